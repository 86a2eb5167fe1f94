"""Reopening a build: what its provenance and its manifest say is not taken on trust."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import SourceError, VerificationError
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, read_manifest
from lora_build.proof.reopen import reopen
from lora_build.recipe.schema import DType
from makers import small


@pytest.fixture
def built(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    lora_build.build(small.recipe(tmp_path, dtype="float32"))
    return tmp_path / "out"


def edit_recipe(folder: Path, **keys: Any) -> None:
    path = folder / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"].update(keys)
    path.write_text(json.dumps(statement))


def test_the_options_that_decide_the_bytes_are_those_of_the_manifest(built: Path) -> None:
    edit_recipe(built, dtype="keep", numerics="peft", tied_embeddings="peft")
    recipe = reopen(built, read_manifest(built)).recipe

    assert (recipe.dtype, recipe.numerics.value, recipe.tied_embeddings.value) == (DType.float32, "exact", "untie")


@pytest.mark.parametrize("options", [{"dtype": "float4"}, {"numerics": "quick-1"}, {"tied": 3}])
def test_an_option_that_nobody_knows_is_named(built: Path, options: dict[str, Any]) -> None:
    manifest = read_manifest(built)
    plan = dataclasses.replace(manifest.plan, options={**manifest.plan.options, **options})
    (built / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, plan=plan).to_bytes())

    with pytest.raises(VerificationError, match="options that this version does not know"):
        reopen(built, read_manifest(built))


def test_a_provenance_whose_recipe_lacks_an_input_is_an_error(built: Path) -> None:
    path = built / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        entry["uri"] = f"hf://org/{entry['name']}@0123abc/{entry['uri'].rpartition('/')[2]}"
    path.write_text(json.dumps(statement))
    edit_recipe(built, adapters={})

    with pytest.raises(VerificationError, match=r"its recipe lacks an input that was read(.|\n)*was edited or made up"):
        reopen(built, read_manifest(built))


@pytest.mark.parametrize(
    "keys",
    [{"adapters": {"a\0": 1}}, {"base": 7}, {"dtype": "float4"}, {"base": {"source": "./b\0"}}, {"nobody": "knows"}],
)
def test_a_recipe_that_somebody_made_up_fails_the_verification(built: Path, keys: dict[str, Any]) -> None:
    edit_recipe(built, **keys)

    with pytest.raises(VerificationError, match=f"{PROVENANCE_NAME} was edited or made up"):
        lora_build.verify(built, forward=True)


def test_inputs_are_not_looked_for_where_the_provenance_of_another_build_says(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built / PROVENANCE_NAME
    path.write_text(path.read_text().replace("sha256:", "sha256:0"))
    edit_recipe(built, base={"source": "/nowhere"})

    with pytest.raises(VerificationError, match="is of another manifest"):
        lora_build.verify(built, forward=True)
    assert main(["verify", "--forward", str(built)]) == 3
    assert "is of another manifest" in capsys.readouterr().err


def test_inputs_that_are_elsewhere_by_now_are_missing(built: Path) -> None:
    (built.parent / "base").rename(built.parent / "moved")

    with pytest.raises(SourceError, match="base"):
        lora_build.verify(built, forward=True)


def test_every_input_that_changed_is_an_issue(built: Path) -> None:
    (built.parent / "base/config.json").write_text((built.parent / "base/config.json").read_text() + " ")
    small.edit(built.parent / "math", lora_B__weight=small.values(77, 8, 2))
    with pytest.raises(VerificationError, match="its inputs are no longer what it was made of") as caught:
        reopen(built, read_manifest(built))

    assert len(caught.value.issues) == 2
    assert "config.json has " in caught.value.issues[0]
    assert caught.value.issues[1].startswith("adapters.math: ")


def test_every_file_that_differs_is_an_issue(built: Path) -> None:
    (built / "tokenizer.json").unlink()
    (built / "new.bin").write_text("x")
    with pytest.raises(VerificationError) as caught:
        lora_build.verify(built)

    assert caught.value.issues == ("tokenizer.json: is missing", "new.bin: is not in the manifest")
