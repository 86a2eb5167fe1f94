"""The tables of docs/performance.md, from what is in benchmarks/results.

    python benchmarks/goals.py [--check]

Writes them between their marks, or says with --check whether they are there as they should be.
"""

import json
import sys
from typing import Any

from big import merged_parameters
from run import HERE

import models

DOCS = HERE.parent / "docs" / "performance.md"
CASES = ("1B-r16", "1B-r64", "1B-r16-float32", "1B-r16-single", "memory", "commands", "8B-in-1GB")


def load(stem: str) -> dict[str, Any]:
    path = HERE / "results" / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def goals() -> str:
    """Return every goal, what was measured of it, and whether that is enough."""
    rows = ["| case | goal | limit | measured | |", "|---|---|---|---|---|"]
    for stem in CASES:
        for goal in load(stem).get("goals", ()):
            mark = "reached" if goal["reached"] else "**missed**"
            number = f"{goal['measured']:.0f}" if goal["measured"] >= 100 else f"{goal['measured']:.2f}"
            rows.append(f"| {stem} | {goal['goal']} | {goal['limit']} | {number} | {mark} |")
    return "\n".join(rows)


def sizes() -> str:
    """Return the seconds of every size beside what the model of the cost says."""
    rows = ["| base | GB | floor, s | lora-build, s | model, s | anonymous memory, MB |", "|---|---|---|---|---|---|"]
    big = load("8B-in-1GB")
    parts = big["prediction"]
    for preset in models.PRESETS:
        report, size = load(f"{preset}-r16"), models.base_bytes(models.PRESETS[preset])
        says = parts["fixed_s"] + parts["copied_ns_per_byte"] * size / 1e9
        model = f"{says + parts['merged_ns_per_parameter'] * merged_parameters(preset) / 1e9:.1f}"
        if preset == "8B":
            floor, ours, memory = "", f"{big['measured']['warm']['wall_s']:.1f}", ""
        elif report:
            medians = report["medians"]
            floor, ours = (f"{medians[tool]['wall_s']:.1f}" for tool in ("floor", "lora-build"))
            memory = f"{medians['lora-build']['peak_anonymous_bytes'] / 1e6:.0f}"
        else:
            continue
        rows.append(f"| {preset} | {size / 1e9:.2f} | {floor} | {ours} | {model} | {memory} |")
    return "\n".join(rows)


def main() -> None:
    """Write the tables, or check them."""
    text = before = DOCS.read_text()
    for mark, table in (("goals", goals()), ("sizes", sizes())):
        start, end = f"<!-- {mark}: benchmarks/goals.py -->\n", f"<!-- end of {mark} -->"
        head, rest = text.split(start)
        text = head + start + table + "\n" + end + rest.split(end)[1]
        print(table, end="\n\n")
    if "--check" in sys.argv:
        sys.exit(text != before and "docs/performance.md is not what benchmarks/results says; run benchmarks/goals.py")
    DOCS.write_text(text)


if __name__ == "__main__":
    main()
