"""`checks.wrapper`: a merge in memory has the bytes of the build, or the check is refused before anything is built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lora_build
from lora_build.errors import PlanError, SourceError, VerificationError
from lora_build.pipeline import memory_bytes, prepare
from lora_build.proof import wrapper_check
from lora_build.proof.forward.inputs import LENGTHS
from lora_build.proof.manifest import PROVENANCE_NAME
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.zoo import Adapter, Base, Zoo, quiet

DORA = (("use_dora", True),)
RSLORA = (("use_rslora", True),)
SAVED = (("modules_to_save", ["lm_head"]),)
BIAS = (("bias", "all"),)
WRAPPER: dict[str, Any] = {"checks": {"wrapper": {}}}


def recipe(zoo: Zoo, base: Base, out: Path, *adapters: Adapter, **more: Any) -> dict[str, Any]:
    specs = {
        f"a{i}": {"source": str(zoo.adapter(base, spec)), "weight": 1.0 if i == 0 else 0.5}
        for i, spec in enumerate(adapters or (Adapter(),))
    }
    return {"base": str(zoo.base(base)), "adapters": specs, "output": {"dir": str(out)}} | WRAPPER | more


def passed(folder: Path) -> Any:
    """Return what provenance says of the check."""
    statement = json.loads((folder / PROVENANCE_NAME).read_text())
    (found,) = (one for one in statement["predicate"]["runDetails"]["byproducts"] if one["name"] == "checks.wrapper")
    return found["annotations"]


CASES = {
    "float32": (Base(), [Adapter()], {}),
    "bfloat16": (Base(dtype="bfloat16"), [Adapter(dtype="bfloat16")], {}),
    "float16": (Base(dtype="float16"), [Adapter()], {}),
    "norms in float32": (Base(dtype="bfloat16", fp32_norms=True), [Adapter()], {}),
    "shards": (Base(dtype="bfloat16", sharded=True), [Adapter()], {}),
    "other shards": (Base(dtype="bfloat16"), [Adapter()], {"max_shard_size": "15KB"}),
    "three adapters": (Base(dtype="bfloat16"), [Adapter(), Adapter(seed=1, rank=2), Adapter(seed=2)], {}),
    "dora": (Base(dtype="bfloat16"), [Adapter(options=DORA), Adapter(seed=1, options=RSLORA)], {}),
    "saved modules": (Base(dtype="bfloat16"), [Adapter(options=SAVED)], {}),
    "a tie that is cut": (
        Base(arch="llama_tied", dtype="bfloat16"), [Adapter(targets=("embed_tokens", "q_proj"))], {},
    ),
    "a tied head that is stored": (Base(arch="llama_tied", dtype="bfloat16", both_tied=True), [Adapter()], {}),
    "gpt2 without its prefix": (Base(arch="gpt2", dtype="float16", bare=True), [Adapter()], {}),
    "t5": (Base(arch="t5", dtype="float16"), [Adapter()], {}),
    "bert": (Base(arch="bert"), [Adapter(options=BIAS)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merge_in_memory_has_the_bytes_of_the_build(zoo: Zoo, tmp_path: Path, case: str) -> None:
    base, adapters, output = CASES[case]
    built = lora_build.build(
        recipe(zoo, base, tmp_path / "out", *adapters) | {"output": {"dir": str(tmp_path / "out")} | output}
    )
    not_held = ["lm_head.weight"] if case == "a tied head that is stored" else []
    assert passed(tmp_path / "out") == {
        "num_tensors": len(built.manifest.tensors) - len(not_held),
        "not_held": not_held,
    }


def test_a_stack_of_experts_is_merged_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    with quiet():
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "base")
        lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        peft.save_pretrained(str(tmp_path / "math"))
    built = lora_build.build(small.recipe(tmp_path) | WRAPPER)

    assert passed(tmp_path / "out") == {"num_tensors": len(built.manifest.tensors), "not_held": []}


def test_a_build_that_a_merge_in_memory_does_not_give_is_not_published(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapters of the live model have twice their weight, all others being right."""
    attach = wrapper_check.attach_adapters

    def doubled(*args: Any) -> Any:
        wrapped = attach(*args)
        wrapped.set_scale("a0", 2.0)
        return wrapped

    monkeypatch.setattr(wrapper_check, "attach_adapters", doubled)
    base = Base(dtype="bfloat16")
    with pytest.raises(VerificationError, match=r"checks\.wrapper: .* to other bytes, in .*_proj\.weight") as caught:
        lora_build.build(recipe(zoo, base, tmp_path / "out"))
    assert "embed_tokens" not in str(caught.value)
    assert str(caught.value).endswith(f"{tmp_path / 'out'} is as it was")
    assert not (tmp_path / "out").exists()


def test_a_finished_build_is_held_to_a_merge_in_memory(zoo: Zoo, tmp_path: Path) -> None:
    built = lora_build.build(recipe(zoo, Base(dtype="bfloat16"), tmp_path / "out", checks={}))
    found = lora_build.verify(tmp_path / "out", wrapper=True)

    assert found.wrapper == wrapper_check.WrapperReport(num_tensors=len(built.manifest.tensors))
    assert (found.forward, found.problems) == (None, ())


def test_a_finished_build_of_other_weights_does_not_pass(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_build.build(recipe(zoo, Base(dtype="bfloat16"), tmp_path / "out", checks={}))
    attach = wrapper_check.attach_adapters

    def without(model: Any, inputs: Any) -> Any:
        wrapped = attach(model, inputs)
        wrapped.set_scale("a0", 0.0)
        return wrapped

    monkeypatch.setattr(wrapper_check, "attach_adapters", without)
    with pytest.raises(VerificationError, match="merges base and adapters in memory to other bytes"):
        lora_build.verify(tmp_path / "out", wrapper=True)


def test_a_finished_build_that_no_model_in_memory_can_be_is_said_to_be_such(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, Base(), tmp_path / "out", checks={}, dtype="bfloat16"))
    with pytest.raises(SourceError, match=r"cannot be held to a merge in memory:\n  dtype: bfloat16 would round twice"):
        lora_build.verify(tmp_path / "out", wrapper=True)


def test_prompts_are_for_the_forward_check_alone(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, Base(), tmp_path / "out", checks={}))
    with pytest.raises(lora_build.RecipeError, match="prompts are what forward=True asks"):
        lora_build.verify(tmp_path / "out", wrapper=True, prompts="p.txt")


def test_a_report_on_no_tensor_at_all_is_not_one_of_success() -> None:
    report = wrapper_check.WrapperReport(num_tensors=0, not_held=("w",))

    assert not report.is_ok
    assert report.problem == "the model in memory has no tensor of the build, so there is nothing to compare"


def test_a_build_that_is_there_is_checked_once(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, calls = wrapper_check.compare_with_wrapper, []
    monkeypatch.setattr(wrapper_check, "compare_with_wrapper", lambda *args: calls.append(1) or compare(*args))
    lora_build.build(recipe(zoo, Base(), tmp_path / "out", checks={}))
    before = (tmp_path / "out/model.safetensors").stat()
    lora_build.build(recipe(zoo, Base(), tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").stat() == before
    assert calls == [1]

    lora_build.build(recipe(zoo, Base(), tmp_path / "new"))
    lora_build.build(recipe(zoo, Base(), tmp_path / "new"))
    assert calls == [1, 1]


def test_the_plan_counts_the_model_into_the_memory(zoo: Zoo, tmp_path: Path) -> None:
    plain, wrapper, forward = (
        memory_bytes(prepare(from_mapping(recipe(zoo, Base(), tmp_path / "out", checks=checks))))
        for checks in ({}, {"wrapper": {}}, {"forward": {}})
    )
    size = (zoo.base(Base()) / "model.safetensors").stat().st_size
    answers = 40 * sum(LENGTHS) * json.loads((zoo.base(Base()) / "config.json").read_text())["vocab_size"]
    assert wrapper >= plain + 0.9 * size
    assert forward >= plain + answers + 1.9 * size  # in float32, and as it is stored


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"dtype": "bfloat16"}, "checks.wrapper: dtype: bfloat16 would round twice"),
        ({"numerics": "peft"}, "checks.wrapper: numerics: peft is peft's merge"),
    ],
)
def test_what_the_wrapper_cannot_do_is_refused_before_anything_is_built(
    zoo: Zoo, tmp_path: Path, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(PlanError) as caught:
        prepare(from_mapping(recipe(zoo, Base(), tmp_path / "out", **more)))
    assert text in str(caught.value)
    assert str(caught.value).endswith("leave it out")


def test_every_reason_is_named_at_once(zoo: Zoo, tmp_path: Path) -> None:
    base = Base(dtype="bfloat16")
    deeper = Adapter(edits=(("layer_replication", [[0, 2], [1, 2]]),))
    with pytest.raises(PlanError) as caught:
        prepare(from_mapping(recipe(zoo, base, tmp_path / "out", deeper, dtype="float16")))
    text = str(caught.value)
    assert "dtype: float16 would round twice" in text
    assert "the adapters change the model's num_hidden_layers" in text
    assert "the adapters change the model's dtype" not in text


def test_the_config_of_an_adapter_beside_the_base_s_files_makes_no_adapter_of_them(zoo: Zoo, tmp_path: Path) -> None:
    """As trainers leave it; transformers would look for the adapter."""
    base = Base(dtype="bfloat16")
    shutil.copytree(zoo.base(base), tmp_path / "base")
    shutil.copy(zoo.adapter(base, Adapter(seed=3)) / "adapter_config.json", tmp_path / "base")
    mapping = recipe(zoo, base, tmp_path / "out", checks={"wrapper": {}, "forward": {}})
    lora_build.build(mapping | {"base": str(tmp_path / "base")})

    assert passed(tmp_path / "out")["not_held"] == []


def test_a_base_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", architectures=["NobodyForCausalLM"], model_type="nobody")
    small.make_adapter(tmp_path / "math")
    with pytest.raises(PlanError, match=r"checks\.wrapper: .*has no architecture \['NobodyForCausalLM'\]"):
        prepare(from_mapping(small.recipe(tmp_path) | WRAPPER))


def test_a_parameter_of_several_dtypes_has_no_model_in_memory(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_build.models.parameters import Part
    from lora_build.wrapper.live_model import LiveModel, Place

    place = Place(parameter="model.norm.weight", part=Part(name="x"))
    monkeypatch.setattr(LiveModel, "places", lambda *_: (place,))
    with pytest.raises(SourceError, match=r"model\.norm\.weight is stored in several dtypes"):
        lora_build.build(recipe(zoo, Base(dtype="bfloat16", fp32_norms=True), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
