"""Combinations: what adapters of any methods add up to, on the compiled pass and in torch; and a further combination."""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
import lora_build.methods.combine
from lora_build._native import levels
from lora_build.dtypes import STORED_DTYPES, torch_dtype
from lora_build.engine.backends.choice import uses_torch
from lora_build.methods.calls import forward_of
from lora_build.methods.combine.interface import combinations, is_sum_of_products, low_rank_deltas
from lora_build.methods.interface import Call, PlacedUpdate
from lora_build.numerics.exact import LowRankSum, as_stored, round_once
from lora_build.numerics.exact_compiled import FusedSum
from lora_build.pipeline import prepare
from lora_build.planning.operations import Merge
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.layers import CASES, Saved, Shelf, Tensors, base, merge, net, updates

Q0 = "model.layers.0.self_attn.q_proj.weight"
LOW_RANK = [(case, module) for case in CASES if case.startswith(("adalora", "vera")) for module in CASES[case][1]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("combine"))


def torch_pair(placed: PlacedUpdate, factors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of an AdaLoRA or VeRA in float64, each operation as torch did it before the compiled pass did."""
    f = {role: tensor.double() for role, tensor in factors.items()}
    if placed.method == "ADALORA":
        B, A = f["B"] * placed.scale, f["A"] * f["E"]
    else:
        lambda_b, lambda_d = f["lambda_b"][:, None], f["lambda_d"][:, None]
        B, A = f["B"][: len(lambda_b)] * lambda_b * placed.scale, f["A"][:, : placed.options["inputs"]] * lambda_d
    if placed.rows is None:
        return B, A
    rows = torch.tensor(placed.rows)
    return (B, A[:, rows]) if placed.transposed else (B[rows], A)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("case", "module"), LOW_RANK)
def test_adalora_and_vera_have_the_bits_of_the_sum_in_torch_on_the_compiled_pass(
    shelf: Shelf, case: str, module: str, count: int, stored: torch.dtype
) -> None:
    pairs = updates([shelf(case, seed) for seed in range(count)], module, weights=(0.7, -1.3, 0.1))
    pairs = [(placed, {role: t.to(stored) for role, t in factors.items()}) for placed, factors in pairs]
    linear: Any = combinations()["linear"]
    assert is_sum_of_products(linear, [placed for placed, _ in pairs])
    deltas = low_rank_deltas([(u, {role: as_stored(t) for role, t in f.items()}) for u, f in pairs])
    found, transposed = linear.pairs(deltas)

    for source in ("BF16", "F16", "F32"):
        W = base(module, dtype=torch_dtype(source)).contiguous()
        in_torch = LowRankSum([torch_pair(*pair) for pair in pairs], transposed=pairs[0][0].transposed)
        for target in ("BF16", "F16", "F32"):
            y = np.empty(W.shape, STORED_DTYPES[target].bits)
            W_bits = as_stored(W).view(STORED_DTYPES[source].bits)
            FusedSum(found, source, target, transposed=transposed).rows(W_bits, 0, y)
            expected = round_once(in_torch.rows(W.double(), 0)[0], torch_dtype(target))
            assert np.array_equal(y, as_stored(expected).view(y.dtype)), (source, target)
            assert torch.equal(merge(pairs, W, torch_dtype(target))[0], expected)


def test_there_are_cases_of_all_storages_among_these() -> None:
    assert {module for _, module in LOW_RANK} >= {"linear", "crossed", "plane", "wide", "narrow"}


# --- builds ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "lora")
    make_adalora(tmp_path / "adalora")
    make_loha(tmp_path / "loha")
    return tmp_path


def make_adalora(folder: Path) -> None:
    write(
        folder,
        {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 3, "rank_pattern": None},
        {"lora_A": small.values(70, 2, 6), "lora_B": small.values(71, 8, 2) / 9, "lora_E": small.values(72, 2, 1)},
    )


def make_loha(folder: Path) -> None:
    a, b = (8, 2), (2, 6)
    shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    tensors = {leaf: small.values(80 + i, *shape) / 3 for i, (leaf, shape) in enumerate(shapes.items())}
    write(folder, {"peft_type": "LOHA", "r": 2, "alpha": 3}, tensors)


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    prefix = f"base_model.model.{Q0.removesuffix('.weight')}"
    save_file(
        {f"{prefix}.{leaf}": tensor.float().contiguous() for leaf, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def built(folder: Path, *adapters: str, **more: Any) -> torch.Tensor:
    lora_build.build(
        small.recipe(folder, *adapters, output={"dir": str(folder / "out"), "if_exists": "overwrite"}, **more)
    )
    return load_file(folder / "out/model.safetensors")[Q0]


@pytest.mark.skipif(not levels(), reason="no compiled loops")
@pytest.mark.parametrize(
    ("adapters", "in_torch"),
    [(("adalora",), False), (("lora", "adalora"), False), (("loha",), True), (("lora", "loha"), True)],
)
def test_a_plan_needs_torch_only_where_something_is_no_product(
    folder: Path, adapters: Sequence[str], in_torch: bool
) -> None:
    plan = prepare(from_mapping(small.recipe(folder, *adapters))).merge_plan

    assert uses_torch(plan, [op for op in plan.operations if isinstance(op, Merge)]) == in_torch


def test_adapters_of_different_methods_add_up_in_any_order(folder: Path) -> None:
    W = load_file(folder / "base/model.safetensors")[Q0].double()
    changes = {name: built(folder, name, dtype="float32").double() - W for name in ("lora", "adalora", "loha")}

    for names in (("lora", "adalora"), ("lora", "loha"), ("adalora", "loha", "lora")):
        together = built(folder, *names, dtype="float32")
        assert torch.allclose(together.double() - W, sum(changes[name] for name in names), atol=1e-6)
        assert torch.equal(built(folder, *names[::-1], dtype="float32"), together)


def test_a_product_and_any_other_matrix_are_applied_beside_a_weight_as_they_are_merged(shelf: Shelf) -> None:
    adapters = [shelf("adalora", 0), shelf("loha", 1), shelf("lokr", 2)]
    pairs = [pair for adapter in adapters for pair in updates([adapter], "linear")]
    module, x = net().linear, torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    merged = merge(pairs, base("linear"), torch.float64)[0]

    y = forward_of(pairs)(Call(module=module, input=x, base=module.forward))

    assert torch.allclose(y.double(), x.double() @ merged.T + module.bias.double(), atol=1e-5)


def test_one_adapter_of_a_sum_is_one_delta_whatever_it_is_made_of(shelf: Shelf) -> None:
    from lora_build.methods.combine.interface import Delta
    from lora_build.methods.combine.sums import Sum

    adapters: list[Saved] = [shelf("adalora", 0), shelf("adalora", 1)]
    deltas = low_rank_deltas(
        [(u, {role: as_stored(t) for role, t in f.items()}) for u, f in updates(adapters, "linear")]
    )
    W = base("linear").double()
    at = deltas[0].at
    both = Delta(adapter="x", at=at, products=deltas[0].products + deltas[1].products)
    with_more = Delta(adapter="x", at=at, products=both.products, dense=(lambda W, first: torch.ones_like(W),))

    assert torch.equal(both.rows(W, 0), Sum(both.products, ()).rows(W, 0)[1])
    assert torch.equal(with_more.rows(W, 0), both.rows(W, 0) + 1)
    assert torch.equal(with_more.rows(W[3:], 3), with_more.rows(W, 0)[3:])


# --- a further combination ------------------------------------------------------------------------------------------------

LARGEST = '''"""Of each element the change of the adapter that changes it most; no more than the mean of all rows' largest."""

from lora_build.methods.combine.interface import Delta


class Largest:
    name = "largest"
    reference = "this test"

    def merger(self, deltas: list[Delta], at):
        import torch

        def chosen(W, first):
            changes = torch.stack([delta.rows(W, first) for delta in deltas])
            return changes.gather(0, changes.abs().argmax(0, keepdim=True))[0]

        # one row at a time: what has to be known of all rows, without holding them
        limit = sum(float(chosen(at.read(i, i + 1), i).abs().max()) for i in range(at.num_rows)) / at.num_rows

        def rows(W, first):
            change = chosen(W, first).clamp(-limit, limit)
            return W + change, change

        return rows


COMBINATION = Largest()
'''


@pytest.fixture
def largest(tmp_path: Path) -> Iterator[None]:
    """One more file in the package, until the test is over."""
    folder = tmp_path / "combine"
    folder.mkdir()
    (folder / "largest.py").write_text(LARGEST)
    lora_build.methods.combine.__path__.append(str(folder))
    importlib.invalidate_caches()
    combinations.cache_clear()
    yield
    lora_build.methods.combine.__path__.remove(str(folder))
    sys.modules.pop("lora_build.methods.combine.largest", None)
    vars(lora_build.methods.combine).pop("largest", None)
    combinations.cache_clear()


@pytest.mark.usefixtures("largest")
def test_one_more_file_is_one_more_combination_for_all_methods_that_add(folder: Path) -> None:
    W = load_file(folder / "base/model.safetensors")[Q0].double()
    names = ("lora", "adalora", "loha")
    changes = torch.stack([built(folder, name, dtype="float32").double() - W for name in names])
    most = changes.gather(0, changes.abs().argmax(0, keepdim=True))[0]
    limit = most.abs().max(dim=1).values.mean()

    merged = built(folder, *names, dtype="float32", combine={"method": "largest"})

    assert torch.allclose(merged.double() - W, most.clamp(-limit, limit), atol=1e-6)
    manifest = json.loads((folder / "out/lora-build.manifest.json").read_text())
    assert manifest["plan"]["options"]["combine"] == "largest"


@pytest.mark.usefixtures("largest")
def test_a_combination_is_named_where_another_one_is_misspelt(folder: Path) -> None:
    with pytest.raises(
        lora_build.LoraBuildError, match=r"expected one of .*largest, linear, .*, found 'largst'; did you mean"
    ):
        built(folder, "lora", combine={"method": "largst"})
