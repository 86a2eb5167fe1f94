"""What an inspection tells: values without behaviour, which the command line prints and gives as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedParameter:
    """A parameter that the adapter has factors for.

    What only a measurable method tells of its factors is None for others, and where the factors are not as its config
    says.

    Attributes:
        module: its module's path in memory at training time.
        parameter: its name there, `weight` mostly; empty where unknown.
        tensors: the keys of its factors.
        shape: as the factors have it: [out, in], embeddings [in, out], a stack of experts [E, out, in].
        rank: by the config.
        alpha: by the config.
        scaling: what B @ A is multiplied by: alpha/r, alpha/√r with rsLoRA.
        norm: ‖scaling·B@A‖, Frobenius, over all experts of a stack; None also if it is no number.
    """

    module: str
    parameter: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    norm: float | None = None

    @property
    def path(self) -> str:
        """Its name in messages: that of the module, with a parameter that is not its weight."""
        return self.module if self.parameter in ("", "weight") else f"{self.module}.{self.parameter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeParameter:
    """A parameter that the adapter holds whole.

    `kind` is `modules_to_save`, `bias` (trained), `saved` (along with the adapter) or `frozen` (the base's own).
    """

    parameter: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens:
    """Trained rows of an embedding or head; `indices` is None if the config does not say of which tokens."""

    module: str
    num_tokens: int
    indices: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedTensor:
    """A tensor of the base that the adapter changes.

    Attributes:
        name: on disk.
        operation: `merge` or `replace`.
        adapted: what the adapter calls it; several where the base fuses them.
    """

    name: str
    operation: str
    adapted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFit:
    """How the adapter goes with a base.

    Attributes:
        base: the base's source.
        issues: why it does not fit, one line each, as `lora-build plan` has them; the rest is empty then.
        num_tensors: the tensors of the merged model, by what happens to them: `copy`, `merge`, `replace`.
        touched: those that are not copied.
        notes: what a user should know.
        config_changes: top-level keys of config.json that get another value.
    """

    base: str
    issues: tuple[str, ...] = ()
    num_tensors: Mapping[str, int]
    touched: tuple[ChangedTensor, ...] = ()
    notes: tuple[str, ...] = ()
    config_changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an adapter is.

    Attributes:
        source: where it is: a path as written, or `hf://org/name@<40 hex>`.
        config: its adapter_config.json.
        variants: what kind of LoRA it is, such as rsLoRA; empty for the plain one and for other methods.
        num_tensors: its tensors.
        size_bytes: of its weight file.
        digest: of its weight file, `sha256:<hex>`.
        dtypes: how many tensors it has of each dtype.
        adapted: the parameters that it has factors for, by module.
        whole: the parameters that it holds whole.
        tokens: the tokens that it was trained on.
        shared: the tensors that belong to it as a whole.
        training_only: the keys of tensors that merging does not need.
        problems: what keeps it from being merged, whatever the base, one line each.
        fit: how it goes with the base that was named, if one was.
    """

    source: str
    config: Mapping[str, Any]
    variants: tuple[str, ...]
    num_tensors: int
    size_bytes: int
    digest: str
    dtypes: Mapping[str, int]
    adapted: tuple[AdaptedParameter, ...]
    whole: tuple[WholeParameter, ...]
    tokens: tuple[TrainedTokens, ...]
    shared: tuple[str, ...]
    training_only: tuple[str, ...]
    problems: tuple[str, ...]
    fit: BaseFit | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return str(self.config["peft_type"])

    @property
    def is_ok(self) -> bool:
        """Whether nothing is known that keeps it from being merged, into the named base if there is one."""
        return not self.problems and not (self.fit and self.fit.issues)

    @property
    def measured(self) -> tuple[AdaptedParameter, ...]:
        """The parameters whose update has a norm, the largest first."""
        found = (a for a in self.adapted if a.norm is not None)
        return tuple(sorted(found, key=lambda a: (-(a.norm or 0.0), a.path)))

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of all updates together; None if one of them has none."""
        norms = [a.norm for a in self.adapted if a.norm is not None]
        return math.hypot(*norms) if norms and len(norms) == len(self.adapted) else None

    @property
    def untrained(self) -> tuple[str, ...]:
        """The parameters whose update is zero."""
        return tuple(a.path for a in self.adapted if a.norm == 0)
