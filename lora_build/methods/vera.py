"""VeRA on Linear and Conv1D: W + (λ_b∘B)@(λ_d∘A), with random A and B that all layers share and trained λ.

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, eq. 2. Semantics of `peft/tuners/vera/layer.py` (Linear:
get_delta_weight), peft 0.21.

Shapes: A [r, in of the widest layer] and B [out of the tallest layer, r], of which a layer takes its first columns and
rows; λ_d [r], λ_b [out].
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.methods.calls import add_outputs, through
from lora_build.methods.checks import HARMLESS, check_module, check_rank, is_transposed, misfit, unknown_keys
from lora_build.methods.interface import AdaptedModule, Call, PlacedUpdate, Update
from lora_build.methods.matrices import stored, stored_factors

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.numerics.exact_compiled import Array, Pair

_LEAVES = ("vera_lambda_b", "vera_lambda_d")
_SHARED = ("vera_A", "vera_B")
_READ = {"r", "save_projection", "fan_in_fan_out"}
# with the projections in the file nothing is drawn from projection_prng_key
_UNREAD = {"bias", "d_initial", "projection_prng_key", "vera_dropout"}


class Vera:
    """Updates of low rank."""

    peft_type = "VERA"
    reference = "https://arxiv.org/abs/2310.11454"
    leaves = _LEAVES
    shared_leaves = _SHARED

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = unknown_keys(config, HARMLESS | _READ | _UNREAD) + check_rank("r", config.get("r"))
        if config.get("save_projection", True) is not True:
            problems.append(
                "save_projection: is not true, so peft would draw vera_A and vera_B anew, and torch draws other "
                "numbers on other processors; where it was trained, load it, set save_projection in its config, and "
                "save it again with vera_A and vera_B"
            )
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight."""
        if problems := check_module(module, ("Linear", "Conv1D"), _LEAVES):
            return {}, problems
        if missing := [leaf for leaf in _SHARED if leaf not in module.shared]:
            return {}, [
                f"{module.where}: the adapter's file has no base_model.{' and no base_model.'.join(missing)}, "
                "although its config says save_projection; it is incomplete"
            ]
        A, B = (module.shared[leaf] for leaf in _SHARED)
        lambda_b, lambda_d = (module.factors[leaf] for leaf in _LEAVES)
        a, b, d, rank = list(A.shape), list(B.shape), list(lambda_d.shape), module.config["r"]
        if len(a) != 2 or len(b) != 2 or d != [rank] or a[0] != rank or b[1] != rank:
            return {}, [
                f"{module.where}: vera_A is {a}, vera_B {b} and vera_lambda_d {d}, "
                f"but adapter_config.json says rank {rank} for them"
            ]

        def fits(num_out: int, num_in: int) -> bool:
            return lambda_b.shape == (num_out,) and num_out <= b[0] and num_in <= a[1]

        transposed = is_transposed(module, fits)
        if transposed is None:
            found = f"vera_lambda_b is {list(lambda_b.shape)}, vera_B {b} and vera_A {a}"
            return {}, [misfit(module, found)]
        shape = module.base.shape("weight") or (0, 0)
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=module.adapter_weight,
            factors={"A": A, "B": B, "lambda_b": lambda_b, "lambda_d": lambda_d},
            options={"inputs": shape[0] if transposed else shape[1]},
            transposed=transposed,
        )
        return {"weight": update}, []

    def pair(self, placed: PlacedUpdate, factors: "Mapping[str, Array]") -> "Pair":
        """Return (w·λ_b∘B, λ_d∘A) in float64, whose product is the update."""
        from lora_build.numerics.exact_compiled import widen

        lambda_b, lambda_d = widen(factors["lambda_b"])[:, None], widen(factors["lambda_d"])[:, None]
        B = widen(factors["B"][: len(lambda_b)]) * lambda_b
        A = widen(factors["A"][:, : placed.options["inputs"]]) * lambda_d
        return stored(placed, B * placed.scale, A)

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output plus λ_b∘B(λ_d∘A(x)) of each adapter; `peft/tuners/vera/layer.py` Linear.forward."""

        def change(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "Tensor":
            lambda_b, lambda_d = factors["lambda_b"][:, None], factors["lambda_d"][:, None]
            B, A = factors["B"][: len(lambda_b)], factors["A"][:, : update.options["inputs"]]
            left, right = stored_factors(update, lambda_b * B, lambda_d * A)
            return through(call.module, call.input, left, right) * update.scale

        return add_outputs(updates, call, change)


METHOD = Vera()
