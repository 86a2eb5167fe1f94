"""Adapters that peft saved of every method but LoRA, on every kind of layer, and what a method sees of them.

A method sees them as the planner gives them: layers with a base of stubs, whose only truth are the shapes and classes of
a small torch model.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.combine.interface import LoadedUpdates, StoredRows, combinations, merger
from lora_build.methods.interface import AdaptedModule, PlacedUpdate, methods
from lora_build.numerics.exact import round_once

Tensors = Mapping[str, Tensor]

FULL = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}


class Net(nn.Module):
    """One module of each class, with a bias where the class may have one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Linear(12, 8), nn.Linear(12, 12)
        self.wide, self.narrow = nn.Linear(12, 16), nn.Linear(6, 8)
        self.crossed, self.crossed_square = Conv1D(8, 12), Conv1D(12, 12)
        self.table = nn.Embedding(10, 12)
        self.line, self.dot = nn.Conv1d(6, 8, 3), nn.Conv1d(6, 8, 1)
        self.plane, self.point, self.cube = nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1), nn.Conv3d(4, 6, 2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(12, 10, bias=False)
        self.gemma = Gemma3TextScaledWordEmbedding(10, 12, 0, embed_scale=3.3)
        self.bart = BartScaledWordEmbedding(10, 12, 0, embed_scale=3.3)
        self.strided = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.ring = nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return x


LINEAR = ("linear", "square")
CROSSED = ("crossed", "crossed_square")
KERNELS = ("line", "dot", "plane", "point", "grouped")

Cases = Mapping[str, tuple[Callable[[list[str]], PeftConfig], tuple[str, ...]]]
"""Name to the config for some modules, and the modules."""

CASES: Cases = {
    "adalora": (lambda t: AdaLoraConfig(target_modules=t, **FULL), (*LINEAR, *CROSSED, "plane", "point")),
    "adalora-no-alpha": (lambda t: AdaLoraConfig(target_modules=t, **FULL | {"lora_alpha": 0}), LINEAR),
    "loha": (
        lambda t: LoHaConfig(target_modules=t, r=3, alpha=4.5, rank_pattern={"square": 2}, alpha_pattern={"linear": 7.5}),
        (*LINEAR, *KERNELS),
    ),
    "loha-cp": (lambda t: LoHaConfig(target_modules=t, r=3, alpha=4.5, use_effective_conv2d=True), KERNELS),
    "lokr-full": (
        lambda t: LoKrConfig(target_modules=t, r=64, alpha=5, rank_pattern={"square": 32}, alpha_pattern={"line": 9}),
        (*LINEAR, *KERNELS),
    ),
    "lokr": (lambda t: LoKrConfig(target_modules=t, r=1, alpha=2, decompose_both=True), (*LINEAR, *KERNELS)),
    "lokr-factor": (lambda t: LoKrConfig(target_modules=t, r=2, alpha=3, decompose_factor=2), (*LINEAR, *KERNELS)),
    "lokr-cp": (lambda t: LoKrConfig(target_modules=t, r=1, alpha=2, use_effective_conv2d=True), ("plane", "grouped")),
    "vera": (lambda t: VeraConfig(target_modules=t, r=5), (*LINEAR, "wide", "narrow")),
    "vera-crossed": (lambda t: VeraConfig(target_modules=t, r=5), CROSSED),
    "ia3": (
        lambda t: IA3Config(target_modules=t, feedforward_modules="never"),
        (*LINEAR, *CROSSED, "plane", "point", "grouped", "cube"),
    ),
    "ia3-feedforward": (
        lambda t: IA3Config(target_modules=t, feedforward_modules=".*"),
        (*LINEAR, *CROSSED, "plane", "point", "grouped", "cube"),
    ),
    "oft": (lambda t: OFTConfig(target_modules=t, oft_block_size=6), (*LINEAR, "table", "point")),
    "oft-terms": (lambda t: OFTConfig(target_modules=t, r=3, oft_block_size=0, num_cayley_neumann_terms=7), LINEAR),
    "oft-inverse": (lambda t: OFTConfig(target_modules=t, oft_block_size=4, use_cayley_neumann=False), (*LINEAR, "table")),
    "oft-shared": (
        lambda t: OFTConfig(target_modules=t, oft_block_size=4, block_share=True, use_cayley_neumann=False),
        (*LINEAR, "table"),
    ),
    "coft": (lambda t: OFTConfig(target_modules=t, oft_block_size=4, coft=True, eps=0.25), LINEAR),
}  # fmt: skip
PLACES = [(case, module) for case, (_, modules) in CASES.items() for module in modules]


@dataclass(frozen=True)
class Stub:
    """What the base has: shapes and a class."""

    shapes: dict[str, tuple[int, ...]]
    layer_type: str | None
    settings: dict[str, Any] = field(default_factory=dict)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self.shapes.get(parameter)


@dataclass(frozen=True)
class Saved:
    """An adapter that peft saved, as a method gets it."""

    name: str
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return read(self.folder)[0]

    @property
    def tensors(self) -> Tensors:
        return read(self.folder)[1]

    def factors(self, module: str) -> Tensors:
        prefix = f"base_model.model.{module}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    @property
    def shared(self) -> Tensors:
        return {k.rpartition(".")[2]: t for k, t in self.tensors.items() if not k.startswith("base_model.model.")}

    def layer(self, module: str, weight: float = 1.0, **changes: Any) -> AdaptedModule:
        layer = AdaptedModule(
            adapter=self.name,
            path=module,
            config=self.config,
            adapter_weight=weight,
            factors={leaf: info(f"{self.name}/{module}.{leaf}", t) for leaf, t in self.factors(module).items()},
            base=stub(module),
            shared={leaf: info(f"{self.name}/{leaf}", t) for leaf, t in self.shared.items()},
        )
        return replace(layer, **changes)

    def load(self, update: PlacedUpdate) -> Tensors:
        """Return the values of an update's factors."""
        values = {
            f"{self.name}/{k.removeprefix('base_model.').removeprefix('model.')}": t for k, t in self.tensors.items()
        }
        return {role: values[tensor.name] for role, tensor in update.factors.items()}  # fmt: skip


@cache
def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(
        source=SourceName.of_adapter("x"),
        file="f",
        name=name,
        dtype="F32",
        shape=tuple(tensor.shape),
        start=0,
        end=tensor.nbytes,
    )


def stub(module: str, *, layer_type: str | None = "known") -> Stub:
    made = dict(net().named_modules())[module]
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    return Stub(shapes, type(made).__name__ if layer_type == "known" else layer_type)


@cache
def net() -> Net:
    """The base; its values suit bfloat16 and float16 exactly, so that it is the same in every dtype."""
    torch.manual_seed(1)
    model = Net()
    for parameter in model.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape)).to(torch.bfloat16).half().float()
    return model


def base(module: str, parameter: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
    values: Tensor = dict(net().named_parameters())[f"{module}.{parameter}"].detach()
    return values.to(dtype).reshape(len(values), -1)


class Shelf:
    """Adapters of some cases, as peft saved them, each made once."""

    def __init__(self, folder: Path, cases: Cases = CASES) -> None:
        self._folder, self._cases, self._made = folder, cases, dict[tuple[str, int], Saved]()

    def __call__(self, case: str, seed: int) -> Saved:
        if (case, seed) not in self._made:
            self._made[case, seed] = saved = Saved(f"a{seed}", self._folder / f"{case}-{seed}")
            make, modules = self._cases[case]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(Net(), make(list(modules)))
                fill(model, seed)
                model.save_pretrained(str(saved.folder))
        return self._made[case, seed]


def fill(model: nn.Module, seed: int) -> None:
    """Give an adapter values such as training leaves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if (
            re.search(r"\.(lora_|hada_|lokr_|vera_lambda|ia3_|oft_|trainable_tokens_delta)", name)
            and "ranknum" not in name
        ):
            middle = 1.0 if "ia3_" in name else 0.0
            parameter.data = middle + 0.4 * torch.randn(parameter.shape, generator=generator)


def merge(
    pairs: Sequence[tuple[PlacedUpdate, Tensors]], W: Tensor, dtype: torch.dtype, *, step: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the merge of all stored rows, `step` at a time, and the change."""
    rows = merger(combinations()["linear"], loaded(pairs, W))
    blocks = [rows(W[i : i + (step or len(W))].double(), i) for i in range(0, len(W), step or len(W))]
    return round_once(torch.cat([y for y, _ in blocks]), dtype), torch.cat([change for _, change in blocks])


def loaded(pairs: Sequence[tuple[PlacedUpdate, Tensors]], W: Tensor) -> LoadedUpdates:
    """Return updates of all stored rows of a matrix, as a backend has them."""
    at = StoredRows(
        tensor="x.weight", first=0, num_rows=len(W), columns=W.shape[1], read=lambda start, end: W[start:end].double()
    )
    return LoadedUpdates(updates=list(pairs), at=at)


def updates(
    adapters: Sequence[Saved], module: str, parameter: str = "weight", weights: Sequence[float] = (1,) * 5
) -> Any:
    """Return the updates of a parameter by adapters with these weights, as in memory, with their factors' values."""
    found = []
    for adapter, weight in zip(adapters, weights, strict=False):
        layer = adapter.layer(module, weight)
        trains_tokens = any(leaf.endswith("trainable_tokens_delta") for leaf in layer.factors)
        method = "TRAINABLE_TOKENS" if trains_tokens else layer.config["peft_type"]
        made, problems = methods()[method].updates(layer)
        assert problems == []
        if parameter in made:
            update, shape = made[parameter], layer.base.shape(parameter) or ()
            placed = PlacedUpdate(update=update, start=0, stop=shape[0], transposed=update.transposed)
            found.append((placed, adapter.load(placed)))
    return found  # fmt: skip


def loaded_by_peft(adapters: Sequence[Saved], dtype: torch.dtype = torch.float64) -> PeftModel:
    """Return the base with adapters that peft loaded, the first of them active."""
    model = Net()
    model.load_state_dict(net().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model.to(dtype), str(adapters[0].folder), adapter_name=adapters[0].name)
        for adapter in adapters[1:]:
            peft.load_adapter(str(adapter.folder), adapter.name)
    return peft
