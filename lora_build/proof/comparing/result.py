"""What two builds or checkpoints differ in, as values: for text, for JSON, for Markdown and for Python."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lora_build.files.identity import Digest
from lora_build.proof.difference import Difference

Kind = Literal["added", "removed", "changed", "affected", "unknown"]
"""`affected`: a build may give it other values; `unknown`: nothing here can tell whether both sides have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """A file of one side; its digest is None where nobody knows it without reading the file, or a build makes it."""

    size_bytes: int
    digest: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDifference:
    """A file that differs.

    Attributes:
        path: its name.
        kind: added, removed, changed, or unknown.
        before: the file of the first side, None where it has none.
        after: that of the second.
        is_weights: whether it holds tensors, which are compared one by one.
        why: what is known of the change: `the header alone`, `spaces or the order of its keys`.
    """

    path: str
    kind: Kind
    before: FileFact | None = None
    after: FileFact | None = None
    is_weights: bool = False
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDifference:
    """A key of a file of JSON that differs, such as `vocab_size` of config.json; a long value is cut."""

    file: str
    key: str
    kind: Kind
    before: Any = None
    after: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateDifference:
    """A chat template that differs.

    Attributes:
        name: of the template; `default` is the one that a tokenizer has for chats.
        kind: added, removed or changed.
        lines: a unified diff; None where the template is too long for one.
        num_more: how many lines of the diff are not here.
    """

    name: str
    kind: Kind
    lines: tuple[str, ...] | None = None
    num_more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerDifference:
    """What tokenizers differ in.

    Attributes:
        added: tokens that only the second one has, with their ids.
        removed: those that only the first one has.
        renumbered: those of both that have other ids: before and after.
        special_added: the words that are special tokens only for the second.
        special_removed: those that are special tokens only for the first.
        eos: the token that ends a text, before and after, where it is another one.
        templates: the chat templates that differ.
        unread: why the tokens of a side are not known, where they are not.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    renumbered: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    special_added: tuple[str, ...] = ()
    special_removed: tuple[str, ...] = ()
    eos: tuple[str | None, str | None] | None = None
    templates: tuple[TemplateDifference, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """A tensor of one side.

    Attributes:
        dtype: in safetensors' words.
        shape: the same.
        file: that it is in.
        operation: what a build did for it: `copy`, `merge math, code`; None of a checkpoint that says nothing of that.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    operation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor that differs, may differ once it is built, or of which nobody knows."""

    name: str
    kind: Kind
    before: TensorFact | None = None
    after: TensorFact | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Tensors of one pattern that differ in one way.

    Attributes:
        pattern: their names with a star for each number: `model.layers.*.self_attn.q_proj.weight`.
        kind: as of each of them.
        names: the names.
        num_alike: how many tensors have this pattern, on either side.
        what: the operation, dtype or shape on each side, as far as it is known: `copy to merge math`.
    """

    pattern: str
    kind: Kind
    names: tuple[str, ...]
    num_alike: int
    what: str

    @property
    def layers(self) -> str:
        """Which of them, by the one number in their names: `0-3, 7`; "" where it is all of them or no such one."""
        if len(self.names) == self.num_alike or self.pattern.count("*") != 1:
            return ""
        numbers = sorted(int(found[0]) for name in self.names if (found := re.search(r"(?<=\.)\d+(?=\.|$)", name)))
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1] = [runs[-1][0], number]
            else:
                runs.append([number])
        return ", ".join("-".join(map(str, run)) for run in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How far values lie apart: of a tensor, or of those tensors of a layer that differ.

    Sums are of float64, over the values that are finite on both sides.

    Attributes:
        name: of the tensor or the layer.
        num_tensors: how many tensors these are of.
        num_elements: how many values were compared.
        num_changed: how many are others; of one dtype, in any bit.
        norm_before: the Frobenius norm on the first side.
        norm_after: on the second.
        norm_change: of the difference.
        cosine: between both, None where one of them is zero.
        largest: the largest absolute difference of a value.
        largest_in: the tensor that has it.
        not_finite: how many values are NaN or infinite, before and after.
        rows: the rows that were compared and all there are, where one side has more.
    """

    name: str
    num_tensors: int
    num_elements: int
    num_changed: int
    norm_before: float
    norm_after: float
    norm_change: float
    cosine: float | None
    largest: float
    largest_in: str
    not_finite: tuple[int, int] = (0, 0)
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFact:
    """What one side is.

    Attributes:
        name: as it was written, or `org/name@<12 digits of its commit>`.
        kind: `build` with its files, `manifest` alone, `checkpoint` without a manifest, or `plan`.
        manifest_hash: of a build or a manifest.
        num_tensors: how many tensors it has.
    """

    name: str
    kind: Literal["build", "manifest", "checkpoint", "plan"]
    manifest_hash: Digest | None = None
    num_tensors: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildDiff:
    """What two builds or checkpoints differ in.

    Attributes:
        before: the first side.
        after: the second.
        plans: what they were made of and how, where both sides say it: inputs, options, keys set in config.json.
        manifests: what else their manifests say differently, where that is all: files left out, notes.
        keys: keys of config.json, generation_config.json and their like.
        tokenizer: what their tokenizers differ in, None where they do not or where no file tells.
        files: the files that differ, those with weights among them.
        tensors: the tensors that differ, or of which nobody knows.
        alike: how many tensors of each pattern there are, those of both sides once.
        weights: with `weights=True`: each tensor that differs, in numbers.
        layers: the same by layer.
        notes: what was compared, and what nobody has looked at.
    """

    before: SideFact
    after: SideFact
    plans: Difference | None = None
    manifests: tuple[str, ...] = ()
    keys: tuple[KeyDifference, ...] = ()
    tokenizer: TokenizerDifference | None = None
    files: tuple[FileDifference, ...] = ()
    tensors: tuple[TensorDifference, ...] = ()
    alike: Mapping[str, int] = field(default_factory=dict, repr=False)
    weights: tuple[Numbers, ...] | None = None
    layers: tuple[Numbers, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether they are the same: what they were made of, every file and tensor; False where nobody knows."""
        return not (self.is_different or self.is_unknown)

    @property
    def is_different(self) -> bool:
        """Whether something is known to differ."""
        return bool(self._plans_differ or self.manifests or self.keys or any(kind != "unknown" for kind in self._kinds))

    @property
    def is_unknown(self) -> bool:
        """Whether there is something of which nobody knows whether it differs."""
        return "unknown" in self._kinds

    @property
    def _kinds(self) -> set[Kind]:
        return {file.kind for file in self.files} | {tensor.kind for tensor in self.tensors}

    @property
    def _plans_differ(self) -> bool:
        # a manifest of version 1 says the same in another form, and less of it
        plans = self.plans
        return plans is not None and any((plans.inputs, plans.options, plans.changes))

    @cached_property
    def groups(self) -> tuple[TensorGroup, ...]:
        """The tensors that differ, those of one pattern together, in the order of layers and names."""
        found: dict[tuple[str, Kind, str], list[str]] = {}
        for tensor in self.tensors:
            found.setdefault((pattern_of(tensor.name), tensor.kind, _what(tensor)), []).append(tensor.name)
        groups = (
            TensorGroup(pattern=pattern, kind=kind, names=tuple(names), num_alike=self.alike.get(pattern, 0), what=what)
            for (pattern, kind, what), names in found.items()
        )
        return tuple(sorted(groups, key=lambda group: (_KINDS.index(group.kind), group.pattern, group.what)))


_KINDS = ("added", "removed", "changed", "affected", "unknown")


def pattern_of(name: str) -> str:
    """Return a tensor's name with a star for each number between two points: `model.layers.*.mlp.up_proj.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _what(tensor: TensorDifference) -> str:
    """Return what is known of a tensor on each side, said once where it is the same."""
    before, after = tensor.before, tensor.after
    if before is None or after is None:
        only = before or after
        assert only is not None
        return ", ".join(filter(None, (only.operation, f"{only.dtype} {list(only.shape)}")))
    said = []
    if before.operation or after.operation:  # of a checkpoint nobody knows it
        said.append(_changed(before.operation or after.operation or "", after.operation or before.operation or ""))
    if before.dtype != after.dtype:
        said.append(_changed(before.dtype, after.dtype))
    if before.shape != after.shape:
        said.append(_changed(str(list(before.shape)), str(list(after.shape))))
    return ", ".join(said)


def _changed(before: str, after: str) -> str:
    return before if before == after else f"{before} to {after}"
