"""Every method but LoRA, on every kind of layer, against its paper's formula in long double and against peft in float64.

The adapters are those of layers.py.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from judges.oracle import long, ulps_off
from lora_build.methods.interface import AdaptedModule, methods
from makers.layers import (
    CASES,
    CROSSED,
    FULL,
    LINEAR,
    PLACES,
    Net,
    Saved,
    Shelf,
    Stub,
    base,
    fill,
    info,
    loaded_by_peft,
    merge,
    net,
    stub,
    updates,
)

Array = Any


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Returns a saved adapter of a case, made once."""
    return Shelf(tmp_path_factory.mktemp("methods"))


def same_bits(one: Tensor, other: Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


# --- the formulas, in long double --------------------------------------------------------------------------------------


def formula(adapter: Saved, module: str, W: Array, weight: float = 1.0) -> Array:
    """Return the merged weight [out, in·...] (an embedding [V, dim]) of one adapter, from its paper's formula."""
    config = adapter.config
    f = {leaf: long(t) for leaf, t in adapter.factors(module).items()}
    match config["peft_type"]:
        case "ADALORA":
            alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]
            s = np.longdouble(weight) * np.longdouble(alpha) / (config["init_r"] + np.longdouble("1e-5"))
            return W + s * (f["lora_B"] @ (f["lora_E"] * f["lora_A"]))
        case "LOHA":
            return W + scaled(config, module, weight) * (hada(f, "1") * hada(f, "2")).reshape(W.shape)
        case "LOKR":
            return W + scaled(config, module, weight) * kronecker(f, W)
        case "VERA":
            A, B = (long(adapter.shared[leaf]) for leaf in ("vera_A", "vera_B"))
            b, d = f["vera_lambda_b"], f["vera_lambda_d"]
            return W + np.longdouble(weight) * np.diag(b) @ B[: W.shape[0]] @ np.diag(d) @ A[:, : W.shape[1]]
        case "IA3":
            l = f["ia3_l"].flatten()  # noqa: E741
            if config["feedforward_modules"] == "never":
                return W * l[:, None]
            per_group = l.reshape(2, -1) if module == "grouped" else l[None]
            columns = np.repeat(per_group, W.shape[1] // per_group.shape[1], axis=1)
            return W * np.repeat(columns, len(W) // len(columns), axis=0)
        case "OFT":
            R = block_diagonal(config, next(iter(f.values())), W.shape[1])
            return W @ (R if module == "table" else R.T)
    raise AssertionError(config["peft_type"])


def scaled(config: Mapping[str, Any], module: str, weight: float) -> Array:
    alpha = config["alpha_pattern"].get(module, config["alpha"])
    return np.longdouble(weight) * np.longdouble(alpha) / config["rank_pattern"].get(module, config["r"])


def hada(f: Mapping[str, Array], i: str) -> Array:
    a, b, t = f[f"hada_w{i}_a"], f[f"hada_w{i}_b"], f.get(f"hada_t{i}")
    return a @ b if t is None else np.einsum("ijkl,jr,ip->prkl", t, b, a)


def kronecker(f: Mapping[str, Array], W: Array) -> Array:
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" not in f:
        a, b, t = f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2")
        w2 = a @ b if t is None else np.einsum("ijkl,ip,jr->prkl", t, a, b)
    else:
        w2 = f["lokr_w2"]
    if w2.ndim == 3:  # peft's reading: the leading dimension that w1 lacks comes first
        return np.einsum("lm,ank->alnmk", w1, w2).reshape(W.shape)
    return np.einsum("lm,an...->lamn...", w1, w2).reshape(W.shape)


def block_diagonal(config: Mapping[str, Any], upper: Array, size: int) -> Array:
    block = round((1 + np.sqrt(1 + 8 * upper.shape[1])) / 2)
    R = np.zeros((size, size), dtype=np.longdouble)
    for i in range(size // block):
        Q = np.zeros((block, block), dtype=np.longdouble)
        Q[np.triu_indices(block, 1)] = upper[i % len(upper)]
        Q = Q - Q.T
        limit = np.longdouble(config["eps"]) / np.sqrt(np.longdouble(len(upper)))
        if config["coft"] and (norm := np.sqrt((Q * Q).sum())) > limit:
            Q = Q * (limit / norm)
        at = slice(i * block, (i + 1) * block)
        R[at, at] = neumann(Q, config["num_cayley_neumann_terms"]) if config["use_cayley_neumann"] else cayley(Q)
    return R


def neumann(Q: Array, terms: int) -> Array:
    """The series as peft ends it: the last power counts once."""
    R, power = np.eye(len(Q), dtype=np.longdouble), Q
    for _ in range(terms - 2):
        R, power = R + 2 * power, power @ Q
    return R + power


def cayley(Q: Array) -> Array:
    M = np.eye(len(Q)) + Q
    X = np.linalg.inv(M.astype(np.float64)).astype(np.longdouble)
    for _ in range(3):
        X = X + X @ (np.eye(len(Q)) - M @ X)
    return (np.eye(len(Q)) - Q) @ X


def in_order(items: Sequence[Any], adapter: Saved, module: str) -> Sequence[Any]:
    """Return what belongs to the adapters of a module in the order in which they act on W."""
    return items[::-1] if adapter.config["peft_type"] == "OFT" and module != "table" else items


def exact(adapters: Sequence[Saved], module: str, weights: Sequence[float]) -> Array:
    """Return the merged weight as it is stored, of adapters that are added up or applied in turn."""
    turned = module in CROSSED
    W = long(base(module))
    W = W.T if turned else W
    total = W
    for adapter, weight in in_order(list(zip(adapters, weights, strict=False)), adapters[0], module):
        if adapter.config["peft_type"] in ("OFT", "IA3"):
            total = formula(adapter, module, total)
        else:
            total = total + (formula(adapter, module, W, weight) - W)
    return total.T if turned else total


# --- tests ----------------------------------------------------------------------------------------------------------------


def test_the_cases_cover_every_method_of_this_file() -> None:
    assert {make([]).peft_type.value for make, _ in CASES.values()} == {"ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA"}
    assert {make([]).peft_type.value for make, _ in CASES.values()} < set(methods())
    assert len(PLACES) == 79


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("case", "module"), PLACES)
def test_the_merge_is_the_formula_rounded_once(
    shelf: Callable[..., Saved], case: str, module: str, count: int, dtype: torch.dtype
) -> None:
    adapters = [shelf(case, seed) for seed in range(count)]
    weights = (1, 1) if case.partition("-")[0] in ("ia3", "oft", "coft") else (0.7, -1.3)
    W = base(module, dtype=dtype)

    merged, change = merge(updates(adapters, module, weights=weights), W, dtype)

    expected = exact(adapters, module, weights)
    assert merged.dtype == dtype
    assert np.max(ulps_off(merged, expected, W, dtype)) <= (0.51 if dtype != torch.float32 else 0.5001)
    assert np.allclose(long(change), expected - long(W), rtol=0, atol=1e-15 * max(1.0, 10 * np.abs(expected).max()))


@cache
def merged_by_peft(adapters: tuple[Saved, ...]) -> dict[str, Tensor]:
    peft = loaded_by_peft(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(peft.merge_and_unload(adapter_names=[adapter.name for adapter in adapters]).state_dict())


def test_inputs_pass_through_rotations_in_the_recipes_order_as_in_pefts_forward(shelf: Callable[..., Saved]) -> None:
    adapters = [shelf("oft", seed) for seed in range(2)]
    x = torch.randn(5, base("linear").shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    peft = loaded_by_peft(adapters)
    peft.base_model.set_adapter([adapter.name for adapter in adapters])

    W = merge(updates(adapters, "linear"), base("linear", dtype=torch.float64), torch.float64)[0]

    assert torch.allclose(peft.base_model.model.linear(x), x @ W.T + net().linear.bias.double(), rtol=0, atol=1e-12)
    theirs = merged_by_peft(tuple(adapters))["linear.weight"]
    assert not torch.allclose(theirs, W, atol=1e-3), "peft's merge is not its forward"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_peft_in_float64_says_the_same(shelf: Callable[..., Saved], case: str, count: int) -> None:
    adapters = [shelf(case, seed) for seed in range(count)]

    for module in CASES[case][1]:
        theirs = merged_by_peft(tuple(in_order(adapters, adapters[0], module)))
        for parameter in ("weight", "bias"):
            ours = base(module, parameter, torch.float64) if f"{module}.{parameter}" in theirs else None
            if pairs := updates(adapters, module, parameter):
                assert ours is not None
                ours = merge(pairs, ours, torch.float64)[0]
            if ours is not None:
                tolerance = 1e-7 * 0.25 if case == "coft" else 1e-13  # peft rounds COFT's eps to float32
                there = theirs[f"{module}.{parameter}"].reshape(ours.shape)
                assert torch.allclose(ours, there, rtol=1e-12, atol=tolerance), (module, parameter)


def test_peft_changes_the_biases_that_are_changed_here(shelf: Callable[..., Saved]) -> None:
    changed = {(case, module) for case, module in PLACES if updates([shelf(case, 0)], module, "bias")}

    assert changed == {(case, module) for case, module in PLACES if case == "ia3"}


@pytest.mark.parametrize(("case", "module"), PLACES)
def test_blocks_of_rows_give_the_bits_of_the_whole(shelf: Callable[..., Saved], case: str, module: str) -> None:
    pairs = updates([shelf(case, seed) for seed in range(3)], module)
    W = base(module)

    whole = merge(pairs, W, torch.float32)
    for step in (1, 5):
        assert all(same_bits(*x) for x in zip(merge(pairs, W, torch.float32, step=step), whole, strict=True))


@pytest.mark.parametrize(("case", "module"), PLACES)
def test_stored_rows_may_be_any_of_the_parameters_rows(shelf: Callable[..., Saved], case: str, module: str) -> None:
    pairs = updates([shelf(case, seed) for seed in range(2)], module)
    W = base(module)
    whole = merge(pairs, W, torch.float32)[0]

    for rows in (range(2, 6), (5, 0, 3, 3)):
        some = [(replace(update, rows=rows), factors) for update, factors in pairs]
        assert same_bits(merge(some, W[list(rows)], torch.float32, step=3)[0], whole[list(rows)])


@pytest.mark.parametrize(("case", "module"), [place for place in PLACES if place[0].startswith(("ia3", "loha"))])
def test_rows_hold_for_biases_too(shelf: Callable[..., Saved], case: str, module: str) -> None:
    pairs = updates([shelf(case, 0)], module, "bias")
    if pairs:
        W = base(module, "bias")
        some = [(replace(update, rows=(4, 1)), factors) for update, factors in pairs]
        assert same_bits(merge(some, W[[4, 1]], torch.float32)[0], merge(pairs, W, torch.float32)[0][[4, 1]])


@pytest.mark.parametrize(
    ("case", "module"), [place for place in PLACES if place[1] in (*LINEAR, *CROSSED, "wide", "narrow")]
)
def test_transposed_storage_gives_the_transposed_bits(shelf: Callable[..., Saved], case: str, module: str) -> None:
    pairs = updates([shelf(case, seed) for seed in range(2)], module)
    turned = [(replace(update, transposed=not update.transposed), factors) for update, factors in pairs]
    W = base(module)
    whole = merge(pairs, W, torch.float32)

    for step in (None, 1, 5):
        other = merge(turned, W.T.contiguous(), torch.float32, step=step)
        assert all(same_bits(x.T, y) for x, y in zip(other, whole, strict=True))
    if pairs[0][0].method != "OFT":
        some = [(replace(update, rows=(5, 2)), factors) for update, factors in turned]
        assert same_bits(merge(some, W.T[[5, 2]].contiguous(), torch.float32)[0].T, whole[0][:, [5, 2]])


def test_rotations_of_adapters_with_other_block_sizes_can_be_stored_transposed(shelf: Callable[..., Saved]) -> None:
    pairs = updates([shelf("oft", 0)], "square") + updates([shelf("oft-inverse", 1)], "square")
    turned = [(replace(update, transposed=True), factors) for update, factors in pairs]
    W = base("square")

    whole = merge(pairs, W, torch.float32)[0]
    assert same_bits(merge(turned, W.T.contiguous(), torch.float32, step=5)[0].T, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "module"), [place for place in PLACES if "oft" not in place[0]])
def test_the_order_of_adapters_changes_no_bit(
    shelf: Callable[..., Saved], case: str, module: str, dtype: torch.dtype
) -> None:
    pairs = updates([shelf(case, seed) for seed in range(5)], module)
    assert not any(placed.update.ordered for placed, _ in pairs)
    whole = merge(pairs, base(module), dtype)

    for order in ((2, 4, 0, 3, 1), (1, 0, 2, 3, 4), (4, 3, 2, 1, 0)):
        assert all(
            same_bits(*x) for x in zip(merge([pairs[i] for i in order], base(module), dtype), whole, strict=True)
        )


def test_the_order_of_rotations_is_the_recipes_and_is_said_to_matter(shelf: Callable[..., Saved]) -> None:
    pairs = updates([shelf("oft", seed) for seed in range(2)], "linear")
    W = base("linear", dtype=torch.float64)

    in_turn = merge(pairs[:1], merge(pairs[1:], W, torch.float64)[0], torch.float64)[0]
    assert all(placed.update.ordered for placed, _ in pairs)
    assert torch.equal(merge(pairs, W, torch.float64)[0], in_turn)
    assert not torch.allclose(merge(pairs[::-1], W, torch.float64)[0], in_turn, atol=1e-3)


COMBINED = ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune", "slerp"]
DIGEST = """
import hashlib, sys
import torch
from lora_build.methods.combine.interface import LoadedUpdates, StoredRows, combinations, merger
from lora_build.numerics.exact import round_once

def digest(inputs):
    found = hashlib.sha256()
    for updates, W, names in inputs:
        read = lambda start, end: W[start:end].double()
        at = StoredRows(tensor="x", first=0, num_rows=len(W), columns=W.shape[1], read=read)
        for dtype in (torch.bfloat16, torch.float32):
            for name in names:
                rows = merger(combinations()[name], LoadedUpdates(updates=updates, at=at))
                merged, change = rows(W.double(), 0)
                for part in (round_once(merged, dtype), change):
                    found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

if __name__ == "__main__":
    print(digest(torch.load(sys.argv[1], weights_only=False)), torch.get_num_threads())
"""


@pytest.mark.parametrize("setting", ["ATEN_CPU_CAPABILITY=default", "MKL_CBWR=COMPATIBLE"])
def test_the_bits_are_the_same_on_other_code_paths_of_the_libraries_and_with_two_threads(
    shelf: Callable[..., Saved], tmp_path: Path, setting: str
) -> None:
    names: dict[str, Any] = {"__name__": "digest"}
    exec(DIGEST, names)
    inputs = []
    for case, module in PLACES:
        pairs = updates([shelf(case, seed) for seed in range(3)], module)
        pairs = [(replace(p, update=replace(p.update, density=0.4, order=i)), f) for i, (p, f) in enumerate(pairs)]
        inputs.append(
            (
                pairs,
                base(module),
                COMBINED if (case, module) in (("loha", "linear"), ("ia3", "crossed")) else ["linear"],
            )
        )
    torch.save(inputs, tmp_path / "inputs.pt")
    name, _, value = setting.partition("=")

    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(tmp_path / "inputs.pt")],
        env={**os.environ, name: value, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [names["digest"](inputs), "2"], done.stderr


# --- AdaLoRA's pruned ranks -------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path: Path) -> Saved:
    """An adapter some of whose ranks training has pruned, all of one module."""
    kept = {"linear": [True, False, True, True], "square": [False] * 4, "crossed": [True] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), AdaLoraConfig(target_modules=list(kept), **FULL))
        fill(model, 5)
        model.peft_config["default"].rank_pattern = {f"{module}.lora_E.default": k for module, k in kept.items()}
        model.save_pretrained(str(tmp_path / "pruned"))
    return Saved("a5", tmp_path / "pruned")


def test_pruned_ranks_keep_the_scaling_of_all_ranks(pruned: Saved) -> None:
    model = Net()
    model.load_state_dict(net().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(model.double(), str(pruned.folder)).merge_and_unload().state_dict()

    assert [len(pruned.factors(m)["lora_A"]) for m in ("linear", "square", "crossed")] == [3, 0, 4]
    for module in ("linear", "crossed"):
        ours = merge(updates([pruned], module), base(module, dtype=torch.float64), torch.float64)[0]
        assert torch.allclose(ours, theirs[f"{module}.weight"], rtol=1e-12, atol=1e-13)
    assert torch.equal(theirs["square.weight"].float(), net().square.weight)
    assert methods()["ADALORA"].updates(pruned.layer("square")) == ({}, [])


def test_keys_of_ms_swift_that_change_no_weight_are_accepted() -> None:
    config = {
        "r": 2, "lora_alpha": 4, "swift_type": "LORA", "lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6,
        "use_qa_lora": False, "use_merged_linear": False, "model_key_mapping": None, "enable_lora": None,
    }  # fmt: skip

    assert methods()["LORA"].check_config(config) == []


def test_a_rank_pattern_that_the_file_does_not_follow_is_refused(pruned: Saved) -> None:
    config = pruned.config | {"rank_pattern": {"linear.lora_E": [True] * 4}}
    _, problems = methods()["ADALORA"].updates(pruned.layer("linear", config=config))

    assert problems == ["adapters.a5: linear: lora_A is [3, 12], but adapter_config.json says rank 4 for it"]


# --- what is refused --------------------------------------------------------------------------------------------------------

CONFIGS = [
    ("adalora", {"init_r": 0}, "init_r: expected a whole number from 1 to 16384, found 0"),
    ("adalora", {"lora_alpha": "8"}, "lora_alpha: expected a finite number, found '8'"),
    ("adalora", {"use_dora": True}, "use_dora: is not supported together with AdaLoRA"),
    ("adalora", {"rank_pattern": {"linear.lora_E": [0, 2]}}, "rank_pattern: 'linear.lora_E': expected a list of booleans"),
    ("adalora", {"rank_pattern": [1]}, "rank_pattern: expected a mapping, found [1]"),
    ("adalora", {"rank_pattern": {"x.lora_E": [True]}, "lora_alpha": 0}, "lora_alpha: 0 with a rank_pattern"),
    ("loha", {"r": 2.5}, "r: expected a whole number from 1 to 16384, found 2.5"),
    ("loha", {"alpha": float("nan")}, "alpha: expected a finite number, found nan"),
    ("loha", {"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is not a regular expression"),
    ("lokr", {"alpha": None}, "alpha: expected a finite number, found None"),
    ("lokr", {"rank_pattern": {"a": "x"}}, "rank_pattern: 'a': expected a whole number from 1 to 16384, found 'x'"),
    ("vera", {"save_projection": False}, "save_projection: is not true, so peft would draw vera_A and vera_B anew"),
    ("vera", {"r": None}, "r: expected a whole number from 1 to 16384, found None"),
    ("ia3", {"feedforward_modules": "("}, "feedforward_modules: '(' is not a regular expression"),
    ("oft", {"use_cayley_neumann": None}, "oft_block_size or use_cayley_neumann: is missing"),
    ("oft", {"peft_version": "0.17.1"}, "peft_version: 0.17.1, but before 0.18 the Cayley-Neumann series"),
    ("oft", {"peft_version": None}, "peft_version: none, but before 0.18 the Cayley-Neumann series"),
    ("oft", {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms: expected a whole number from 1 on, found 0"),
    ("coft", {"eps": "1"}, "eps: expected a positive number, found '1'"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_accepted_and_a_key_that_nobody_knows_is_not(
    shelf: Callable[..., Saved], case: str
) -> None:
    config = shelf(case, 0).config
    check = methods()[config["peft_type"]].check_config

    assert check(config) == []
    assert check(config | {"new_thing": 1}) == [
        "new_thing: is not a key that this version knows; if it cannot change the weights, delete it from the file"
    ]


@pytest.mark.parametrize(("case", "changes", "message"), CONFIGS)
def test_a_config_with_another_meaning_is_refused(
    shelf: Callable[..., Saved], case: str, changes: dict[str, Any], message: str
) -> None:
    config = shelf(case, 0).config | changes
    problems = methods()[config["peft_type"]].check_config(config)

    assert [p for p in problems if p.startswith(message)], problems


def problems_of(adapter: Saved, module: str, shapes: Mapping[str, Sequence[int]], **changes: Any) -> str:
    """Return the one problem of a layer some of whose tensors have other shapes; an empty shape leaves a tensor out."""
    layer = adapter.layer(module, **changes)
    factors = dict(layer.factors)
    shared = dict(layer.shared)
    for leaf, shape in shapes.items():
        into = shared if leaf in shared else factors
        into[leaf] = replace(next(iter(factors.values())), shape=tuple(shape))
        if not shape:
            del into[leaf]
    made, problems = methods()[layer.config["peft_type"]].updates(replace(layer, factors=factors, shared=shared))
    assert made == {}
    (problem,) = problems
    return problem


SHAPES: list[tuple[str, str, dict[str, Sequence[int]], str]] = [
    ("adalora", "linear", {"lora_E": ()}, "linear: has lora_A, lora_B but no lora_E; the adapter's file is incomplete"),
    ("adalora", "linear", {"lora_E": (3, 1)}, "lora_A [4, 12], lora_E [3, 1] and lora_B [8, 4] should be [r, in]"),
    ("adalora", "linear", {"lora_A": (4, 13)}, "lora_B @ lora_A is [8, 13], the base's weight is [8, 12]; was it trained"),
    ("adalora", "crossed", {"lora_B": (9, 4)}, "lora_B @ lora_A is [9, 12], the base's weight is [12, 8]"),
    ("adalora", "plane", {"lora_A": (4, 18)}, "lora_B @ lora_A is [8, 18], the base's weight is [8, 6, 3, 3]"),
    ("loha", "linear", {"hada_w2_b": ()}, "linear: has hada_w1_a, hada_w1_b, hada_w2_a but no hada_w2_b"),
    ("loha", "linear", {"hada_w1_b": (4, 12)}, "hada_w1_b is [4, 12], but adapter_config.json says rank 3 for it"),
    ("loha", "linear", {"hada_w2_a": (8, 4)}, "hada_w2_a [8, 4], hada_w2_b [3, 12], the base's weight is [8, 12]"),
    ("loha", "line", {"hada_w1_b": (3, 6)}, "hada_w1_b [3, 6], hada_w2_a [8, 3], hada_w2_b [3, 18], the base's weight is"),
    ("loha-cp", "line", {"hada_t2": (3, 3, 2, 1)}, "hada_t2 [3, 3, 2, 1], the base's weight is [8, 6, 3]"),
    ("loha-cp", "line", {"hada_t1": ()}, "line: has hada_t2, hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b but no hada_t1"),
    ("lokr", "linear", {"lokr_w2_b": ()}, "linear: lokr_w1_a, lokr_w1_b, lokr_w2_a do not make up a LoKr"),
    ("lokr", "linear", {"lokr_w1": (2, 3)}, "linear: lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2_a, lokr_w2_b do not make up"),
    ("lokr", "linear", {"lokr_w1_b": (2, 3)}, "at rank 1 the factors are lokr_w1_a [2, 1], lokr_w1_b [2, 3],"),
    ("lokr", "linear", {"lokr_w2_a": (5, 1)}, "the base's weight is [8, 12]; was it trained on another base?"),
    ("lokr-full", "plane", {"lokr_w2": (4, 3, 2, 3)}, "lokr_w2 [4, 3, 2, 3], the base's weight is [8, 6, 3, 3]"),
    ("lokr-cp", "plane", {"lokr_t2": (1, 1, 3, 2)}, "lokr_t2 [1, 1, 3, 2], lokr_w1 [2, 2], lokr_w2_a"),
    ("vera", "linear", {"vera_A": ()}, "the adapter's file has no base_model.vera_A, although its config says save_projection"),
    ("vera", "linear", {"vera_lambda_d": (4,)}, "vera_lambda_d [4], but adapter_config.json says rank 5 for them"),
    ("vera", "linear", {"vera_A": (5, 11)}, "vera_A [5, 11], the base's weight is [8, 12]; was it trained on another base?"),
    ("vera", "linear", {"vera_lambda_b": (7,)}, "vera_lambda_b is [7], vera_B [16, 5] and vera_A [5, 12]"),
    ("ia3", "linear", {"ia3_l": (3, 1)}, "ia3_l is [3, 1] (expected [8, 1], or [1, 12] of a feedforward module)"),
    ("ia3", "plane", {"ia3_l": (1, 7, 1, 1)}, "ia3_l is [1, 7, 1, 1] (expected [1, 8, 1, 1], or [1, 6, 1, 1]"),
    ("ia3", "plane", {"ia3_l": (8,)}, "ia3_l is [8] (expected [1, 8, 1, 1], or [1, 6, 1, 1]"),
    ("oft", "linear", {"oft_R.weight": (2, 14)}, "oft_R.weight is [2, 14] (expected [12/b, b·(b-1)/2] of blocks b x b)"),
    ("oft", "linear", {"oft_R.weight": (3, 15)}, "oft_R.weight is [3, 15]"),
    ("oft", "linear", {"oft_R.weight": (15,)}, "oft_R.weight is [15]"),
    ("oft-shared", "linear", {"oft_R.weight": (3, 6)}, "oft_R.weight is [3, 6] (expected [1, b·(b-1)/2]"),
    ("oft-shared", "linear", {"oft_R.weight": (1, 10)}, "oft_R.weight is [1, 10] (expected [1, b·(b-1)/2]"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "module", "shapes", "message"), SHAPES)
def test_shapes_that_do_not_fit_are_refused(
    shelf: Callable[..., Saved], case: str, module: str, shapes: dict[str, Sequence[int]], message: str
) -> None:
    problem = problems_of(shelf(case, 0), module, shapes)

    assert problem.startswith(f"adapters.a0: {module}: ")
    assert message in problem


@pytest.mark.parametrize("case", ["ia3", "oft"])
def test_a_product_cannot_be_weighted(shelf: Callable[..., Saved], case: str) -> None:
    problem = problems_of(shelf(case, 0), "linear", {}, adapter_weight=0.5)

    assert problem == (f"adapters.a0: linear: {case.upper()} multiplies, so a weight of 0.5 means nothing; set it to 1")


UNFIT = [
    ("adalora", "Embedding", "is a Embedding of weight [8, 12] in the base; expected Linear, Conv1D, Conv2d"),
    ("loha", "Conv1D", "is a Conv1D of weight [8, 12] in the base; expected Linear, Conv1d, Conv2d"),
    ("lokr", "Conv1D", "is a Conv1D of weight [8, 12] in the base; expected Linear, Conv1d, Conv2d"),
    ("vera", "Embedding", "is a Embedding of weight [8, 12] in the base; expected Linear, Conv1D"),
    ("ia3", "Embedding", "is a Embedding of weight [8, 12] in the base; expected Linear, Conv1D, Conv2d, Conv3d"),
    ("oft", "Conv1D", "is a Conv1D of weight [8, 12] in the base; expected Linear, Conv2d"),
]


@pytest.mark.parametrize(("case", "layer_type", "message"), UNFIT)
def test_modules_that_peft_does_not_adapt_are_refused(
    shelf: Callable[..., Saved], case: str, layer_type: str, message: str
) -> None:
    adapter = shelf(case, 0)

    assert message in problems_of(adapter, "linear", {}, base=stub("linear", layer_type=layer_type))
    assert "lies inside another adapted module" in problems_of(adapter, "linear", {}, wrapped=True)
    assert "the base has no weight there" in problems_of(adapter, "linear", {}, base=Stub({}, None))
    assert "is a module of weight [2, 2, 2, 2, 2, 2]" in problems_of(
        adapter, "linear", {}, base=Stub({"weight": (2,) * 6}, None)
    )


@pytest.mark.parametrize(
    ("case", "module"), [("oft", "table"), ("loha", "plane"), ("ia3", "cube"), ("adalora", "point")]
)
@pytest.mark.parametrize("layer_type", [None, "Linear", "SomeoneElsesLayer"])
def test_a_class_that_only_its_weight_tells_is_accepted(
    shelf: Callable[..., Saved], case: str, module: str, layer_type: str | None
) -> None:
    layer = shelf(case, 0).layer(module)

    known = methods()[layer.config["peft_type"]].updates(layer)
    assert known[1] == []
    assert (
        methods()[layer.config["peft_type"]].updates(replace(layer, base=stub(module, layer_type=layer_type))) == known
    )


@pytest.mark.parametrize("case", ["adalora", "vera", "ia3", "ia3-feedforward"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_where_nobody_knows_the_class_shapes_tell_and_then_the_config(
    shelf: Callable[..., Saved], case: str, fan_in_fan_out: bool
) -> None:
    adapter = shelf(case, 0)
    config = adapter.config | {"fan_in_fan_out": fan_in_fan_out}
    method = methods()[config["peft_type"]]

    def transposed(module: str, shape: tuple[int, ...]) -> bool:
        layer = adapter.layer(module, config=config, base=Stub({"weight": shape}, None))
        made, problems = method.updates(layer)
        assert problems == []
        return made["weight"].transposed

    assert not transposed("linear", (8, 12))
    assert transposed("linear", (12, 8))
    assert transposed("square", (12, 12)) == fan_in_fan_out


def test_known_groups_tell_which_channels_a_vector_has_to_scale(shelf: Callable[..., Saved]) -> None:
    adapter = shelf("ia3-feedforward", 0)

    def groups(number: int) -> Any:
        return adapter.layer("grouped", base=replace(stub("grouped"), settings={"groups": number}))

    made, problems = methods()["IA3"].updates(groups(2))
    assert problems == []
    assert made["weight"].options == {"groups": 2, "outputs": 8}
    _, problems = methods()["IA3"].updates(replace(groups(1), factors={"ia3_l": info("x", torch.ones(1, 16, 1, 1))}))
    assert "ia3_l is [1, 16, 1, 1] (expected [1, 8, 1, 1], or [1, 4, 1, 1] of a feedforward module)" in problems[0]


def test_a_convolution_whose_patches_overlap_cannot_hold_a_rotation() -> None:
    """peft's forward adds up turned patches: merged, the model is another one, and peft says nothing."""

    class Model(nn.Module):
        def __init__(self, kernel: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, kernel, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    def off(kernel: int) -> float:
        model = get_peft_model(Model(kernel), OFTConfig(target_modules=["conv"], oft_block_size=2)).eval()
        fill(model, 3)
        x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            trained = model(x)
            return float((model.merge_and_unload()(x) - trained).abs().max())

    assert off(1) < 1e-5
    assert off(3) > 1
    layer = AdaptedModule(
        adapter="a",
        path="plane",
        config=OFTConfig(oft_block_size=2).to_dict(),
        adapter_weight=1.0,
        factors={"oft_R.weight": info("x", torch.zeros(27, 1))},
        base=stub("plane"),
    )
    (problem,) = methods()["OFT"].updates(layer)[1]
    assert "plane: is a convolution with a kernel [3, 3], for which peft trains patches turned" in problem


def test_blocks_of_one_element_turn_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(Net(), OFTConfig(target_modules=["linear"], oft_block_size=1)).save_pretrained(str(tmp_path))

    assert methods()["OFT"].updates(Saved("a", tmp_path).layer("linear")) == ({}, [])


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 9])
def test_the_series_has_the_terms_that_peft_gives_it(terms: int) -> None:
    from peft.tuners.oft.layer import OFTRotationModule

    from lora_build.methods.oft import _neumann

    upper = 0.3 * torch.randn(1, 15, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    module = OFTRotationModule(1, 15, 6, 6)
    theirs = module._cayley_batch(upper, 6, use_cayley_neumann=True, num_neumann_terms=terms)[0]
    Q = module._pytorch_skew_symmetric(upper, 6)[0]

    assert torch.allclose(_neumann(Q, terms), theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_inverse_stays_exact_without_pivoting(size: float) -> None:
    from lora_build.methods.oft import _inverse

    raw = size * torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    M = torch.eye(40, dtype=torch.float64) + (raw - raw.transpose(1, 2))

    assert float((_inverse(M) - torch.linalg.inv(M)).abs().max()) < 1e-12


def test_stored_matrices_that_hold_only_some_inputs_cannot_be_turned(shelf: Callable[..., Saved]) -> None:
    from lora_build.errors import MergeError

    update, factors = updates([shelf("oft", 0)], "linear")[0]
    with pytest.raises(MergeError, match="OFT turns inputs, of which a0 has only some"):
        merge([(replace(update, transposed=True, rows=(1, 2)), factors)], base("linear").T, torch.float32)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield
