"""The record of what is done to a tensor: short, and nothing is lost of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_build.proof.planned_tensor import PlannedTensor, SegmentRecord, TensorRef, UpdateRecord, _runs


@given(st.lists(st.integers(0, 40), max_size=30))
def test_rows_in_ranges_are_the_rows(rows: list[int]) -> None:
    assert [row for start, stop, step in _runs(rows) for row in range(start, stop, step)] == rows


def test_the_rows_of_a_head_that_lie_two_apart_are_a_range_for_each_half() -> None:
    rows = [*range(0, 64, 2), *range(1, 64, 2)]
    assert _runs(rows) == [[0, 63, 2], [1, 64, 2]]


@pytest.mark.parametrize("factor", [
    TensorRef(adapter=1, file="adapter_model.safetensors", name="x.lora_A.weight"),
    TensorRef(adapter=0, file="adapter_model.safetensors", name="x.lora_A.weight"),
    TensorRef(adapter=1, file="other.safetensors", name="x.lora_A.weight"),
    TensorRef(adapter=None, file="model.safetensors", name="x.weight"),
])  # fmt: skip
def test_what_is_said_of_a_tensor_is_read_back_as_it_was(factor: TensorRef) -> None:
    update = UpdateRecord(
        adapter=1, method="LORA", scale=0.1, factors={"A": factor}, more={"expert": 0, "rows": [[0, 4, 2]]}
    )
    planned = PlannedTensor(
        name="x.weight", dtype="BF16", shape=(4, 2), file="model.safetensors", operation="merge",
        source=TensorRef(adapter=0, file="f", name="n"), segments=(SegmentRecord(start=0, stop=4, updates=(update,)),),
    )  # fmt: skip

    assert PlannedTensor.from_json(planned.to_json()) == planned
    assert planned.adapters == (0, 1)
