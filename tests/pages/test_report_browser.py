"""The report in a real browser, from file://: its numbers as the page shows them, by keyboard, without a network."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_build.pages.content import (
    AdapterShare,
    Cell,
    Drop,
    GroupOverlap,
    PairOverlap,
    Report,
    ReportBuild,
    ReportInterference,
    ReportPoint,
)
from lora_build.pages.html import html_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
AXES, METRICS = ("adapters.math.weight", "adapters.json.weight"), ("sums.exact_match", "json.exact_match")
HASH = "sha256:" + "3f2a" * 16


def points() -> tuple[ReportPoint, ...]:
    """Return a grid of nine, of which the seventh failed; the best of the sum is (0.5, 1)."""
    grid = [(m, j) for m in (0, 0.5, 1) for j in (0, 0.5, 1)]
    scores = [
        (0.1, 0.2),
        (0.1, 0.6),
        (0.0, 0.9),
        (0.5, 0.1),
        (0.6, 0.5),
        (0.5, 0.8),
        (0.9, 0.0),
        (0.8, 0.3),
        (0.7, 0.4),
    ]
    return tuple(
        ReportPoint(
            number=number, label=f"p{number}", axes=dict(zip(AXES, place, strict=True)),
            scores={} if number == 6 else dict(zip(METRICS, found, strict=True)),
            objective=None if number == 6 else sum(found) / 2, seconds=number + 0.25,
            manifest_hash=None if number == 6 else HASH, manifest="../p/lora-build.manifest.json",
            state="failed" if number == 6 else "built",
            error="it <b>broke</b> here" if number == 6 else None,
        )
        for number, (place, found) in enumerate(zip(grid, scores, strict=True))
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = tuple(
        Cell(layer=layer, module=module, relative_norm=0.01 * (layer + 1), changed=0.5)
        for layer in range(30)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    )
    build = ReportBuild(
        label="builds/duo", manifest_hash=HASH, cells=cells,
        adapters=(AdapterShare(adapter="math", num_tensors=60, relative_norm=0.0125, changed=0.75),),
    )  # fmt: skip
    group = GroupOverlap(module="self_attn.q_proj", cosine=0.25, opposed=0.4)
    pair = PairOverlap(first="json", second="math", cosine=-0.125, opposed=0.55, num_tensors=60, modules=(group,))
    report = Report(
        title="duo <i>grid</i>", is_sweep=True, points=points(), axes=AXES, metrics=METRICS, best=5,
        objective="maximize sums.exact_match and json.exact_match", front=(2, 5, 8, 7), pareto=METRICS,
        drops=(Drop(adapter="math", metric=METRICS[0], point=5, other=2, with_it=0.5, without_it=0.0),),
        about_drops="Held against the best.", interference=ReportInterference(about="Two.", pairs=(pair,)),
        builds=(build,), notes=("one is left out",),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_bytes(html_of(report))
    return file


def browse(
    page: Path, *, script: str = "", flags: tuple[str, ...] = (), width: int = 1200
) -> tuple[str, str, list[str]]:
    """Return the page's DOM after a script, what the console said, and the URLs that the page asked for.

    What its policy forbids is not asked for, but said on the console.
    """
    assert CHROMIUM is not None
    shown = page.with_name("shown.html")
    asked = "JSON.stringify(performance.getEntriesByType('resource').map((one) => one.name))"
    after = f"<script>addEventListener('load', () => {{ {script} document.body.dataset.asked = {asked}; }});</script>"
    shown.write_text(page.read_text().replace("</html>", f"{after}</html>"))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},2400",
            "--disable-background-networking", "--disable-component-update", "--no-first-run", "--enable-logging=stderr",
            f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000",
            *flags, "--dump-dom", shown.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    found = re.search(r'<body[^>]* data-asked="([^"]*)"', done.stdout)
    assert found is not None, "the script ran to its end"
    return done.stdout, console, json.loads(html.unescape(found[1]))


def rows(dom: str) -> list[Mapping[str, Any]]:
    """Return the shown rows of the table: what each cell has."""
    body = re.search(r'<table class="points">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)
    assert body is not None
    found = re.findall(r"<tr([^>]*)>(.*?)</tr>", body[1], re.DOTALL)
    cell = re.compile(r'<td[^>]*data-column="([^"]*)" data-value="([^"]*)">(.*?)</td>', re.DOTALL)
    return [
        {html.unescape(name): html.unescape(value) for name, value, _ in cell.findall(inside)}
        for attributes, inside in found
        if "hidden" not in attributes
    ]


def test_the_page_shows_the_numbers_of_its_report(page: Path) -> None:
    dom, console, urls = browse(page)
    assert (console, urls) == ("", [])
    shown = rows(dom)
    assert [int(row["#"]) for row in shown] == list(range(9))
    for row, point in zip(shown, points(), strict=True):
        assert float(row["adapters.math.weight"]) == point.axes["adapters.math.weight"]
        assert [float(row[m]) if row[m] else None for m in METRICS] == [point.scores.get(m) for m in METRICS]
        assert row["state"] == point.state
    assert shown[6]["error"] == "it <b>broke</b> here"
    assert "<b>broke</b>" not in dom.partition("<main")[2]
    assert re.search(r'<tr class="best" data-point="5"', dom)
    assert 'href="../p/lora-build.manifest.json"' in dom
    for number in ("0.65", "-0.125", "55.0%", "0.0125", "75.0%", "+0.5"):
        assert number in dom
    assert "one is left out" in dom
    # nine dots an axis and score but for the failed one, a cell a value in each heat map, the front's line
    assert dom.count("<figure") >= 10
    assert dom.count('aria-label="cell"') >= 4


def test_a_click_sorts_the_rows_and_a_word_filters_them(page: Path) -> None:
    header = "[...document.querySelectorAll('th button')].find((one) => one.textContent === 'json.exact_match')"
    shown = rows(browse(page, script=f"{header}.click();")[0])
    assert [row["json.exact_match"] for row in shown] == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.8", "0.9", ""]
    shown = rows(browse(page, script=f"{header}.click(); {header}.click();")[0])
    assert [row["json.exact_match"] for row in shown][:2] == ["0.9", "0.8"]
    type_in = "const box = document.getElementById('filter'); box.value = '%s'; box.dispatchEvent(new Event('input'));"
    assert [row["#"] for row in rows(browse(page, script=type_in % "math.weight=0.5")[0])] == ["3", "4", "5"]
    assert [row["#"] for row in rows(browse(page, script=type_in % "failed")[0])] == ["6"]


def test_the_filter_is_reached_by_a_key_and_every_heading_by_tab(page: Path) -> None:
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}));"
    dom, console, _ = browse(page, script=f"{press} document.title = document.activeElement.id;")
    assert "<title>filter</title>" in dom
    assert console == ""
    assert dom.count("<th scope") == dom.count('<th scope="col"')
    assert len(re.findall(r'aria-sort="none"><button type="button">', dom)) == 9


@pytest.mark.parametrize(("flags", "width"), [((), 400), (("--blink-settings=preferredColorScheme=0",), 1200)])
def test_it_holds_on_a_narrow_screen_and_in_the_dark(page: Path, flags: tuple[str, ...], width: int) -> None:
    measure = "document.title = [document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor].join(' ');"
    dom, console, urls = browse(page, script=measure, flags=flags, width=width)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    fits, _, background = title[1].partition(" ")
    assert (fits, console, urls) == ("true", "", [])
    assert background == ("rgb(20, 23, 26)" if flags else "rgb(255, 255, 255)")
