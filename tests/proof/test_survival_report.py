"""The survival report read back: as it was written, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_build.numerics.measure import Share
from lora_build.numerics.survival import TensorSurvival, by_adapter, to_bytes
from lora_build.proof.manifest import SURVIVAL_NAME
from lora_build.proof.survival_report import read_survival

SHARE = Share(adapter="math", base_norm=2.0, update_norm=0.25, num_updated=8, num_changed=7)
TENSOR = TensorSurvival(
    name="w", dtype="BF16", base_norm=2.0, update_norm=0.25, num_elements=10, num_updated=8, num_changed=7,
    shares=(SHARE,),
)  # fmt: skip


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    document = json.loads(to_bytes([TENSOR]))
    change(document)
    (folder / SURVIVAL_NAME).write_text(json.dumps(document))


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_survival(tmp_path) == (TENSOR,)


def test_a_norm_that_is_no_number_stays_none(tmp_path: Path) -> None:
    write(tmp_path, lambda d: d["tensors"][0]["shares"][0].update(update_norm=None))
    found = read_survival(tmp_path)

    assert found is not None
    assert by_adapter(found)[0].relative_norm is None


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema="lora-build/survival/v2"),
        lambda d: d.pop("tensors"),
        lambda d: d.update(tensors=7),
        lambda d: d["tensors"].append("w"),
        lambda d: d["tensors"][0].update(shares={"a": 1}),
        lambda d: d["tensors"][0].update(num_changed=11),
        lambda d: d["tensors"][0].update(num_updated=-1),
        lambda d: d["tensors"][0].update(num_elements="10"),
        lambda d: d["tensors"][0].update(base_norm=1e300),
        lambda d: d["tensors"][0].update(base_norm=float("nan")),
        lambda d: d["tensors"][0]["shares"][0].update(adapter="\x1b[2Jmath"),
        lambda d: d["tensors"][0]["shares"][0].update(adapter=5),
    ],
)
def test_a_report_that_is_not_ours_is_none(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    write(tmp_path, change)
    assert read_survival(tmp_path) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_report_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SURVIVAL_NAME).write_bytes(data)
    assert read_survival(tmp_path) is None


def test_no_report_is_none(tmp_path: Path) -> None:
    assert read_survival(tmp_path) is None
