"""A live model combines adapters as a build does, merged and unmerged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_build
from lora_build import LoraModel
from lora_build.errors import LoraBuildError
from makers.live import BF16, CODE, IDS, MATH, base_model
from makers.zoo import Zoo, quiet

TIES = {"method": "ties", "density": 0.3}


def live(zoo: Zoo, **more: object) -> LoraModel:
    with quiet():
        model = LoraModel(base_model(zoo, BF16), **more)  # type: ignore[arg-type]
        for name, adapter in {"math": MATH, "code": CODE}.items():
            model.load_adapter(zoo.adapter(BF16, adapter), name)
    model.set_adapter(["math", "code"])
    return model.eval()


@torch.no_grad()
def answer(model: LoraModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def recipe(zoo: Zoo, folder: Path, **more: object) -> dict[str, object]:
    adapters = {name: str(zoo.adapter(BF16, adapter)) for name, adapter in {"math": MATH, "code": CODE}.items()}
    return {"base": str(zoo.base(BF16)), "adapters": adapters, "output": {"dir": str(folder)}, **more}


@pytest.mark.parametrize("combine", [TIES, "dare_linear"])
def test_a_merged_model_has_the_bits_of_the_build(zoo: Zoo, tmp_path: Path, combine: object) -> None:
    lora_build.build(recipe(zoo, tmp_path / "out", combine=combine))
    built = load_file(tmp_path / "out/model.safetensors")

    merged = live(zoo, combine=combine).merge_and_unload().state_dict()

    assert {name: torch.equal(merged[name], values) for name, values in built.items()} == dict.fromkeys(built, True)


def test_an_unmerged_model_answers_as_the_merged_one(zoo: Zoo) -> None:
    model, sums = live(zoo, combine=TIES), live(zoo)
    unmerged, of_sums = answer(model), answer(sums)
    model.merge_adapter()

    assert torch.equal(unmerged, answer(model))
    assert not torch.equal(unmerged, of_sums)


def test_a_build_passes_both_checks(zoo: Zoo, tmp_path: Path) -> None:
    built = lora_build.build(recipe(zoo, tmp_path / "out", combine="dare_ties", checks={"forward": {}, "wrapper": {}}))

    assert built.passed == ("forward", "wrapper")


def test_a_word_that_no_recipe_knows_is_refused(zoo: Zoo) -> None:
    with pytest.raises(LoraBuildError, match=r"combine.densty: unknown key; did you mean 'density'"):
        LoraModel(base_model(zoo, BF16), combine={"method": "ties", "densty": 0.3})
    with pytest.raises(LoraBuildError, match="found 'tiez'; did you mean 'ties'"):
        live(zoo, combine="tiez")
