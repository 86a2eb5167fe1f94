"""Each method's forward beside the weight, against the merged weight in float64 and against peft's own forward.

The two say the same by different mathematics: a low-rank path, scaled outputs, turned inputs; and a matrix of their own.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from lora_build.errors import MergeError
from lora_build.methods.calls import through
from lora_build.methods.interface import Call, PlacedUpdate, methods
from lora_build.methods.lora.forward import without_offsets
from lora_build.methods.trainable_tokens import replacement
from makers.layers import (
    CASES,
    CROSSED,
    LINEAR,
    Cases,
    Saved,
    Shelf,
    Tensors,
    base,
    info,
    loaded_by_peft,
    merge,
    net,
    updates,
)

Pairs = Sequence[tuple[PlacedUpdate, Tensors]]

TABLES = ("table", "gemma", "bart")
CONVOLUTIONS = ("line", "dot", "plane", "point", "strided", "cube")


def lora(targets: list[str], **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, r=4, lora_alpha=6, fan_in_fan_out=targets[0] in CROSSED, **options)


def tokens(indices: list[int]) -> LoraConfig:
    return lora(["linear"], trainable_token_indices=dict.fromkeys(("head", *TABLES), indices))


LORA: Cases = {
    "lora": (lora, (*LINEAR, *TABLES, *CONVOLUTIONS, "head")),
    "lora-crossed": (lora, CROSSED),
    "lora-rank-stabilised": (lambda t: lora(t, use_rslora=True, alpha_pattern={"table": 3}), ("linear", "table", "plane")),
    "lora-bias": (lambda t: lora(t, lora_bias=True), (*LINEAR, *CONVOLUTIONS)),
    "lora-bias-crossed": (lambda t: lora(t, lora_bias=True), CROSSED),
    "dora": (lambda t: lora(t, use_dora=True), (*LINEAR, *TABLES, *CONVOLUTIONS, "head")),
    "dora-crossed": (lambda t: lora(t, use_dora=True), CROSSED),
    "bdlora": (
        lambda t: lora(t, use_bdlora=BdLoraConfig(target_modules_bd_a=["linear"], target_modules_bd_b=["square"], nblocks=2, match_strict=False)),
        (*LINEAR, "head"),
    ),
    "kasa": (lambda t: lora(t, kasa_config=KasaConfig()), LINEAR),
    "pissa": (lambda t: lora(t, init_lora_weights="pissa"), (*LINEAR, "table")),
    "pissa-crossed": (lambda t: lora(t, init_lora_weights="pissa"), CROSSED),
    "olora": (lambda t: lora(t, init_lora_weights="olora"), LINEAR),
}  # fmt: skip
TOKENS: Cases = {
    "tokens": (lambda _: tokens([1, 7]), ("head", *TABLES)),
    "tokens-alone": (lambda t: TrainableTokensConfig(target_modules=t, token_indices=[4, 2]), ("table", "gemma")),
}
OTHERS: Cases = {
    "lora-ring": (lora, ("ring",)),  # peft's forward is another one
    # no two may train one token
    "tokens-others": (lambda _: tokens([8, 0, 3]), ("head", *TABLES)),
    "tokens-alone-others": (lambda t: TrainableTokensConfig(target_modules=t, token_indices=[9]), ("table", "gemma")),
}
ALL = CASES | LORA | TOKENS
# why two of a case are not compared with peft
ALONE_IN_PEFT = dict.fromkeys(
    ("kasa", "pissa", "pissa-crossed", "olora"),
    "of a second one peft decomposes what the first one left of the base, not the base that it was trained on",
) | dict.fromkeys(("tokens",), "peft activates one TrainableTokensWrapper at a time")
PLACES = [(case, module) for case, (_, modules) in ALL.items() for module in modules]
NOT_WEIGHTED = ("ia3", "oft", "coft", "tokens")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("forward"), ALL | OTHERS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def adapters_of(shelf: Shelf, case: str, count: int) -> list[Saved]:
    if f"{case}-others" in OTHERS:
        return [shelf(case, 0), shelf(f"{case}-others", 1)][:count]
    return [shelf(case, seed) for seed in range(count)]


def module_of(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(dict(net().named_modules())[name]).to(dtype).requires_grad_(False)


def with_values(module: nn.Module, **values: Tensor) -> nn.Module:
    """Return a copy of a module with other values, given as matrices."""
    changed = copy.deepcopy(module)
    for name, value in values.items():
        old = changed.get_parameter(name)
        shape = (len(value), *old.shape[1:]) if old.dim() > 2 or name == "bias" else value.shape
        setattr(changed, name, nn.Parameter(value.reshape(shape), requires_grad=False))
    return changed


def input_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = module.get_parameter("weight")
    if isinstance(module, nn.Embedding):
        return torch.arange(2 * len(weight)).reshape(2, -1).flip(1) % len(weight)
    if weight.dim() > 2:
        channels = weight.shape[1] * getattr(module, "groups", 1)
        return torch.randn(2, channels, *[6] * (weight.dim() - 2), dtype=dtype, generator=generator)
    inner = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
    return torch.randn(2, 3, inner, dtype=dtype, generator=generator)


def all_updates(adapters: Sequence[Saved], name: str, weights: Sequence[float] = (1,) * 5) -> Pairs:
    """Return the updates of a module's weight and bias."""
    return [pair for leaf in ("weight", "bias") for pair in updates(adapters, name, leaf, weights)]


def forward(pairs: Pairs, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    loaded = [(update, {role: t.to(dtype) for role, t in factors.items()}) for update, factors in pairs]
    return methods()[pairs[0][0].method].forward(loaded, Call(module=module, input=x, base=module.forward))


def merged(adapters: Sequence[Saved], name: str, weights: Sequence[float] = (1,) * 5) -> nn.Module:
    """Return a module in float64 with what the merge makes of its weight and bias."""
    changed = {
        leaf: merge(pairs, base(name, leaf, torch.float64), torch.float64)[0]
        for leaf in ("weight", "bias")
        if (pairs := updates(adapters, name, leaf, weights))
    }
    return with_values(module_of(name, torch.float64), **changed)


def in_peft(adapters: Sequence[Saved], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the net with all adapters active, loaded by peft."""
    peft = loaded_by_peft(adapters, dtype).eval().requires_grad_(False)
    peft.base_model.set_adapter([adapter.name for adapter in adapters])
    found: nn.Module = peft.base_model.model.requires_grad_(False)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_the_cases_cover_every_method() -> None:
    made = {make(["linear"]).peft_type.value for make, _ in ALL.values()}
    assert made == set(methods())
    assert len(PLACES) == 138


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("case", "name"), PLACES)
def test_adapters_beside_the_weight_give_what_the_merged_weight_gives(
    shelf: Shelf, case: str, name: str, count: int
) -> None:
    adapters = adapters_of(shelf, case, count)
    weights = (1, 1) if case.partition("-")[0] in NOT_WEIGHTED else (0.7, -1.3)
    module = module_of(name, torch.float64)
    before, x = copy.deepcopy(module.state_dict()), input_of(module, torch.float64)

    y = forward(all_updates(adapters, name, weights), module, x, torch.float64)

    assert off(y, merged(adapters, name, weights)(x)) < 1e-10
    assert off(y, module(x)) > 1e-3
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("case", "count"), [(case, n) for case in ALL for n in (1, 2) if n == 1 or case not in ALONE_IN_PEFT]
)
def test_adapters_beside_the_weight_give_what_pefts_forward_gives(shelf: Shelf, case: str, count: int) -> None:
    adapters = adapters_of(shelf, case, count)
    peft = in_peft(adapters)

    for name in ALL[case][1]:
        module = module_of(name, torch.float32)
        x = input_of(module, torch.float32)
        y = forward(all_updates(adapters, name), module, x, torch.float32)
        assert off(y, peft.get_submodule(name)(x)) < 1e-5, name


# --- rows, storage, order -------------------------------------------------------------------------------------------------

HAVE_ROWS = [place for place in PLACES if place[1] != "grouped" and place[0] not in ALONE_IN_PEFT]


@pytest.mark.parametrize(("case", "name"), HAVE_ROWS)
def test_a_module_may_hold_any_of_the_parameters_rows(shelf: Shelf, case: str, name: str) -> None:
    rows = (5, 0, 2, 2, 1)
    module = module_of(name, torch.float64)
    pairs = [(replace(update, rows=rows), factors) for update, factors in all_updates([shelf(case, 0)], name)]
    if any(update.transposed and "m" in factors for update, factors in pairs):
        return  # the norms of its columns need all rows; no plan gives such an update some of them
    crossed, has_bias = type(module).__name__ == "Conv1D", getattr(module, "bias", None) is not None
    if crossed:  # stored rows are inputs
        pairs = [(u, f) if u.transposed else (replace(u, rows=None), f) for u, f in pairs]
    values = {"weight": base(name, dtype=torch.float64)[list(rows)]}
    if has_bias and not crossed:
        values["bias"] = base(name, "bias", torch.float64)[list(rows)]
    some = with_values(module, **values)
    of_bias = len(pairs) - len(updates([shelf(case, 0)], name))
    parts = {"weight": pairs[: len(pairs) - of_bias], "bias": pairs[len(pairs) - of_bias :]}
    after = {
        leaf: merge(
            part, base(name, leaf, torch.float64) if leaf == "bias" and crossed else values[leaf], torch.float64
        )[0]
        for leaf, part in parts.items()
        if part
    }
    x = input_of(some, torch.float64)

    assert off(forward(pairs, some, x, torch.float64), with_values(some, **after)(x)) < 1e-10


def test_an_update_of_a_head_may_be_of_the_embedding_that_it_shares_its_weight_with(shelf: Shelf) -> None:
    adapters = [shelf("lora", seed) for seed in range(2)]
    pairs = updates(adapters[:1], "head") + updates(adapters[1:], "table")
    assert [update.transposed for update, _ in pairs] == [False, True]
    after = merge(pairs, base("table", dtype=torch.float64), torch.float64)[0]

    for module in (module_of("table", torch.float64), nn.Linear(12, 10, bias=False)):
        tied = with_values(module, weight=base("table", dtype=torch.float64))
        x = input_of(tied, torch.float64)
        assert off(forward(pairs, tied, x, torch.float64), with_values(tied, weight=after)(x)) < 1e-10


@pytest.mark.parametrize("case", ["lora-bias", "ia3"])
@pytest.mark.parametrize("name", ["linear", "plane"])
def test_updates_of_a_bias_may_come_first(shelf: Shelf, case: str, name: str) -> None:
    adapters = [shelf(case, seed) for seed in range(2)]
    module = module_of(name, torch.float64)
    x, pairs = input_of(module, torch.float64), updates(adapters, name, "bias") + updates(adapters, name)

    assert off(forward(pairs, module, x, torch.float64), merged(adapters, name)(x)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("case", "name"), [place for place in PLACES if place[1] in ("linear", "crossed", "gemma", "point")]
)
def test_the_output_has_the_dtype_of_the_bases(shelf: Shelf, case: str, name: str, dtype: torch.dtype) -> None:
    adapters, module = adapters_of(shelf, case, 2), module_of(name, dtype)
    x = input_of(module, dtype)
    y = forward(all_updates(adapters, name), module, x, torch.float32)

    assert y.dtype == dtype
    wide = x if x.dtype == torch.int64 else x.double()
    after = merged(adapters, name)
    if name == "gemma":
        after.embed_scale = module.embed_scale.double()  # as its forward rounds it
    assert off(y, after(wide)) < 4 * torch.finfo(dtype).eps


def test_a_decomposition_of_the_weight_can_be_done_once(shelf: Shelf) -> None:
    for case in ("kasa", "pissa", "olora"):
        module, pairs = module_of("linear", torch.float64), all_updates([shelf(case, 0)], "linear")
        x = input_of(module, torch.float64)
        once = list(without_offsets(pairs, module))

        assert [len(pairs), len(once)] == [1, 2]
        assert not any(placed.update.decomposes_base for placed, _ in once)
        assert off(forward(once, module, x, torch.float64), forward(pairs, module, x, torch.float64)) < 1e-6


def test_each_group_of_a_convolution_meets_all_ranks() -> None:
    generator = torch.Generator().manual_seed(5)
    module = module_of("grouped", torch.float64)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 3), (3, 36)))
    x = input_of(module, torch.float64)
    alone = with_values(module, weight=left @ right, bias=torch.zeros(8, dtype=torch.float64))

    assert off(through(module, x, left, right), alone(x)) < 1e-12
    assert off(through(module, x, left @ right), alone(x)) < 1e-12


# --- where peft's forward is not its merge --------------------------------------------------------------------------------


def test_peft_scales_a_bias_that_was_added_before_dora_and_its_merge_does_not(shelf: Shelf) -> None:
    adapters = [shelf("lora-bias", 0), shelf("dora", 1)]
    module = module_of("linear", torch.float32)
    x = input_of(module, torch.float32)
    theirs = in_peft(adapters).get_submodule("linear")(x)
    after = loaded_by_peft(adapters).merge_and_unload(adapter_names=["a0", "a1"]).linear.requires_grad_(False)

    y = forward(all_updates(adapters, "linear"), module, x, torch.float32)
    assert off(y, after(x.double())) < 1e-5
    assert off(y, merged(adapters, "linear")(x.double())) < 1e-5
    assert off(y, theirs) > 1e-2


def test_peft_pads_a_convolution_with_zeros_whatever_its_base_does(shelf: Shelf) -> None:
    adapter = shelf("lora-ring", 0)
    module = module_of("ring", torch.float32)
    x = input_of(module, torch.float32)

    y = forward(all_updates([adapter], "ring"), module, x, torch.float32)
    assert off(y, merged([adapter], "ring")(x.double())) < 1e-5
    theirs = in_peft([adapter]).get_submodule("ring")(x)
    assert off(y[..., 1:-1], theirs[..., 1:-1]) < 1e-5
    assert off(y, theirs) > 1e-2


def test_peft_scales_an_update_of_an_embedding_by_another_number_than_gemma_in_sixteen_bits(shelf: Shelf) -> None:
    adapter, module = shelf("lora", 0), module_of("gemma", torch.bfloat16)
    pairs = [
        (replace(placed, update=replace(placed.update, scale=1e6)), factors)
        for placed, factors in all_updates([adapter], "gemma")
    ]
    x = input_of(module, torch.float32)
    after = with_values(module, weight=merge(pairs, base("gemma", dtype=torch.float64), torch.bfloat16)[0])
    layer = in_peft([adapter], torch.bfloat16).get_submodule("gemma")
    layer.scaling["a0"] = 1e6
    layer.base_layer.embed_scale = module.embed_scale = after.embed_scale = torch.tensor(1.0039)  # bfloat16 has 1

    y = forward(pairs, module, x, torch.float32)
    ours, theirs, expected = (float(t.double().abs().sum()) for t in (y, layer(x), after(x)))
    assert ours == pytest.approx(expected, rel=5e-4)
    assert theirs == pytest.approx(1.0039 * expected, rel=5e-4)


def test_peft_leaves_out_the_bias_of_a_head_whose_tokens_were_trained(shelf: Shelf) -> None:
    generator = torch.Generator().manual_seed(6)
    rows, module = torch.randn(2, 12, generator=generator), module_of("linear", torch.float32)
    update = PlacedUpdate(update=replacement("a", info("rows", rows), (6, 2)), start=0, stop=8)
    x = input_of(module, torch.float32)
    weight = merge([(update, {"rows": rows})], base("linear"), torch.float32)[0]

    y = forward([(update, {"rows": rows})], module, x, torch.float32)
    assert off(y, with_values(module, weight=weight)(x)) < 1e-6
    config = TrainableTokensConfig(token_indices=[6, 2])
    layer = TrainableTokensLayer(module, "a", config)
    layer.update_layer("a", config)
    layer.set_adapter(["a"])
    layer.trainable_tokens_delta["a"].data = rows
    assert off(y, layer(x).detach() + module.bias) < 1e-6


def test_rows_in_place_of_all_of_a_tables_are_its_output() -> None:
    rows, module = torch.randn(10, 12, generator=torch.Generator().manual_seed(8)), module_of("table", torch.float32)
    update = PlacedUpdate(update=replacement("a", info("rows", rows), range(10)), start=0, stop=10)
    x = input_of(module, torch.float32)

    assert torch.equal(forward([(update, {"rows": rows})], module, x, torch.float32), rows[x])


def test_inputs_of_which_a_module_has_only_some_cannot_be_turned(shelf: Shelf) -> None:
    update, factors = updates([shelf("oft", 0)], "linear")[0]
    module = module_of("linear", torch.float32)

    with pytest.raises(MergeError, match="OFT turns inputs, of which a0 has only some"):
        forward([(replace(update, transposed=True, rows=(1, 2)), factors)], module, torch.ones(1, 2), torch.float32)
