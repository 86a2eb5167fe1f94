"""Trainable tokens: some rows of an embedding (or head) are replaced by trained ones, nothing is added.

Semantics of `peft/tuners/trainable_tokens/layer.py` (TrainableTokensLayer.merge), peft 0.21; any other method of PEFT
may train tokens along (`trainable_token_indices`).

Shapes: W [V, d], rows [n, d] for the n token indices of the config.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.calls import through
from lora_build.methods.checks import unknown_keys
from lora_build.methods.interface import AdaptedModule, Call, MergeRows, PlacedUpdate, ReadRows, Update

if TYPE_CHECKING:
    from torch import Tensor

_LEAVES = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
_KNOWN = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_type", "peft_version",
    "revision", "target_modules", "task_type", "token_indices",
}  # fmt: skip


class TrainableTokens:
    """Replaced rows."""

    peft_type = "TRAINABLE_TOKENS"
    reference = "peft/tuners/trainable_tokens/layer.py"
    leaves: tuple[str, ...] = _LEAVES

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        return unknown_keys(config, _KNOWN)

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the replacement of rows of the module's weight."""
        rows = next(module.factors[leaf] for leaf in _LEAVES if leaf in module.factors)
        weight = module.base.shape("weight") or ()
        indices = token_indices(module.config, module.path)
        if module.adapter_weight != 1:
            problem = (
                f"has weight {module.adapter_weight!r}, but it replaces rows, which cannot be weighted; set it to 1"
            )
        elif indices is None:
            problem = f"has trained rows {list(rows.shape)}, but adapter_config.json does not say of which tokens"
        elif len(weight) != 2 or rows.shape != (len(indices), weight[1]):
            problem = (
                f"trained rows are {list(rows.shape)} for {len(indices)} tokens, the base's weight is {list(weight)}"
            )
        elif outside := [i for i in indices if not 0 <= i < weight[0]]:
            problem = f"trains token {outside[0]}, the base's weight is {list(weight)}; was its vocabulary grown?"
        elif len(set(indices)) < len(indices):
            problem = "adapter_config.json names a token twice"
        elif module.base.shape("bias"):
            problem = "trains tokens of a layer with a bias, which peft leaves out while it trains"
        else:
            return {"weight": replacement(module.adapter, rows, tuple(indices))}, []
        return {}, [f"{module.where}: {problem}"]

    def merger(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
        """Return the replacement of rows; no two updates replace the same one."""
        trained: dict[int, Tensor] = {}
        for update, factors in updates:
            assert update.update.tokens is not None
            trained |= zip(update.update.tokens, factors["rows"], strict=True)
        stored = updates[0][0].rows

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            after = W.clone()
            for i in range(W.shape[0]):
                token = first + i if stored is None else stored[first + i]
                if token in trained:
                    after[i] = trained[token].double()
            return after, after - W

        return rows

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output with what the trained rows give in place of what the base's give.

        `peft/tuners/trainable_tokens/layer.py` forward_adapters; like it, and like a merge, it takes the rows in the
        dtype of the weight. Unlike it, it leaves a head its bias.
        """
        y = call.base(call.input)
        for update, factors in updates:
            y = _replace(update, factors["rows"], y, call)
        return y


def replacement(adapter: str, rows: TensorInfo, tokens: Sequence[int]) -> Update:
    """Return the update that puts the rows of a tensor in place of some rows of a parameter; a range means all."""
    return Update(
        adapter=adapter,
        method=TrainableTokens.peft_type,
        scale=1.0,
        factors={"rows": rows},
        additive=False,
        tokens=tokens,
    )


def token_indices(config: Mapping[str, Any], path: str) -> list[int] | None:
    """Return the token of each trained row of a module, None if the config does not say.

    The list of a config is for the input embedding; a mapping names modules by the end of their path.
    """
    found = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(found, dict):
        found = next((v for k, v in found.items() if path == k or path.endswith("." + k)), None)
    if isinstance(found, list) and all(type(i) is int for i in found):
        return found
    return None


def _replace(update: PlacedUpdate, trained: "Tensor", y: "Tensor", call: Call) -> "Tensor":
    """Return an output y, of an embedding with other rows, of a head with other columns."""
    import torch
    from torch import nn

    weight = call.module.get_parameter("weight")
    trained, place = trained.to(weight.dtype), _places(update, len(weight), len(trained)).to(weight.device)
    if isinstance(call.module, nn.Embedding):
        at = place[call.input]
        return torch.where((at < 0)[..., None], y, through(call.module, at.clamp(min=0), trained).to(y.dtype))
    (stored,) = torch.nonzero(place >= 0, as_tuple=True)
    columns = through(call.module, call.input, trained[place[stored]])
    bias = getattr(call.module, "bias", None)
    return y.index_copy(-1, stored, (columns if bias is None else columns + bias[stored]).to(y.dtype))


def _places(update: PlacedUpdate, num_stored: int, num_trained: int) -> "Tensor":
    """Return the trained row that takes the place of each stored one, -1 for none."""
    import torch

    tokens = torch.arange(num_stored) if update.rows is None else torch.tensor(update.rows)
    indices = torch.tensor(update.update.tokens)
    place = torch.full((int(torch.cat([tokens, indices]).max()) + 1,), -1)
    place[indices] = torch.arange(num_trained)
    return place[tokens]


METHOD = TrainableTokens()
