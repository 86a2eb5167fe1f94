"""What lies beside an adapter: other trained weights are an error, what training left behind a note."""

from pathlib import Path

import pytest
import torch

import lora_build
from lora_build.errors import PlanError
from lora_build.files.formats.beside_adapter import look_beside
from lora_build.wrapper.adapters import LoadedAdapter
from makers import small

OWN = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin", "non_lora_state_dict.bin", "value_head.safetensors", "value_head.bin", "vit.safetensors",
        "trainable_params.bin", "pytorch_model.bin", "mm_projector.bin", "new_embeddings.pt", "model.safetensors",
        "adapters.npz", "projector/model.safetensors", "vision_tower/pytorch_model.bin", "2_Dense/pytorch_model.bin", "HEAD.PTH", "merger.ckpt",
    ],
)  # fmt: skip
def test_other_weights_are_a_problem_that_names_them_and_what_to_do(name: str) -> None:
    (problem,) = look_beside([*OWN, name, "README.md"], where="adapters.math").problems

    assert problem.startswith(f"adapters.math: {name} may hold weights that were trained with it")
    assert "list them in adapters.math.ignore_files" in problem
    left_aside = look_beside([*OWN, name], where="adapters.math", ignore_files=[name])
    assert (left_aside.problems, left_aside.notes) == ((), (f"built without {name}, as ignore_files says",))


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"),
         "the state of its training is left aside: optimizer.pt, rng_state_0.pth, scheduler.pt and 1 more"),
        (("global_step10/mp_rank_00_model_states.pt",),
         "the state of its training is left aside: global_step10/mp_rank_00_model_states.pt"),
        (("checkpoint-500/adapter_model.safetensors", "checkpoint-500/adapter_config.json"),
         "the state of its training is left aside: checkpoint-500/adapter_model.safetensors"),
        (("random_states_0.pkl", "runs/x/weights.bin"),
         "the state of its training is left aside: random_states_0.pkl, runs/x/weights.bin"),
        (("adapter_model.bin",), "adapter_model.bin is not read: adapter_model.safetensors is there"),
        (("code/adapter_config.json", "code/adapter_model.safetensors"),
         "other adapters or models in it are left aside: code/"),
        (("merged/config.json", "merged/tokenizer_config.json", "merged/model.safetensors"),
         "other adapters or models in it are left aside: merged/"),
    ],
)  # fmt: skip
def test_what_training_left_behind_is_a_note(names: tuple[str, ...], note: str) -> None:
    found = look_beside([*OWN, *names], where="adapters.math")

    assert (found.problems, found.notes) == ((), (note,))


@pytest.mark.parametrize(
    "name",
    ["README.md", "tokenizer.model", "tokenizer.json", "trainer_state.json", "runs/events.out.tfevents.1", "a.gguf", "loss.png"],
)  # fmt: skip
def test_what_holds_no_weights_is_nothing_to_speak_of(name: str) -> None:
    found = look_beside([*OWN, name], where="adapters.math")

    assert (found.problems, found.notes) == ((), ())


def test_a_pattern_that_matches_nothing_is_a_note_and_leaves_the_problem() -> None:
    found = look_beside([*OWN, "value_head.bin"], where="adapters.math", ignore_files=["value_haed.*"])

    assert found.notes == ("no file matches value_haed.* of ignore_files",)
    assert len(found.problems) == 1


def test_a_pattern_that_matches_the_adapter_itself_is_a_problem() -> None:
    (problem,) = look_beside([*OWN, "value_head.bin"], where="adapters.math", ignore_files=["*"]).problems

    assert problem == "adapters.math.ignore_files: '*' matches the adapter's own files, which a merge is made of"


def test_a_build_stops_at_them_and_goes_on_without_them_to_the_same_manifest(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    before = lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "one")})).manifest
    torch.save({}, tmp_path / "math" / "value_head.bin")

    with pytest.raises(PlanError, match=r"value_head\.bin may hold weights"):
        lora_build.build(small.recipe(tmp_path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="no option 'ignore_fils'"):
        lora_build.LoraModel.from_pretrained(torch.nn.Module(), tmp_path / "math", ignore_fils=["value_*"])
    LoadedAdapter.open(tmp_path / "math", "math", ignore_files=["value_*"])
    (problem,) = lora_build.inspect(tmp_path / "math").problems
    assert "value_head.bin may hold weights" in problem

    adapters = {"math": {"source": str(tmp_path / "math"), "ignore_files": ["value_*"]}}
    recipe = small.recipe(tmp_path, adapters=adapters)
    assert (
        "adapters.math: built without value_head.bin, as ignore_files says" in lora_build.plan(recipe).merge_plan.notes
    )
    after = lora_build.build(recipe).manifest
    assert (after.build_key, after.weights_digest) == (before.build_key, before.weights_digest)
