"""Where inputs are looked for: by what provenance says, at the first root that has all of them."""

from pathlib import Path

import pytest

from lora_build.files.identity import BASE, SourceName
from lora_build.proof.places import how_to_say, placed
from lora_build.proof.wanted import Places
from lora_build.recipe.validate import from_mapping

MATH, CODE = SourceName.of_adapter("math"), SourceName.of_adapter("code")


def test_the_first_root_that_has_the_folders_is_taken_whatever_is_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "here/math").mkdir(parents=True)
    recipe = from_mapping({"base": "acme/base", "adapters": {"math": "./math"}})

    assert placed(recipe, Places(), [tmp_path / "gone", tmp_path / "here"]).root == str(tmp_path / "here")
    assert placed(recipe, Places(), [tmp_path / "gone"]).root == str(tmp_path / "gone")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("acme/code", "add --base PATH --adapter code=PATH"),
        ("/loras/code", "add --base PATH --adapter code=PATH"),
        ("../code", "add --base PATH --adapter code=PATH, or --root DIR where ../code begins"),
    ],
)
def test_a_root_is_spoken_of_only_where_a_path_begins_there(code: str, said: str) -> None:
    recipe = from_mapping({"base": "acme/base", "adapters": {"code": code, "math": "./math"}})

    assert how_to_say(recipe, [BASE, CODE]) == said
    assert how_to_say(recipe, [MATH]) == "add --adapter math=PATH, or --root DIR where ./math begins"
