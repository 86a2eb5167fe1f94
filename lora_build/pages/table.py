"""The rows of a report as CSV: a column for each axis and each score."""

import csv
import io

from lora_build.pages.content import Report
from lora_build.terminal import without_secrets

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take a cell that begins so for
_MORE = ("objective", "state", "seconds", "dir", "manifest_hash", "weights_digest", "error")


def table_bytes(report: Report) -> bytes:
    """Return the rows, a heading first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    first = "number" if report.is_sweep else "build"
    table.writerow([first, *map(_cell, report.axes), *map(_cell, report.metrics), *_MORE])
    for point in sorted(report.points, key=lambda point: point.number):
        own = [getattr(point, key) for key in _MORE]
        of_axes = [point.axes.get(axis) for axis in report.axes]
        of_scores = [point.scores.get(metric) for metric in report.metrics]
        name = point.number if report.is_sweep else point.label
        table.writerow(list(map(_cell, [name, *of_axes, *of_scores, *own])))
    return text.getvalue().encode(errors="backslashreplace")


def _cell(value: object) -> str:
    """Return a cell: empty for nothing, and no text that a spreadsheet would compute."""
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = without_secrets(str(value))
    return f"'{text}" if not isinstance(value, int | float) and text.startswith(_FORMULAS) else text
