"""What a report works out of points and survival, by hand."""

import math

import pytest

from lora_build.numerics.survival import TensorSurvival
from lora_build.pages.content import Drop, Report, ReportPoint
from lora_build.pages.findings import build_of, drops_of, front_of, layer_and_module, merged_adapters
from lora_build.pages.html import html_of


def point(number: int, **more: object) -> ReportPoint:
    return ReportPoint(number=number, label=f"p{number}", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (3, "mlp.experts.*.up_proj")),
        ("transformer.h.11.attn.c_attn.bias", (11, "attn.c_attn.bias")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens")),
        ("lm_head.weight", (None, "lm_head")),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", (0, "layer.*.DenseReluDense.wi")),
        ("layers.3", (3, "layers")),
    ],
)
def test_a_tensor_is_of_a_layer_and_a_type_in_it(tensor: str, expected: tuple[int | None, str]) -> None:
    assert layer_and_module(tensor) == expected


def tensor(name: str, base: float, update: float, updated: int, changed: int) -> TensorSurvival:
    return TensorSurvival(
        name=name, dtype="BF16", base_norm=base, update_norm=update, num_elements=100, num_updated=updated,
        num_changed=changed, shares=(),
    )  # fmt: skip


def test_a_cell_sums_the_squares_of_its_tensors_and_counts_their_elements() -> None:
    names = [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(2)]
    survival = (
        tensor(names[0], 3.0, 0.3, 10, 5),
        tensor(names[1], 4.0, 0.4, 30, 5),
        tensor("lm_head.weight", 0, 0, 0, 0),
    )
    cells = build_of("x", "sha256:0", survival).cells
    assert [(cell.layer, cell.module) for cell in cells] == [(1, "mlp.experts.*.up_proj"), (None, "lm_head")]
    assert cells[0].relative_norm == pytest.approx(0.1)
    assert cells[0].changed == 0.25
    assert (cells[1].relative_norm, cells[1].changed) == (None, None)


def test_the_front_has_the_points_that_no_other_betters() -> None:
    points = [
        point(0, scores={"a": 1.0, "b": 5.0}),
        point(1, scores={"a": 2.0, "b": 4.0}),
        point(2, scores={"a": 2.0, "b": 3.0}),  # as good as 1 in a, worse in b
        point(3, scores={"a": 2.0, "b": 4.0}),  # as 1
        point(4, scores={"a": math.nan, "b": 9.0}),
        point(5, scores={"b": 9.0}),
    ]
    assert front_of(points, ("a", "b"), ()) == (0, 1, 3)
    assert front_of(points, ("a", "b"), ("b",)) == (2,)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, {"math", "code"}),
        ({"adapter_names": None}, {"math", "code"}),
        ({"adapter_names": ["math"]}, {"math"}),
        ({"adapters.math.weight": 0}, {"code"}),
        ({"adapters.math.weight": 0.0, "adapter_names": ["math", "code"]}, {"code"}),
        ({"adapters.math.weight": 0.5}, {"math", "code"}),
    ],
)
def test_a_point_merges_the_adapters_that_are_chosen_with_a_weight(axes: dict[str, object], expected: set[str]) -> None:
    assert merged_adapters(axes, ["math", "code"]) == expected


def test_what_an_adapter_brings_is_told_of_two_points_that_differ_by_it_alone() -> None:
    points = [
        point(0, axes={"adapters.math.weight": 1, "dtype": "float32"}, scores={"s": 0.9}),
        point(1, axes={"adapters.math.weight": 0, "dtype": "float16"}, scores={"s": 0.1}),  # another dtype too
        point(2, axes={"adapters.math.weight": 0, "dtype": "float32"}, scores={"s": 0.4}),
        point(3, axes={"adapters.math.weight": 1, "dtype": "float16"}, scores={"s": 0.8}),
    ]
    (drop,) = drops_of(points, points[0], ["math", "code"], ["s", "t"])
    assert drop == Drop(adapter="math", metric="s", point=0, other=2, with_it=0.9, without_it=0.4)
    assert drop.effect == pytest.approx(0.5)
    chosen = [
        point(0, axes={"adapter_names": ["math", "code"]}, scores={"s": 3.0}),
        point(1, axes={"adapter_names": ["code"]}, scores={"s": 1.0}),
        point(2, axes={"adapter_names": ["math"]}, scores={"s": 2.5}),
    ]
    assert [(d.adapter, d.other, d.effect) for d in drops_of(chosen, chosen[0], ["math", "code"], ["s"])] == [
        ("code", 2, 0.5), ("math", 1, 2.0),
    ]  # fmt: skip


def test_no_name_ends_the_pages_data_or_becomes_a_tag() -> None:
    evil = "</script><script>alert(1)</script><!--"
    page = html_of(
        Report(
            title=evil, is_sweep=True, axes=(evil,), points=(point(0, error=evil, axes={evil: [evil]}),), notes=(evil,)
        )
    ).decode()
    assert "<script>alert" not in page
    assert page.count("<script") == page.count("</script>") == 4


def test_a_page_is_whole_below_two_megabytes_and_loads_nothing() -> None:
    page = html_of(Report(title="x", is_sweep=False, points=()))
    assert len(page) < 600_000
    assert b"default-src 'none'" in page
    for loader in (b"src=", b"@import", b"url("):
        assert loader not in page.partition(b"<script>")[0]
    assert page == html_of(Report(title="x", is_sweep=False, points=()))
