"""The report as one file of HTML: its data, the library that draws it and its style, all inside.

The charts are drawn by Observable Plot and D3 (assets/LICENSES.txt). The page may load nothing (its own policy says
so), and text of others only ever becomes text: the data is JSON in which no tag can end, drawn without innerHTML.
"""

import html
import json
from importlib.resources import files
from pathlib import Path

from lora_build.pages.content import Report

PAGE_NAME = "report.html"
_MARK = '<meta name="generator" content="lora-build report">'
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def html_of(report: Report) -> bytes:
    """Return the page of a report, UTF-8; the same report gives the same bytes."""
    data = json.dumps(report.to_json(), ensure_ascii=True, allow_nan=False, sort_keys=True)
    title = html.escape(report.title)
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        _MARK,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: lora-build</title>",
        f"<!--\n{_asset('LICENSES.txt')}-->",
        f"<style>\n{_asset('report.css')}</style>",
        f"<main><h1>{title}</h1><noscript>This page is drawn by its script, which is switched off.</noscript></main>",
        f'<script id="report" type="application/json">{_without_tags(data)}</script>',
        *(f"<script>{_asset(name)}</script>" for name in ("d3.min.js", "plot.min.js", "report.js")),
        "</html>\n",
    ]
    return "\n".join(parts).encode()


def is_page(file: Path) -> bool:
    """Whether a file is a page that `html_of` has made, and may be replaced."""
    with file.open("rb") as opened:
        return _MARK.encode() in opened.read(1024)


def _without_tags(data: str) -> str:
    """Return JSON in which nothing can end the element that holds it."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (files("lora_build.pages") / "assets" / name).read_text(encoding="utf-8")
