"""`peft-0.21`: the operations of peft's merge in peft's order, with peft's roundings, for the bits that peft writes.

The bits of a float32 product depend on the BLAS, on the operands' shapes and layout, and on the number of threads. So a
delta is always that of a whole parameter as it is in memory, made of operands as peft has them, with as many threads as
torch takes by itself; what lies on disk in parts is cut out of it afterwards. All else works element by element, but
for DoRA's norms, which get the whole parameter too.

`PeftModel.from_pretrained` casts the factors of fp16 and bf16 adapters to float32 (tuners_utils.py cast_adapter_dtype);
whatever replaces values of the base is cast to its dtype, once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.interface import PeftLayer, PlacedUpdate

# layers and variants that cast a delta to the base's dtype before they add it, whatever safe_merge says
_CASTING = {"Embedding", "MultiheadAttention", "ParamWrapper", "bdlora", "mica"}
_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one adapter did to some rows when its turn came.

    Attributes:
        adapter: its name.
        before: the rows before it.
        after: the rows after it, rounded to the output's dtype.
        change: what it added before rounding, in float64.
    """

    adapter: str
    before: Tensor
    after: Tensor
    change: Tensor


class Deltas:
    """The deltas of whole parameters; the last ones are kept where a parameter is several tensors on disk."""

    def __init__(self, load: Callable[[TensorInfo], Tensor]) -> None:
        """Take what reads a factor."""
        self._load = load
        self._adapters: set[str] = set()
        self._kept: dict[tuple[TensorInfo, ...], Tensor] = {}

    def keep_for(self, adapters: Iterable[str]) -> None:
        """Make room for the deltas of two parameters of each adapter: the stacks of a layer take turns in a file."""
        self._adapters.update(adapters)

    def factor(self, tensor: TensorInfo) -> Tensor:
        """Return a factor as peft has it: float32, and aligned as torch aligns, on which a BLAS's bits may depend."""
        return torch.empty(tensor.shape, dtype=torch.float32).copy_(self._load(tensor))

    def values(self, tensor: TensorInfo) -> Tensor:
        """Return a tensor as it is in its file."""
        return self._load(tensor)

    def whole(self, update: PlacedUpdate, dtype: torch.dtype) -> Tensor:
        """Return the delta of an update's parameter, of the parameter's shape; in `dtype` if peft casts it at once."""
        key = tuple(update.factors[role] for role in ("A", "B"))
        delta = self._kept.pop(key, None)
        if delta is None:
            A, B = (self.factor(tensor) for tensor in key)
            delta = _delta(update, A, B)
            if (layer := _layer_of(update)).name == "ParamWrapper" or layer.variant == "bdlora":
                delta = delta.to(dtype)
        if update.expert is not None or update.rows is not None:
            self._kept[key] = delta
            if len(self._kept) > 2 * (1 + len(self._adapters)):
                del self._kept[next(iter(self._kept))]
        return delta


def merge(W: Tensor, updates: Sequence[PlacedUpdate], deltas: Deltas, *, safe_merge: bool) -> list[Step]:
    """Return what each update does to stored rows, in the recipe's order, with a rounding after each.

    Args:
        W: the rows [n, columns] in the output's dtype, which is that of the model in peft.
        updates: those of the rows.
        deltas: where deltas come from.
        safe_merge: as in `merge_and_unload`; its check for values that are not finite is left to the caller.
    """
    if all(update.method == "TRAINABLE_TOKENS" for update in updates):
        return _steps(W, updates, [_replace_rows(update, deltas.values(update.factors["rows"])) for update in updates])
    if all(_layer_of(update).name == "Bias" for update in updates):
        return _steps(W, updates, [_add_bias(update, deltas.factor(update.factors["B"])) for update in updates])
    has_norms = any(_layer_of(update).variant == "dora" for update in updates)
    shape = _layer_of(updates[0]).shape if has_norms else tuple(W.shape)
    layer = _Layer(
        weight=W.reshape(shape).clone(),
        adapters={str(place): _adapter(update, W, deltas, has_norms) for place, update in enumerate(updates)},
    )
    steps = []
    for place, update in enumerate(updates):
        before = layer.weight
        layer.merge([str(place)], safe_merge)
        change = layer.change(str(place), before)
        steps.append(_step(update, before, layer.weight, change, tuple(W.shape)))
    return steps


def _adapter(update: PlacedUpdate, W: Tensor, deltas: Deltas, is_whole: bool) -> "_Adapter":
    layer, delta = _layer_of(update), deltas.whole(update, W.dtype)
    return _Adapter(
        delta=delta if is_whole else _piece(update, delta).reshape(W.shape),
        magnitude=deltas.factor(update.factors["m"]) if "m" in update.factors else None,
        crossed=layer.crossed,
        casts=bool({layer.name, layer.variant} & _CASTING),
        twice=layer.name == "OutProj",
    )


def _layer_of(update: PlacedUpdate) -> PeftLayer:
    assert update.peft is not None, "the plan says which layer of peft merges it"
    return update.peft


def _step(update: PlacedUpdate, before: Tensor, after: Tensor, change: Tensor, shape: tuple[int, ...]) -> Step:
    return Step(
        adapter=update.adapter,
        before=before.reshape(shape),
        after=after.reshape(shape),
        change=change.to(torch.float64).reshape(shape),
    )


def _steps(
    W: Tensor, updates: Sequence[PlacedUpdate], changes: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]]
) -> list[Step]:
    """Return the steps of updates that need nothing but the rows before them."""
    steps = []
    for update, change_rows in zip(updates, changes, strict=True):
        after, change = change_rows(W)
        steps.append(_step(update, W, after, change, tuple(W.shape)))
        W = after
    return steps


def _replace_rows(update: PlacedUpdate, rows: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what puts trained rows in place; `peft/tuners/trainable_tokens/layer.py` merge."""

    def apply(W: Tensor) -> tuple[Tensor, Tensor]:
        tokens, stored = update.update.tokens, update.rows
        assert tokens is not None
        places = {token: place for place, token in enumerate(range(len(W)) if stored is None else stored)}
        pairs = [(places[token], row) for row, token in enumerate(tokens) if token in places]
        trained = rows.reshape(len(rows), -1)[[row for _, row in pairs]].to(W.dtype)
        after = W.index_copy(0, torch.tensor([place for place, _ in pairs], dtype=torch.int64), trained)
        return after, after.to(torch.float64) - W.to(torch.float64)

    return apply


def _add_bias(update: PlacedUpdate, bias: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what adds lora_B.bias to a bias; `peft/tuners/lora/layer.py` Linear.merge, alike for both `safe_merge`."""
    delta = _rows(update, bias * update.scale)

    def apply(W: Tensor) -> tuple[Tensor, Tensor]:
        after = W.clone()
        after += delta.reshape(W.shape)
        return after, delta

    return apply


def _delta(update: PlacedUpdate, A: Tensor, B: Tensor) -> Tensor:
    """Return get_delta_weight of the layer's class in `peft/tuners/lora/layer.py`; of BD-LoRA in `variants.py`."""
    layer, stack = _layer_of(update), update.update.stack
    if stack is not None:
        A = A.reshape(stack.num_experts, -1, A.shape[-1])
        B = B.reshape(B.shape[0], -1, stack.num_experts)
        order = "e i o" if layer.crossed else "e o i"
        return torch.einsum(f"o r e, e r i -> {order}", B, A) * update.scale
    if layer.name == "ConvNd":
        return _kernel_delta(A, B, update.scale)
    if layer.variant == "bdlora":  # the blocks of one of the factors lie one below the other
        num_in = layer.shape[0 if layer.crossed else 1]
        A, B = _block_diagonal(A, num_in // A.shape[1]), _block_diagonal(B, A.shape[0] // B.shape[1])
    product = B @ A
    return (product.T if layer.crossed else product) * update.scale


def _block_diagonal(stacked: Tensor, count: int) -> Tensor:
    if count == 1:
        return stacked
    full: Tensor = torch.block_diag(*torch.chunk(stacked, count, dim=0))  # type: ignore[no-untyped-call]
    return full


def _kernel_delta(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the delta of a convolution's kernel; `peft/tuners/lora/layer.py` _ConvNd.get_delta_weight."""
    if tuple(A.shape[2:4]) == (1, 1):
        return (B.squeeze(3).squeeze(2) @ A.squeeze(3).squeeze(2)).unsqueeze(2).unsqueeze(3) * scale
    return _CONVOLUTIONS[A.dim()](A.transpose(0, 1), B).transpose(0, 1) * scale


def _piece(update: PlacedUpdate, delta: Tensor) -> Tensor:
    """Return what the stored rows of an update get of the delta of its parameter."""
    if update.expert is not None:
        delta = delta[update.expert]
    return _rows(update, delta.T if update.transposed != _layer_of(update).crossed else delta)


def _rows(update: PlacedUpdate, delta: Tensor) -> Tensor:
    match update.rows:
        case None:
            return delta
        case range(start=start, stop=stop, step=1):
            return delta[start:stop]
        case rows:
            return delta[torch.tensor(rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """One adapter on a layer.

    Attributes:
        delta: of the layer's weight.
        magnitude: DoRA's, with which `delta` is whole and of the weight's shape in memory.
        crossed: whether that shape is [in, out].
        casts: whether the delta is rounded to the weight's dtype even where `safe_merge` is false.
        twice: whether it is added a second time, as to the out_proj of an attention.
    """

    delta: Tensor
    magnitude: Tensor | None
    crossed: bool
    casts: bool
    twice: bool


@dataclass(kw_only=True)
class _Layer:
    """A layer of peft while adapters are merged into its weight, in turn.

    DoRA's norms are those of the weight without the adapters merged before: peft takes these out, which in low
    precision does not give back the base's bits, and then merges them again. So does this.
    Source: `peft/tuners/lora/layer.py` Linear.merge, Linear.unmerge, LoraLayer._unmerged_base_weight.
    """

    weight: Tensor
    adapters: Mapping[str, _Adapter]
    merged: list[str] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    unmerged: Tensor | None = None

    def merge(self, names: Sequence[str], safe_merge: bool) -> None:
        """Merge adapters one after another."""
        for name in names:
            adapter = self.adapters[name]
            if adapter.magnitude is not None:
                self.norms[name] = self._norm(adapter, safe_merge)
                scaled = _factor(adapter, self.norms[name]) * (self.weight + adapter.delta)
                self.weight = scaled.to(self.weight.dtype)
            else:
                once = adapter.casts or adapter.twice or safe_merge
                self.weight = _added(self.weight, adapter.delta, cast=once)
                if adapter.twice:  # peft/tuners/lora/layer.py MultiheadAttention.merge, then that of its out_proj
                    self.weight = _added(self.weight, adapter.delta, cast=False)
            self.merged.append(name)

    def unmerge(self) -> None:
        """Take all adapters out again, the last one first."""
        while self.merged:
            name = self.merged.pop()
            adapter, dtype = self.adapters[name], self.weight.dtype
            if adapter.magnitude is not None:
                factor = _factor(adapter, self.norms.pop(name))
                self.weight = (self.weight / factor - adapter.delta).to(dtype)
            else:
                self.weight = self.weight - adapter.delta.to(dtype)

    def change(self, name: str, before: Tensor) -> Tensor:
        """Return what an adapter, just merged, added to `before`, before rounding."""
        adapter = self.adapters[name]
        if adapter.magnitude is None:
            return adapter.delta * 2 if adapter.twice else adapter.delta
        return _factor(adapter, self.norms[name]) * (before + adapter.delta) - before

    def _norm(self, adapter: _Adapter, safe_merge: bool) -> Tensor:
        if self.unmerged is not None:  # adapters that are merged again share the weight that the first of them found
            return _weight_norm(self.unmerged, adapter)
        done = self.merged[:]
        self.unmerge()
        self.unmerged = self.weight.clone()
        norm = _weight_norm(self.unmerged, adapter)
        self.merge(done, safe_merge)
        self.unmerged = None
        return norm


def _added(weight: Tensor, delta: Tensor, *, cast: bool) -> Tensor:
    result = weight.clone()
    result += delta.to(weight.dtype) if cast else delta
    return result


def _factor(adapter: _Adapter, norm: Tensor) -> Tensor:
    """Return DoRA's magnitude over norm, as what multiplies the weight; `peft/tuners/lora/variants.py`."""
    assert adapter.magnitude is not None
    factor = adapter.magnitude / norm
    if adapter.delta.dim() > 2:
        return factor.view(-1, *[1] * (adapter.delta.dim() - 1))
    return factor.view(1, -1) if adapter.crossed else factor.view(-1, 1)


def _weight_norm(weight: Tensor, adapter: _Adapter) -> Tensor:
    """Return the norm of each output's weights; `peft/tuners/lora/dora.py` get_weight_norm."""
    if adapter.delta.dim() > 2:
        moved = weight + 1 * adapter.delta
        norm: Tensor = moved.norm(p=2, dim=tuple(range(1, moved.dim())), keepdim=True)
        return norm.transpose(1, 0)
    delta = adapter.delta
    moved = weight.T + 1 * delta.T if adapter.crossed else weight + 1 * delta
    norms: Tensor = torch.linalg.norm(moved, dim=1)
    return norms
