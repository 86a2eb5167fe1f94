"""Every known defect of peft 0.21 that a merge can meet: peft gets it wrong here, and ours is right or refuses.

A test is named after the issue or pull request of huggingface/peft (or of the project it names). It first shows what
peft does, then holds our build to the unmerged model, or to float64 written out in the test.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from judges.oracle import long, ulps_off
from lora_build.pipeline import prepare
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.zoo import quiet

PREFIX = "base_model.model."
VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = SIZES | {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
GROUPS: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1}
MLP = ["gate_proj", "up_proj", "down_proj"]

NOISE = (
    (r"Found missing adapter keys", UserWarning),  # what peft says where it merges nothing
    # of every mixture whose names it converts, and of a config without the rest of its init's settings
    (r"The following (rank|alpha)_pattern keys did not match any targeted module", RuntimeWarning),
    (r"`init_lora_weights` is '\w+' but `\w+_config` is not specified", UserWarning),
)


@contextmanager
def hushed() -> Iterator[None]:
    """Silence what peft and transformers say of these very defects."""
    with quiet():
        for message, category in NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield


# --- models, adapters, answers ------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_base(folder: Path, cls: Any, config: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model as transformers does and return its folder."""
    with hushed():
        model = cls(config)
        for i, (_, parameter) in enumerate(model.named_parameters()):
            mean = 1.0 if parameter.ndim == 1 else 0.0
            parameter.data = mean + 0.2 * noise(i, *parameter.shape)
        model.tie_weights()
        model.to(dtype).save_pretrained(folder)
    return folder


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    settings = SIZES | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | config
    return make_base(folder, Llama, transformers.LlamaConfig(**settings), dtype=dtype)


Llama = transformers.LlamaForCausalLM


def load(cls: Any, folder: Path, dtype: Any = "auto") -> Any:
    """Return the model of a folder that holds all of its parameters and nothing else."""
    with hushed():
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not [key for keys in info.values() for key in keys], info
    return model.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """An adapter that peft saved, and the model it was trained in."""

    folder: Path
    model: Any

    @property
    def answer(self) -> Tensor:
        return answer(self.model)


def train(cls: Any, base: Path, folder: Path, *, seed: int = 1, grow: int = 0, **options: Any) -> Trained:
    """Adapt a base with peft, to weights that no initialisation gives, and save the adapter."""
    with hushed():
        model = cls.from_pretrained(base, dtype="auto")
        if grow:
            model.resize_token_embeddings(VOCAB + grow, mean_resizing=False)
        peft = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | options)))
        for i, (_, parameter) in enumerate(peft.named_parameters()):
            if parameter.requires_grad:  # in place: tied factors stay tied
                parameter.data += 0.3 * noise(100 * seed + i, *parameter.shape).to(parameter.dtype)
        peft.save_pretrained(str(folder))
    return Trained(folder=folder, model=peft.eval())


def unmerged(
    cls: Any, base: Path, *adapters: Path, dtype: Any = "auto", active: bool = True, **load_options: Any
) -> Any:
    """Return the base with adapters named after their folders, in evaluation mode; all of them active, or the first."""
    model = load(cls, base, dtype)
    with hushed():
        peft = PeftModel.from_pretrained(model, adapters[0], adapter_name=adapters[0].name, **load_options)
        for folder in adapters[1:]:
            peft.load_adapter(folder, adapter_name=folder.name, **load_options)
        if active and len(adapters) > 1:
            peft.base_model.set_adapter([folder.name for folder in adapters])
    return peft.eval()


def merged(peft: Any, **options: Any) -> Any:
    with hushed():
        return peft.merge_and_unload(**options).eval()


def answer(model: Any) -> Tensor:
    """Return the logits, or the last states, for fixed inputs, tokens or images."""
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad(), hushed():
        if model.main_input_name == "input_ids":
            found = model(input_ids=ids)
        else:
            found = model(pixel_values=noise(6, 2, 3, 8, 8))
    result: Tensor = found.logits if "logits" in found else found.pooler_output
    return result


def drift(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference in units of the largest answer."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


RIGHT, WRONG = 1e-5, 1e-3


# --- our builds ---------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, base: Path, *adapters: Path, **more: Any) -> dict[str, Any]:
    named = {folder.name: str(folder) for folder in adapters}
    return {"base": str(base), "adapters": named, "output": {"dir": str(tmp_path / "out")}} | more


def build(tmp_path: Path, base: Path, *adapters: Path, **more: Any) -> Path:
    """Build, check what was written, and return the folder."""
    lora_build.build(recipe(tmp_path, base, *adapters, **more))
    lora_build.verify(tmp_path / "out")
    return tmp_path / "out"


def refused(tmp_path: Path, base: Path, *adapters: Path, **more: Any) -> str:
    """Return the message with which a build is refused before anything is written."""
    with pytest.raises(lora_build.LoraBuildError) as caught:
        lora_build.build(recipe(tmp_path, base, *adapters, **more))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def outcome(tmp_path: Path, base: Path, *adapters: Path, **more: Any) -> Path | str:
    """Return the folder of a build, or the message with which it was refused: where both are honest."""
    try:
        return build(tmp_path, base, *adapters, **more)
    except lora_build.LoraBuildError as error:
        refusal = error
    assert refusal.exit_code == 2
    assert not (tmp_path / "out").exists()
    return str(refusal)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def ulps(found: Tensor, exact: Tensor, base: Tensor) -> float:
    """Return the largest error in ulps of the dtype found; a single rounding makes at most 0.5 and a hair."""
    return float(ulps_off(found, long(exact), base, found.dtype).max())


ONE_ROUNDING = 0.51


def edit(folder: Path, *, keys: Callable[[str], str | None] = str, extra: Mapping[str, Tensor] | None = None,
         **config: Any) -> Path:  # fmt: skip
    """Rename the tensors of a copy of an adapter (None drops one), add some, change its config; return the copy."""
    copy = folder.with_name(f"{folder.name}_edited")
    shutil.copytree(folder, copy)
    old = load_file(copy / "adapter_model.safetensors")
    new = {to: t for key, t in old.items() if (to := keys(key)) is not None} | dict(extra or {})
    save_file({key: t.contiguous().clone() for key, t in new.items()}, copy / "adapter_model.safetensors")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def write_adapter(folder: Path, modules: Mapping[str, tuple[int, int]], **config: Any) -> Path:
    """Write an adapter of rank 2 and scaling 2 by hand, for modules of [out, in], as an older peft named them."""
    folder.mkdir(parents=True)
    factors = {}
    for i, (module, (rows, columns)) in enumerate(sorted(modules.items())):
        factors[f"{PREFIX}{module}.lora_A.weight"] = noise(300 + i, 2, columns)
        factors[f"{PREFIX}{module}.lora_B.weight"] = noise(600 + i, rows, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": leaves,
                "bias": "none", "base_model_name_or_path": "base"} | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def delta(adapter: Path, module: str, scale: float = 2.0) -> Tensor:
    """Return scale * B @ A of a module in float64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return scale * B.flatten(1) @ A.flatten(1)


def assert_merged(out: Path, base: Path, expected: Mapping[str, Tensor]) -> None:
    """Hold the named tensors to their float64 values, and all others to the bytes of the base."""
    ours, theirs = tensors(out), tensors(base)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if name in expected:
            assert ulps(tensor, expected[name], theirs[name]) <= (1 if tensor.dtype == torch.float32 else 0.51), name
        else:
            assert torch.equal(tensor, theirs[name]), name


# --- factors that peft loses --------------------------------------------------------------------------------

MIXTURES: dict[str, tuple[Any, Callable[[], Any], str]] = {
    # what peft 0.21 loses there: the routed experts, or the dense layer and the shared expert
    "qwen2_moe": (
        transformers.Qwen2MoeForCausalLM,
        lambda: transformers.Qwen2MoeConfig(**EXPERTS, num_experts=3, shared_expert_intermediate_size=20),
        r"\.experts\.",
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        lambda: transformers.Qwen3MoeConfig(**EXPERTS, num_experts=3, mlp_only_layers=[0], head_dim=8),
        r"layers\.0\.mlp",
    ),
    "deepseek_v3": (
        transformers.DeepseekV3ForCausalLM,
        lambda: transformers.DeepseekV3Config(
            **EXPERTS | GROUPS, n_group=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        r"layers\.0\.mlp|shared_experts",
    ),
    "glm4_moe": (
        transformers.Glm4MoeForCausalLM,
        lambda: transformers.Glm4MoeConfig(**EXPERTS | GROUPS, n_group=1, head_dim=8),
        r"layers\.0\.mlp|shared_experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_peft_3711_shared_dense_and_routed_experts_are_not_lost(family: str, tmp_path: Path) -> None:
    cls, config, lost = MIXTURES[family]
    base = make_base(tmp_path / "base", cls, config())
    before = tensors(base)
    modules = {
        n.removesuffix(".weight"): tuple(t.shape)
        for n, t in before.items()
        if n.endswith("_proj.weight") and ".mlp." in n
    }
    math = write_adapter(tmp_path / "math", modules)

    # peft converts the names of transformers 4 to the fused ones of 5, and says nothing of those it loses
    merged(unmerged(cls, base, math)).save_pretrained(tmp_path / "peft")
    theirs = tensors(tmp_path / "peft")
    unchanged = [name for name in modules if torch.equal(theirs[f"{name}.weight"], before[f"{name}.weight"])]
    assert unchanged
    assert all(re.search(lost, name) for name in unchanged)

    out = build(tmp_path, base, math)
    assert_merged(out, base, {f"{m}.weight": before[f"{m}.weight"].double() + delta(math, m) for m in modules})


def nemotron(folder: Path) -> Path:
    """Save a mixture whose experts have no gate: up_proj and down_proj alone."""
    config = transformers.NemotronHConfig(
        **SIZES | {"num_hidden_layers": 2}, layers_block_type=["moe", "attention"], head_dim=8, n_routed_experts=4,
        n_shared_experts=1, moe_intermediate_size=12, moe_shared_expert_intermediate_size=12, num_experts_per_tok=2,
    )  # fmt: skip
    return make_base(folder, transformers.NemotronHForCausalLM, config)


def test_nemo_1755_3284_3439_experts_without_a_gate_are_merged_by_the_names_of_their_files(tmp_path: Path) -> None:
    base = nemotron(tmp_path / "base")
    before = tensors(base)
    modules = {n.removesuffix(".weight"): tuple(t.shape) for n, t in before.items() if "_proj.weight" in n}
    assert sum(".experts." in module for module in modules) == 8
    math = write_adapter(tmp_path / "math", modules)

    out = build(tmp_path, base, math)

    assert_merged(out, base, {f"{m}.weight": before[f"{m}.weight"].double() + delta(math, m) for m in modules})


def test_nemo_1755_3284_3439_experts_without_a_gate_are_merged_by_their_names_in_memory(tmp_path: Path) -> None:
    base = nemotron(tmp_path / "base")
    cls = transformers.NemotronHForCausalLM
    parameters = ["experts.up_proj", "experts.down_proj"]
    math = train(cls, base, tmp_path / "math", target_modules=["q_proj"], target_parameters=parameters)

    assert drift(answer(load(cls, base)), math.answer) > WRONG
    assert drift(answer(load(cls, build(tmp_path, base, math.folder))), math.answer) < RIGHT


def test_peft_drops_embed_out_of_gpt_neox(tmp_path: Path) -> None:
    cls = transformers.GPTNeoXForCausalLM
    config = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    base = make_base(tmp_path / "base", cls, transformers.GPTNeoXConfig(**config, tie_word_embeddings=False))
    math = write_adapter(tmp_path / "math", {"embed_out": (VOCAB, 16), "gpt_neox.layers.0.mlp.dense_h_to_4h": (24, 16)})
    head = tensors(base)["embed_out.weight"]

    # in memory the head is called lm_head since transformers 5: peft drops what the file calls embed_out
    assert torch.equal(merged(unmerged(cls, base, math)).get_output_embeddings().weight, head)

    module = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    expected = {f"{m}.weight": tensors(base)[f"{m}.weight"].double() + delta(math, m) for m in ("embed_out", module)}
    assert_merged(build(tmp_path, base, math), base, expected)


def vit(tmp_path: Path) -> tuple[Any, Path]:
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification, make_base(
        tmp_path / "base", transformers.ViTForImageClassification, config
    )


def test_peft_cannot_load_a_vit_adapter_of_transformers_4(tmp_path: Path) -> None:
    cls, base = vit(tmp_path)
    modules = [f"vit.encoder.layer.0.attention.attention.{leaf}" for leaf in ("query", "value")]
    math = write_adapter(tmp_path / "math", dict.fromkeys(modules, (16, 16)), task_type=None)

    # the modules are called q_proj and v_proj since transformers 5; the files still say query and value
    with pytest.raises(ValueError, match="Target modules"):
        unmerged(cls, base, math)

    expected = {f"{m}.weight": tensors(base)[f"{m}.weight"].double() + delta(math, m) for m in modules}
    assert_merged(build(tmp_path, base, math), base, expected)


def test_peft_3711_a_vit_adapter_of_transformers_5_finds_the_names_of_the_file(tmp_path: Path) -> None:
    cls, base = vit(tmp_path)
    math = train(cls, base, tmp_path / "math", target_modules=["q_proj", "v_proj"])

    assert drift(math.answer, answer(load(cls, base))) > WRONG
    assert drift(answer(load(cls, build(tmp_path, base, math.folder))), math.answer) < RIGHT


FOREIGN_KEYS: dict[str, Callable[[str], str]] = {
    "without the prefix": lambda key: key.removeprefix(PREFIX),
    "of torch.compile": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "of a wrapper": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "with the adapter's name": lambda key: key.replace("lora_A.", "lora_A.math.").replace("lora_B.", "lora_B.math."),
    "of an adapter that is called lora": lambda key: key.replace(".lora_", "_"),
    "of the bare model": lambda key: key.replace("model.model.", "model."),
    "of a larger model": lambda key: key.replace("model.model.", "model.language_model.model."),
}


@pytest.mark.parametrize("foreign", FOREIGN_KEYS)
def test_peft_1379_1579_1932_2084_keys_that_peft_does_not_find_are_merged_or_refused(
    foreign: str, tmp_path: Path
) -> None:
    base = llama(tmp_path / "base")
    trained = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    math = edit(trained.folder, keys=FOREIGN_KEYS[foreign])

    # peft warns of missing keys and merges nothing: merged == base
    assert torch.equal(answer(merged(unmerged(Llama, base, math))), answer(load(Llama, base)))

    match outcome(tmp_path, base, math):
        case Path() as out:
            assert drift(answer(load(Llama, out)), trained.answer) < RIGHT
        case message:
            assert "q_proj" in message


def test_peft_merges_nothing_where_a_lora_b_is_missing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    half = edit(math.folder, keys=lambda key: None if "layers.1" in key and "lora_B" in key else key)

    # peft keeps the zeros that it begins with, and so layer 1 as it is in the base
    theirs = merged(unmerged(Llama, base, half)).model.layers[1].self_attn.q_proj.weight
    assert torch.equal(theirs, tensors(base)["model.layers.1.self_attn.q_proj.weight"])

    assert "the adapter's file is incomplete" in refused(tmp_path, base, half)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.lora_C.weight", "model.layers.0.nowhere.weight"])
def test_peft_ignores_unknown_extra_keys(key: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    more = edit(math.folder, extra={PREFIX + key: torch.ones(16)})

    with warnings.catch_warnings(), quiet():  # no warning but those of the versions
        PeftModel.from_pretrained(load(Llama, base), more)

    assert key in refused(tmp_path, base, more)


def test_peft_ignores_factors_outside_of_target_modules(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    both = train(Llama, base, tmp_path / "math", target_modules=["q_proj", "k_proj"])
    math = edit(both.folder, target_modules=["q_proj"])

    theirs = merged(unmerged(Llama, base, math)).model.layers[0].self_attn.k_proj.weight
    assert torch.equal(theirs, tensors(base)["model.layers.0.self_attn.k_proj.weight"])

    match outcome(tmp_path, base, math):  # every tensor of the file counts, or the build stops
        case Path() as out:
            assert drift(answer(load(Llama, out)), both.answer) < RIGHT
        case message:
            assert "k_proj" in message


def test_peft_overwrites_the_base_with_extra_full_tensors_and_does_not_say_so(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    more = edit(math.folder, extra={f"{PREFIX}model.norm.weight": torch.full((16,), 3.0)})

    with warnings.catch_warnings(), quiet():
        theirs = PeftModel.from_pretrained(load(Llama, base), more)
    assert theirs.base_model.model.model.norm.weight[0] == 3  # though modules_to_save is empty

    match outcome(tmp_path, base, more):
        case Path():
            plan = prepare(from_mapping(recipe(tmp_path, base, more))).merge_plan
            assert [op.name for op in plan.operations if op.verb == "replace"] == ["model.norm.weight"]
        case message:
            assert "model.norm.weight" in message


def test_peft_788_an_adapter_of_a_deeper_model_is_not_merged_into_some_of_its_layers(tmp_path: Path) -> None:
    shallow, deep = llama(tmp_path / "shallow", num_hidden_layers=1), llama(tmp_path / "deep")
    math = train(Llama, deep, tmp_path / "math", target_modules=["q_proj"])

    with warnings.catch_warnings(), quiet():  # "merged successfully": nothing is said of layer 1
        theirs = PeftModel.from_pretrained(load(Llama, shallow), math.folder).merge_and_unload()
    assert drift(answer(theirs), answer(load(Llama, shallow))) > WRONG

    assert "model.layers.1.self_attn.q_proj" in refused(tmp_path, shallow, math.folder)


def test_peft_788_a_layer_is_found_by_its_whole_name_and_not_by_its_end(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    twin = "vision.model.layers.0.self_attn.q_proj.weight"
    save_file(tensors(base) | {twin: small.values(3, 8, 6)}, base / "model.safetensors", {"format": "pt"})
    math = small.make_adapter(tmp_path / "math")
    expected = {f"{m}.weight": tensors(base)[f"{m}.weight"].double() + delta(math, m) for m in small.MODULES}

    assert_merged(build(tmp_path, base, math), base, expected)


# --- several adapters ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Trained, Trained]:
    """Return a base and two adapters of the same modules, `a` and `b`."""
    base = llama(tmp_path / "base")
    a, b = (
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj", "v_proj"])
        for i, name in ((1, "a"), (2, "b"))
    )
    return base, a, b


def test_peft_merges_nothing_for_an_unknown_adapter_name(pair: tuple[Path, Trained, Trained], tmp_path: Path) -> None:
    base, a, b = pair

    theirs = merged(unmerged(Llama, base, a.folder, b.folder), adapter_names=["c"])
    assert torch.equal(answer(theirs), answer(load(Llama, base)))

    assert "no adapter 'c'" in refused(tmp_path, base, a.folder, b.folder, adapter_names=["c"])


def test_peft_takes_modules_to_save_of_a_for_adapter_names_b(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    a, b = (train(Llama, base, tmp_path / name, seed=i, **options) for i, name in ((1, "a"), (2, "b")))

    peft = unmerged(Llama, base, a.folder, b.folder, active=False)
    theirs = merged(peft, adapter_names=["b"])
    assert torch.equal(theirs.lm_head.weight, tensors(a.folder)[f"{PREFIX}lm_head.weight"])

    out = build(tmp_path, base, a.folder, b.folder, adapter_names=["b"])
    assert drift(answer(load(Llama, out)), b.answer) < RIGHT


def test_peft_3763_no_adapter_names_means_all_adapters_and_not_the_first(
    pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, a, b = pair

    theirs = merged(unmerged(Llama, base, a.folder, b.folder, active=False))
    assert drift(answer(theirs), a.answer) < RIGHT

    both = answer(unmerged(Llama, base, a.folder, b.folder))
    assert drift(answer(load(Llama, build(tmp_path, base, a.folder, b.folder))), both) < RIGHT


def test_peft_3455_1137_modules_to_save_of_several_adapters_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    a, b = (train(Llama, base, tmp_path / name, seed=i, **options) for i, name in ((1, "a"), (2, "b")))

    # two heads cannot both be in the output; peft keeps the one that it activated first
    theirs = merged(unmerged(Llama, base, a.folder, b.folder, active=False), adapter_names=["a", "b"])
    assert torch.equal(theirs.lm_head.weight, tensors(a.folder)[f"{PREFIX}lm_head.weight"])

    assert "adapters a and b both replace lm_head.weight" in refused(tmp_path, base, a.folder, b.folder)


def test_peft_3756_merging_a_subset_disables_the_rest_of_the_active_adapters(
    pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, a, b = pair

    peft = unmerged(Llama, base, a.folder, b.folder)
    both = answer(peft)
    with hushed():
        peft.merge_adapter(["a"])
    assert drift(answer(peft), both) > WRONG  # b is active, but answers no more
    assert drift(answer(peft), a.answer) < RIGHT

    # ours merges what the recipe names; the rest is merged by another recipe on top
    first = build(tmp_path / "one", base, a.folder, b.folder, adapter_names=["a"])
    assert drift(answer(load(Llama, first)), a.answer) < RIGHT
    assert drift(answer(load(Llama, build(tmp_path, first, b.folder))), both) < RIGHT


def weighted(**weights: float) -> Callable[[Path], dict[str, Any]]:
    return lambda root: {"adapters": {n: {"source": str(root / n), "weight": w} for n, w in weights.items()}}


def q_proj_sum(root: Path, base: Path, layer: int, **scales: float) -> Tensor:
    """Return W + sum of scale * B @ A of a q_proj in float64."""
    module = f"model.layers.{layer}.self_attn.q_proj"
    return tensors(base)[f"{module}.weight"].double() + sum(
        delta(root / name, module, scale) for name, scale in scales.items()
    )


def test_peft_3004_a_linear_combination_has_no_cross_terms(pair: tuple[Path, Trained, Trained], tmp_path: Path) -> None:
    base, a, b = pair
    exact = q_proj_sum(tmp_path, base, 0, a=2 * 0.5, b=2 * 0.5)

    # peft adds the A's and the B's apart, so (A1 + A2)(B1 + B2)
    peft = unmerged(Llama, base, a.folder, b.folder)
    with hushed():
        peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="linear")
        peft.set_adapter("sum")
    theirs = merged(peft).model.layers[0].self_attn.q_proj.weight
    assert drift(theirs, exact) > 0.1

    out = build(tmp_path, base, **weighted(a=0.5, b=0.5)(tmp_path))
    assert ulps(tensors(out)["model.layers.0.self_attn.q_proj.weight"], exact, torch.zeros_like(exact)) < 2


def test_peft_2796_a_negative_weight_subtracts(pair: tuple[Path, Trained, Trained], tmp_path: Path) -> None:
    base, a, b = pair
    exact = q_proj_sum(tmp_path, base, 1, a=2.0, b=2 * -0.7)

    # before #2811 peft lost the sign with the root of the weight's absolute value; today the signs are right, and the
    # cross terms are not
    peft = unmerged(Llama, base, a.folder, b.folder)
    with hushed():
        peft.add_weighted_adapter(["a", "b"], [1.0, -0.7], "sum", combination_type="linear")
        peft.set_adapter("sum")
    assert drift(merged(peft).model.layers[1].self_attn.q_proj.weight, exact) > 0.1

    out = build(tmp_path, base, **weighted(a=1.0, b=-0.7)(tmp_path))
    assert drift(tensors(out)["model.layers.1.self_attn.q_proj.weight"], exact) < 1e-7


def test_peft_2796_an_adapter_minus_itself_is_the_base_and_refused(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    for name in ("a", "b"):
        small.make_adapter(tmp_path / name)

    with pytest.raises(lora_build.MergeError, match="the output would equal the base"):
        build(tmp_path, base, **weighted(a=1.0, b=-1.0)(tmp_path))


def combined_by_peft(base: Path, *adapters: Path, method: str = "svd") -> Any:
    """Return peft's merge of the equally weighted sum of adapters."""
    peft = unmerged(Llama, base, *adapters)
    with hushed():
        names = [folder.name for folder in adapters]
        peft.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type=method)
        peft.set_adapter("sum")
    return merged(peft)


def test_peft_3761_rslora_keeps_its_scaling_in_a_weighted_sum(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    for i, name in enumerate(("a", "b")):
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj"], use_rslora=True)
    both = answer(unmerged(Llama, base, tmp_path / "a", tmp_path / "b"))

    assert drift(answer(combined_by_peft(base, tmp_path / "a", tmp_path / "b", method="cat")), both) > WRONG
    assert drift(answer(load(Llama, build(tmp_path, base, tmp_path / "a", tmp_path / "b"))), both) < RIGHT


def test_peft_3761_lora_bias_is_not_dropped_from_a_weighted_sum(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", attention_bias=True)
    for i, name in enumerate(("a", "b")):
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj"], lora_bias=True)
    both = answer(unmerged(Llama, base, tmp_path / "a", tmp_path / "b"))

    assert drift(answer(combined_by_peft(base, tmp_path / "a", tmp_path / "b", method="cat")), both) > WRONG
    assert drift(answer(load(Llama, build(tmp_path, base, tmp_path / "a", tmp_path / "b"))), both) < RIGHT


def test_peft_3761_dora_magnitudes_are_not_dropped_from_a_sum(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    for i, name in enumerate(("a", "b")):
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj"], use_dora=not i)
    both = answer(unmerged(Llama, base, tmp_path / "a", tmp_path / "b"))

    assert drift(answer(combined_by_peft(base, tmp_path / "a", tmp_path / "b", method="cat")), both) > WRONG
    assert drift(answer(load(Llama, build(tmp_path, base, tmp_path / "a", tmp_path / "b"))), both) < RIGHT


def test_peft_3761_the_diagonal_of_kasa_is_not_dropped(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "kasa_config": {"beta": 1e-4, "gemma": 1e-3}}
    math = train(Llama, base, tmp_path / "math", **options)

    # without its config the file is a plain LoRA with keys that peft ignores
    plain = edit(math.folder, kasa_config=None)
    assert drift(answer(merged(unmerged(Llama, base, plain))), math.answer) > WRONG
    assert "lora_diag" in refused(tmp_path, base, plain)

    match outcome(tmp_path, base, math.folder):  # it changes the base by an SVD
        case Path() as out:
            assert drift(answer(load(Llama, out)), math.answer) < 1e-4
        case message:
            assert "kasa" in message.lower()


def dora(W: Tensor, D: Tensor, norms_of: Tensor, magnitude: Tensor) -> Tensor:
    """Return m / ||norms_of + D|| * (W + D), row by row."""
    return (magnitude / (norms_of + D).norm(dim=1))[:, None] * (W + D)


def test_peft_3608_two_dora_adapters_take_their_norms_from_the_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    for i, name in enumerate(("a", "b")):
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj"], use_dora=True)
    module = "model.layers.0.self_attn.q_proj"
    W0 = tensors(base)[f"{module}.weight"]
    exact = W0.double()
    for name in ("a", "b"):
        magnitude = tensors(tmp_path / name)[f"{PREFIX}{module}.lora_magnitude_vector"].double()
        exact = dora(exact, delta(tmp_path / name, module), W0.double(), magnitude)

    # peft gets W0 back from a merged and rounded weight; before 0.21 it took the norms of that very weight
    theirs = merged(unmerged(Llama, base, tmp_path / "a", tmp_path / "b"), adapter_names=["a", "b"])
    assert ulps(theirs.model.layers[0].self_attn.q_proj.weight.detach(), exact, W0) > ONE_ROUNDING

    ours = tensors(build(tmp_path, base, tmp_path / "a", tmp_path / "b"))[f"{module}.weight"]
    assert ulps(ours, exact, W0) <= ONE_ROUNDING


# --- rounding -----------------------------------------------------------------------------------------------


def test_peft_2502_safe_merge_rounds_once_and_changes_no_bit(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    module = "model.layers.0.self_attn.q_proj"
    W, exact = tensors(base)[f"{module}.weight"], q_proj_sum(tmp_path, base, 0, math=2.0)

    unsafe, safe = (
        merged(unmerged(Llama, base, math.folder), safe_merge=safe).model.layers[0].self_attn.q_proj.weight.detach()
        for safe in (False, True)
    )
    assert not torch.equal(unsafe, safe)  # safe_merge rounds the update, and then the sum
    assert ulps(safe, exact, W) > ONE_ROUNDING

    checked, unchecked = (
        tensors(build(tmp_path / str(safe), base, math.folder, safe_merge=safe))[f"{module}.weight"]
        for safe in (True, False)
    )
    assert torch.equal(checked, unchecked)
    assert ulps(checked, exact, W) <= ONE_ROUNDING


def test_peft_1035_several_adapters_are_rounded_once_and_in_any_order(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    for i, name in enumerate(("a", "b")):
        train(Llama, base, tmp_path / name, seed=i, target_modules=["q_proj"])
    module = "model.layers.0.self_attn.q_proj"
    W, exact = tensors(base)[f"{module}.weight"], q_proj_sum(tmp_path, base, 0, a=2.0, b=2.0)

    orders = (["a", "b"], ["b", "a"])
    ab, ba = (
        merged(unmerged(Llama, base, tmp_path / "a", tmp_path / "b"), adapter_names=names)
        .model.layers[0].self_attn.q_proj.weight.detach()
        for names in orders
    )  # fmt: skip
    assert not torch.equal(ab, ba)  # one rounding after each adapter
    assert ulps(ab, exact, W) > ONE_ROUNDING

    ours = [
        tensors(build(tmp_path / "-".join(n), base, *(tmp_path / x for x in n)))[f"{module}.weight"] for n in orders
    ]
    assert torch.equal(*ours)
    assert ulps(ours[0], exact, W) <= ONE_ROUNDING


def test_peft_1836_an_embedding_is_rounded_once(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    math = train(Llama, base, tmp_path / "math", target_modules=["embed_tokens"])
    W = tensors(base)["model.embed_tokens.weight"]
    A, B = (tensors(math.folder)[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
    exact = W.double() + 2 * (B @ A).T

    theirs = merged(unmerged(Llama, base, math.folder)).model.embed_tokens.weight.detach()
    assert ulps(theirs, exact, W) > ONE_ROUNDING  # even without safe_merge

    assert ulps(tensors(build(tmp_path, base, math.folder))["model.embed_tokens.weight"], exact, W) <= ONE_ROUNDING


def test_peft_3509_factors_are_not_truncated_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    module = "model.layers.0.self_attn.q_proj"
    W, exact = tensors(base)[f"{module}.weight"], q_proj_sum(tmp_path, base, 0, math=2.0)

    theirs = merged(unmerged(Llama, base, math.folder, low_cpu_mem_usage=True))
    assert ulps(theirs.model.layers[0].self_attn.q_proj.weight.detach(), exact, W) > 1

    assert ulps(tensors(build(tmp_path, base, math.folder))[f"{module}.weight"], exact, W) <= ONE_ROUNDING


def test_peft_recasts_the_norms_of_a_base_in_two_dtypes(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    mixed = {n: t.float() + 1e-4 if "norm" in n else t for n, t in tensors(base).items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])

    theirs = merged(unmerged(Llama, base, math.folder, dtype=torch.bfloat16))
    assert theirs.model.norm.weight.dtype == torch.bfloat16

    ours = tensors(build(tmp_path, base, math.folder))["model.norm.weight"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, mixed["model.norm.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_peft_3682_a_merge_that_fails_leaves_nothing_half_merged(value: float, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    bad = tensors(math.folder)[key].index_fill(0, torch.tensor([3]), value)
    broken = edit(math.folder, extra={key: bad})

    peft = unmerged(Llama, base, broken)
    with pytest.raises(ValueError, match="NaNs detected"):
        merged(peft, safe_merge=True)
    first = peft.base_model.model.model.layers[0].self_attn.q_proj.weight  # layer 0 is merged, layer 1 is not
    assert not torch.equal(first, tensors(base)["model.layers.0.self_attn.q_proj.weight"])

    with pytest.raises(lora_build.MergeError, match=r"layers\.1\.self_attn\.q_proj\.weight\[3, 0\] is not finite"):
        build(tmp_path, base, broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "math", "math_edited"]


# --- tied embeddings and the vocabulary ---------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
def test_peft_2018_tied_embeddings_are_not_merged_into_each_other(targets: list[str], tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj", *targets])

    assert drift(answer(merged(unmerged(Llama, base, math.folder))), math.answer) > WRONG

    out = build(tmp_path, base, math.folder)
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]], ids="-".join)
def test_peft_2864_ensure_weight_tying_adds_the_update_once(targets: list[str], tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    options: dict[str, Any] = {"target_modules": ["q_proj", *targets], "ensure_weight_tying": True}
    math = train(Llama, base, tmp_path / "math", **options)

    assert drift(answer(merged(unmerged(Llama, base, math.folder))), math.answer) > WRONG  # W + 2D

    assert drift(answer(load(Llama, build(tmp_path, base, math.folder))), math.answer) < RIGHT


@pytest.mark.parametrize("tokens", [{"lm_head": [5, 9]}, {"embed_tokens": [5, 9], "lm_head": [7]}], ids=str)
def test_peft_2864_trained_tokens_of_one_of_two_tied_matrices_stay_there(
    tokens: dict[str, list[int]], tmp_path: Path
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"], trainable_token_indices=tokens)

    assert drift(answer(merged(unmerged(Llama, base, math.folder))), math.answer) > WRONG
    assert drift(answer(load(Llama, build(tmp_path, base, math.folder))), math.answer) < RIGHT


@pytest.mark.parametrize("modules", [None, ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_transformers_45127_an_extended_vocabulary_agrees_with_the_tie_in_the_config(
    modules: list[str] | None, tmp_path: Path
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", grow=8, target_modules=["q_proj"], modules_to_save=modules)

    out = build(tmp_path, base, math.folder)
    config, written = json.loads((out / "config.json").read_text()), tensors(out)
    assert config["vocab_size"] == VOCAB + 8
    assert {t.shape[0] for name, t in written.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))} == {
        VOCAB + 8
    }
    # the config said tied while the file had two matrices: whoever reads the flag alone (GGUF tools) and whoever reads
    # the file alone must see the same model
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in written)
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT


@pytest.mark.parametrize(
    ("targets", "tied"),
    [(["q_proj"], False), (["q_proj"], True), (["embed_tokens"], True), (["lm_head"], True)],
    ids=str,
)
def test_peft_1457_a_grown_vocabulary_is_merged_into_the_plain_base(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    math = train(Llama, base, tmp_path / "math", grow=8, target_modules=targets)

    with pytest.raises(RuntimeError, match="size mismatch"):  # peft wants the user to grow the base first
        unmerged(Llama, base, math.folder)

    out = build(tmp_path, base, math.folder)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCAB + 8
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT


@pytest.mark.parametrize("key", ["model.norm.modules_to_save.weight", "model.norm.weight"])
def test_peft_3455_two_keys_for_one_parameter_are_not_settled_by_their_order(key: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"], modules_to_save=["norm"])
    saved = tensors(math.folder)[f"{PREFIX}model.norm.weight"]
    twice = {f"{PREFIX}model.norm.weight": saved, f"{PREFIX}model.norm.modules_to_save.weight": saved}

    # peft writes a parameter twice, of equal values, where it saves a module and an embedding that is the same
    same = edit(math.folder, extra=twice)
    assert drift(answer(load(Llama, build(tmp_path, base, same))), math.answer) < RIGHT
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(same)

    # where the two differ nobody can tell which one was trained
    assert "model.norm" in refused(tmp_path, base, edit(math.folder, extra=twice | {PREFIX + key: saved + 1}))


@pytest.mark.parametrize(("target", "lost"), [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")])
def test_peft_1457_a_grown_matrix_that_peft_did_not_save_is_asked_for(target: str, lost: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", grow=8, target_modules=[target])

    # where one of the two embeddings is adapted, peft saves that one only: the other's new rows are gone
    assert not [key for key in tensors(math.folder) if f"{lost}." in key]

    assert f"{lost}.weight" in refused(tmp_path, base, math.folder)


def test_peft_1457_a_vocabulary_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = llama(tmp_path / "base"), llama(tmp_path / "other", vocab_size=VOCAB - 16)
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj", "lm_head"])

    message = refused(tmp_path, other, math.folder)
    assert str(VOCAB) in message
    assert str(VOCAB - 16) in message


# --- attention modules and convolutions ---------------------------------------------------------------------


def test_peft_3774_mha_out_proj_is_merged_as_it_was_trained(tmp_path: Path) -> None:
    cls = transformers.SiglipVisionModel
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
    base = make_base(tmp_path / "base", cls, config)
    math = train(cls, base, tmp_path / "math", target_modules=["head.attention"])
    factors = tensors(math.folder)
    mha, out_proj = f"{PREFIX}head.attention", f"{PREFIX}head.attention.base_layer.out_proj"
    D_in, D_out = (
        2 * factors[f"{m}.lora_B.weight"].double() @ factors[f"{m}.lora_A.weight"].double() for m in (mha, out_proj)
    )
    before = tensors(base)

    # peft up to 0.21.2 adds the update of out_proj twice, in training as in merging; what was trained is W + 2D
    expected = {
        "head.attention.in_proj_weight": before["head.attention.in_proj_weight"].double() + D_in,
        "head.attention.out_proj.weight": before["head.attention.out_proj.weight"].double() + 2 * D_out,
    }
    theirs = merged(unmerged(cls, base, math.folder)).state_dict()
    assert all(drift(theirs[name], exact) < 1e-6 for name, exact in expected.items())

    out = build(tmp_path, base, math.folder)
    assert_merged(out, base, expected)
    assert drift(answer(load(cls, out)), math.answer) < RIGHT


def test_peft_3769_a_sum_of_adapters_of_a_one_dimensional_convolution(tmp_path: Path) -> None:
    cls = transformers.WhisperForConditionalGeneration
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=6, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    base = make_base(tmp_path / "base", cls, config)
    for i, name in enumerate(("a", "b")):
        train(cls, base, tmp_path / name, seed=i, target_modules=["conv1", "conv2"])

    peft = unmerged(cls, base, tmp_path / "a", tmp_path / "b")
    with pytest.raises(RuntimeError), hushed():
        peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="svd")

    modules, before = [f"model.encoder.conv{i}" for i in (1, 2)], tensors(base)
    sums = {f"{m}.weight": sum(delta(tmp_path / name, m) for name in "ab") for m in modules}
    expected = {name: before[name].double() + D.reshape(before[name].shape) for name, D in sums.items()}
    assert_merged(build(tmp_path, base, tmp_path / "a", tmp_path / "b"), base, expected)


def test_peft_3769_a_convolution_over_points_in_three_dimensions(tmp_path: Path) -> None:
    cls = transformers.VideoMAEModel
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.VideoMAEConfig(
        **sizes, num_hidden_layers=1, image_size=2, patch_size=1, num_frames=2, tubelet_size=1
    )
    base = make_base(tmp_path / "base", cls, config)
    math = train(cls, base, tmp_path / "math", target_modules=["projection"])
    module = "embeddings.patch_embeddings.projection"

    # a kernel of 1 x 1 x 1 goes down the path of two dimensions
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        merged(unmerged(cls, base, math.folder))

    W = tensors(base)[f"{module}.weight"].double()
    expected = {f"{module}.weight": W + delta(math.folder, module).reshape(W.shape)}
    assert_merged(build(tmp_path, base, math.folder), base, expected)


# --- stacks of experts --------------------------------------------------------------------------------------

STACKS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "gpt_oss": (  # [expert, in, out] in memory and on disk
        transformers.GptOssForCausalLM,
        lambda: transformers.GptOssConfig(
            **SIZES | {"intermediate_size": 16, "head_dim": 8}, num_local_experts=3, num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
        ),
    ),
    "qwen3_moe": (  # [expert, out, in] in memory, one file entry for each expert
        transformers.Qwen3MoeForCausalLM,
        lambda: transformers.Qwen3MoeConfig(**EXPERTS | {"moe_intermediate_size": 16, "head_dim": 8}, num_experts=3),
    ),
}  # fmt: skip


def stacked(base: Path, family: str, layer: int) -> Tensor:
    """Return the down_proj of all experts of a layer, [expert, ., .] as in memory."""
    found, experts = tensors(base), f"model.layers.{layer}.mlp.experts"
    if family == "gpt_oss":
        return found[f"{experts}.down_proj"]
    return torch.stack([found[f"{experts}.{e}.down_proj.weight"] for e in range(3)])


@pytest.mark.parametrize(
    ("family", "version", "crossed"),
    [
        ("gpt_oss", "0.17.1", True),
        ("gpt_oss", "0.18.1", True),
        ("gpt_oss", "0.19.0", False),
        ("gpt_oss", "0.19.1", True),
        ("gpt_oss", "0.21.2", True),
        ("qwen3_moe", "0.17.1", True),
        ("qwen3_moe", "0.18.1", True),
        ("qwen3_moe", "0.19.0", True),
        ("qwen3_moe", "0.19.1", False),
        ("qwen3_moe", "0.21.2", False),
    ],
)
def test_peft_square_stacks_of_experts_are_read_as_the_version_that_wrote_them(
    family: str, version: str, crossed: bool, tmp_path: Path
) -> None:
    cls, config = STACKS[family]
    base = make_base(tmp_path / "base", cls, config())
    saved = train(cls, base, tmp_path / "math", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    # peft says which version it is since 0.18
    math = edit(saved.folder, peft_version=version if version > "0.18" else None)
    A = tensors(math)[f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight"].double().reshape(3, 4, 16)
    B = tensors(math)[f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"].double().reshape(16, 4, 3)
    D = 2 * torch.einsum("ore,eri->eoi", B, A)
    exact = stacked(base, family, 0).double() + (D.mT if crossed else D)

    # peft reads every file as its own version writes them, and square ones fit either way
    theirs = merged(unmerged(cls, base, math)).model.layers[0].mlp.experts.down_proj.detach()
    today = {"gpt_oss": True, "qwen3_moe": False}[family]
    assert (drift(theirs, exact) < 1e-6) == (crossed == today)

    assert drift(stacked(build(tmp_path, base, math), family, 0), exact) < 1e-6


def test_unsloth_6930_its_packing_of_expert_factors_cannot_be_told_so_pefts_is_meant(tmp_path: Path) -> None:
    cls, config = STACKS["qwen3_moe"]
    base = make_base(tmp_path / "base", cls, config())
    math = train(cls, base, tmp_path / "math", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    B = tensors(math.folder)[f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"].double()
    A = tensors(math.folder)[f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight"].double().reshape(3, 4, 16)
    # Unsloth writes the columns of B expert by expert, peft rank by rank: the same shape
    pefts = stacked(base, "qwen3_moe", 0).double() + 2 * torch.einsum("ore,eri->eoi", B.reshape(16, 4, 3), A)
    unsloths = stacked(base, "qwen3_moe", 0).double() + 2 * torch.einsum("oer,eri->eoi", B.reshape(16, 3, 4), A)

    ours = stacked(build(tmp_path, base, math.folder), "qwen3_moe", 0)
    assert drift(ours, pefts) < 1e-6
    assert drift(ours, unsloths) > WRONG
    assert drift(answer(load(cls, tmp_path / "out")), math.answer) < RIGHT


# --- adapters that change the base --------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_2184_pissa_changes_the_base_and_is_merged_so_or_refused(init: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"], init_lora_weights=init)

    # read as plain LoRA, which nothing in its tensors forbids, it is another model
    plain = edit(math.folder, init_lora_weights=True)
    assert drift(answer(merged(unmerged(Llama, base, plain))), math.answer) > WRONG

    match outcome(tmp_path, base, math.folder):
        case Path() as out:
            assert drift(answer(load(Llama, out)), math.answer) < 1e-4
        case message:
            assert f"'{init}' changes the base when the adapter is loaded" in message
            assert "convert it to plain LoRA" in message


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_4"])
def test_peft_merges_lora_ga_and_pissa_niter_into_another_model_than_the_trained_one(init: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    options = {"init_lora_weights": init if init.startswith("pissa") else True}
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"], **options)
    adapter = edit(math.folder, init_lora_weights=init, lora_ga_config=None)

    # lora_ga trains on W - s*B0@A0, and peft merges into W; the randomised SVD is drawn anew at each load
    theirs = answer(merged(unmerged(Llama, base, adapter)))
    plain = edit(adapter, init_lora_weights=True)
    wrong = answer(merged(unmerged(Llama, base, plain))) if init == "lora_ga" else math.answer
    assert (drift(theirs, wrong) < RIGHT) == (init == "lora_ga")

    message = refused(tmp_path, base, adapter)
    assert f"'{init}'" in message
    assert "convert it to plain LoRA" in message


@pytest.mark.parametrize("init", ["corda", "loftq"])
def test_peft_cannot_load_corda_and_loftq_again_and_they_are_refused(init: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    adapter = edit(math.folder, init_lora_weights=init)

    with pytest.raises((AttributeError, ValueError, ImportError)):
        unmerged(Llama, base, adapter)

    assert f"'{init}'" in refused(tmp_path, base, adapter)


# --- the model's shape and the output's files ---------------------------------------------------------------


def test_peft_1707_replicated_layers_are_merged_each_with_its_own_update(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    assert any("layers.2." in key for key in tensors(math.folder))

    # peft merges both updates into the one layer that both copies share
    theirs = merged(unmerged(Llama, base, math.folder))
    assert drift(answer(theirs), math.answer) > WRONG

    out = build(tmp_path, base, math.folder)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT


def test_peft_1381_an_adapter_config_in_the_output_would_load_the_adapter_again(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])

    # people save the merge into the adapter's folder, and transformers then merges in its head a second time
    with hushed():
        merged(unmerged(Llama, base, math.folder)).save_pretrained(math.folder)
        twice = Llama.from_pretrained(math.folder)
    assert drift(answer(twice), math.answer) > WRONG
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (math.folder / name).unlink()

    (base / "adapter_config.json").write_text((math.folder / "adapter_config.json").read_text())
    out = build(tmp_path, base, math.folder)
    assert not list(out.glob("adapter*"))
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT
    with pytest.raises(lora_build.RecipeError, match="overlaps"):
        lora_build.build(recipe(tmp_path, base, math.folder, output={"dir": str(math.folder)}))


def test_peft_868_1190_an_output_without_data_is_never_written(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])

    # with weights offloaded to the meta device peft merges nothing into nothing and says nothing
    with torch.device("meta"):
        empty = Llama(transformers.LlamaConfig.from_pretrained(base))
    with hushed():
        theirs = merged(PeftModel.from_pretrained(empty, math.folder, low_cpu_mem_usage=True))
    assert theirs.model.layers[0].self_attn.q_proj.weight.is_meta

    weights = base / "model.safetensors"
    out = build(tmp_path, base, math.folder)
    assert (out / "model.safetensors").stat().st_size == weights.stat().st_size
    shutil.rmtree(out)
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "is the file cut short?" in refused(tmp_path, base, math.folder)


# --- ties, as adapters in the wild meet them -----------------------------------------------------------------


def keep_both_on_disk(base: Path) -> None:
    """Store a tied head beside the embedding, as several checkpoints of the Hub do."""
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=["tokens", "saved-alike", "adapted-alike", "embedding", "head"],
)
@pytest.mark.parametrize("both_on_disk", [False, True])
def test_peft_2018_a_tie_whose_head_is_stored_too_is_kept_or_cut_as_if_it_were_not(
    options: dict[str, Any], both_on_disk: bool, tmp_path: Path
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", **options)
    if both_on_disk:
        keep_both_on_disk(base)

    out = build(tmp_path, base, math.folder)

    assert drift(answer(load(Llama, out)), math.answer) < RIGHT


def test_peft_2018_a_head_that_differs_from_its_tied_embedding_on_disk_stays_as_it_is(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", target_modules=["embed_tokens"])
    keep_both_on_disk(base)
    head = noise(77, VOCAB, 16)
    save_file(load_file(base / "model.safetensors") | {"lm_head.weight": head}, base / "model.safetensors")

    assert torch.equal(tensors(build(tmp_path, base, math.folder))["lm_head.weight"], head)


def test_peft_2864_what_is_meant_for_both_sides_of_a_tie_reaches_both_when_another_adapter_cuts_it(
    tmp_path: Path,
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    alike = train(Llama, base, tmp_path / "alike", target_modules=["embed_tokens"], ensure_weight_tying=True)
    one = train(Llama, base, tmp_path / "one", seed=2, target_modules=["embed_tokens"])

    def delta(adapter: Trained) -> Tensor:
        factors = load_file(adapter.folder / "adapter_model.safetensors")
        B, A = (factors[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"].double() for x in "BA")
        return 2 * (B @ A).T

    written = tensors(build(tmp_path, base, alike.folder, one.folder))

    W = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    for name, expected in {
        "model.embed_tokens.weight": W + delta(alike) + delta(one),
        "lm_head.weight": W + delta(alike),
    }.items():
        torch.testing.assert_close(written[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_peft_2864_tokens_of_a_tied_embedding_beside_an_update_of_its_head_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    math = train(Llama, base, tmp_path / "math", target_modules=["lm_head"], trainable_token_indices=[3, 5])

    with pytest.raises(lora_build.PlanError, match=r"different methods update it; merge them .*: two recipes"):
        build(tmp_path, base, math.folder)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_1457_new_tokens_may_be_trained_alone(tied: bool, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [VOCAB, VOCAB + 1]}
    if not tied:
        options["modules_to_save"] = ["lm_head"]
    math = train(Llama, base, tmp_path / "math", grow=2, **options)

    out = build(tmp_path, base, math.folder)

    assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCAB + 2
    assert drift(answer(load(Llama, out)), math.answer) < RIGHT


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["none", "all"])
def test_a_head_of_several_layers_gets_the_labels_of_its_last_one(biases: str, tmp_path: Path) -> None:
    sizes = SIZES | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "type_vocab_size": 1}
    config = transformers.RobertaConfig(**sizes)
    base = make_base(tmp_path / "base", transformers.RobertaForMaskedLM, config)
    cls = transformers.RobertaForSequenceClassification
    with hushed():
        model = cls.from_pretrained(base, num_labels=3)
        options = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], bias=biases)  # type: ignore[arg-type]
        peft = get_peft_model(model, options)
        for i, (_, parameter) in enumerate(peft.named_parameters()):
            if parameter.requires_grad:
                parameter.data += 0.3 * noise(i, *parameter.shape)
        peft.save_pretrained(str(tmp_path / "math"))

    out = build(tmp_path, base, tmp_path / "math")

    assert len(json.loads((out / "config.json").read_text())["id2label"]) == 3
    assert drift(answer(load(cls, out)), answer(peft.eval())) < RIGHT


def test_a_head_on_a_part_that_neither_base_nor_adapter_has_is_refused(tmp_path: Path) -> None:
    sizes = SIZES | {"pad_token_id": 0, "type_vocab_size": 1}
    base = make_base(tmp_path / "base", transformers.BertForMaskedLM, transformers.BertConfig(**sizes))
    with hushed():
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
        peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))  # type: ignore[arg-type]
        peft.save_pretrained(str(tmp_path / "math"))

    with pytest.raises(
        lora_build.PlanError, match=r"needs bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight, which"
    ):
        build(tmp_path, base, tmp_path / "math")


def test_a_replicated_layer_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", num_hidden_layers=2)
    small.make_adapter(tmp_path / "math", layer_replication=[[0, 3]])

    with pytest.raises(lora_build.PlanError, match="layer_replication wants layer 2, the base has 2"):
        build(tmp_path, tmp_path / "base", tmp_path / "math")


def test_a_head_without_a_task_is_that_of_the_class_that_peft_noted(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    cls = transformers.LlamaForSequenceClassification
    with hushed():
        model = cls.from_pretrained(base, num_labels=1, pad_token_id=0)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"]))
        for i, (_, parameter) in enumerate(peft.named_parameters()):
            if parameter.requires_grad:
                parameter.data += 0.3 * noise(i, *parameter.shape)
        peft.save_pretrained(str(tmp_path / "math"))

    written = tensors(build(tmp_path, base, tmp_path / "math"))

    assert written["score.weight"].shape == (1, 16)
    assert "lm_head.weight" not in written


# --- keys -------------------------------------------------------------------------------------------------------


def test_peft_2084_keys_with_the_adapters_name_in_them_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    math = train(Llama, base, tmp_path / "math", target_modules=["q_proj"])
    file = math.folder / "adapter_model.safetensors"
    save_file({re.sub(r"(lora_[AB])", r"\1.chat", name): t for name, t in load_file(file).items()}, file)

    with pytest.raises(lora_build.PlanError, match=r"take '\.chat' out of the keys"):
        build(tmp_path, base, math.folder)


def test_a_target_parameter_of_a_conv1d_is_adapted_as_it_is_stored(tmp_path: Path) -> None:
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    base = make_base(tmp_path / "base", transformers.GPT2LMHeadModel, gpt2)
    targets = ["attn.c_proj.weight", "c_fc.weight"]
    math = train(transformers.GPT2LMHeadModel, base, tmp_path / "math", target_modules=[], target_parameters=targets)

    out = build(tmp_path, base, math.folder)

    assert drift(answer(load(transformers.GPT2LMHeadModel, out)), math.answer) < RIGHT


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_bdlora": True}, "use_bdlora: expected a mapping with nblocks"),
        ({"use_bdlora": {"nblocks": "x"}}, "use_bdlora: expected a mapping with nblocks"),
        ({"target_parameters": 3}, "target_parameters: expected a list of names"),
        (
            {"layer_replication": [[0, 2], [0, 2]], "init_lora_weights": "pissa"},
            "layer_replication: cannot be combined",
        ),
    ],
    ids=str,
)
def test_a_damaged_config_is_refused_by_the_key(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", num_hidden_layers=2)
    small.make_adapter(tmp_path / "math", **config)

    with pytest.raises(lora_build.LoraBuildError, match=re.escape(said)):
        build(tmp_path, tmp_path / "base", tmp_path / "math")
