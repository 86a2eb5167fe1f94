"""(IA)³ on Linear, Conv1D, Conv2d and Conv3d: outputs of W (or inputs, of a feedforward module) times a vector l.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3. Semantics of `peft/tuners/ia3/layer.py` (Linear and
_ConvNd: merge), peft 0.21.

Shapes: l [out, 1], or [1, in] of a feedforward module; of a kernel [1, out, 1, ...] or [1, in, 1, ...], where `in`
counts the channels of all groups. A bias [out] is scaled with the outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_build.files.formats.patterns import PatternError, Patterns
from lora_build.methods.calls import along_channels
from lora_build.methods.checks import HARMLESS, check_module, is_transposed, misfit, refuse_weight, unknown_keys
from lora_build.methods.interface import AdaptedModule, Call, MergeRows, PlacedUpdate, ReadRows, Update

if TYPE_CHECKING:
    from torch import Tensor

_LEAF = "ia3_l"
_READ = {"fan_in_fan_out", "feedforward_modules"}


class IA3:
    """Scalings, all adapters of a parameter in one product; their order changes no bit."""

    peft_type = "IA3"
    reference = "https://arxiv.org/abs/2205.05638"
    leaves = (_LEAF,)

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = unknown_keys(config, HARMLESS | _READ | {"init_ia3_weights"})
        names = config.get("feedforward_modules")
        if isinstance(names, str):
            try:
                _pattern(names)
            except PatternError as error:
                problems.append(f"feedforward_modules: {error}")
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight, and of its bias where l scales the outputs."""
        if problems := refuse_weight(module, "IA3") + check_module(
            module, ("Linear", "Conv1D", "Conv2d", "Conv3d"), ()
        ):
            return {}, problems
        vector, shape = module.factors[_LEAF], module.base.shape("weight") or ()
        found = tuple(vector.shape)
        if len(shape) == 2:
            transposed = is_transposed(module, lambda out, inner: found in ((out, 1), (1, inner)))
            groups, (out, inner) = 1, shape[::-1] if transposed else shape
            output: tuple[int, ...] = (out, 1)
            inputs: tuple[int, ...] = (1, inner)
        else:
            transposed, ones = False, (1,) * (len(shape) - 2)
            out, groups = shape[0], _num_groups(module, found, shape)
            output, inputs = (1, out, *ones), (1, shape[1] * groups, *ones)
        if transposed is None or found not in (output, inputs):
            expected = f"expected {list(output)}, or {list(inputs)} of a feedforward module"
            return {}, [misfit(module, f"ia3_l is {list(found)} ({expected})")]
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=1.0,
            factors={"output": vector},
            transposed=transposed,
            additive=False,
        )
        if found == output and (found != inputs or not _is_feedforward(module)):
            has_bias = module.base.shape("bias") is not None
            return {"weight": update} | ({"bias": replace(update, transposed=False)} if has_bias else {}), []
        options = {"groups": groups, "outputs": out} if groups > 1 else {}
        return {"weight": replace(update, factors={"input": vector}, options=options)}, []

    def merger(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
        """Return W times every l; the order of the adapters changes no bit."""
        import torch

        by_row, by_column = [], []
        for update, factors in updates:
            ((side, vector),) = factors.items()
            vector = vector.double().flatten()
            if (side == "output") != update.transposed:
                by_row.append(vector if update.rows is None else vector[torch.tensor(update.rows)])
            else:
                by_column.append(_for_rows(update, vector))
        row_factor = _product(by_row) if by_row else None
        column_factor = _product(by_column) if by_column else None

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            at = slice(first, first + len(W))
            after = W
            if row_factor is not None:
                after = after * row_factor[at, None]
            if column_factor is not None:
                columns = column_factor[at] if len(column_factor) > 1 else column_factor
                after = after * columns.repeat_interleave(W.shape[1] // columns.shape[1], dim=1)
            return after, after - W

        return rows

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output for scaled inputs, scaled; `peft/tuners/ia3/layer.py` Linear.forward, _ConvNd.forward.

        The output has its bias in it, so the update of a bias, the same vector again, is done with its weight's.
        """
        scales: dict[str, list[Tensor]] = {"input": [], "output": []}
        done = set()
        for update, factors in updates:
            ((side, vector),) = factors.items()
            tensor = update.adapter, update.factors[side].name
            if tensor not in done:
                scales[side].append(along_channels(call.module, _own(update, side, vector.flatten())))
            done.add(tensor)
        x = call.input
        for scale in scales["input"]:
            x = x * scale
        result = call.base(x.to(call.input.dtype))
        y = result
        for scale in scales["output"]:
            y = y * scale
        return y.to(result.dtype)


def _num_groups(module: AdaptedModule, vector: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Return the groups of a convolution, which a vector over the channels of all of them tells; 1 if it is none."""
    groups, rest = divmod(vector[1] if len(vector) > 1 else 0, kernel[1])
    if rest or not groups or kernel[0] % groups:
        groups = 1
    return int(module.base.settings.get("groups", groups))


@lru_cache(maxsize=8)
def _pattern(text: str) -> Patterns:
    return Patterns([text])


def _is_feedforward(module: AdaptedModule) -> bool:
    """Whether l scales the inputs where its shape cannot tell; `peft/tuners/ia3/model.py`."""
    names = module.config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return _pattern(names).first(module.path) is not None
    return any(module.path.endswith(name) for name in names)


def _for_rows(update: PlacedUpdate, vector: "Tensor") -> "Tensor":
    """Return a vector over the stored columns as [1, columns], or [rows, columns] if each group of rows has its own."""
    import torch

    groups = update.options.get("groups", 1)
    if groups == 1:
        return vector[None]
    num_rows = update.options["outputs"]
    group = torch.arange(num_rows) // (num_rows // groups)
    return vector.reshape(groups, -1)[group if update.rows is None else group[torch.tensor(update.rows)]]


def _own(update: PlacedUpdate, side: str, vector: "Tensor") -> "Tensor":
    """Return what a vector has for the stored rows, if it is along them."""
    import torch

    along_rows = (side == "output") != update.transposed
    return vector[torch.tensor(update.rows)] if along_rows and update.rows is not None else vector


def _product(vectors: "Sequence[Tensor]") -> "Tensor":
    """Return the elementwise product in float64, the same in any order of the vectors."""
    import torch

    ordered = torch.stack(list(vectors))
    if len(vectors) > 2:  # float64 rounds from the third factor on: each element's are taken from the smallest up
        ordered = ordered.sort(dim=0).values
    product = ordered[0]
    for vector in ordered[1:]:
        product = product * vector
    return product


METHOD = IA3()
