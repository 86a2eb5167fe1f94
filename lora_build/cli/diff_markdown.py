"""A diff as Markdown, for a pull request: a line of outcome, what the two were made of, and tables of what came out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_build.cli.diff_text import (
    file_text,
    group_count,
    key_text,
    layer_rows,
    outcome,
    shown_files,
    some,
    template_text,
    token_texts,
)  # fmt: skip
from lora_build.cli.markdown import code, fenced, table
from lora_build.errors import shortened

if TYPE_CHECKING:
    from lora_build.proof.comparing.result import BuildDiff, SideFact

_SHOWN = 30  # rows, keys, files
_SHOWN_LINES, _LONGEST_LINE = 60, 200  # of a template
_SHOWN_LAYERS = 100


def diff_markdown(found: "BuildDiff") -> str:
    """Return what two builds differ in as Markdown; its text ends in a line break."""
    word = "Equal" if found.is_equal else "Different" if found.is_different else "Not known to be equal"
    lines = [
        f"### {code(found.before.name)} to {code(found.after.name)}", "",
        f"**{word}**: {outcome(found)}", "",
        *table(("", "what", "manifest"), [_side("before", found.before), _side("after", found.after)]),
    ]  # fmt: skip
    for title, part in _parts(found):
        if body := list(part):
            lines += ["", f"#### {title}", "", *body]
    return "\n".join(lines) + "\n"


def _side(word: str, side: "SideFact") -> tuple[str, str, str]:
    kind = {"build": "build", "manifest": "manifest", "checkpoint": "folder without a manifest", "plan": "recipe"}
    return word, f"{kind[side.kind]} {code(side.name)}", code(side.manifest_hash) if side.manifest_hash else ""


def _parts(found: "BuildDiff") -> "Iterator[tuple[str, Iterator[str] | list[str]]]":
    plans = found.plans
    if plans is not None:
        yield "Inputs", _listed(plans.input_reasons)
        yield "Options", _listed(plans.option_reasons)
    changes = plans.change_reasons if plans is not None and not found.keys else ()
    yield "Configuration", _listed((*changes, *map(key_text, found.keys)))
    yield "Tokenizer", _tokenizer(found)
    yield "Files", _listed(list(map(file_text, shown_files(found))))
    yield "Tensors", _tensors(found)
    yield "Weights", _layers(found)
    yield "Manifests", _listed(found.manifests)
    yield "Notes", _listed(found.notes)


def _listed(texts: "tuple[str, ...] | list[str]") -> list[str]:
    return [f"- {code(text)}" for text in some(texts, _SHOWN)]


def _tokenizer(found: "BuildDiff") -> Iterator[str]:
    if found.tokenizer is None:
        return
    yield from (f"- {code(text)}" for text in token_texts(found.tokenizer, _SHOWN))
    for template in found.tokenizer.templates:
        yield f"- chat template {code(template_text(template))}"
        if template.lines:
            shown = [shortened(line, _LONGEST_LINE) for line in template.lines[:_SHOWN_LINES]]
            more = len(template.lines) - len(shown) + template.num_more
            yield ""
            yield from fenced([*shown, *([f"... {more} lines more"] if more else [])], "diff")
            yield ""


def _tensors(found: "BuildDiff") -> Iterator[str]:
    rows = [
        (
            group.kind,
            code(group.pattern),
            group_count(len(group.names), group.num_alike, group.layers),
            code(group.what) if group.what else "",
        )
        for group in found.groups[:_SHOWN]
    ]
    if rows:
        yield from table(("", "tensors", "how many", "what"), rows)
    if more := len(found.groups) - len(rows):
        yield from ("", f"and {more} patterns more")


def _layers(found: "BuildDiff") -> Iterator[str]:
    layers = found.layers or ()
    if layers:
        heads, rows = layer_rows(layers[:_SHOWN_LAYERS])
        yield from table(heads, [[code(cell) if cell else "" for cell in row] for row in rows])
    if len(layers) > _SHOWN_LAYERS:
        yield from ("", f"and {len(layers) - _SHOWN_LAYERS} layers more")
