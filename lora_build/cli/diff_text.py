"""What is said of a diff: what two builds were made of, and what came out, a line or a table for each part."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.text import count, short, size
from lora_build.errors import shortened

if TYPE_CHECKING:
    from lora_build.proof.comparing.result import (
        BuildDiff,
        FileDifference,
        KeyDifference,
        Numbers,
        SideFact,
        TemplateDifference,
        TokenizerDifference,
    )

FINAL = ("equal", "different", "not known")
_SHOWN_LINES, _SHOWN_KEYS, _SHOWN_TOKENS, _SHOWN_GROUPS, _SHOWN_LAYERS = 40, 12, 6, 30, 200
_LONGEST_LINE = 200  # of a template


def diff_lines(found: "BuildDiff") -> list[Said]:
    """Return what two builds differ in; the last line is the outcome."""
    lines: list[Said] = [_side_line("before", found.before), _side_line("after", found.after)]
    if found.plans is not None:
        lines += [Line("input", text) for text in found.plans.input_reasons]
        lines += [Line("option", text) for text in found.plans.option_reasons]
        if not found.keys:  # which say it of the files themselves
            lines += [Line("config", text) for text in found.plans.change_reasons]
    lines += [Line("config", text) for text in some([key_text(key) for key in found.keys], _SHOWN_KEYS)]
    lines += _tokenizer_lines(found.tokenizer) if found.tokenizer else []
    lines += [Line("file", text) for text in some([file_text(file) for file in shown_files(found)], _SHOWN_KEYS)]
    lines += _tensor_tables(found)
    lines += _layer_tables(found.layers or ())
    lines += [Line("manifest", text) for text in found.manifests]
    lines += [Line("note", note) for note in found.notes]
    word = "equal" if found.is_equal else "different" if found.is_different else "not known"
    return [*lines, Line(word, outcome(found))]


def outcome(found: "BuildDiff") -> str:
    """Return what differs in numbers, or what is equal."""
    whole = max(found.before.num_tensors, found.after.num_tensors)
    if found.is_equal:
        every = count(whole, "tensor")
        return every if found.plans is None else f"in what they are made of, and in {every}"
    plans, tensors = found.plans, [tensor for tensor in found.tensors if tensor.kind != "unknown"]
    parts = [(len(plans.inputs), "input"), (len(plans.options), "option")] if plans else []
    parts += [(len(found.keys), "key"), (len(shown_files(found)), "file")]
    said = [count(number, noun) for number, noun in parts if number]
    if tensors:
        may = ", which may have other values once built" if any(t.kind == "affected" for t in tensors) else ""
        said.append(f"{len(tensors)} of {count(sum(found.alike.values()), 'tensor')}{may}")
    if unknown := len(found.tensors) - len(tensors):
        said.append(f"{unknown} unknown")
    return ", ".join(said) or "their manifests"


def shown_files(found: "BuildDiff") -> list["FileDifference"]:
    """Return the files that are said: not those that differ as the tensors or the keys in them do."""
    explained = {key.file for key in found.keys}
    if found.tensors:
        explained |= {file.path for file in found.files if file.is_weights}
    return [file for file in found.files if file.why or file.path not in explained]


def _side_line(word: str, side: "SideFact") -> Line:
    of = {"manifest": "a manifest alone", "checkpoint": "no manifest", "plan": "as it would be built today"}
    return Line(word, side.name, side.manifest_hash if side.kind == "build" and side.manifest_hash else of[side.kind])


def key_text(key: "KeyDifference") -> str:
    """Return a key that differs: `config.json: vocab_size: 256 to 260`."""
    was, now = (short(value) for value in (key.before, key.after))
    what = {"added": f"{now} added", "removed": f"{was} removed"}.get(key.kind, f"{was} to {now}")
    return f"{key.file}: {key.key}: {what}"


def file_text(file: "FileDifference") -> str:
    """Return a file that differs: `merges.txt changed (1.2 kB to 1.3 kB)`."""
    sizes = [size(fact.size_bytes) for fact in (file.before, file.after) if fact is not None]
    what = "may differ, and nobody knows" if file.kind == "unknown" else file.kind
    why = f": {file.why}" if file.why else ""
    return f"{file.path} {what} ({' to '.join(dict.fromkeys(sizes))}){why}"


def _tokenizer_lines(found: "TokenizerDifference") -> Iterator[Said]:
    for text in token_texts(found, _SHOWN_TOKENS):
        yield Line("tokens", text)
    for template in found.templates:
        yield Line("template", template_text(template))
        lines = template.lines or ()
        for line in lines[:_SHOWN_LINES]:
            yield Line("", shortened(line, _LONGEST_LINE))
        if more := len(lines) - _SHOWN_LINES + template.num_more if len(lines) > _SHOWN_LINES else template.num_more:
            yield Line("", f"and {count(more, 'line')} more; --json has them")


def token_texts(found: "TokenizerDifference", shown: int) -> Iterator[str]:
    """Yield what tokenizers differ in, but for their templates, in a line each."""
    parts = {
        "added": [f"{token!r} {number}" for token, number in found.added.items()],
        "removed": [f"{token!r} {number}" for token, number in found.removed.items()],
        "with another id": [f"{token!r} {was} to {now}" for token, (was, now) in found.renumbered.items()],
        "special now": list(map(repr, found.special_added)),
        "special no more": list(map(repr, found.special_removed)),
    }
    for what, tokens in parts.items():
        if tokens:
            yield f"{len(tokens)} {what}: {', '.join(some(tokens, shown))}"
    if found.eos is not None:
        yield f"a text ends with {found.eos[1]!r}, before with {found.eos[0]!r}"
    yield from found.unread


def template_text(template: "TemplateDifference") -> str:
    """Return what became of a chat template, its lines aside."""
    return f"{template.name} {template.kind}" + ("" if template.lines is not None else ", too long for a diff")


def _tensor_tables(found: "BuildDiff") -> Iterator[Said]:
    groups = found.groups
    if groups:
        shown = groups[:_SHOWN_GROUPS]
        yield Table(
            word="tensors",
            columns=[
                Column(cells=[group.kind for group in shown], kind=Kind.word),
                Column(cells=[group.pattern for group in shown]),
                Column(cells=[group_count(len(group.names), group.num_alike, group.layers) for group in shown]),
                Column(cells=[group.what for group in shown]),
            ],
        )
    if more := groups[_SHOWN_GROUPS:]:
        tensors = sum(len(group.names) for group in more)
        yield Line("", f"and {count(tensors, 'tensor')} of {count(len(more), 'pattern')} more; --json has them")


def group_count(number: int, alike: int, layers: str) -> str:
    """Return how many tensors of a pattern differ: `12 of 24 (0-11)`."""
    return f"{number} of {alike}" + (f" ({shortened(layers, 100)})" if layers else "")


def _layer_tables(layers: "Sequence[Numbers]") -> Iterator[Said]:
    if layers:
        heads, rows = layer_rows(layers[:_SHOWN_LAYERS])
        columns = [Column(head=head, cells=cells) for head, cells in zip(heads, zip(*rows, strict=True), strict=True)]
        yield Table(word="weights", columns=columns)
    if more := len(layers) - _SHOWN_LAYERS if len(layers) > _SHOWN_LAYERS else 0:
        yield Line("", f"and {count(more, 'layer')} more; --json has them")


def layer_rows(layers: "Sequence[Numbers]") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads and the rows of a table of layers: norms, cosine and the largest change of those that differ."""
    heads = ("of what differs in", "norm", "after", "change", "cosine", "largest", "in", "")
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        where = layer.largest_in.removeprefix(f"{layer.name}.").removesuffix(".weight")
        rows.append((
            layer.name, f"{layer.norm_before:.5g}", f"{layer.norm_after:.5g}", f"{layer.norm_change:.3g}",
            "" if layer.cosine is None else f"{layer.cosine:.6f}", f"{layer.largest:.3g}",
            where if where != layer.name.removesuffix(".weight") else "", _aside(layer),
        ))  # fmt: skip
    return heads, rows


def _aside(layer: "Numbers") -> str:
    said = [
        f"{number} not finite {when}"
        for number, when in zip(layer.not_finite, ("before", "after"), strict=True)
        if number
    ]
    if layer.rows:
        said.append(f"the first {layer.rows[0]} of {layer.rows[1]} rows")
    return ", ".join(said)


def some(lines: Sequence[str], shown: int) -> list[str]:
    """Return the first lines, and how many more there are, which JSON has."""
    return [*lines[:shown], *([f"and {len(lines) - shown} more"] if len(lines) > shown else [])]
