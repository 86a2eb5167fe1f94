"""Each combination against its paper, written once more in numpy on whole matrices; and what must hold of all."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lora_build
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.combine.interface import (
    Combination,
    LoadedUpdates,
    StoredRows,
    combinations,
    content_digest,
    merger,
)
from lora_build.methods.combine.masks import Mask
from lora_build.methods.combine.selection import keep_largest, num_kept
from lora_build.methods.interface import PlacedUpdate, Update
from makers import small
from makers.layers import CASES, Shelf, base, updates

Array = np.ndarray[Any, np.dtype[np.float64]]
ROWS, COLUMNS, RANK = 23, 17, 3


def pairs_of(
    *weights: float, density: float | None = 0.4, seed: int = 0, transposed: bool = False
) -> list[tuple[PlacedUpdate, dict[str, torch.Tensor]]]:
    """Return the updates of one matrix by some adapters of LoRA."""
    found = []
    for order, weight in enumerate(weights):
        generator = np.random.Generator(np.random.Philox(key=100 * seed + order))
        shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
        factors = {"B": generator.normal(size=(shape[0], RANK)), "A": generator.normal(size=(RANK, shape[1]))}
        tensors = {role: torch.from_numpy(values.astype(np.float32)) for role, values in factors.items()}
        infos = {role: info(f"{order}.{role}", tensor) for role, tensor in tensors.items()}
        update = Update(
            adapter=f"a{order}", method="LORA", scale=weight, factors=infos, transposed=transposed, density=density,
            order=order,
        )  # fmt: skip
        found.append((PlacedUpdate(update=update, start=0, stop=ROWS, transposed=transposed), tensors))
    return found


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(
        source=SourceName.of_adapter("a"), file="f", name=name, dtype="F32", shape=tuple(tensor.shape), start=0, end=0
    )


def change_of(pair: tuple[PlacedUpdate, dict[str, torch.Tensor]]) -> Array:
    """Return what one adapter adds, as float64 knows it."""
    placed, factors = pair
    product = placed.scale * (factors["B"].double().numpy() @ factors["A"].double().numpy())
    return product.T if placed.transposed else product


def combined(combination: Combination, pairs: Sequence[Any], W: Array, step: int = ROWS) -> Array:
    """Return what a combination makes of the base, some rows at a time."""
    weights = torch.from_numpy(W)
    at = StoredRows(
        tensor="x.weight", first=0, num_rows=len(W), columns=W.shape[1], read=lambda start, end: weights[start:end]
    )
    rows = merger(combination, LoadedUpdates(updates=list(pairs), at=at))
    return np.concatenate([rows(weights[i : i + step], i)[0].numpy() for i in range(0, len(W), step)])


def weights_of(seed: int = 9) -> Array:
    return np.random.Generator(np.random.Philox(key=seed)).normal(size=(ROWS, COLUMNS))


def chosen(name: str, **parameters: Any) -> Combination:
    found: Any = combinations()[name]
    return replace(found, **parameters) if parameters else found  # type: ignore[no-any-return]


# --- the papers, on whole matrices ------------------------------------------------------------------------------------


def trimmed(change: Array, density: float) -> Array:
    """TIES, algorithm 1, step 1: keep the k values of largest magnitude; the first ones where some are equal."""
    k = max(1, math.floor(Fraction(str(density)) * change.size))
    order = sorted(range(change.size), key=lambda i: (-abs(change.flat[i]), i))
    out = np.zeros_like(change)
    for i in order[:k]:
        out.flat[i] = change.flat[i]
    return out


def elected_mean(changes: Sequence[Array], sign: str) -> Array:
    """TIES, algorithm 1, steps 2 and 3, an element at a time."""
    out = np.zeros_like(changes[0])
    for i in range(out.size):
        values = [float(change.flat[i]) for change in changes]
        votes = values if sign == "mass" else [math.copysign(1, v) if v else 0 for v in values]
        positive = math.fsum(votes) >= 0
        agreeing = [v for v in values if v and (v > 0) == positive]
        out.flat[i] = math.fsum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def dared(change: Array, density: float, key: int) -> Array:
    """DARE, eq. 1 and 2: drop with probability 1 - density, divide by density; numbers of Philox in one go."""
    drawn = np.random.Philox(key=key).random_raw(change.size).reshape(change.shape)
    keeps = np.array([int(u) < Fraction(str(density)) * 2**64 for u in drawn.flat]).reshape(change.shape)
    return np.where(keeps, change / density, 0.0)


def key_of(pair: tuple[PlacedUpdate, dict[str, torch.Tensor]], seed: int) -> int:
    import hashlib

    content = " ".join(sorted(f"{role} {content_digest(tensor)}" for role, tensor in pair[1].items()))
    return int.from_bytes(hashlib.sha256(f"dare-1\0{seed}\0{content}\0x.weight".encode()).digest()[:16], "little")


def nearest_of_rank(change: Array, rank: int) -> Array:
    """Eckart and Young: the largest singular values."""
    U, S, V = np.linalg.svd(change, full_matrices=False)
    return np.asarray((U[:, :rank] * S[:rank]) @ V[:rank])


def product_of_sums(pairs: Sequence[Any]) -> Array:
    """PEFT's `linear`, peft/tuners/lora/model.py: factors added up with sign(w) sqrt|w| (A) and sqrt|w| (B)."""
    scales = [placed.scale for placed, _ in pairs]
    B = sum(math.sqrt(abs(w)) * f["B"].double().numpy() for w, (_, f) in zip(scales, pairs, strict=True))
    A = sum(
        math.copysign(math.sqrt(abs(w)), w) * f["A"].double().numpy() for w, (_, f) in zip(scales, pairs, strict=True)
    )
    return (B @ A).T if pairs[0][0].transposed else B @ A


def great_circle(ends: Sequence[Array], t: float) -> Array:
    """Shoemake, section 3.3, with the angle of the matrices as vectors; one end alone goes towards the base."""
    v0, v1 = [*ends, weights_of()][:2]
    cosine = np.sum(v0 * v1) / (np.linalg.norm(v0) * np.linalg.norm(v1))
    angle = math.acos(min(1.0, float(cosine)))
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)


ORACLES: dict[str, Any] = {
    "linear": lambda pairs, c: sum(map(change_of, pairs)),
    "ties": lambda pairs, c: elected_mean([trimmed(change_of(p), p[0].update.density) for p in pairs], c.sign),
    "magnitude_prune": lambda pairs, c: sum(trimmed(change_of(p), p[0].update.density) for p in pairs),
    "dare_linear": lambda pairs, c: sum(dared(change_of(p), p[0].update.density, key_of(p, c.seed)) for p in pairs),
    "dare_ties": lambda pairs, c: elected_mean(
        [dared(change_of(p), p[0].update.density, key_of(p, c.seed)) for p in pairs], c.sign
    ),
    "svd": lambda pairs, c: nearest_of_rank(sum(map(change_of, pairs)), c.rank),
    "peft_linear": lambda pairs, c: product_of_sums(pairs),
    "slerp": lambda pairs, c: great_circle([weights_of() + change_of(p) for p in pairs], c.t) - weights_of(),
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("ties", {}), ("ties", {"sign": "count"}), ("magnitude_prune", {}), ("dare_linear", {}),
    ("dare_linear", {"seed": 7}), ("dare_ties", {}), ("dare_ties", {"sign": "count"}), ("svd", {"rank": 2}),
    ("svd", {"rank": 20}), ("peft_linear", {}), ("slerp", {}), ("slerp", {"t": 0.2}),
]  # fmt: skip
SPARSE = ("ties", "magnitude_prune", "dare_linear", "dare_ties")


def test_every_combination_has_an_oracle() -> None:
    assert ORACLES.keys() == combinations().keys()
    assert {name for name, _ in VARIANTS} == ORACLES.keys()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (0.7, -1.3, 0.4), (1.0, 0.5, -0.5, 2.0)])
@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_a_combination_is_its_paper(
    name: str, parameters: dict[str, Any], weights: tuple[float, ...], transposed: bool
) -> None:
    weights = weights[:2] if name == "slerp" else weights
    for density in (0.05, 0.4, 0.9, 1.0) if name in SPARSE else (1.0,):
        pairs, W = pairs_of(*weights, density=density, transposed=transposed), weights_of()
        combination = chosen(name, **parameters)

        found = combined(combination, pairs, W)

        assert np.allclose(found, W + ORACLES[name](pairs, combination), rtol=1e-12, atol=1e-12)


# --- what holds of all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_neither_the_order_of_adapters_nor_the_blocks_change_a_bit(name: str, parameters: dict[str, Any]) -> None:
    pairs, W, combination = pairs_of(0.7, -1.3, 0.4, 1.1), weights_of(), chosen(name, **parameters)
    whole = combined(combination, pairs, W)

    for order in ((3, 2, 1, 0), (1, 3, 0, 2)) if name != "svd" else ():  # whose bits the library decides
        assert np.array_equal(combined(combination, [pairs[i] for i in order], W), whole)
    for step in (1, 2, 5):
        assert np.array_equal(combined(combination, pairs, W, step), whole)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("count", [1, 3])
def test_density_1_leaves_nothing_out(name: str, count: int) -> None:
    pairs, W = pairs_of(*(0.7, -1.3, 0.4)[:count], density=1.0), weights_of()
    sums = combined(chosen("linear"), pairs, W)

    if count == 1 or not name.endswith("ties"):  # of several adapters TIES takes one sign and a mean
        assert np.allclose(combined(chosen(name), pairs, W), sums, rtol=0, atol=1e-15)
    if not name.endswith("ties"):
        assert np.array_equal(combined(chosen(name), pairs, W), sums)


@pytest.mark.parametrize("name", SPARSE)
def test_an_adapter_of_weight_0_has_no_say(name: str) -> None:
    W = weights_of()

    assert np.array_equal(combined(chosen(name), pairs_of(1.0, 0.0), W), combined(chosen(name), pairs_of(1.0), W))


@pytest.mark.parametrize("name", SPARSE)
def test_what_no_adapter_changes_keeps_the_bits_of_the_base(name: str) -> None:
    pairs, W = pairs_of(1.0, density=0.1), np.full((ROWS, COLUMNS), -0.0)
    found = combined(chosen(name), pairs, W)

    assert 0.5 < np.mean(np.signbit(found) & (found == 0)) < 1


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("case", ["loha", "ia3", "oft", "adalora", "coft"])
def test_what_is_no_sum_of_products_is_combined_as_what_it_changes_alone(
    tmp_path_factory: pytest.TempPathFactory, case: str, name: str
) -> None:
    shelf = Shelf(tmp_path_factory.mktemp("combinations"), {case: CASES[case]})
    pairs = [
        (replace(p, update=replace(p.update, density=0.3, order=i)), f)
        for i, (p, f) in enumerate(updates([shelf(case, 0), shelf(case, 1)], "square"))
    ]
    W = base("square").double().numpy()
    alone = [combined(chosen("linear"), [pair], W, len(W)) - W for pair in pairs]
    combination = chosen(name)
    keys = iter([key_of(pair, 0) for pair in pairs])
    parts = [trimmed(c, 0.3) if "dare" not in name else dared(c, 0.3, next(keys)) for c in alone]
    expected = elected_mean(parts, "mass") if name.endswith("ties") else sum(parts)

    assert np.allclose(combined(combination, pairs, W, 5), W + expected, rtol=1e-9, atol=1e-12)


def test_slerp_ends_at_the_models_and_goes_the_other_way_where_the_adapters_do() -> None:
    (first, second), W = pairs_of(1.0, 1.0), weights_of()
    turned = [(replace(p, update=replace(p.update, order=1 - p.update.order)), f) for p, f in (first, second)]

    for t, end in ((0.0, first), (1.0, second)):
        assert np.allclose(
            combined(chosen("slerp", t=t), [first, second], W), W + change_of(end), rtol=1e-13, atol=1e-13
        )
    forth, back = combined(chosen("slerp", t=0.3), [first, second], W), combined(chosen("slerp", t=0.7), turned, W)
    assert np.allclose(forth, back, rtol=1e-15, atol=1e-15)


def test_slerp_of_nearly_the_same_models_is_the_line_between_them() -> None:
    (first, second), W = pairs_of(1e-9, 1e-9), weights_of()

    found = combined(chosen("slerp", t=0.25), [first, second], W)

    assert np.allclose(found - W, 0.75 * change_of(first) + 0.25 * change_of(second), rtol=1e-4, atol=1e-15)
    same = pairs_of(1.0)[0]
    assert np.allclose(
        combined(
            chosen("slerp"),
            [same, (replace(same[0], update=replace(same[0].update, adapter="b", order=1)), same[1])],
            W,
        ),
        W + change_of(same),
        atol=1e-15,
    )


def test_the_shares_of_a_circle_are_those_of_the_library_s_functions() -> None:
    from lora_build.methods.combine.slerp import _shares

    for angle in (1e-6, 0.01, 0.5, math.pi / 2, 2.5, 3.1):
        for size in (0.1, 1.0, 30.0):
            v0, v1 = np.array([1.0, 0.0]), size * np.array([math.cos(angle), math.sin(angle)])
            found = _shares(float(v0 @ v0), float(v0 @ (v1 - v0)), float((v1 - v0) @ (v1 - v0)), 0.3)
            expected = (math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle))
            assert np.allclose(found, expected, rtol=1e-9)
    assert _shares(1.0, -2.0, 4.0, 0.3) == (0.7, 0.3)  # opposite: no circle is nearest
    assert _shares(0.0, 0.0, 1.0, 0.3) == _shares(math.nan, 0.0, 1.0, 0.3) == (0.7, 0.3)


def test_svd_keeps_what_has_no_more_than_the_rank_to_the_bit() -> None:
    pairs, W = pairs_of(0.7, -1.3), weights_of()

    assert np.array_equal(combined(chosen("svd", rank=6), pairs, W), combined(chosen("linear"), pairs, W))
    assert np.linalg.matrix_rank(combined(chosen("svd", rank=4), pairs, W) - W, tol=1e-9) == 4


def test_peft_linear_of_one_adapter_is_the_adapter() -> None:
    pairs, W = pairs_of(-1.3), weights_of()

    assert np.allclose(combined(chosen("peft_linear"), pairs, W), W + change_of(pairs[0]), rtol=1e-14)


# --- selection and masks ---------------------------------------------------------------------------------------------


def kept(x: torch.Tensor, density: float, step: int) -> torch.Tensor:
    flat = x.reshape(-1)

    def blocks() -> Any:
        return ((i, flat[i : i + step]) for i in range(0, len(flat), step))

    found = keep_largest(blocks, len(flat), density)
    return flat if found is None else found.of(flat, 0)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1 + 2**-52, 5e-324, -3e300, 2.5, math.inf]), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.3, 0.5, 0.99]),
    st.integers(1, 7),
    st.booleans(),
)  # fmt: skip
def test_the_largest_values_are_those_of_a_sort_and_the_first_of_equal_ones(
    values: list[float], density: float, step: int, few: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not few:  # as of a matrix with more candidates than are looked at one by one
            patch.setattr("lora_build.methods.combine.selection._FEW", -1)
        found = kept(torch.tensor(values, dtype=torch.float64), density, step).numpy()

    assert np.array_equal(found, trimmed(np.array(values), density))


def test_the_largest_of_many_values_are_found_in_passes() -> None:
    x = torch.from_numpy(np.random.Generator(np.random.Philox(key=1)).normal(size=3_000_000))

    found = kept(x, 0.2, 1 << 17)

    assert int(torch.count_nonzero(found)) == 600_000
    assert float(found[found != 0].abs().min()) > float(x[found == 0].abs().max())


def test_a_density_is_the_decimal_number_that_was_written() -> None:
    assert [num_kept(10, density) for density in (0.1, 0.3, 0.7, 0.04)] == [1, 3, 7, 1]


def test_a_mask_is_the_same_in_any_cut_and_another_for_another_seed_adapter_or_tensor() -> None:
    x = torch.ones(41, 13, dtype=torch.float64)
    of: Any = {"density": 0.3, "seed": 5, "content": "c", "tensor": "t"}
    whole = Mask(**of).of(x, 0)

    for step in (1, 3, 40):
        cut = [Mask(**of).of(x[i : i + step], 13 * i) for i in range(0, 41, step)]
        assert torch.equal(torch.cat(cut), whole)
    others = [Mask(**{**of, key: new}).of(x, 0) for key, new in (("seed", 6), ("content", "d"), ("tensor", "u"))]
    masks = [whole != 0, *(other != 0 for other in others)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


def test_masks_keep_the_part_that_the_density_says_and_are_the_ones_that_they_always_were() -> None:
    x = torch.ones(100_000, dtype=torch.float64)
    found = Mask(density=0.3, seed=0, content="c", tensor="t").of(x, 0)

    assert abs(float((found != 0).double().mean()) - 0.3) < 0.005
    assert [int(i) for i in torch.nonzero(found)[:8, 0]] == FIRST_KEPT


FIRST_KEPT = [2, 7, 15, 17, 22, 27, 28, 30]


# --- mergekit on the full models -------------------------------------------------------------------------------------

MERGEKIT = Path(__file__).parent.parent / "judges/mergekit.json"


@pytest.mark.parametrize(
    ("name", "combine"),
    [
        ("task_arithmetic", "linear"),
        ("ties", {"method": "ties", "density": 0.4}),
        ("slerp", {"method": "slerp", "t": 0.3}),
    ],
)
def test_mergekit_makes_the_same_of_the_two_full_models(tmp_path: Path, name: str, combine: Any) -> None:
    """mergekit 0.1.5 on base, base + math and base + code in float32; `judges/mergekit_values.py` recorded it."""
    recorded = json.loads(MERGEKIT.read_text())[name]
    small.make_base(tmp_path / "base", dtype=torch.float32)
    for adapter, seed in (("math", 50), ("code", 90)):
        small.make_adapter(tmp_path / adapter, seed=seed)

    lora_build.build(small.recipe(tmp_path, "math", "code", combine=combine))

    built = load_file(tmp_path / "out/model.safetensors")
    for tensor, values in recorded["tensors"].items():
        theirs = torch.tensor(values, dtype=torch.float64)
        # slerp: of models this near each other mergekit takes the line, which is off by the square of their angle
        atol = 2e-3 if name == "slerp" else 5e-7
        assert torch.allclose(built[tensor].double(), theirs, rtol=0, atol=atol), tensor


def test_mergekit_divides_by_weights_where_ties_divides_by_the_number_of_adapters(tmp_path: Path) -> None:
    """With `normalize: false` it divides by nothing: both know the same values, signs and weights."""
    recorded = json.loads(MERGEKIT.read_text())["ties of weights"]
    small.make_base(tmp_path / "base", dtype=torch.float32)
    for adapter, seed in (("math", 50), ("code", 90)):
        small.make_adapter(tmp_path / adapter, seed=seed)
    weights = dict(zip(("math", "code"), recorded["merge"]["weights"], strict=True))
    adapters = {name: {"source": str(tmp_path / name), "weight": weight} for name, weight in weights.items()}

    lora_build.build(small.recipe(tmp_path, adapters=adapters, combine={"method": "ties", "density": 0.4}))

    base, built = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    for tensor, values in recorded["tensors"].items():
        ours = built[tensor].double() - base[tensor].double()
        theirs = torch.tensor(values, dtype=torch.float64) - base[tensor].double()
        ratio = theirs / torch.where(ours == 0, 1.0, ours)
        assert set(torch.round(ratio, decimals=3).reshape(-1).tolist()) <= {0.0, 1.0, 2.0}
        assert torch.equal(ours != 0, theirs.abs() > 1e-6)
