"""The forward check: a build answers as base and adapters do, or the layer in which it does not is named."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.cli import main as app
from lora_build.engine.memory import TensorMerger
from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import Digest
from lora_build.pipeline import prepare
from lora_build.proof.build_files import find_files
from lora_build.proof.forward.inputs import Prompts, questions
from lora_build.proof.forward.report import ForwardReport
from lora_build.proof.forward.trace import Trace, half_ulps
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, read_manifest
from lora_build.proof.reopen import reopen
from lora_build.proof.verify import Verification, hold_to_inputs
from lora_build.proof.wanted import Wanted
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.forgery import vouch
from makers.zoo import Adapter, Base, Zoo, quiet

LAYER = "model.layers.1.self_attn.v_proj"
LLAMA = Base(arch="llama", dtype="bfloat16")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(zoo: Zoo, base: Base, out: Path, *adapters: Adapter, **more: Any) -> dict[str, Any]:
    specs = {f"a{i}": str(zoo.adapter(base, spec)) for i, spec in enumerate(adapters or (Adapter(),))}
    return {"base": str(zoo.base(base)), "adapters": specs, "output": {"dir": str(out)}} | more


def forge(folder: Path, **changes: torch.Tensor) -> None:
    """Change tensors of a build and make its manifest say that they were built so."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for end, value in changes.items():
        (name,) = [name for name in tensors if name.endswith(end.replace("__", "."))]
        assert tensors[name].shape == value.shape
        assert not torch.equal(tensors[name], value)
        tensors[name] = value.to(tensors[name].dtype).contiguous()
    save_file(tensors, file, {"format": "pt"})
    manifest = read_manifest(folder)
    record = {"sha256": Digest.sha256(file.read_bytes()), "size_bytes": file.stat().st_size}
    forged = dataclasses.replace(
        manifest,
        files=tuple(dataclasses.replace(f, **record) if f.path == file.name else f for f in manifest.files),
        digests=tuple(
            Digest.blake3(tensors[t.name].view(-1).view(torch.uint8).numpy().tobytes()) for t in manifest.tensors
        ),
    )
    (folder / MANIFEST_NAME).write_bytes(forged.to_bytes())
    vouch(folder)


def weights(zoo: Zoo, base: Base, out: Path, end: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor of the base and of the build, in float64."""
    found = [load_file(folder / "model.safetensors") for folder in (zoo.base(base), out)]
    before, after = (next(t for n, t in tensors.items() if n.endswith(end)) for tensors in found)
    return before.double(), after.double()


def report_of(folder: Path, **asked: Any) -> ForwardReport:
    """Return what the check finds of a build whose bytes are taken for right."""
    counts = {"num_files": 0, "num_tensors": 0, "num_bytes": 0}
    unread = Verification(manifest_hash=read_manifest(folder).manifest_hash, **counts)
    report = hold_to_inputs(find_files(folder), unread, Wanted(forward=True, **asked)).forward
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *(("llama", dtype) for dtype in ("float32", "bfloat16", "float16")),
        ("gpt2", "float16"),
        ("t5", "bfloat16"),
        ("bert", "bfloat16"),
    ],
)
def test_a_correct_build_answers_as_base_and_adapters_do(zoo: Zoo, tmp_path: Path, arch: str, dtype: str) -> None:
    lora_build.build(recipe(zoo, Base(arch=arch, dtype=dtype), tmp_path / "out"))
    report = lora_build.verify(tmp_path / "out", forward=True).forward

    assert report.is_ok
    assert report.dtypes == (dtype,)
    assert len(report.prompts) == 4
    for prompt in report.prompts:
        assert prompt.kl is not None
        assert prompt.kl <= prompt.kl_bound
        assert prompt.unexplained <= prompt.allowance
        # the bound is what rounding does and little more
        assert prompt.bound < (4 * prompt.rounding if prompt.rounding else 1e-3)


@pytest.mark.parametrize(
    "more",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"numerics": "peft", "dtype": "bfloat16"}],
    ids=["bfloat16", "float16", "peft"],
)
def test_a_build_of_another_dtype_passes(zoo: Zoo, tmp_path: Path, more: dict[str, Any]) -> None:
    base = Base(arch="llama")
    lora_build.build(recipe(zoo, base, tmp_path / "out", Adapter(), Adapter(seed=1, rank=2), **more))

    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok


@pytest.mark.parametrize("options", [(("use_dora", True),), (("modules_to_save", ["lm_head"]),)])
def test_dora_and_saved_modules_pass(zoo: Zoo, tmp_path: Path, options: tuple[tuple[str, Any], ...]) -> None:
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out", Adapter(options=options)))

    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok


def test_a_tie_that_was_cut_passes(zoo: Zoo, tmp_path: Path) -> None:
    base = Base(arch="llama_tied", dtype="bfloat16")
    lora_build.build(recipe(zoo, base, tmp_path / "out", Adapter(targets=("embed_tokens", "q_proj"))))

    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok


def trained(folder: Path, model: Any, targets: list[str], **more: Any) -> Path:
    """Return a folder with a base in bfloat16 and an adapter of it."""
    with quiet():
        model.to(torch.bfloat16).save_pretrained(folder / "base")
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **more))
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        peft.save_pretrained(str(folder / "math"))
    return folder


EXPERTS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """Return a folder with a mixture of experts and an adapter on its attention, its router and its experts."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS))
    return trained(tmp_path, model, ["q_proj", "v_proj"], target_parameters=["mlp.experts.down_proj"])


def test_a_mixture_of_experts_passes_and_a_wrong_expert_is_named(mixtral: Path) -> None:
    lora_build.build(small.recipe(mixtral))
    assert lora_build.verify(mixtral / "out", forward=True).forward.is_ok

    built = load_file(mixtral / "out/model.safetensors")
    base = load_file(mixtral / "base/model.safetensors")
    name = next(n for n in sorted(built) if "layers.1." in n and "expert" in n and not torch.equal(built[n], base[n]))
    forge(mixtral / "out", **{name: base[name]})
    report = report_of(mixtral / "out")
    assert not report.is_ok
    assert report.traced is not None
    assert report.traced.module == "model.layers.1.mlp.experts"


def test_a_layer_whose_module_uses_the_cache_is_named(tmp_path: Path) -> None:
    """The attention of gpt-oss has parameters of its own, so it is called again, and would find its keys cached."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(head_dim=8, num_experts_per_tok=2, **EXPERTS))
    lora_build.build(small.recipe(trained(tmp_path, model, ["q_proj", "v_proj"])))
    name = "model.layers.1.self_attn.q_proj.weight"
    forge(tmp_path / "out", **{name: load_file(tmp_path / "base/model.safetensors")[name]})

    report = report_of(tmp_path / "out")
    assert report.traced is not None
    assert f"{report.traced.module}.weight" == name


def test_a_mixer_that_reads_the_weight_of_its_module_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    model = transformers.MambaForCausalLM(config)
    lora_build.build(small.recipe(trained(tmp_path, model, ["in_proj", "dt_proj"])))

    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok


AST = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}


@pytest.mark.parametrize(
    ("name", "config", "targets"),
    [
        ("ASTForAudioClassification", TINY | AST, ["q_proj", "dense"]),
        ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}, ["convolution"]),
    ],
    ids=["ast", "resnet"],
)  # fmt: skip
def test_models_of_sound_and_pictures_pass_and_a_missing_update_does_not(
    tmp_path: Path, name: str, config: dict[str, Any], targets: list[str]
) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    lora_build.build(small.recipe(trained(tmp_path, model_class(model_class.config_class(**config)), targets)))
    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok

    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    changed = next(name for name in sorted(before) if not torch.equal(before[name], after[name]))
    forge(tmp_path / "out", **{changed: before[changed]})
    assert changed in report_of(tmp_path / "out").mismatched_tensors


def test_a_layer_that_the_build_lacks_is_named(zoo: Zoo) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(zoo.base(LLAMA), dtype=torch.float32)
    other = copy.deepcopy(model)
    del other.model.layers[1]
    with torch.no_grad(), Trace(other=other, half_ulps=lambda _, p: half_ulps(p, p.dtype), threshold=1.0) as trace:
        trace.watch(model)
        model(input_ids=torch.arange(4, 12)[None], use_cache=False)

    assert trace.found is not None
    assert trace.found.module == "model.layers.1.input_layernorm"


def test_of_a_model_beside_its_copy_no_layer_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    other = copy.deepcopy(model)
    with torch.no_grad(), Trace(other=other, half_ulps=lambda _, p: half_ulps(p, p.dtype), threshold=1.0) as trace:
        trace.watch(model)
        model(torch.ones(1, 4))

    assert trace.worst is not None
    assert trace.found is None


@pytest.mark.parametrize(
    ("dtype", "times"), [("float32", 2), ("bfloat16", 0), ("bfloat16", 2), ("float16", 0)],
    ids=["float32 twice", "bfloat16 missing", "bfloat16 twice", "float16 missing"],
)  # fmt: skip
def test_one_update_that_is_missing_or_there_twice_is_found_and_its_layer_named(
    zoo: Zoo, tmp_path: Path, dtype: str, times: int
) -> None:
    base = Base(arch="llama", dtype=dtype)
    lora_build.build(recipe(zoo, base, tmp_path / "out"))
    before, after = weights(zoo, base, tmp_path / "out", f"{LAYER}.weight")
    forge(tmp_path / "out", **{f"{LAYER}.weight": before + times * (after - before)})
    lora_build.verify(tmp_path / "out")

    with pytest.raises(VerificationError, match=rf"does not answer as base and adapters do.*; first in {LAYER}, "):
        lora_build.verify(tmp_path / "out", forward=True)


@pytest.mark.parametrize(
    ("arch", "module"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k"),
        ("bert", "bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_the_layer_is_named_in_every_kind_of_model(zoo: Zoo, tmp_path: Path, arch: str, module: str) -> None:
    base = Base(arch=arch, dtype="bfloat16")
    lora_build.build(recipe(zoo, base, tmp_path / "out"))
    before, _ = weights(zoo, base, tmp_path / "out", f"{module}.weight")
    forge(tmp_path / "out", **{f"{module}.weight": before})

    report = report_of(tmp_path / "out")
    assert report.traced is not None
    assert report.traced.module == module


def test_one_weight_that_is_an_ulp_off_is_found(zoo: Zoo, tmp_path: Path) -> None:
    """The judge does not wait until a mistake outgrows what rounding does to the logits."""
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    _, wrong = weights(zoo, LLAMA, tmp_path / "out", f"{LAYER}.weight")
    wrong.view(-1)[wrong.abs().argmax()] *= 1 + 2**-7
    forge(tmp_path / "out", **{f"{LAYER}.weight": wrong})
    report = report_of(tmp_path / "out")

    assert max(p.unexplained / p.rounding for p in report.prompts) < 1
    assert not report.is_ok
    assert report.traced is not None
    assert report.traced.module == LAYER


def test_a_tensor_that_no_prompt_reaches_is_held_to_the_merge(tmp_path: Path) -> None:
    """Text alone never calls the tower for pictures."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(vocab_size=64, **TINY)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **TINY)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    lora_build.build(small.recipe(trained(tmp_path, model, ["q_proj", "fc1"])))
    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok

    tensors = load_file(tmp_path / "base/model.safetensors")
    (name,) = (n for n in tensors if n.endswith("fc1.weight"))
    forge(tmp_path / "out", **{name: tensors[name]})
    with pytest.raises(VerificationError, match=f"has other weights than base and adapters, .*reach: {name}$"):
        lora_build.verify(tmp_path / "out", forward=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_the_embedding_that_no_prompt_asks_is_held_to_the_merge(
    with_words: Path, zoo: Zoo, dtype: str
) -> None:
    base = Base(arch="llama", dtype=dtype)
    lora_build.build(recipe(zoo, base, with_words / dtype))
    _, rows = weights(zoo, base, with_words / dtype, "embed_tokens.weight")
    rows[77] *= 1.01
    forge(with_words / dtype, **{"embed_tokens.weight": rows})
    (with_words / "p.txt").write_text("w10 w20")
    report = report_of(with_words / dtype, prompts=with_words / "p.txt")

    assert all(prompt.is_ok for prompt in report.prompts)
    assert report.mismatched_tensors == ("model.embed_tokens.weight",)
    assert not report.is_ok


def test_weights_are_measured_in_blocks_of_any_size(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a whole embedding in float64 takes more memory than the model."""
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    before, _ = weights(zoo, LLAMA, tmp_path / "out", f"{LAYER}.weight")
    forge(tmp_path / "out", **{f"{LAYER}.weight": before})
    whole = report_of(tmp_path / "out")
    monkeypatch.setattr("lora_build.proof.forward.trace._BLOCK_ELEMENTS", 100)
    rand, sizes = torch.rand, set()
    monkeypatch.setattr(torch, "rand", lambda size, **more: sizes.add(size.numel()) or rand(size, **more))
    report = report_of(tmp_path / "out")

    assert max(sizes) == 100
    assert (report.mismatched_tensors, report.traced) == (whole.mismatched_tensors, whole.traced)
    assert report.prompts == whole.prompts


def test_an_answer_of_one_number_allows_what_peft_rounds(tmp_path: Path) -> None:
    """What rounding does to one number may be nothing by chance, and another rounding does something else."""
    torch.manual_seed(0)
    text, vision = TINY | {"vocab_size": 64}, TINY | {"image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    lora_build.build(small.recipe(trained(tmp_path, model, ["q_proj", "fc1"]), numerics="peft"))

    assert all(report_of(tmp_path / "out", seed=seed).is_ok for seed in range(5))


def test_a_prompt_with_tokens_that_the_model_lacks_is_one_clear_error(with_words: Path) -> None:
    file = with_words / "base/config.json"
    words = json.loads((with_words / "base/tokenizer.json").read_text())
    words["model"]["vocab"]["beyond"] = json.loads(file.read_text())["vocab_size"]
    (with_words / "base/tokenizer.json").write_text(json.dumps(words))
    (with_words / "p.txt").write_text("w10 beyond")
    lora_build.build(small.recipe(with_words, output={"dir": str(with_words / "new")}))

    with pytest.raises(SourceError, match="cannot be asked 'w10 beyond': index out of range"):
        lora_build.verify(with_words / "new", forward=True, prompts=with_words / "p.txt")


def test_weights_that_peft_rounds_more_often_pass_and_a_missing_update_does_not(zoo: Zoo, tmp_path: Path) -> None:
    adapters = Adapter(options=(("use_dora", True),)), Adapter(seed=1)
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out", *adapters, numerics="peft"))
    assert report_of(tmp_path / "out").mismatched_tensors == ()

    before, _ = weights(zoo, LLAMA, tmp_path / "out", f"{LAYER}.weight")
    forge(tmp_path / "out", **{f"{LAYER}.weight": before})
    assert report_of(tmp_path / "out").mismatched_tensors == (f"{LAYER}.weight",)


def configure(folder: Path, **changes: Any) -> None:
    """Change a build's config.json and make its manifest say that it was built so."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    manifest = read_manifest(folder)
    record = {"sha256": Digest.sha256(file.read_bytes()), "size_bytes": file.stat().st_size}
    changed = (dataclasses.replace(f, **record) if f.path == file.name else f for f in manifest.files)
    (folder / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, files=tuple(changed)).to_bytes())
    vouch(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_act": "gelu"}, r"every module with weights gives the same, so look at the build's config\.json"),
        ({"rms_norm_eps": 0.1}, r"first in model\.layers\.0\.input_layernorm, "),
        ({"architectures": ["LlamaForSequenceClassification"]}, "answer 0 and nothing else"),
        ({"num_key_value_heads": 4}, r"the build cannot be run as its base can: out/config\.json: "),
        ({"num_key_value_heads": 0}, r"config\.json: .*cannot "),
        ({"pad_token_id": 1000}, r"the build cannot be run as its base can: out/config\.json: "),
        *(
            ({"vocab_size": size}, rf"config\.json: vocab_size is {size}, .*embed_tokens.* has 128 rows")
            for size in (-1, 0, 16, 1000, 10**12)
        ),
    ],
)
def test_a_wrong_config_is_found(zoo: Zoo, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    configure(tmp_path / "out", **changes)

    with pytest.raises(VerificationError, match=text):
        lora_build.verify(tmp_path / "out", forward=True)


def test_a_grown_vocabulary_passes_where_another_config_lies_in_the_base_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(vocab_size=64, **TINY)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **TINY)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    with quiet():
        model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70, mean_resizing=False)
        saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        get_peft_model(model, saved).save_pretrained(str(tmp_path / "math"))
    lora_build.build(small.recipe(tmp_path))

    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["vocab_size"] == 70
    assert lora_build.verify(tmp_path / "out", forward=True).forward.is_ok


@pytest.fixture
def overflown(zoo: Zoo, tmp_path: Path) -> Path:
    """Return a folder with a build whose dtype does not reach the base's largest weight."""
    base = Base(arch="llama")
    shutil.copytree(zoo.base(base), tmp_path / "base")
    shutil.copytree(zoo.adapter(base, Adapter()), tmp_path / "math")
    weight = load_file(tmp_path / "base/model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    weight[0, 0] = 1e5
    small.edit(tmp_path / "base", model__layers__0__mlp__down_proj__weight=weight)
    lora_build.build(small.recipe(tmp_path, dtype="float16", safe_merge=False))
    return tmp_path


def test_rounding_that_leaves_no_finite_answer_explains_nothing(overflown: Path) -> None:
    with pytest.raises(VerificationError, match="a logit differs by inf"):
        lora_build.verify(overflown / "out", forward=True)


def test_numbers_that_json_does_not_have_are_null(overflown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert app.main(["verify", "--forward", "--json", str(overflown / "out")]) == 3
    (build,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["builds"]
    assert build["forward"]["prompts"][0]["difference"] is None


@pytest.mark.parametrize("numerics", ["exact", "peft"])
def test_a_base_that_answers_nan_proves_nothing(zoo: Zoo, tmp_path: Path, numerics: str) -> None:
    shutil.copytree(zoo.base(LLAMA), tmp_path / "base")
    shutil.copytree(zoo.adapter(LLAMA, Adapter()), tmp_path / "math")
    small.edit(tmp_path / "base", model__norm__weight=torch.full((32,), torch.nan, dtype=torch.bfloat16))
    lora_build.build(small.recipe(tmp_path, numerics=numerics, safe_merge=False))

    with pytest.raises(VerificationError, match="base and adapters answer NaN"):
        lora_build.verify(tmp_path / "out", forward=True)


def test_a_merge_that_is_wrong_in_memory_too_is_found(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine and the live merge share cannot hide: the forward has other mathematics."""
    merge = TensorMerger.merge

    def doubled(self: TensorMerger, operation: Any, W: torch.Tensor) -> torch.Tensor:
        after = merge(self, operation, W)
        return after + (after - W) if operation.name == f"{LAYER}.weight" else after

    out = tmp_path / "out"
    lora_build.build(recipe(zoo, LLAMA, out))
    before, after = weights(zoo, LLAMA, out, f"{LAYER}.weight")
    forge(out, **{f"{LAYER}.weight": 2 * after - before})
    monkeypatch.setattr(TensorMerger, "merge", doubled)

    with pytest.raises(VerificationError, match=rf"once they are merged in float32.*; first in {LAYER}, "):
        lora_build.verify(out, forward=True)


def test_a_damaged_build_is_not_run(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    with (tmp_path / "out/config.json").open("a") as file:
        file.write(" ")

    with pytest.raises(VerificationError, match="differs from its manifest"):
        lora_build.verify(tmp_path / "out", forward=True)


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("base", r"base: .*model\.safetensors has \d+ bytes, expected \d+ by the manifest\n.* add --base PATH"),
        (
            "math",
            r"adapters\.math: .*\.safetensors has sha256:.*, expected sha256:.* by the manifest\n.* add --adapter math=PATH",
        ),
    ],
)
def test_another_input_at_the_same_path_is_an_error_that_names_it(
    zoo: Zoo, tmp_path: Path, which: str, text: str
) -> None:
    shutil.copytree(zoo.base(LLAMA), tmp_path / "base")
    shutil.copytree(zoo.adapter(LLAMA, Adapter()), tmp_path / "math")
    lora_build.build(small.recipe(tmp_path))
    other = zoo.base(Base(arch="llama", dtype="float16")) if which == "base" else zoo.adapter(LLAMA, Adapter(seed=5))
    shutil.rmtree(tmp_path / which)
    shutil.copytree(other, tmp_path / which)

    with pytest.raises(VerificationError, match=text):
        lora_build.verify(tmp_path / "out", forward=True)


def test_inputs_are_found_again_from_anywhere_if_the_recipe_s_folder_is_above_the_build(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(zoo.base(LLAMA), tmp_path / "here/base")
    shutil.copytree(zoo.adapter(LLAMA, Adapter()), tmp_path / "here/math")
    mapping = {"base": "./base", "adapters": {"math": "./math"}, "root": str(tmp_path / "here")}
    lora_build.build(mapping | {"output": {"dir": "builds/x"}})
    lora_build.build(mapping | {"output": {"dir": str(tmp_path / "far")}})
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")

    def base(folder: str) -> Path:
        source = reopen(Path(folder), read_manifest(Path(folder))).sources["base"]
        return source.path("config.json").parent.resolve()

    assert base("../here/builds/x") == tmp_path / "here/base"
    with pytest.raises(SourceError, match="base does not exist"):
        base("../far")
    monkeypatch.chdir(tmp_path / "here")
    assert base("../far") == tmp_path / "here/base"


def test_a_build_without_provenance_says_what_is_missing(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    (tmp_path / "out" / PROVENANCE_NAME).unlink()

    with pytest.raises(SourceError, match="which says where base and adapters are"):
        lora_build.verify(tmp_path / "out", forward=True)


# --- what is asked ---------------------------------------------------------------------------------------------


@pytest.fixture
def with_words(zoo: Zoo, tmp_path: Path) -> Path:
    """Return a folder with a build whose tokenizer splits text at spaces."""
    shutil.copytree(zoo.base(LLAMA), tmp_path / "base")
    shutil.copytree(zoo.adapter(LLAMA, Adapter()), tmp_path / "math")
    file = tmp_path / "base/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}))
    lora_build.build(small.recipe(tmp_path))
    return tmp_path


def test_prompts_go_through_the_tokenizer_of_the_build(with_words: Path) -> None:
    tmp_path = with_words
    (tmp_path / "prompts.txt").write_text("w10 w20 w30\n\nw40\n", encoding="utf-8")
    report = lora_build.verify(tmp_path / "out", forward=True, prompts=tmp_path / "prompts.txt").forward

    assert [(p.prompt, p.num_tokens) for p in report.prompts] == [("w10 w20 w30", 3), ("w40", 1)]


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "cannot be read"), (b"\n \n", "expected 1 to 64 lines"), (b"\xff\xfe", "is not UTF-8 text"),
     (b"w5 " * 70, "prompt 1 has 70 tokens, the model takes 1 to 62")],
)  # fmt: skip
def test_prompts_that_cannot_be_asked_are_a_mistake_of_the_user(
    with_words: Path, content: bytes | None, text: str
) -> None:
    tmp_path = with_words
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)

    with pytest.raises(RecipeError, match=text):
        lora_build.verify(tmp_path / "out", forward=True, prompts=tmp_path / "prompts.txt")


def test_the_same_seed_asks_the_same_and_another_seed_does_not(zoo: Zoo) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(zoo.base(LLAMA))
    first, again, other = (questions(model, Path(), Prompts(seed=seed)) for seed in (3, 3, 4))

    assert [q.num_tokens for q in first] == [5, 11, 17, 26]
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[3].inputs["input_ids"], other[3].inputs["input_ids"])


@pytest.mark.parametrize(
    ("config", "model_class", "keys"),
    [
        (transformers.ViTConfig(image_size=16, patch_size=8, **TINY), transformers.ViTModel, ["pixel_values"]),
        (transformers.ASTConfig(patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8, **TINY),
         transformers.ASTModel, ["input_values"]),
        (transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), transformers.ResNetModel, ["pixel_values"]),
        (transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=64,
                                    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
                                    max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                    decoder_start_token_id=3),
         transformers.WhisperForConditionalGeneration, ["input_features", "decoder_input_ids"]),
        (transformers.CLIPConfig(text_config=TINY | {"vocab_size": 64}, vision_config=TINY | {"image_size": 16, "patch_size": 8}),
         transformers.CLIPModel, ["input_ids", "attention_mask", "pixel_values"]),
    ],
    ids=["vit", "ast", "resnet", "whisper", "clip"],
)  # fmt: skip
def test_models_of_pixels_and_sound_get_noise_that_they_can_take(
    config: Any, model_class: Any, keys: list[str]
) -> None:
    with quiet(), torch.no_grad():
        model = model_class(config).eval()
        asked = questions(model, Path(), Prompts())
        assert list(asked[0].inputs) == keys
        model(**asked[0].inputs)


def test_a_model_that_nobody_knows_how_to_call_is_one_clear_error() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = transformers.LlamaConfig(**TINY)  # type: ignore[assignment]
    model.main_input_name = "past_values"  # type: ignore[assignment]

    with pytest.raises(SourceError, match="takes past_values; a seed makes only input_ids, pixel_values"):
        questions(model, Path(), Prompts())


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json_and_exits_with_3(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    lora_build.build(recipe(zoo, LLAMA, Path(out)))
    assert app.main(["verify", "--forward", out, "--seed=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ok        {out}  ")
    assert lines[2].split() == [
        "forward", "prompt", "tokens", "logits", "differ", "by", "at", "most", "same", "top", "token", "KL", "at", "most"
    ]  # fmt: skip
    assert len(lines) == 8

    before, _ = weights(zoo, LLAMA, Path(out), f"{LAYER}.weight")
    forge(Path(out), **{f"{LAYER}.weight": before})
    assert app.main(["verify", out]) == 0
    capsys.readouterr()
    assert app.main(["verify", out, "--forward"]) == 3
    shown, err = capsys.readouterr()
    assert shown.splitlines()[-1] == f"layer     {LAYER}"
    assert err.startswith(f"error: {out}: the build does not answer as base and adapters do: on ")
    assert app.main(["verify", out, "--forward", "--json"]) == 3
    (build,) = json.loads(capsys.readouterr().out)["builds"]
    assert build["forward"]["traced"]["module"] == LAYER
    assert build["forward"]["ok"] is False
    assert {"difference", "bound", "rounding", "top1", "kl", "kl_bound"} <= build["forward"]["prompts"][0].keys()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--forwrd", "x"], "unknown option '--forwrd'; did you mean '--forward'?"),
        (["--prompts", "x", "y"], "--prompts goes with --forward"),
        (["--forward", "--seed", "one", "x"], "--seed: expected a whole number, 0 or more, found 'one'"),
        (["--forward"], "verify takes builds, folders or repositories of the Hub"),
        (["x", "--forward", "--prompts"], "--prompts: expected a value after it"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["verify", *words]) == 2
    assert text in capsys.readouterr().err


# --- checks in a recipe ----------------------------------------------------------------------------------------


def test_a_check_changes_no_byte_and_is_recorded(zoo: Zoo, tmp_path: Path) -> None:
    plain = lora_build.build(recipe(zoo, LLAMA, tmp_path / "plain")).manifest
    checked = lora_build.build(recipe(zoo, LLAMA, tmp_path / "checked", checks={"forward": {"seed": 7}})).manifest

    assert checked.manifest_hash == plain.manifest_hash
    statement = json.loads((tmp_path / "checked" / PROVENANCE_NAME).read_text())
    record = statement["predicate"]["runDetails"]["byproducts"][0]["annotations"]
    assert record["seed"] == 7
    assert len(record["prompts"]) == 4


def test_a_check_that_fails_leaves_the_target_as_it_was(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_build.engine.backends.compiled import FusedMerger

    before = lora_build.build(recipe(zoo, LLAMA, tmp_path / "out", Adapter(seed=3))).manifest
    merge = FusedMerger.block

    def wrong(self: FusedMerger, rows: Any, out: memoryview, first: int, **more: Any) -> Any:
        block = merge(self, rows, out, first, **more)
        return dataclasses.replace(block, data=rows) if self._op.source.shape == (16, 32) else block

    monkeypatch.setattr(FusedMerger, "block", wrong)
    with pytest.raises(
        VerificationError, match=r"checks\.forward: .*first in model\.layers\.0\.self_attn\.k_proj.* as it was"
    ):
        lora_build.build(recipe(zoo, LLAMA, tmp_path / "out", checks={"forward": {}}))
    assert lora_build.verify(tmp_path / "out").manifest_hash == before.manifest_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_build_that_is_there_unchecked_is_checked_and_one_that_passed_is_not_run_again(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_build.proof.forward import compare as forward_check

    runs: list[Path] = []
    compare = forward_check.compare_forward
    monkeypatch.setattr(
        forward_check, "compare_forward", lambda folder, *more: runs.append(folder) or compare(folder, *more)
    )
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out"))
    assert runs == []
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "out", checks={"forward": {}}))
    assert runs == [tmp_path / "out"]
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "two", checks={"forward": {}}))
    lora_build.build(recipe(zoo, LLAMA, tmp_path / "two", checks={"forward": {}}))
    assert len(runs) == 2


def test_a_record_of_checks_that_is_none_is_no_pass(zoo: Zoo, tmp_path: Path) -> None:
    mapping = recipe(zoo, LLAMA, tmp_path / "out", checks={"forward": {}})
    before = lora_build.build(mapping).manifest
    path = tmp_path / "out" / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    statement["predicate"]["runDetails"]["byproducts"] = [{"name": "checks.forward", "annotations": {"prompts": "yes"}}]
    path.write_text(json.dumps(statement))

    assert lora_build.build(mapping).manifest.manifest_hash == before.manifest_hash


def test_a_check_can_be_asked_for_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/x.yaml").write_text("base: ./base\nadapters: [./math]\n")
    (tmp_path / "recipes/y.yaml").write_text("defaults: [x, _self_]\nchecks: {forward: {prompts: ./p.txt}}\n")
    monkeypatch.chdir(tmp_path)
    specs = [
        lora_build.load_recipe(name, overrides).checks.forward
        for name, *overrides in (
            ("x",),
            ("x", "checks.forward={}"),
            ("x", "checks.forward={seed: 4}"),
            ("x", "checks.forward.prompts=./a/p-1.txt", "checks.forward.seed=2"),
            ("y", "checks.forward.seed=3"),
            ("y", "checks.forward=null"),
        )
    ]
    assert [spec and (spec.prompts, spec.seed) for spec in specs] == [
        None, (None, 0), (None, 4), ("./a/p-1.txt", 2), ("./p.txt", 3), None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "text"),
    [(b" \n", "expected 1 to 64 lines"), (b"\xff", "is not UTF-8 text"), (b"hello", "the build has no tokenizer")],
)
def test_prompts_that_cannot_be_asked_stop_a_build_before_it_begins(
    zoo: Zoo, tmp_path: Path, content: bytes, text: str
) -> None:
    shutil.copytree(zoo.base(LLAMA), tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        if is_tokenizer_file(file.name):
            file.unlink()
    (tmp_path / "p.txt").write_bytes(content)
    mapping = recipe(zoo, LLAMA, tmp_path / "out", checks={"forward": {"prompts": str(tmp_path / "p.txt")}})

    with pytest.raises(RecipeError, match=text):
        prepare(from_mapping(mapping | {"base": str(tmp_path / "base")}))


def test_a_check_that_cannot_run_is_refused_before_anything_is_built(zoo: Zoo, tmp_path: Path) -> None:
    deeper = Adapter(edits=(("layer_replication", [[0, 2], [1, 2]]),))
    mapping = recipe(zoo, LLAMA, tmp_path / "out", deeper, checks={"forward": {}})
    with pytest.raises(SourceError, match="num_hidden_layers is not the base's; a forward check cannot run"):
        prepare(from_mapping(mapping))

    small.make_base(tmp_path / "base", architectures=["NobodyForCausalLM"], model_type="nobody")
    small.make_adapter(tmp_path / "math")
    with pytest.raises(SourceError, match="has no architecture"):
        prepare(from_mapping(small.recipe(tmp_path, checks={"forward": {}})))


@pytest.mark.parametrize(
    ("checks", "text"),
    [
        ({"forwrd": {}}, "checks.forwrd: unknown key; did you mean 'forward'?"),
        ({"forward": {"promts": "x"}}, "checks.forward.promts: unknown key; did you mean 'prompts'?"),
        ({"forward": {"seed": -1}}, "checks.forward.seed: expected a whole number, 0 or more, found the int -1"),
        ({"forward": {"seed": True}}, "checks.forward.seed: expected a whole number, 0 or more, found the bool True"),
        ({"forward": True}, "checks.forward: expected a mapping of keys to values, found the bool True"),
        ({"forward": {"prompts": "./none.txt"}}, "checks.forward.prompts: ./none.txt is not a file"),
    ],
)
def test_a_mistake_in_checks_is_named(tmp_path: Path, checks: dict[str, Any], text: str) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")

    with pytest.raises(RecipeError) as caught:
        lora_build.build(small.recipe(tmp_path, checks=checks))
    assert text in str(caught.value)
