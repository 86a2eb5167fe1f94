"""What two plans differ in: inputs, options, and the tensors that this affects.

`plan` and `explain` say it of a build and of what its recipe makes today, `diff` of any two builds.

    difference = compare(Side(record=manifest.plan), Side(record=record_plan(plan, inputs), names=("math", "text")))
    difference.reasons     ("adapters.math changed (ca17.. to 9f2b..), 30 of 48 tensors",)

Adapters go by their names where both sides know them, else by what is in their files. Tensors are held to what is
planned for them and to the files that they are made of; a file that changed affects all that is read from it, since
a plan knows no digest of a single tensor.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_build.errors import some_of
from lora_build.files.formats.adapter import WEIGHTS_NAME
from lora_build.files.identity import BASE, Digest, FileKey, FileRecord, SourceName
from lora_build.proof.affected import AffectedTensors
from lora_build.proof.plan_record import AdapterRecord, PlanRecord, flat_options
from lora_build.recipe.values import flatten

_SHOWN = 4  # digits of a digest in a sentence
UNKNOWN = Digest("unknown:")  # of a file that is another one, by its size, and has not been read
_COMMIT = 7  # of a commit


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two plans.

    Attributes:
        record: the plan.
        names: the recipe's name of the adapter at each place of the record; None where nobody knows them.
        commits: the commit of each input that is a Hub repository, where provenance or a plan says it.
        is_first_version: whether a manifest of version 1 tells of it, which has not what is planned for a tensor.
    """

    record: PlanRecord
    names: tuple[str, ...] | None = None
    commits: Mapping[SourceName, str] = field(default_factory=dict)
    is_first_version: bool = False

    @property
    def adapters(self) -> Mapping[SourceName, AdapterRecord]:
        """Its adapters, by name, or by place as `adapters.0`."""
        names = self.names or tuple(map(str, range(len(self.record.adapters))))
        return dict(zip(map(SourceName.of_adapter, names), self.record.adapters, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """A file of an input, or of an output, that is another one; None on the side that lacks it."""

    path: str
    before: FileRecord | None
    after: FileRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """An input that is another one.

    Attributes:
        source: its name in the recipe.
        kind: added, removed or changed.
        files: those that differ, of an input that is on both sides.
        weights: an adapter's weights in the sum, if they differ.
        settings: what else the recipes say of an adapter and differ in: its density, weights by module.
        commits: of a Hub repository whose files differ, before and after, if they differ; None of a folder.
        tensors: how many output tensors that affects.
    """

    source: SourceName
    kind: str
    files: tuple[FileChange, ...] = ()
    weights: tuple[float, float] | None = None
    settings: "tuple[ValueChange, ...]" = ()
    commits: tuple[str | None, str | None] | None = None
    tensors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueChange:
    """A value that is another one: an option of the plan, or a key of a file, as `config.json: vocab_size`."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two plans differ in; nothing where their build_key is one.

    Attributes:
        inputs: the inputs that differ.
        options: the options that differ.
        changes: the keys set in config.json and its like that differ.
        added: the names of tensors that only the second plan makes.
        removed: those that only the first one makes.
        affected: those of both that may have other values, or are of another dtype, shape or file.
        num_tensors: how many the second plan makes.
        other_format: whether one of them is only known by a manifest of version 1.
    """

    inputs: tuple[InputChange, ...] = ()
    options: tuple[ValueChange, ...] = ()
    changes: tuple[ValueChange, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    affected: tuple[str, ...] = ()
    num_tensors: int = 0
    other_format: bool = False

    def __bool__(self) -> bool:
        """Whether there is any."""
        return any(
            (self.inputs, self.options, self.changes, self.added, self.removed, self.affected, self.other_format)
        )

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """A line for each input and option that differs; the rest is said only where none of them explains it."""
        found = [*self.input_reasons, *(f"option {text}" for text in self.option_reasons)]
        if not found:
            found += self.change_reasons
        if self.other_format and not found:
            found.append("its manifest is of version 1")
        if not found and (names := (*self.added, *self.removed, *self.affected)):
            found.append(f"{some_of(names)} planned in another way")
        return tuple(found)

    @property
    def input_reasons(self) -> tuple[str, ...]:
        """A line for each input that differs."""
        return tuple(_input_reason(change, self.num_tensors) for change in self.inputs)

    @property
    def option_reasons(self) -> tuple[str, ...]:
        """A line for each option that differs."""
        return tuple(f"{option.name}: {_said(option.before)} to {_said(option.after)}" for option in self.options)

    @property
    def change_reasons(self) -> tuple[str, ...]:
        """A line for each key set in config.json and its like that differs."""
        return tuple(f"{change.name}: {_said(change.before)} to {_said(change.after)}" for change in self.changes)


def compare(before: Side, after: Side) -> Difference:
    """Return what two plans differ in."""
    if before.record == after.record and not before.is_first_version and not after.is_first_version:
        return Difference(num_tensors=len(after.record.tensors))  # whatever names the adapters have
    before, after = matched(before, after)
    files = {BASE: _files(before.record.base, after.record.base)}
    commits = {source: (before.commits.get(source), after.commits.get(source)) for source in (BASE, *after.adapters)}
    commits = {source: both for source, both in commits.items() if both[0] != both[1]}
    inputs = []
    if files[BASE]:
        inputs.append(InputChange(source=BASE, kind="changed", files=files[BASE], commits=commits.get(BASE)))
    for source in dict.fromkeys((*before.adapters, *after.adapters)):
        was, now = before.adapters.get(source), after.adapters.get(source)
        if was is None or now is None:
            inputs.append(InputChange(source=source, kind="added" if was is None else "removed"))
        elif was != now:
            files[source] = _files(was.files, now.files)
            weights = None if was.weight == now.weight else (was.weight, now.weight)
            at = commits.get(source) if files[source] else None
            inputs.append(
                InputChange(
                    source=source, kind="changed", files=files[source], weights=weights, commits=at,
                    settings=_values(flatten(was.settings), flatten(now.settings)),
                )
            )  # fmt: skip
    options = _values(flat_options(before.record.options), flat_options(after.record.options))
    changed = {FileKey(source, file.path) for source, found in files.items() for file in found}
    tensors = AffectedTensors(before, after, changed, {option.name for option in options})
    return Difference(
        inputs=tuple(dataclasses.replace(change, tensors=tensors.affected_by(change.source)) for change in inputs),
        options=options,
        changes=_values(_flat(before.record.changes), _flat(after.record.changes))
        if before.is_first_version is after.is_first_version
        else (),
        added=tuple(name for name in tensors.after if name not in tensors.before),
        removed=tuple(name for name in tensors.before if name not in tensors.after),
        affected=tensors.affected,
        num_tensors=len(tensors.after),
        other_format=before.is_first_version is not after.is_first_version,
    )


def matched(before: Side, after: Side) -> tuple[Side, Side]:
    """Return two sides with names for all adapters, the same for what is the same adapter as far as one can tell."""
    if before.names is not None and after.names is not None:
        return _renamed(before, after), after
    if before.names is None and after.names is None:
        before = dataclasses.replace(before, names=tuple(map(str, range(len(before.record.adapters)))))
    known, blind = (before, after) if after.names is None else (after, before)
    assert known.names is not None
    left = list(zip(known.names, known.record.adapters, strict=True))
    found: dict[int, str] = {}
    for alike in (_are_equal, _have_equal_files, _share_a_file):
        for place, adapter in enumerate(blind.record.adapters):
            match = next((pair for pair in left if place not in found and alike(pair[1], adapter)), None)
            if match is not None:
                found[place] = match[0]
                left.remove(match)
    taken = set(known.names)
    free = (str(number) for number in range(len(taken) + len(blind.record.adapters)) if str(number) not in taken)
    names = tuple(found.get(place) or next(free) for place in range(len(blind.record.adapters)))
    named = dataclasses.replace(blind, names=names)
    return (before, named) if blind is after else (named, after)


def _renamed(before: Side, after: Side) -> Side:
    """Return the first side with the second one's names for adapters that are called otherwise there."""
    assert before.names is not None
    own, others = before.adapters, after.adapters
    gone = [source for source in own if source not in others]
    new = [source for source in others if source not in own]
    names = {source: source for source in own}
    for alike in (_are_equal, _have_equal_files):
        for source in [source for source in gone if names[source] == source]:
            match = next((other for other in new if alike(own[source], others[other])), None)
            if match is not None:
                names[source] = match
                new.remove(match)
    commits = {names.get(source, source): commit for source, commit in before.commits.items()}
    return dataclasses.replace(before, names=tuple(names[source].adapter_name for source in own), commits=commits)


def _are_equal(one: AdapterRecord, other: AdapterRecord) -> bool:
    return one == other


def _have_equal_files(one: AdapterRecord, other: AdapterRecord) -> bool:
    return one.files == other.files


def _share_a_file(one: AdapterRecord, other: AdapterRecord) -> bool:
    return not set(one.files).isdisjoint(other.files)


def _files(before: Sequence[FileRecord], after: Sequence[FileRecord]) -> tuple[FileChange, ...]:
    was, now = ({file.path: file for file in files} for files in (before, after))
    return tuple(
        FileChange(path=path, before=was.get(path), after=now.get(path))
        for path in sorted(was.keys() | now.keys())
        if was.get(path) != now.get(path)
    )


def _values(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[ValueChange, ...]:
    return tuple(
        ValueChange(name=name, before=before.get(name), after=after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )


def _flat(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{file}: {key}": value for file, keys in changes.items() for key, value in keys.items()}


def _input_reason(change: InputChange, num_tensors: int) -> str:
    what: list[str] = []
    if change.kind != "changed":
        what.append(f"{change.source} {change.kind}")
    if change.weights is not None:
        what.append(f"{change.source} weight {change.weights[0]:g} to {change.weights[1]:g}")
    what += [f"{change.source} {said}" for said in settings_said(change)]
    if change.files:
        what.append(_files_reason(change) + (_commits_reason(*change.commits) if change.commits else ""))
    of = f", {change.tensors} of {num_tensors} tensors" if change.tensors or not change.source.is_base else ""
    return f"{' and '.join(what)}{of}"


def _files_reason(change: InputChange) -> str:
    """Return which files of an input changed; the weights alone are the adapter itself."""
    first, *more = change.files
    if not more:
        where = change.source if first.path == WEIGHTS_NAME else f"{change.source}/{first.path}"
        if first.before is not None and first.after is not None:
            return f"{where} changed ({_how(first.before, first.after)})"
        return f"{where} {'added' if first.before is None else 'removed'}"
    return f"{change.source} changed ({some_of([file.path for file in change.files])})"


def _how(before: FileRecord, after: FileRecord) -> str:
    if UNKNOWN in (before.sha256, after.sha256):
        return f"{before.size_bytes} to {after.size_bytes} bytes"
    return f"{short(before.sha256)} to {short(after.sha256)}"


def _commits_reason(before: str | None, after: str | None) -> str:
    was, now = (f"commit {commit[:_COMMIT]}" if commit else "a folder" for commit in (before, after))
    return f" ({was} to {now})"


def short(digest: Digest) -> str:
    """Return the first digits of a digest: `ca17..`."""
    return f"{digest.hex[:_SHOWN]}.."


def settings_said(change: InputChange) -> list[str]:
    """Return what differs of what recipes say of an adapter, beside its weight."""
    return [f"{setting.name} {_said(setting.before)} to {_said(setting.after)}" for setting in change.settings]


def _said(value: Any) -> str:
    return "none" if value is None else "mixed" if isinstance(value, Mapping) else str(value)
