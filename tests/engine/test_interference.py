"""How adapters go together, from their factors alone, beside what peft merges of each by itself."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_build import pipeline
from lora_build.engine.interference import Interference, interference
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.zoo import Adapter, Base, Zoo


def found(base: Path, *adapters: Path, **more: object) -> Interference:
    """Return what is found of adapters on a base, by the last part of a tensor's name but `weight`."""
    entries = {f"a{i}": {"source": str(adapter), **more} for i, adapter in enumerate(adapters)}
    plan = pipeline.survey(
        from_mapping({"base": str(base), "adapters": entries, "output": {"dir": str(base.parent / "out")}})
    )
    return interference(plan.merge_plan, plan.sources, lambda name: name.split(".")[-2])


def deltas(zoo: Zoo, base: Base, adapter: Adapter) -> dict[str, torch.Tensor]:
    before = {name: tensor for path in zoo.base(base).glob("*.safetensors") for name, tensor in load_file(path).items()}
    after = zoo.reference(base, (adapter,)).tensors
    return {name: after[name].double() - tensor.double() for name, tensor in before.items() if name in after}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_the_cosine_is_that_of_what_peft_adds(zoo: Zoo, arch: str) -> None:
    base, experts = Base(arch=arch), arch == "mixtral"
    pair = Adapter(experts=experts), Adapter(seed=3, rank=6, alpha=3, experts=experts)
    result = found(zoo.base(base), *(zoo.adapter(base, adapter) for adapter in pair))
    one, other = (deltas(zoo, base, adapter) for adapter in pair)
    inner = sum(float((one[name] * other[name]).sum()) for name in one)
    norms = [math.sqrt(sum(float((delta**2).sum()) for delta in of.values())) for of in (one, other)]
    (found_pair,) = result.pairs
    assert (found_pair.first, found_pair.second, result.left_out) == ("a0", "a1", ())
    assert found_pair.whole.cosine == pytest.approx(inner / math.prod(norms), abs=1e-5)
    touched = {name for name in one if one[name].any() and other[name].any()}
    assert found_pair.whole.tensors == touched
    assert set(found_pair.groups) == {name.split(".")[-2] for name in touched}


def test_signs_are_counted_on_rows_that_are_made(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")  # eight rows, so all of them are looked at
    for name, seed in (("one", 50), ("other", 91)):
        small.make_adapter(tmp_path / name, seed=seed)
    (pair,) = found(base, tmp_path / "one", tmp_path / "other").pairs
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other")]
    opposed = signed = 0
    for module in small.MODULES:
        A, B = (
            [file[f"base_model.model.{module}.lora_{role}.weight"].double() for file in files] for role in ("A", "B")
        )
        product = (B[0] @ A[0]).sign() * (B[1] @ A[1]).sign()
        opposed, signed = opposed + int((product < 0).sum()), signed + int((product != 0).sum())
    assert (pair.whole.num_opposed, pair.whole.num_signed) == (opposed, signed)


def test_an_adapter_and_itself_are_one_and_its_negative_minus_one(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "one")
    small.make_adapter(tmp_path / "same")
    (pair,) = found(base, tmp_path / "one", tmp_path / "same").pairs
    assert (pair.whole.cosine, pair.whole.opposed) == (pytest.approx(1.0), 0.0)
    small.make_adapter(tmp_path / "negative", scale=-0.1)
    (pair,) = found(base, tmp_path / "one", tmp_path / "negative").pairs
    assert (pair.whole.cosine, pair.whole.opposed) == (pytest.approx(-1.0), 1.0)


def test_what_has_no_direction_has_no_cosine(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "one")
    small.make_adapter(tmp_path / "zero", scale=0.0)
    (pair,) = found(base, tmp_path / "one", tmp_path / "zero").pairs
    assert (pair.whole.cosine, pair.whole.opposed) == (None, None)


def test_tensors_where_an_adapter_is_no_product_are_named(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "one")
    small.make_adapter(tmp_path / "dora", seed=90, use_dora=True)
    file = tmp_path / "dora/adapter_model.safetensors"
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(8) for module in small.MODULES}
    save_file(load_file(file) | magnitudes, file)
    result = found(base, tmp_path / "one", tmp_path / "dora")
    assert (result.pairs, result.left_out) == ((), tuple(f"{module}.weight" for module in small.MODULES))
