"""`lora-build explain DIR|recipe=NAME [TENSOR]`: why a build is current or not, and where a tensor comes from."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Line, Said
from lora_build.cli.output import Manner, say
from lora_build.errors import RecipeError

if TYPE_CHECKING:
    from lora_build.keeping.explaining import ExplainedTensor, Explanation

_USAGE = "lora-build explain DIR [TENSOR], or lora-build explain recipe=NAME [KEY=VALUE ...] [TENSOR]"
_MORE = """\
DIR is the folder of a build, which is held to its recipe's file as it is now, or a
manifest's file or a repository of the Hub, of which tensors alone are explained.
TENSOR is the name of an output tensor, or a pattern: '*.0.*q_proj.weight'
"""
_WORDS = {"current": "up to date", "stale": "stale", "unknown": "not known", "absent": "not built"}


def parser() -> Parser:
    """Return the parser of `explain`."""
    about = "Say why a build is up to date or not, input by input, and where a tensor's values come from."
    return Parser("explain", usage="DIR|recipe=NAME [TENSOR]", about=about, more=_MORE)


def run(asked: Namespace) -> int:
    """Print the explanation, and return the exit code."""
    from lora_build.keeping.explaining import explain

    build, tensor = _asked(asked)
    found = explain(build, tensor)
    say(lambda: _lines(found), Manner.of(asked), result=lambda: _json(found), final=tuple(_WORDS.values()))
    return 0


def _asked(asked: Namespace) -> tuple[Any, str | None]:
    """Return the build or the recipe, and the tensor."""
    of_recipe = [word for word in asked.words if "=" in word or word.startswith("~")]
    others = [word for word in asked.words if word not in of_recipe]
    if any(word.startswith("recipe=") for word in of_recipe):
        if len(others) > 1:
            raise RecipeError(f"explain takes one tensor or pattern, found {' and '.join(map(repr, others))}; {_USAGE}")
        from lora_build.cli.composed import one_recipe

        return one_recipe(of_recipe, "explain"), next(iter(others), None)
    if not asked.words or len(asked.words) > 2:
        found = " and ".join(map(repr, asked.words)) or "nothing"
        raise RecipeError(f"explain takes a build, and maybe a tensor, found {found}; {_USAGE}")
    from lora_build.recipe import files as recipe_files

    word = asked.words[0]
    if "/" not in word and not Path(word).exists() and any(word in known.names() for known in recipe_files.folders()):
        raise RecipeError(f"'{word}' is the name of a recipe, which is written so: lora-build explain recipe={word}")
    return asked.words[0], asked.words[1] if asked.words[1:] else None


def _lines(found: "Explanation") -> list[Said]:
    lines: list[Said] = [Line(_WORDS[found.state], found.where), Line("by", found.by)]
    lines += [Line("since", reason) for reason in found.reasons]
    for one in found.inputs:
        word, name = ("base", "") if one.source == "base" else ("adapter", f"{one.source.removeprefix('adapters.')}: ")
        state = {"unknown": "", "new": "", "unread": "digest not remembered, "}.get(one.state, f"{one.state}, ")
        where = "" if one.uri is None else f", {one.uri}"
        tensors = f", affects {one.tensors} tensors" if one.tensors else ""
        lines.append(Line(word, f"{name}{state}{one.how or 'nothing else'}{tensors}{where}"))
    changed = [o for o in found.options if o.before != o.after] if found.state in ("current", "stale") else []
    lines += [Line("option", f"{o.name}: {_said(o.before)} to {_said(o.after)}") for o in changed]
    same = [f"{o.name} {_said(o.before if o.after is None else o.after)}" for o in found.options if o not in changed]
    if same:
        lines.append(
            Line("options", f"{'unchanged: ' if changed or found.state == 'current' else ''}{', '.join(same)}")
        )
    for tensor in found.tensors:
        lines += _tensor_lines(tensor)
    lines += [Line("note", note) for note in found.notes]
    lines += [] if found.build_key is None else [Line("build_key", found.build_key)]
    return [*lines, *([] if found.manifest_hash is None else [Line("manifest", found.manifest_hash)])]


def _tensor_lines(tensor: "ExplainedTensor") -> list[Line]:
    """Return where the values of a tensor come from, a line each."""
    lines = [
        Line("tensor", f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} in {tensor.file}"),
        Line("  is", f"{tensor.operation} of {tensor.begins_as}"),
    ]
    for update in tensor.updates:
        rank = "" if update.rank is None else f", rank {update.rank}"
        start, stop = update.rows
        whole = "all rows" if (start, stop) == (0, tensor.shape[0]) else f"rows {start} to {stop}"
        adapter = update.adapter.removeprefix("adapters.")
        lines.append(Line("  update", f"{adapter}: {update.method}, scale {update.scale:g}{rank}, {whole}"))
        lines += [Line("", f"{role} {factor}") for role, factor in update.factors.items()]
    if (left := tensor.survival) is not None:
        changed = f"{left.num_changed:,} of {left.num_updated:,} updated elements changed"
        lines.append(Line("  norms", f"‖W‖ {left.base_norm:.4g}, ‖ΔW‖ {left.update_norm:.4g}, {changed}"))
        for share in left.shares if left.shares[1:] else ():
            lines.append(
                Line(
                    "", f"{share.adapter}: ‖W‖ {share.base_norm:.4g}, ‖ΔW‖ {share.update_norm:.4g} of the rows measured"
                )
            )
    return lines


def _said(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _json(found: "Explanation") -> dict[str, Any]:
    return {"schema": "lora-build/explanation/v1", **dataclasses.asdict(found)}
