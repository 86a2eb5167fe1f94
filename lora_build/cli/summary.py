"""What is said of a sweep: a table of its points, without what all of them share, and then what went wrong."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.text import ACTIONS, count, first, size
from lora_build.errors import label
from lora_build.proof.builds import Action
from lora_build.proof.sweep_record import Point

_NONE = "-"
_TO_DO = {
    Action.create: "to create",
    Action.replace: "to replace",
    Action.reuse: "up to date",
    Action.replace_or_reuse: "perhaps up to date",
}


def summary_lines(points: Sequence[Point], said: Sequence[str] = (), best: Sequence[Point] = ()) -> list[Said]:
    """Return how many points there are, a row for each, and the messages of those that failed.

    Args:
        points: those of the sweep.
        said: the words that all of them share, as they were typed.
        best: those that have an objective, the best one first: so do their rows stand.
    """
    first = [point.number for point in best]
    points = sorted(points, key=lambda p: first.index(p.number) if p.number in first else len(first) + p.number)
    shared = [text for text in points[0].overrides if all(text in point.overrides for point in points)]
    own = [[text for text in point.overrides if text not in shared] for point in points]
    failed = sum(1 for point in points if point.exit_code)
    title = f"{count(len(points), 'point')}, {failed} failed: {' '.join(said)}".removesuffix(": ")
    columns = [
        Column(cells=[f"#{point.number}" for point in points]),
        *_override_columns(own),
        Column(cells=list(map(_outcome, points)), kind=Kind.word),
        Column(head="objective", cells=[_number(point.objective) for point in points], kind=Kind.word),
        *_score_columns(points),
        Column(head="to write", cells=list(map(_to_write, points))),
        Column(head="output", cells=list(map(_output, points)), kind=Kind.path, spare=3),
        Column(head="why", cells=[_why(point) for point in points]),
        Column(head="manifest", cells=[point.manifest_hash or "" for point in points], kind=Kind.word, spare=2),
        Column(head="replaces", cells=[point.replaced or "" for point in points], kind=Kind.word, spare=1),
    ]
    lines: list[Said] = [title, Table(columns=columns, indent=0), *_messages(points)]
    return lines if all(point.plan is None for point in points) else [*lines, Line("plan", _counted(points))]


def counts(points: Sequence[Point]) -> dict[str, int]:
    """Return how many points there are of each action of a plan, and how many failed."""
    found = Counter("failed" if point.plan is None else point.plan["action"] for point in points)
    return {action: found[action] for action in (*(action.value for action in Action), "failed")}


def _counted(points: Sequence[Point]) -> str:
    """Return that in words: `3 to create, 1 to replace, 96 up to date`."""
    words = {**{action.value: said for action, said in _TO_DO.items()}, "failed": "failed"}
    return ", ".join(f"{number} {words[action]}" for action, number in counts(points).items() if number)


def _override_columns(own: Sequence[Sequence[str]]) -> list[Column]:
    """Return a column for each key that points differ in."""
    values = [dict(map(_key_and_value, texts)) for texts in own]
    keys = dict.fromkeys(key for found in values for key in found)
    return [Column(head=key.removeprefix("adapters."), cells=[f.get(key, _NONE) for f in values]) for key in keys]


def _score_columns(points: Sequence[Point]) -> list[Column]:
    """Return a column for each score, but for one that is the objective itself."""
    found = dict.fromkeys((name, m) for point in points for name, of in (point.scores or {}).items() for m in of)
    columns = []
    for name, metric in found:
        values = [(point.scores or {}).get(name, {}).get(metric) for point in points]
        if values != [point.objective for point in points]:
            columns.append(Column(head=f"{name} {metric}", cells=list(map(_number, values)), kind=Kind.word, spare=4))
    return columns


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _output(point: Point) -> str:
    return _NONE if point.dir is None or point.kept is False else label(Path(point.dir))


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    return key, value if equals else "left out"  # ~key


def _outcome(point: Point) -> str:
    if point.same_as is not None:
        return f"same as #{point.same_as}"
    if point.exit_code:
        return f"failed ({point.exit_code})"
    if point.kept is False:
        return "not kept"
    if point.plan is not None:
        return ACTIONS[Action(point.plan["action"])]
    return "up to date" if point.reused else "built"


def _why(point: Point) -> str:
    """Return why a plan replaces what is there, or what would tell whether it does."""
    if point.plan is None:
        return ""
    unread = [f"not read: {name}" for name in point.plan["unread"]]
    return "; ".join(first([*point.plan["reasons"], *unread], 2))


def _to_write(point: Point) -> str:
    if point.plan is None or Action(point.plan["action"]) is Action.reuse:
        return ""
    return size(point.plan["bytes_to_write"])


def _messages(points: Sequence[Point]) -> list[Line]:
    """Return each message once, with the points that it is of: warnings first, so that what failed stands last."""
    told: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        notes = [] if point.same_as is not None else [point.error] if point.error else point.warnings or ()
        for note in notes:
            told.setdefault(("failed" if point.error else "warning", note), []).append(point)
    lines = []
    for (word, note), group in sorted(told.items(), key=lambda item: item[0][0] == "failed"):
        begin, *rest = note.splitlines()
        lines.append(Line(word, f"{', '.join(f'#{point.number}' for point in group)}: {begin}"))
        lines += [Line("", line) for line in rest]
    return lines
