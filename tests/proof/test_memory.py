"""`engine: memory`: a build by way of a live model has the bytes of the streamed one, or is refused before it begins."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from makers import small
from makers.pico import PicoAdapter, PicoBase, Zoo, quiet
from peft import LoraConfig, get_peft_model

import lora_build
from lora_build.engine import execute as engine
from lora_build.errors import MergeError, PlanError
from lora_build.pipeline import memory_bytes, prepare
from lora_build.proof.manifest import PROVENANCE_NAME
from lora_build.recipe.validate import from_mapping

DORA = (("use_dora", True),)
RSLORA = (("use_rslora", True),)
SAVED = (("modules_to_save", ["lm_head"]),)
BIAS = (("bias", "all"),)


def recipe(zoo: Zoo, base: PicoBase, out: Path, *adapters: PicoAdapter, **more: Any) -> dict[str, Any]:
    specs = {
        f"a{i}": {"source": str(zoo.adapter(base, spec)), "weight": 1.0 if i == 0 else 0.5}
        for i, spec in enumerate(adapters or (PicoAdapter(),))
    }
    return {"base": str(zoo.base(base)), "adapters": specs, "output": {"dir": str(out)}} | more


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of a build but the one that says when."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != PROVENANCE_NAME}


CASES = {
    "float32": (PicoBase(), [PicoAdapter()], {}),
    "bfloat16": (PicoBase(dtype="bfloat16"), [PicoAdapter(dtype="bfloat16")], {}),
    "float16": (PicoBase(dtype="float16"), [PicoAdapter()], {}),
    "norms in float32": (PicoBase(dtype="bfloat16", fp32_norms=True), [PicoAdapter()], {}),
    "shards": (PicoBase(dtype="bfloat16", shard_size="20KB"), [PicoAdapter()], {}),
    "other shards": (PicoBase(dtype="bfloat16"), [PicoAdapter()], {"max_shard_size": "15KB"}),
    "three adapters": (PicoBase(dtype="bfloat16"), [PicoAdapter(), PicoAdapter(seed=1, rank=2), PicoAdapter(seed=2)], {}),
    "dora": (PicoBase(dtype="bfloat16"), [PicoAdapter(options=DORA), PicoAdapter(seed=1, options=RSLORA)], {}),
    "saved modules": (PicoBase(dtype="bfloat16"), [PicoAdapter(options=SAVED)], {}),
    "a tie that is cut": (
        PicoBase(arch="llama_tied", dtype="bfloat16"), [PicoAdapter(targets=("embed_tokens", "q_proj"))], {},
    ),
    "a tied head that is stored": (PicoBase(arch="llama_tied", dtype="bfloat16", both_tied=True), [PicoAdapter()], {}),
    "gpt2 without its prefix": (PicoBase(arch="gpt2", dtype="float16", bare=True), [PicoAdapter()], {}),
    "t5": (PicoBase(arch="t5", dtype="float16"), [PicoAdapter()], {}),
    "bert": (PicoBase(arch="bert"), [PicoAdapter(options=BIAS)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_memory_builds_what_streaming_builds(zoo: Zoo, tmp_path: Path, case: str) -> None:
    base, adapters, output = CASES[case]
    streamed, built = (
        lora_build.build(
            recipe(zoo, base, tmp_path / kind, *adapters, engine=kind)
            | {"output": {"dir": str(tmp_path / kind)} | output}
        )
        for kind in ("stream", "memory")
    )
    assert built.manifest_hash == streamed.manifest_hash
    assert files(tmp_path / "memory") == files(tmp_path / "stream")


def test_an_expert_stack_is_written_as_it_was_read(tmp_path: Path) -> None:
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
    streamed = lora_build.build(small.recipe(tmp_path))
    built = lora_build.build(small.recipe(tmp_path, engine="memory", output={"dir": str(tmp_path / "memory")}))

    assert built.manifest_hash == streamed.manifest_hash


def test_the_tensors_that_are_written_are_those_of_the_model(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are read from it, and one that is not what the files give stops the build."""
    base, asked = PicoBase(dtype="bfloat16"), []
    from lora_build.proof import memory

    merge = memory.merge_in_memory

    def spied(*inputs: Any) -> engine.Held:
        held = merge(*inputs)
        return lambda operation: asked.append((operation.name, held(operation) is not None)) or held(operation)

    monkeypatch.setattr(memory, "merge_in_memory", spied)
    manifest = lora_build.build(recipe(zoo, base, tmp_path / "out", engine="memory"))
    assert sorted(asked) == [(tensor.name, True) for tensor in manifest.tensors]

    wrong = memoryview(bytearray(1 << 20))
    monkeypatch.setattr(memory, "merge_in_memory", lambda *_: lambda _: wrong)
    with pytest.raises(MergeError, match="of the model in memory is not what its files and the adapters give"):
        lora_build.build(recipe(zoo, base, tmp_path / "new", engine="memory"))
    assert not (tmp_path / "new").exists()


def test_a_build_in_memory_is_up_to_date_for_a_streamed_recipe(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, PicoBase(), tmp_path / "out", engine="memory"))
    before = (tmp_path / "out/model.safetensors").stat()
    lora_build.build(recipe(zoo, PicoBase(), tmp_path / "out"))

    assert (tmp_path / "out/model.safetensors").stat() == before


def test_the_plan_counts_the_model_into_the_memory(zoo: Zoo, tmp_path: Path) -> None:
    stream, memory, checked = (
        memory_bytes(prepare(from_mapping(recipe(zoo, PicoBase(), tmp_path / "out", **more))))
        for more in ({}, {"engine": "memory"}, {"checks": {"forward": {}}})
    )
    size = (zoo.base(PicoBase()) / "model.safetensors").stat().st_size
    assert memory >= stream + 0.9 * size
    assert checked >= stream + 1.5 * size


def _unknown(folder: Path) -> dict[str, Any]:
    small.make_base(folder / "base", architectures=["NobodyForCausalLM"], model_type="nobody")
    small.make_adapter(folder / "math")
    return small.recipe(folder)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"dtype": "bfloat16"}, "engine: memory: dtype: bfloat16 would round twice"),
        ({"numerics": "peft"}, "engine: memory: numerics: peft is peft's merge"),
    ],
)
def test_what_memory_cannot_do_is_refused_before_anything_is_read(
    zoo: Zoo, tmp_path: Path, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(PlanError) as caught:
        prepare(from_mapping(recipe(zoo, PicoBase(), tmp_path / "out", engine="memory", **more)))
    assert text in str(caught.value)
    assert str(caught.value).endswith("set engine: stream")


def test_every_reason_is_named_at_once(zoo: Zoo, tmp_path: Path) -> None:
    base = PicoBase(dtype="bfloat16")
    deeper = PicoAdapter(edits=(("layer_replication", [[0, 2], [1, 2]]),))
    with pytest.raises(PlanError) as caught:
        prepare(from_mapping(recipe(zoo, base, tmp_path / "out", deeper, engine="memory", dtype="float16")))
    text = str(caught.value)
    assert "dtype: float16 would round twice" in text
    assert "the adapters change the model's num_hidden_layers" in text
    assert "the adapters change the model's dtype" not in text


def test_an_adapter_beside_the_base_s_files_is_not_loaded_with_them(zoo: Zoo, tmp_path: Path) -> None:
    """As trainers leave them; transformers would put it into the model."""
    base = PicoBase(dtype="bfloat16")
    shutil.copytree(zoo.base(base), tmp_path / "base")
    shutil.copytree(zoo.adapter(base, PicoAdapter(seed=3)), tmp_path / "base", dirs_exist_ok=True)
    mapping = recipe(zoo, base, tmp_path / "stream") | {"base": str(tmp_path / "base")}
    streamed = lora_build.build(mapping)
    built = lora_build.build(mapping | {"engine": "memory", "output": {"dir": str(tmp_path / "memory")}})

    assert built.manifest_hash == streamed.manifest_hash
    assert lora_build.verify_forward(tmp_path / "stream").is_ok


def test_a_base_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"engine: memory: .*has no architecture \['NobodyForCausalLM'\]"):
        prepare(from_mapping(_unknown(tmp_path) | {"engine": "memory"}))


def test_another_number_of_layers_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    base = PicoBase(dtype="bfloat16")
    edits = (("layer_replication", [[0, 2], [1, 2]]),)
    with pytest.raises(PlanError, match="engine: memory: the adapters change the model's num_hidden_layers"):
        prepare(from_mapping(recipe(zoo, base, tmp_path / "out", PicoAdapter(edits=edits), engine="memory")))


def test_a_mistake_in_the_engine_s_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        lora_build.RecipeError, match=r"engine: expected one of stream, memory, found 'memry'; did you mean 'memory'\?"
    ):
        from_mapping(small.recipe(tmp_path, engine="memry"))


def test_provenance_names_the_engine(zoo: Zoo, tmp_path: Path) -> None:
    lora_build.build(recipe(zoo, PicoBase(), tmp_path / "out", engine="memory"))
    statement = json.loads((tmp_path / "out" / PROVENANCE_NAME).read_text())

    assert statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["engine"] == "memory"
