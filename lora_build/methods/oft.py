"""OFT on Linear, Embedding and 1x1 Conv2d: W@Rᵀ (an embedding's W@R), R block-diagonal and (nearly) orthogonal.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280 (Cayley, COFT); Qiu et al. 2025 (OFTv2),
https://arxiv.org/abs/2506.19847 (Cayley-Neumann). Semantics of `peft/tuners/oft/layer.py` (OFTRotationModule.get_weight
and merge), peft 0.21; several adapters multiply from the right in the recipe's order.

Shapes: W [out, in]; the file has the upper triangles of skew-symmetric blocks Q [b, b] as [in/b, b·(b-1)/2], or of one
that all blocks share. R = (I-Q)(I+Q)⁻¹ of each block, or the first terms of its Neumann series.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.errors import MergeError
from lora_build.methods.checks import HARMLESS, check_module, is_number, misfit, refuse_weight, unknown_keys
from lora_build.methods.interface import AdaptedModule, Call, MergeRows, PlacedUpdate, ReadRows, Update

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = "oft_embedding_R.weight"
_LINEAR = "oft_R.weight"
_READ = {"block_share", "coft", "eps", "num_cayley_neumann_terms", "oft_block_size", "use_cayley_neumann"}
# the shape in the file says how many blocks there are; a weight [in, out] is nothing that peft adapts
_UNREAD = {"bias", "fan_in_fan_out", "module_dropout", "r"}
_NEUMANN_SINCE = (0, 18)  # the peft that first had today's series


class OFT:
    """Rotations of the inputs, one adapter after the other."""

    peft_type = "OFT"
    reference = "https://arxiv.org/abs/2306.07280"
    leaves = (_LINEAR, _EMBEDDING)

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = unknown_keys(config, HARMLESS | _READ | _UNREAD)
        if "oft_block_size" not in config or not isinstance(config.get("use_cayley_neumann"), bool):
            return [
                *problems,
                "oft_block_size or use_cayley_neumann: is missing, as in adapters of older versions of peft, whose R "
                "was another one; train again, or merge it with the peft that made it",
            ]
        if config["use_cayley_neumann"]:
            version, terms = str(config.get("peft_version") or "0"), config.get("num_cayley_neumann_terms")
            if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < _NEUMANN_SINCE:
                problems.append(
                    f"peft_version: {version if version != '0' else 'none'}, but before 0.18 the Cayley-Neumann series "
                    "was another one; train again, or merge it with the peft that made it"
                )
            if type(terms) is not int or terms < 1:
                problems.append(f"num_cayley_neumann_terms: expected a whole number from 1 on, found {terms!r}")
        eps = config.get("eps")
        if config.get("coft") and not (is_number(eps) and eps > 0):  # type: ignore[operator]
            problems.append(f"eps: expected a positive number, found {eps!r}")
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight; none where blocks of one element turn nothing."""
        leaf = _EMBEDDING if _EMBEDDING in module.factors else _LINEAR
        layer_types = ("Embedding",) if leaf == _EMBEDDING else ("Linear", "Conv2d")
        if problems := refuse_weight(module, "OFT") + check_module(module, layer_types, (leaf,)):
            return {}, problems
        shape, found = module.base.shape("weight") or (), module.factors[leaf].shape
        if any(size != 1 for size in shape[2:]):
            return {}, [
                f"{module.where}: is a convolution with a kernel {list(shape[2:])}, for which peft trains patches "
                "turned before they are added up, so no weight can hold it; only 1x1 kernels can be merged"
            ]
        block = (1 + math.isqrt(1 + 8 * found[1])) // 2 if len(found) == 2 else 0
        num_blocks = 1 if module.config.get("block_share") else shape[1] // max(block, 1)
        if found != (num_blocks, block * (block - 1) // 2) or shape[1] % block:
            expected = "[1" if module.config.get("block_share") else f"[{shape[1]}/b"
            return {}, [misfit(module, f"{leaf} is {list(found)} (expected {expected}, b·(b-1)/2] of blocks b x b)")]
        if block == 1:
            return {}, []
        config, options = module.config, {"block": block, "side": "right" if leaf == _EMBEDDING else "left"}
        if config["use_cayley_neumann"]:
            options["terms"] = config["num_cayley_neumann_terms"]
        if config.get("coft"):
            options["eps"] = repr(float(config["eps"]))
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=1.0,
            factors={"Q": module.factors[leaf]},
            options=options,
            additive=False,
            ordered=True,
        )
        return {"weight": update}, []

    def merger(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
        """Return W turned by every adapter.

        Inputs pass through the adapters in the recipe's order, as in peft's forward, so the last one is next to W;
        peft's merge takes them the other way round and gives another model.
        """
        _check_rows(updates)
        turns = []
        for update, factors in updates if updates[0][0].options["side"] == "right" else reversed(updates):
            R = _rotations(update.options, factors["Q"].double())
            turns.append(R if update.options["side"] == "right" else R.transpose(1, 2))
        # stored [in, out], the rows of whole blocks of every adapter go together
        step = math.lcm(*(update.options["block"] for update, _ in updates)) if updates[0][0].transposed else 0

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            if step:
                start, stop = first // step * step, -(-(first + len(W)) // step) * step
                after = _turn(read(start, stop).T, turns, start).T[first - start :][: len(W)]
            else:
                after = _turn(W, turns, 0)
            return after, after - W

        return rows

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output for turned inputs, of an embedding the turned output; `peft/tuners/oft/layer.py` forward.

        Inputs pass through the adapters in the order given.
        """
        _check_rows(updates)
        channels = 1 - call.module.get_parameter("weight").dim()  # the last dimension but those of a kernel
        if updates[0][0].options["side"] == "right":
            result = call.base(call.input)
            return _pass(updates, result, channels).to(result.dtype)
        return call.base(_pass(updates, call.input, channels).to(call.input.dtype))


def _check_rows(updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]") -> None:
    for update, _ in updates:
        if update.transposed and update.rows is not None:
            raise MergeError(f"{update.factors['Q'].name}: OFT turns inputs, of which {update.adapter} has only some")


def _turn(W: "Tensor", turns: "Sequence[Tensor]", first: int) -> "Tensor":
    """Return the columns of W, the first of which is column `first`, times block-diagonal matrices [blocks, b, b]."""
    from lora_build.numerics.exact import ExactProduct

    for blocks in turns:
        size = blocks.shape[1]
        columns = W.reshape(len(W), -1, size).transpose(0, 1)  # [blocks of W, rows, b]
        of_W = blocks if len(blocks) == 1 else blocks[first // size :][: len(columns)]
        W = ExactProduct(columns, of_W).all().transpose(0, 1).reshape(W.shape)
    return W


def _rotations(options: Mapping[str, Any], upper: "Tensor") -> "Tensor":
    """Return R [blocks, b, b] of the upper triangles [blocks, b·(b-1)/2] of Q, in float64."""
    import torch

    size = options["block"]
    if "eps" in options:
        upper = _project(upper, float(options["eps"]))
    Q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    above, right = torch.triu_indices(size, size, 1)
    Q[:, above, right] = upper
    Q[:, right, above] = -upper
    if "terms" in options:
        return torch.stack([_neumann(block, options["terms"]) for block in Q])
    # (I-Q)(I+Q)⁻¹ = 2(I+Q)⁻¹ - I
    return 2 * _inverse(torch.eye(size, dtype=torch.float64) + Q) - torch.eye(size, dtype=torch.float64)


def _project(upper: "Tensor", eps: float) -> "Tensor":
    """Return the triangles, shortened where ‖Q‖ of a block is above eps/√blocks; OFTRotationModule._project_batch.

    peft rounds eps/√blocks to float32, which moves R by 1e-7 of eps.
    """
    import torch

    from lora_build.numerics.exact import tree_sum

    limit = eps / math.sqrt(len(upper))
    norm = torch.sqrt(2 * tree_sum(upper * upper))[:, None]
    return torch.where(norm <= limit, upper, limit * (upper / norm))


def _neumann(Q: "Tensor", terms: int) -> "Tensor":
    """Return I + 2Q + 2Q² + ... with the last power once, as OFTRotationModule._cayley_batch ends it.

    Three terms are the same as four there: the last power is never below the third.
    """
    import torch

    from lora_build.numerics.exact import ExactProduct

    R = torch.eye(len(Q), dtype=torch.float64)
    if terms == 1:
        return R
    R = R + 2 * Q
    if terms == 2:
        return R
    power = ExactProduct(Q, Q).all()
    R = R + 2 * power
    for _ in range(terms - 4):
        power = ExactProduct(power, Q).all()
        R = R + 2 * power
    return R + ExactProduct(power, Q).all()


def _inverse(M: "Tensor") -> "Tensor":
    """Return the inverses of I + Q [blocks, b, b] by Gauss-Jordan elimination, every operation IEEE and elementwise.

    No pivoting: what elimination leaves of I + Q has I + something positive as its symmetric part, so every pivot is at
    least 1.
    """
    for k in range(M.shape[1]):
        pivot = M[:, k : k + 1, k : k + 1]
        row, column = M[:, k : k + 1] / pivot, M[:, :, k : k + 1]
        after = M - column * row
        after[:, k] = row[:, 0]
        after[:, :, k] = (-column / pivot)[:, :, 0]
        after[:, k, k] = (1 / pivot)[:, 0, 0]
        M = after
    return M


def _pass(updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", x: "Tensor", dim: int) -> "Tensor":
    """Return x turned along a dimension by one adapter after the other; OFTRotationModule.forward."""
    y = x.movedim(dim, -1)
    for update, factors in updates:
        R = _turns(update.options, factors["Q"])
        blocks = y.to(R.dtype).reshape(*y.shape[:-1], -1, 1, update.options["block"])
        y = (blocks @ R).flatten(-3)
    return y.movedim(-1, dim)


def _turns(options: Mapping[str, Any], upper: "Tensor") -> "Tensor":
    """Return R [blocks, b, b] in the dtype of Q; OFTRotationModule._cayley_batch."""
    import torch

    size = options["block"]
    Q = upper.new_zeros(len(upper), size, size)
    above, right = torch.triu_indices(size, size, 1)
    Q[:, above, right] = upper
    Q = Q - Q.mT
    if "eps" in options:
        limit = float(options["eps"]) / math.sqrt(len(upper))
        Q = Q * (limit / torch.linalg.matrix_norm(Q, keepdim=True)).clamp(max=1)
    eye = torch.eye(size, dtype=Q.dtype, device=Q.device).expand_as(Q)
    terms = options.get("terms")
    R: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False) if terms is None else eye + 2 * (min(terms, 2) - 1) * Q
    if terms is None or terms <= 2:
        return R
    power = Q
    for _ in range(max(terms, 4) - 3):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


METHOD = OFT()
