"""The known defects of other tools that merge LoRA adapters: a test each, named after tool and defect.

The tools are not here; what each of them does is in the test's comment. Ours gives float64's answer or refuses.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from judges.oracle import long, ulps_off
from lora_build.files.targets.file_writer import FileWriter
from lora_build.pipeline import prepare, run
from lora_build.proof.manifest import read_manifest
from lora_build.recipe.validate import from_mapping
from makers import hub_server, small
from makers.zoo import quiet

PREFIX = "base_model.model."
Q0, Q1 = (f"{module}.weight" for module in small.MODULES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a base in bf16 and an adapter `math`."""
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def build(folder: Path, *adapters: str, **more: Any) -> dict[str, Tensor]:
    """Build, check what was written, and return its tensors."""
    recipe = small.recipe(folder, *adapters, **more)
    lora_build.build(recipe)
    lora_build.verify(Path(recipe["output"]["dir"]))
    return tensors(Path(recipe["output"]["dir"]))


def refused(folder: Path, *adapters: str, **more: Any) -> str:
    """Return the message with which a build is refused before anything is written."""
    with pytest.raises(lora_build.LoraBuildError) as caught:
        lora_build.build(small.recipe(folder, *adapters, **more))
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists()
    return str(caught.value)


def delta(adapter: Path, module: str, scale: float = 2.0) -> Tensor:
    """Return scale * B @ A of a module in float64."""
    found = tensors(adapter)
    A, B = (found[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return scale * B @ A


def assert_merged(found: Mapping[str, Tensor], base: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold the named tensors to float64 within one rounding, and all others to the bytes of the base."""
    assert set(found) == set(base)
    for name, tensor in found.items():
        assert tensor.dtype == base[name].dtype, name
        if name not in expected:
            assert torch.equal(tensor, base[name]), name
            continue
        limit = 1 if tensor.dtype == torch.float32 else 0.51
        assert ulps_off(tensor, long(expected[name]), base[name], tensor.dtype).max() <= limit, name


def add(folder: Path, **new: Tensor) -> None:
    """Add tensors, `__` for `.`, to the only weight file of a folder."""
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {k.replace("__", "."): t for k, t in new.items()}, file, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's JSON config; None removes one."""
    path = next(p for p in (folder / "adapter_config.json", folder / "config.json") if p.exists())
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def plain_sum(folder: Path, **scales: float) -> dict[str, Tensor]:
    """Return W + sum of scale * B @ A for both layers in float64."""
    base = tensors(folder / "base")
    return {
        f"{m}.weight": base[f"{m}.weight"].double() + sum(delta(folder / name, m, s) for name, s in scales.items())
        for m in small.MODULES
    }


# --- tiny models, for what needs a model's class ------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def qwen3_moe(**more: Any) -> Any:
    sizes = SIZES | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12} | more
    return transformers.Qwen3MoeConfig(**sizes)


def make_model(folder: Path, cls: Any, config: Any, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Save a random model as transformers does and return its folder."""
    generator = torch.Generator().manual_seed(0)
    with quiet():
        model = cls(config)
        for parameter in model.parameters():
            parameter.data = (parameter.ndim == 1) + 0.2 * torch.randn(parameter.shape, generator=generator)
        model.tie_weights()
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def train(cls: Any, base: Path, folder: Path, *, grow: int = 0, **options: Any) -> Any:
    """Adapt a base with peft, save the adapter, and return the unmerged model."""
    generator = torch.Generator().manual_seed(1)
    with quiet():
        model = cls.from_pretrained(base, dtype="auto")
        if grow:
            model.resize_token_embeddings(SIZES["vocab_size"] + grow, mean_resizing=False)
        peft = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | options)))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        peft.save_pretrained(str(folder))
    return peft.eval()


def load(cls: Any, folder: Path) -> Any:
    """Return the model of a folder that holds all of its parameters and nothing else."""
    with quiet():
        model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not [key for keys in info.values() for key in keys], info
    return model.eval()


def drift(model: Any, wanted: Any) -> float:
    """Return the largest difference of two models' logits in units of the largest one."""
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad(), quiet():
        found, right = model(input_ids=ids).logits.double(), wanted(input_ids=ids).logits.double()
    return float((found - right).abs().max() / right.abs().max())


# --- axolotl merge-lora -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["keep", "0.1KB"])
def test_axolotl_a_the_index_says_bytes_and_not_the_number_of_tensors(size: str, tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    found = build(tmp_path, output={"dir": str(tmp_path / "out"), "max_shard_size": size})

    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values()) == 204
    assert set(index["weight_map"]) == set(found)


def test_axolotl_b_lora_bias_is_not_dropped(folder: Path) -> None:
    # "Applied LoRA to 4/29 tensors", exit code 0
    add(folder / "base", **{Q0.replace("weight", "bias"): small.values(4, 8)})
    add(folder / "math", **{f"{PREFIX}{small.MODULES[0]}.lora_B.bias": small.values(5, 8, dtype=torch.float32)})
    configure(folder / "math", lora_bias=True)
    bias = tensors(folder / "base")[Q0.replace("weight", "bias")].double()
    expected = plain_sum(folder, math=2.0) | {
        Q0.replace("weight", "bias"): bias + 2 * small.values(5, 8, dtype=torch.float32).double()
    }

    assert_merged(build(folder), tensors(folder / "base"), expected)


def test_axolotl_c_embedding_lora_is_not_dropped(folder: Path) -> None:
    add(folder / "base", model__embed_tokens__weight=small.values(4, 16, 6))
    A, B = small.values(5, 2, 16, dtype=torch.float32), small.values(6, 6, 2, dtype=torch.float32)
    module = f"{PREFIX}model.embed_tokens"
    add(folder / "math", **{f"{module}.lora_embedding_A": A, f"{module}.lora_embedding_B": B})
    configure(folder / "math", target_modules=["q_proj", "embed_tokens"])
    base = tensors(folder / "base")
    embedding = base["model.embed_tokens.weight"].double() + 2 * (B.double() @ A.double()).T

    assert_merged(build(folder), base, plain_sum(folder, math=2.0) | {"model.embed_tokens.weight": embedding})


def test_axolotl_d_trainable_tokens_are_not_dropped(folder: Path) -> None:
    configure(folder / "base", vocab_size=16, num_hidden_layers=2, num_attention_heads=2)
    add(folder / "base", model__embed_tokens__weight=small.values(4, 16, 6), lm_head__weight=small.values(8, 16, 6))
    rows = small.values(5, 2, 6, dtype=torch.float32)
    add(folder / "math", **{f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows})
    configure(folder / "math", trainable_token_indices=[11, 3])
    base = tensors(folder / "base")
    embedding = base["model.embed_tokens.weight"].double()
    embedding[[11, 3]] = rows.double()  # the rows are new values, not differences

    assert_merged(build(folder), base, plain_sum(folder, math=2.0) | {"model.embed_tokens.weight": embedding})


def test_axolotl_e_a_trained_head_of_a_tied_model_is_not_lost(folder: Path) -> None:
    # lm_head not written, tie_word_embeddings left true
    configure(folder / "base", vocab_size=16, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True)
    add(folder / "base", model__embed_tokens__weight=small.values(4, 16, 6))
    head = small.values(5, 16, 6)
    add(folder / "math", **{f"{PREFIX}lm_head.weight": head})
    configure(folder / "math", modules_to_save=["lm_head"])

    found = build(folder)
    assert torch.equal(found["lm_head.weight"], head)
    assert torch.equal(found["model.embed_tokens.weight"], small.values(4, 16, 6))
    assert json.loads((folder / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_axolotl_f_the_score_of_a_classifier_is_not_lost(tmp_path: Path) -> None:
    cls = transformers.LlamaForSequenceClassification
    base = make_model(tmp_path / "base", cls, transformers.LlamaConfig(**SIZES, num_labels=3))
    model = train(cls, base, tmp_path / "math", target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    found = build(tmp_path)

    assert torch.equal(found["score.weight"], model.base_model.model.score.modules_to_save["default"].weight)
    assert drift(load(cls, tmp_path / "out"), model) < 1e-5


def test_axolotl_f_a_classifier_on_a_causal_base_gets_its_score_or_is_refused(tmp_path: Path) -> None:
    # score.weight lost, lm_head kept: a language model that was never trained
    base = make_model(tmp_path / "base", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    cls = transformers.LlamaForSequenceClassification
    headed = make_model(tmp_path / "headed", cls, transformers.LlamaConfig(**SIZES))
    body = {n: t for n, t in tensors(base).items() if n != "lm_head.weight"}
    save_file(tensors(headed) | body, headed / "model.safetensors", {"format": "pt"})
    model = train(cls, headed, tmp_path / "math", target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)

    try:
        found = build(tmp_path)
    except lora_build.LoraBuildError as error:
        found, refusal = {}, error
    if found:
        assert "lm_head.weight" not in found
        assert drift(load(cls, tmp_path / "out"), model) < 1e-5
    else:
        assert refusal.exit_code == 2
        assert "score" in str(refusal)
        assert not (tmp_path / "out").exists()


def test_axolotl_g_half_of_the_keys_without_a_match_is_refused(folder: Path) -> None:
    # a warning only if not a single key matches
    file = folder / "math/adapter_model.safetensors"
    save_file({k.replace("layers.1.", "blocks.1."): t for k, t in load_file(file).items()}, file)

    message = refused(folder)
    assert "adapts 'model.blocks.1.self_attn.q_proj.weight', which the base does not have" in message
    assert "nearest in the base: model.layers.1.self_attn.q_proj.weight" in message


def test_axolotl_h_nothing_goes_through_a_quantisation_that_the_recipe_does_not_name(folder: Path) -> None:
    # adapter: qlora sends every matrix through NF4, embeddings and untouched layers too
    add(folder / "base", model__embed_tokens__weight=small.values(4, 16, 6), lm_head__weight=small.values(5, 16, 6))
    small.edit(folder / "math", **{f"{PREFIX}{small.MODULES[1]}.lora_{x}.weight": None for x in "AB"})

    assert_merged(build(folder), tensors(folder / "base"), {Q0: plain_sum_of_first(folder)})


def plain_sum_of_first(folder: Path) -> Tensor:
    return tensors(folder / "base")[Q0].double() + delta(folder / "math", small.MODULES[0])


def test_axolotl_i_an_adapter_of_the_attention_leaves_the_layout_of_the_experts_alone(tmp_path: Path) -> None:
    # 45 keys became 25: the experts were written as transformers fuses them in memory
    base = make_model(tmp_path / "base", transformers.Qwen3MoeForCausalLM, qwen3_moe(), dtype=torch.bfloat16)
    train(transformers.Qwen3MoeForCausalLM, base, tmp_path / "math", target_modules=["q_proj"])
    expected = {
        n: t.double() + delta(tmp_path / "math", n.removesuffix(".weight"))
        for n, t in tensors(base).items()
        if "q_proj" in n
    }
    assert sum(".experts." in name for name in tensors(base)) == 18

    assert_merged(build(tmp_path), tensors(base), expected)


def experts_by_name(folder: Path, base: Path) -> dict[str, Tensor]:
    """Write an adapter of every expert as transformers 4 names them, and return what must come out in float64."""
    modules = [n.removesuffix(".weight") for n in tensors(base) if ".experts." in n]
    factors = {}
    for i, module in enumerate(modules):
        rows, columns = tensors(base)[f"{module}.weight"].shape
        factors[f"{PREFIX}{module}.lora_A.weight"] = small.values(40 + i, 2, columns, dtype=torch.float32)
        factors[f"{PREFIX}{module}.lora_B.weight"] = small.values(80 + i, rows, 2, dtype=torch.float32)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    targets = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG | targets))
    return {f"{m}.weight": tensors(base)[f"{m}.weight"].double() + delta(folder, m) for m in modules}


def test_axolotl_j_updates_of_experts_are_not_dropped(tmp_path: Path) -> None:
    # "MERGE INCOMPLETE ... EXPERT LoRA is being DROPPED", exit code 0
    base = make_model(tmp_path / "base", transformers.Qwen3MoeForCausalLM, qwen3_moe(), dtype=torch.bfloat16)
    expected = experts_by_name(tmp_path / "math", base)

    assert_merged(build(tmp_path), tensors(base), expected)


def test_axolotl_j_updates_of_a_stack_of_experts_reach_a_file_that_has_them_one_by_one(tmp_path: Path) -> None:
    cls = transformers.Qwen3MoeForCausalLM
    base = make_model(tmp_path / "base", cls, qwen3_moe())
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = train(cls, base, tmp_path / "math", target_modules=["q_proj"], target_parameters=stacks)

    assert set(build(tmp_path)) == set(tensors(base))
    assert drift(load(cls, tmp_path / "out"), model) < 1e-5


def straddled(folder: Path) -> Path:
    """Return a base whose experts of one layer lie in two shards."""
    base = make_model(folder, transformers.Qwen3MoeForCausalLM, qwen3_moe(), shard="5KB")
    placed = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(len({file for n, file in placed.items() if f"layers.{i}.mlp.experts" in n}) > 1 for i in (0, 1))
    return base


def test_axolotl_k_experts_of_one_layer_in_two_shards_are_all_merged(tmp_path: Path) -> None:
    base = straddled(tmp_path / "base")
    expected = experts_by_name(tmp_path / "math", base)

    assert_merged(build(tmp_path), tensors(base), expected)


def test_axolotl_k_a_stack_of_experts_reaches_two_shards(tmp_path: Path) -> None:
    cls, base = transformers.Qwen3MoeForCausalLM, straddled(tmp_path / "base")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = train(cls, base, tmp_path / "math", target_modules=[], target_parameters=stacks)
    build(tmp_path)

    assert drift(load(cls, tmp_path / "out"), model) < 1e-5


def test_axolotl_l_dora_is_rounded_once_and_not_by_way_of_a_difference(folder: Path) -> None:
    # bf16(merged) - bf16(base), added to the base: a fifth of the values is another
    magnitude = 1 + small.values(5, 8, dtype=torch.float32) / 4
    for module in small.MODULES:
        add(folder / "math", **{f"{PREFIX}{module}.lora_magnitude_vector": magnitude})
    configure(folder / "math", use_dora=True)
    expected = {
        name: (magnitude.double() / total.norm(dim=1))[:, None] * total
        for name, total in plain_sum(folder, math=2.0).items()
    }

    assert_merged(build(folder), tensors(folder / "base"), expected)


def test_axolotl_m_other_formats_of_the_unmerged_model_are_not_copied(folder: Path) -> None:
    # vLLM looks for consolidated*.safetensors and params.json first, and would serve the base
    foreign = ["consolidated.safetensors", "consolidated.00.pth", "params.json", "tf_model.h5", "flax_model.msgpack",
               "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "README.md"]  # fmt: skip
    for name in foreign:
        (folder / "base" / name).write_bytes(b"the base's")
    build(folder)

    assert not [name for name in foreign if (folder / "out" / name).exists()]
    assert set(foreign) <= set(prepare(from_mapping(small.recipe(folder))).merge_plan.left_out["base"])


def tokenizer(num_tokens: int) -> str:
    """Return a tokenizer.json of words w0, w1, ..."""
    words = {f"w{i}": i for i in range(num_tokens)}
    return json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}})


def test_axolotl_n_a_grown_vocabulary_comes_with_its_tokenizer(tmp_path: Path) -> None:
    cls, rows = transformers.LlamaForCausalLM, SIZES["vocab_size"]
    base = make_model(tmp_path / "base", cls, transformers.LlamaConfig(**SIZES))
    train(cls, base, tmp_path / "math", target_modules=["q_proj"], grow=8)
    (base / "tokenizer.json").write_text(tokenizer(rows))
    (tmp_path / "math/tokenizer.json").write_text(tokenizer(rows + 8))
    build(tmp_path)

    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows + 8
    assert (tmp_path / "out/tokenizer.json").read_text() == tokenizer(rows + 8)


def test_axolotl_n_an_unchanged_vocabulary_keeps_the_tokenizer_of_the_base(folder: Path) -> None:
    (folder / "base/tokenizer.json").write_text(tokenizer(16))
    (folder / "math/tokenizer.json").write_text(tokenizer(17))
    build(folder)

    assert (folder / "out/tokenizer.json").read_text() == tokenizer(16)


def on_a_hub(folder: Path, hub: hub_server.Hub, **recipe: Any) -> subprocess.CompletedProcess[str]:
    """Build in another process (the client reads its settings once), with a Hub on loopback."""
    code = "import json, sys, lora_build; lora_build.build(json.loads(sys.argv[1]))"
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    values = {"output": {"dir": str(folder / "out")}} | recipe
    return subprocess.run([sys.executable, "-c", code, json.dumps(values)], env=env, capture_output=True, text=True)


def test_axolotl_o_the_revision_of_the_base_is_honoured(folder: Path) -> None:
    # training honours revision_of_model, merging takes the main branch
    with hub_server.serve({"acme/base": folder / "base"}) as hub:
        base = {"source": "acme/base", "revision": "v1-that-is-gone"}
        done = on_a_hub(folder, hub, base=base, adapters={"math": str(folder / "math")})

    assert done.returncode != 0
    assert "base: acme/base has no revision 'v1-that-is-gone'" in done.stderr
    assert not (folder / "out").exists()


def test_axolotl_p_square_experts_are_not_read_by_their_shape(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **SIZES | {"intermediate_size": 16, "head_dim": 8}, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    cls = transformers.GptOssForCausalLM
    base = make_model(tmp_path / "base", cls, config)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = train(cls, base, tmp_path / "math", target_modules=[], target_parameters=stacks)
    assert tensors(base)["model.layers.0.mlp.experts.down_proj"].shape == (3, 16, 16)
    build(tmp_path)

    assert drift(load(cls, tmp_path / "out"), model) < 1e-5


# --- mergekit -----------------------------------------------------------------------------------------------


def test_mergekit_stale_cache_an_adapter_retrained_at_the_same_path_is_merged_anew(folder: Path) -> None:
    # the cache's key is a checksum of the path
    file = folder / "math/adapter_model.safetensors"
    before, first = file.stat(), build(folder)
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t or a tar leaves it
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    second = build(folder)
    assert not torch.equal(first[Q0], second[Q0])
    assert_merged(second, tensors(folder / "base"), plain_sum(folder, math=2.0))


def test_mergekit_stale_cache_another_dtype_is_another_build(folder: Path) -> None:
    assert {t.dtype for t in build(folder).values()} == {torch.bfloat16}
    assert {t.dtype for t in build(folder, dtype="float32").values()} == {torch.float32}


def test_mergekit_poisoned_cache_a_build_that_ran_out_of_memory_spoils_no_later_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the empty folder of the failed merge was taken for a merge
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(FileWriter, "close", no_memory)
        with pytest.raises(MemoryError):
            build(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["base", "math"]

    assert_merged(build(folder), tensors(folder / "base"), plain_sum(folder, math=2.0))


def test_mergekit_hash_seed_the_same_recipe_gives_the_same_files_under_every_hash_seed(folder: Path) -> None:
    # the donor of config and tokenizer was the first of a set
    for i in range(3):
        adapter = small.make_adapter(folder / f"adapter{i}", seed=50 + 10 * i)
        (adapter / "tokenizer.json").write_text(tokenizer(20 + i))
    names = ("adapter0", "adapter1", "adapter2")
    build(folder, *names)  # with the seed of this process
    code = "import json, sys, lora_build; lora_build.build(json.loads(sys.argv[1]))"
    recipe = json.dumps(small.recipe(folder, *names, output={"dir": str(folder / "again")}))
    seeded = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run([sys.executable, "-c", code, recipe], env=seeded, check=True)

    for path in (folder / "out").iterdir():
        if path.name != "lora-build.provenance.json":  # the one that says when
            assert path.read_bytes() == (folder / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("typo", [{"dtyp": "float32"}, {"outdtype": "float32"}, {"paramaters": {"weight": 0.5}}])
def test_mergekit_typos_in_a_recipe_are_not_ignored(typo: dict[str, Any], folder: Path) -> None:
    (key,) = typo

    assert f"{key}: unknown key" in refused(folder, **typo)


def test_mergekit_typos_in_the_weight_of_an_adapter_are_not_ignored(folder: Path) -> None:
    adapters = {"math": {"source": str(folder / "math"), "wieght": 0.5}}

    assert "did you mean 'weight'" in refused(folder, adapters=adapters)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "merges.txt", "vocab.json", "additional_chat_templates/rag.jinja"]
)
def test_mergekit_a_chat_template_in_jinja_is_not_lost(name: str, folder: Path) -> None:
    (folder / "base" / name).parent.mkdir(exist_ok=True)
    (folder / "base" / name).write_text("{{ messages }}")
    build(folder)

    assert (folder / "out" / name).read_text() == "{{ messages }}"


def test_mergekit_an_exception_never_finalises_a_checkpoint(tmp_path: Path) -> None:
    # the writer's __exit__ wrote index and config whatever had happened
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")

    def fail(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(prepare(from_mapping(small.recipe(tmp_path))), progress=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "math"]


# --- mlrecipe, ms-swift, litgpt, unsloth --------------------------------------------------------------------


def test_mlrecipe_a_shard_without_the_layer_does_not_get_another_layers_update(tmp_path: Path) -> None:
    # targets were matched shard by shard, by their ends: layer 5 got the factors of layer 9
    base, math = small.make_base(tmp_path / "base", shards=True), small.make_adapter(tmp_path / "math")
    small.edit(math, **{f"{PREFIX}{small.MODULES[0]}.lora_{x}.weight": None for x in "AB"})

    assert_merged(build(tmp_path), tensors(base), {Q1: plain_sum_of(tmp_path, small.MODULES[1])})


def plain_sum_of(folder: Path, module: str) -> Tensor:
    return tensors(folder / "base")[f"{module}.weight"].double() + delta(folder / "math", module)


def test_ms_swift_a_second_adapter_does_not_replace_the_first(folder: Path) -> None:
    # --adapters A B loads both under the name "default": the merge is B alone
    small.make_adapter(folder / "code", seed=70)

    assert_merged(build(folder, "math", "code"), tensors(folder / "base"), plain_sum(folder, math=2.0, code=2.0))


@pytest.mark.parametrize("tool", ["ms_swift", "litgpt"])
def test_ms_swift_and_litgpt_an_output_that_exists_is_not_taken_for_an_up_to_date_one(tool: str, folder: Path) -> None:
    # "already exists, skipping", exit code 0
    build(folder)
    if tool == "ms_swift":
        weighted = {"math": {"source": str(folder / "math"), "weight": 0.25}}
        expected, found = plain_sum(folder, math=0.5), build(folder, adapters=weighted)
    else:
        small.edit(folder / "base", model__norm__weight=small.values(33, 6))
        expected, found = plain_sum(folder, math=2.0), build(folder)

    assert_merged(found, tensors(folder / "base"), expected)


@pytest.mark.parametrize("exist", ["reuse", "overwrite"])
def test_unsloth_a_second_run_does_not_merge_twice(exist: str, folder: Path) -> None:
    # shards that are there are kept, and merged into again
    output = {"dir": str(folder / "out"), "if_exists": exist}
    for _ in range(2):
        found = build(folder, output=output)

    assert_merged(found, tensors(folder / "base"), plain_sum(folder, math=2.0))


def test_unsloth_a_run_after_a_crash_does_not_merge_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    crash_after_the_first_shard(tmp_path, monkeypatch)

    assert_merged(build(tmp_path), tensors(tmp_path / "base"), plain_sum(tmp_path, math=2.0))


def crash_after_the_first_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a build that stops when one shard has been written, and leave there what a killed process leaves."""
    close, inputs = FileWriter.close, set(folder.iterdir())

    def crash(self: Any) -> Any:
        record = close(self)
        if not record.path.endswith(".safetensors"):
            return record
        (folder / "left").mkdir()
        for path in set(folder.iterdir()) - inputs - {folder / "left"}:
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / "left" / path.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileWriter, "close", crash)
        with pytest.raises(KeyboardInterrupt):
            lora_build.build(small.recipe(folder))
    assert list((folder / "left").rglob("model-*.safetensors"))
    for path in (folder / "left").iterdir():
        path.rename(folder / path.name)
    (folder / "left").rmdir()
    assert not (folder / "out").exists()


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_unsloth_minus_infinity_does_not_pass_the_finite_check(value: float, folder: Path) -> None:
    # isfinite(amax(W)) never sees -inf
    bad = small.values(1, 8, 2, dtype=torch.float32)
    bad[3] = value
    small.edit(folder / "math", lora_B__weight=bad)

    with pytest.raises(lora_build.MergeError, match=r"q_proj.weight\[3, 0\] is not finite"):
        build(folder)


def test_unsloth_minus_infinity_of_a_cast_to_fp16_does_not_pass_either(folder: Path) -> None:
    small.edit(folder / "base", model__norm__weight=torch.full((6,), -1e30, dtype=torch.bfloat16))

    with pytest.raises(lora_build.MergeError, match=r"model.norm.weight\[0\] does not fit F16"):
        build(folder, dtype="float16")


@pytest.mark.parametrize("alpha", [None, 0, "two", float("nan")])
def test_unsloth_a_scaling_that_cannot_be_resolved_is_not_zero(alpha: Any, folder: Path) -> None:
    # an unresolved scaling returns 0.0: a merge that changes nothing
    configure(folder / "math", lora_alpha=alpha)

    with pytest.raises(lora_build.LoraBuildError, match=r"lora_alpha|would equal the base"):
        build(folder)
    assert not (folder / "out").exists()


# --- llama.cpp, LLaMA-Factory, torchtune, Megatron-Bridge ---------------------------------------------------


def test_llama_cpp_rslora_is_not_ignored(folder: Path) -> None:
    # the converter writes alpha, the export divides by the rank
    configure(folder / "math", use_rslora=True)

    assert_merged(build(folder), tensors(folder / "base"), plain_sum(folder, math=4 / 2**0.5))


@pytest.mark.parametrize(
    "pattern", ["layers.1.self_attn.q_proj", r".*\.1\..*", r"model\.layers\.[1-9]\.self_attn\.q_proj"]
)
def test_llama_cpp_alpha_pattern_is_not_ignored(pattern: str, folder: Path) -> None:
    configure(folder / "math", alpha_pattern={pattern: 16})
    second = tensors(folder / "base")[Q1].double() + delta(folder / "math", small.MODULES[1], 8.0)

    assert_merged(build(folder), tensors(folder / "base"), plain_sum(folder, math=2.0) | {Q1: second})


def test_llama_cpp_factors_that_are_not_in_the_base_are_refused(folder: Path) -> None:
    # the export walks over the base's tensors, and prints how many it merged
    add(folder / "math", **{f"{PREFIX}model.layers.7.mlp.up_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})
    configure(folder / "math", target_modules=["q_proj", "up_proj"])

    assert "adapts 'model.layers.7.mlp.up_proj.weight', which the base does not have" in refused(folder)


def test_llama_factory_the_revision_of_the_base_is_not_used_for_the_adapter(folder: Path) -> None:
    # one revision for both: base and adapter cannot be pinned separately
    with hub_server.serve({"acme/base": folder / "base", "acme/math": folder / "math"}) as hub:
        pins = {name: hub.commit(f"acme/{name}") for name in ("base", "math")}
        base, math = ({"source": f"acme/{name}", "revision": pin} for name, pin in pins.items())
        done = on_a_hub(folder, hub, base=base, adapters={"math": math})

    assert pins["base"] != pins["math"]
    assert done.returncode == 0, done.stderr
    provenance = (folder / "out/lora-build.provenance.json").read_text()
    assert all(f"hf://acme/{name}@{pin}/" in provenance for name, pin in pins.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llama_factory_the_machine_does_not_choose_the_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # infer_dtype: auto asks the GPU for bf16, then for fp16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    base = small.make_base(tmp_path / "base", dtype=dtype)
    small.make_adapter(tmp_path / "math")

    assert_merged(build(tmp_path), tensors(base), plain_sum(tmp_path, math=2.0))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).rpartition(".")[2]


@pytest.mark.parametrize("lora", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_torchtune_and_litgpt_the_output_does_not_take_the_dtype_of_the_adapter(
    base: torch.dtype, lora: torch.dtype, tmp_path: Path
) -> None:
    small.make_base(tmp_path / "base", dtype=base)
    file = small.make_adapter(tmp_path / "math") / "adapter_model.safetensors"
    save_file({name: t.to(lora) for name, t in load_file(file).items()}, file)

    assert_merged(build(tmp_path), tensors(tmp_path / "base"), plain_sum(tmp_path, math=2.0))


CONFIGS: dict[str, Callable[[Path], object]] = {
    "missing": lambda config: config.unlink(),
    "cut short": lambda config: config.write_text(config.read_text()[:20]),
    "without rank": lambda config: configure(config.parent, r=None),
    "without alpha": lambda config: configure(config.parent, lora_alpha=None),
    "without type": lambda config: configure(config.parent, peft_type=None),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_megatron_bridge_a_config_that_cannot_be_read_is_not_replaced_by_defaults(damage: str, folder: Path) -> None:
    # "Using defaults" for rank and alpha
    CONFIGS[damage](folder / "math/adapter_config.json")

    assert "adapters.math" in refused(folder)


# --- tinker-cookbook, kohya, verl ---------------------------------------------------------------------------


def test_tinker_a_resumed_build_does_not_mix_two_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the state of an interrupted build does not say of which adapter it is
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    crash_after_the_first_shard(tmp_path, monkeypatch)
    for module in small.MODULES:
        small.edit(tmp_path / "math", **{f"{PREFIX}{module}.lora_B.weight": small.values(9, 8, 2, dtype=torch.float32)})

    assert_merged(build(tmp_path), tensors(tmp_path / "base"), plain_sum(tmp_path, math=2.0))


@pytest.mark.parametrize("safe_merge", [True, False])
def test_tinker_a_nan_is_refused_unless_the_recipe_waives_it(safe_merge: bool, folder: Path) -> None:
    small.edit(folder / "math", lora_A__weight=torch.full((2, 6), float("nan")))

    if safe_merge:
        with pytest.raises(lora_build.MergeError, match="is not finite"):
            build(folder)
    else:
        assert build(folder, safe_merge=False)[Q0].isnan().all()


def test_tinker_every_shard_says_format_pt(tmp_path: Path) -> None:
    # transformers refused files without it
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    build(tmp_path)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))

    assert len(shards) == 2
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_kohya_keys_without_a_match_are_not_a_line_in_a_log(folder: Path) -> None:
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    add(folder / "math", **{key: torch.ones(2, 6)})

    assert key in refused(folder)


@pytest.mark.parametrize("how", ["weight 0", "factors of 0", "factors below rounding", "no factors"])
def test_verl_a_merge_that_equals_its_base_is_refused(how: str, folder: Path) -> None:
    # the "merged" folder has the bytes of the base, and nobody says so
    adapters: dict[str, Any] = {"math": {"source": str(folder / "math")}}
    match how:
        case "weight 0":
            adapters["math"]["weight"] = 0
        case "no factors":
            save_file({}, folder / "math/adapter_model.safetensors")
        case _:
            factor = 0.0 if how == "factors of 0" else 1e-9
            file = folder / "math/adapter_model.safetensors"
            save_file({k: t * factor if "lora_B" in k else t for k, t in load_file(file).items()}, file)

    why = "holds no tensors" if how == "no factors" else "the output would equal the base"
    with pytest.raises(lora_build.LoraBuildError, match=why):
        build(folder, adapters=adapters)
    assert not (folder / "out").exists()


def test_verl_what_is_in_the_output_is_what_its_manifest_says(folder: Path) -> None:
    build(folder)
    (folder / "out/model.safetensors").write_bytes((folder / "base/model.safetensors").read_bytes())

    assert read_manifest(folder / "out").weights_digest
    with pytest.raises(lora_build.VerificationError):
        lora_build.verify(folder / "out")
