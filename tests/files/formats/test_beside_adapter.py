"""What lies beside an adapter: other trained weights are an error, what training left behind a note."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lora_build
from lora_build.errors import PlanError
from lora_build.files.formats.beside_adapter import look_beside
from lora_build.pipeline import prepare
from lora_build.planning.plan import MergePlan
from lora_build.recipe.validate import from_mapping
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


def write_modules(folder: Path, *, pooling: str = "mean", dense: str = "x", version: str = "5.0", **more: str) -> Path:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    files = {
        "modules.json": json.dumps([{"path": path, "type": f"st.v{version}.{kind}"} for path, kind in kinds.items()]),
        "config_sentence_transformers.json": json.dumps({"__version__": version, "prompts": {}}),
        "1_Pooling/config.json": json.dumps({"pooling_mode": pooling}),
        "2_Dense/model.safetensors": dense,
        **more,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def embedding_model(root: Path, **modules: str) -> MergePlan:
    """Plan an adapter with modules of sentence-transformers on the base beside it."""
    write_modules(small.make_adapter(root / "math"), **modules)
    return prepare(from_mapping(small.recipe(root))).merge_plan


def test_modules_that_are_the_bases_own_are_nothing_to_speak_of(tmp_path: Path) -> None:
    write_modules(small.make_base(tmp_path / "base"))
    plan = embedding_model(tmp_path, version="6.1")

    assert not any("modules" in note for note in plan.notes)
    assert plan.side_files["2_Dense/model.safetensors"] == "base"
    assert plan.left_out["adapters.math"] == {
        "1_Pooling/": "the same as the base's", "2_Dense/": "the same as the base's",
        "config_sentence_transformers.json": "the same as the base's", "modules.json": "the same as the base's",
    }  # fmt: skip


def test_settings_of_modules_that_are_not_the_bases_are_a_note(tmp_path: Path) -> None:
    write_modules(small.make_base(tmp_path / "base"))
    plan = embedding_model(tmp_path, pooling="cls")

    assert [note for note in plan.notes if "modules" in note] == [
        "adapters.math: its modules of sentence-transformers are not the base's (1_Pooling/config.json), and what the base "
        "has of them goes along: pooling, normalisation and prompts may be others than in training; to have those of the "
        "adapter, copy these files into a copy of the base"
    ]
    assert plan.left_out["adapters.math"]["1_Pooling/"] == "a module's, of which the base's go along"
    for name in ("1_Pooling/config.json", "modules.json"):
        shutil.copy(tmp_path / "math" / name, tmp_path / "base" / name)
    assert not any("modules" in note for note in prepare(from_mapping(small.recipe(tmp_path))).merge_plan.notes)


@pytest.mark.parametrize("is_plain", [True, False])
def test_weights_of_modules_that_the_base_has_not_are_refused_until_it_has_them(tmp_path: Path, is_plain: bool) -> None:
    base = small.make_base(tmp_path / "base")
    if not is_plain:
        write_modules(base, dense="y")
    with pytest.raises(lora_build.LoraBuildError) as caught:
        embedding_model(tmp_path)

    assert str(caught.value).endswith(
        "adapters.math: 2_Dense/model.safetensors of its modules is not the base's, and only adapter_model.safetensors is "
        "merged; copy modules.json and the folders that it names into a copy of the base to build with them, or list them "
        "in adapters.math.ignore_files to build without"
    )
    shutil.copy(tmp_path / "math/modules.json", base)
    for folder in ("1_Pooling", "2_Dense"):
        shutil.copytree(tmp_path / "math" / folder, base / folder, dirs_exist_ok=True)
    plan = prepare(from_mapping(small.recipe(tmp_path))).merge_plan
    assert plan.side_files["2_Dense/model.safetensors"] == "base"


def test_what_ends_up_in_no_folder_of_the_model_is_called_what_it_is(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    folder = small.make_adapter(tmp_path / "math")
    (folder / "runs").mkdir()
    for name in ("runs/loss.png", "runs/tokenizer.json"):
        (folder / name).touch()

    left = prepare(from_mapping(small.recipe(tmp_path))).merge_plan.left_out["adapters.math"]
    assert left == {"runs/": "no part of an adapter"}
