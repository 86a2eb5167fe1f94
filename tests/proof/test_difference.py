"""What two plans differ in: the input or option that did it, and how many tensors that affects."""

import dataclasses
from typing import Any

import pytest

from lora_build.files.identity import BASE, Digest, FileRecord, SourceName
from lora_build.proof.difference import Side, compare
from lora_build.proof.plan_record import AdapterRecord, PlanRecord
from lora_build.proof.planned_tensor import PlannedTensor, SegmentRecord, TensorRef, UpdateRecord
from lora_build.proof.sides import adapter_names

WEIGHTS = "adapter_model.safetensors"
MATH, TEXT = SourceName.of_adapter("math"), SourceName.of_adapter("text")


def file(path: str, content: str) -> FileRecord:
    return FileRecord(path=path, size_bytes=len(content), sha256=Digest.sha256(content.encode()))


def adapter(content: str, weight: float = 1.0, config: str = "{}") -> AdapterRecord:
    return AdapterRecord(files=(file("adapter_config.json", config), file(WEIGHTS, content)), weight=weight)


def tensor(name: str, *places: int, file: str = "model.safetensors", **more: Any) -> PlannedTensor:
    updates = tuple(
        UpdateRecord(
            adapter=place, method="LORA", scale=1.0, more={},
            factors={"A": TensorRef(adapter=place, file=WEIGHTS, name=f"{name}.A")},
        )
        for place in places
    )  # fmt: skip
    segments = (SegmentRecord(start=0, stop=4, updates=updates),) if places else ()
    operation = "merge" if places else "copy"
    made = PlannedTensor(name=name, dtype="BF16", shape=(4, 4), file=file, operation=operation, segments=segments)
    return dataclasses.replace(made, **more)


def side(*adapters: AdapterRecord, names: tuple[str, ...] | None = ("math", "text"), **more: Any) -> Side:
    found: dict[str, Any] = {
        "options": {"combine": "linear", "dtype": "keep"},
        "base": (file("config.json", "{}"), file("model.safetensors", "w")),
        "adapters": adapters or (adapter("m"), adapter("t")),
        "changes": {},
        "tensors": (tensor("a", 0), tensor("b", 0, 1), tensor("c", 1), tensor("d")),
    }
    return Side(record=PlanRecord(**{**found, **more}), names=names)


def test_equal_plans_do_not_differ() -> None:
    assert not compare(side(), side())
    assert compare(side(), side()).reasons == ()


def test_an_adapter_of_other_bytes_affects_the_tensors_that_it_updates() -> None:
    found = compare(side(), side(adapter("n"), adapter("t")))
    was, now = Digest.sha256(b"m").hex[:4], Digest.sha256(b"n").hex[:4]
    assert found.reasons == (f"adapters.math changed ({was}.. to {now}..), 2 of 4 tensors",)
    assert found.affected == ("a", "b")


def test_a_file_beside_an_adapters_weights_is_named() -> None:
    found = compare(side(), side(adapter("m", config='{"r": 8}'), adapter("t")))
    assert found.reasons[0].startswith("adapters.math/adapter_config.json changed (")
    assert found.affected == ("a", "b")


def test_places_that_moved_are_no_change() -> None:
    swapped = (tensor("a", 1), tensor("b", 1, 0), tensor("c", 0), tensor("d"))
    assert not compare(side(), side(adapter("t"), adapter("m"), names=("text", "math"), tensors=swapped))


def test_a_shard_of_the_base_affects_the_tensors_that_it_holds_alone() -> None:
    tensors = (tensor("a", 0, file="one.safetensors"), tensor("d", file="two.safetensors"))
    sides = [
        side(base=(file("one.safetensors", content), file("two.safetensors", "w")), tensors=tensors) for content in "vw"
    ]
    (reason,) = compare(*sides).reasons
    assert reason.startswith("base/one.safetensors changed (")
    assert reason.endswith("), 1 of 2 tensors")


def test_another_name_for_the_same_adapter_is_no_difference() -> None:
    assert not compare(side(names=("x", "text")), side())
    heavier = compare(side(names=("x", "text")), side(adapter("m", weight=0.5), adapter("t")))
    assert heavier.reasons == ("adapters.math weight 1 to 0.5, 2 of 4 tensors",)
    assert not compare(side(names=("text", "math")), side())


@pytest.mark.parametrize("names", [None, ("x", "y")])
def test_adapters_without_names_go_by_their_content(names: tuple[str, ...] | None) -> None:
    swapped = (tensor("a", 1), tensor("b", 1, 0), tensor("c", 0), tensor("d"))
    blind = side(adapter("t"), adapter("m"), names=None, tensors=swapped)
    assert not compare(dataclasses.replace(side(), names=names), blind)
    assert not compare(blind, dataclasses.replace(side(), names=names))


def test_a_weight_affects_what_the_adapter_updates() -> None:
    found = compare(side(), side(adapter("m", 0.5), adapter("t")))
    assert found.reasons == ("adapters.math weight 1 to 0.5, 2 of 4 tensors",)


def test_an_option_is_named_with_both_values() -> None:
    found = compare(side(), side(options={"combine": "linear", "dtype": "float32"}))
    assert found.reasons == ("option dtype: keep to float32",)


def test_another_arithmetic_affects_every_merge_and_no_copy() -> None:
    found = compare(side(), side(options={"combine": "ties", "dtype": "keep"}))
    assert found.affected == ("a", "b", "c")


def test_an_adapter_that_comes_or_goes_is_named_and_its_tensors_counted() -> None:
    alone = side(adapter("m"), names=("math",), tensors=(tensor("a", 0), tensor("b", 0), tensor("c"), tensor("d")))
    assert compare(alone, side()).reasons == ("adapters.text added, 2 of 4 tensors",)
    assert compare(side(), alone).reasons == ("adapters.text removed, 2 of 4 tensors",)


def test_a_weight_file_of_the_base_affects_all_that_is_read_from_it() -> None:
    found = compare(side(), side(base=(file("config.json", "{}"), file("model.safetensors", "v"))))
    assert found.inputs[0].source == BASE
    assert found.reasons[0].startswith("base/model.safetensors changed (")
    assert found.reasons[0].endswith(", 4 of 4 tensors")


def test_a_side_file_of_the_base_affects_no_tensor() -> None:
    found = compare(side(), side(base=(file("config.json", "{ }"), file("model.safetensors", "w"))))
    assert found.affected == ()
    assert found.reasons[0].startswith("base/config.json changed (")


def test_tensors_that_come_and_go_are_listed() -> None:
    found = compare(side(), side(tensors=(tensor("a", 0), tensor("b", 0, 1), tensor("c", 1), tensor("e"))))
    assert (found.added, found.removed) == (("e",), ("d",))
    assert found.reasons == ("e, d planned in another way",)


def test_an_adapter_whose_recipe_says_no_weight_is_known_by_one() -> None:
    digests = {source: frozenset(f.sha256 for f in adapter(c).files) for source, c in ((MATH, "m"), (TEXT, "t"))}
    assert adapter_names(side().record, digests, {"text": 1.0}) == ("math", "text")
    assert adapter_names(side(adapter("m", 0.5), adapter("t")).record, digests, {"text": 1.0}) is None
