"""How much of an update rounding leaves, by tensor and by adapter."""

import json
import math
from dataclasses import asdict

import pytest

from lora_build.numerics.measure import Share
from lora_build.numerics.survival import (
    AdapterSurvival,
    TensorSurvival,
    by_adapter,
    describe_norm,
    json_numbers,
    to_bytes,
    warnings,
)


def share(adapter: str, *, base: float = 1.0, update: float = 1.0, updated: int = 100, changed: int = 50) -> Share:
    return Share(adapter=adapter, base_norm=base, update_norm=update, num_updated=updated, num_changed=changed)


def tensor(*shares: Share, name: str = "w", base_norm: float = 1.0) -> TensorSurvival:
    return TensorSurvival(
        name=name, dtype="BF16", base_norm=base_norm, update_norm=1.0, num_elements=100, num_updated=100,
        num_changed=50, shares=shares,
    )  # fmt: skip


def test_the_shares_of_an_adapter_are_summed_over_its_tensors() -> None:
    tensors = [
        tensor(share("math", base=3.0, update=0.3, updated=100, changed=10), share("code")),
        tensor(share("math", base=4.0, update=0.4, updated=300, changed=70)),
    ]

    code, math_ = by_adapter(tensors)
    assert code == AdapterSurvival(adapter="code", num_tensors=1, relative_norm=1.0, changed=0.5)
    assert (math_.adapter, math_.num_tensors, math_.changed) == ("math", 2, 0.2)
    assert math_.relative_norm == pytest.approx(0.1)  # √(0.3² + 0.4²) / √(3² + 4²)


@pytest.mark.parametrize(
    ("base", "update", "norm", "said"),
    [(2.0, 0.5, 0.25, "0.25"), (0.0, 1.0, None, "not a number"), (1.0, math.nan, None, "not a number")],
)
def test_a_relative_norm_is_a_number_or_none(base: float, update: float, norm: float | None, said: str) -> None:
    (found,) = by_adapter([tensor(share("math", base=base, update=update))])

    assert found.relative_norm == norm
    assert describe_norm(found) == f"‖ΔW‖/‖W‖ {said}"


@pytest.mark.parametrize(("changed", "barely"), [(0, True), (9, True), (10, False), (100, False)])
def test_an_adapter_barely_survives_if_less_than_a_tenth_of_its_elements_change(changed: int, barely: bool) -> None:
    tensors = [tensor(share("math", changed=changed), share("sound"))]

    said = warnings(tensors)
    assert [line.partition(":")[0] for line in said] == ["adapter math barely survives rounding"] * barely
    assert all(f"only {changed / 100:.1%} of the elements it updates changed" in line for line in said)


def test_an_adapter_that_updates_nothing_changes_nothing() -> None:
    (found,) = by_adapter([tensor(share("math", updated=0, changed=0))])

    assert (found.changed, found.barely) == (0.0, True)


def test_the_report_is_json_of_all_adapters_and_tensors() -> None:
    one, other = tensor(share("math")), tensor(share("math", update=math.inf), name="v", base_norm=math.nan)

    text = to_bytes([one, other]).decode()

    found = json.loads(text)
    assert found["schema"] == "lora-build/survival/v1"
    assert [a["adapter"] for a in found["adapters"]] == ["math"]
    assert found["tensors"][0] == json.loads(json.dumps(asdict(one)))
    assert found["tensors"][1]["base_norm"] is found["tensors"][1]["shares"][0]["update_norm"] is None
    assert text == json.dumps(found, indent=1, sort_keys=True) + "\n"


def test_what_json_has_no_number_for_is_null_wherever_it_lies() -> None:
    value = {"a": [1, 0.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None}, "e": True}

    assert json_numbers(value) == {"a": [1, 0.5, None, [None, "x"]], "b": {"c": None, "d": None}, "e": True}
