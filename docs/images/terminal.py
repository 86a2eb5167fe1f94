"""Draws terminal.svg, what a terminal of 80 columns shows of a few commands: python docs/images/terminal.py."""

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from lora_build.cli.main import main

COMMANDS = (
    "lora-build plan demo",
    "lora-build recipe=demo",
    "lora-build verify builds/demo",
    "lora-build -m recipe=demo adapter_names=[math],[mth],[math,text] \\\n> adapters.math.weight=0.5,1",
)
_ROOT = Path(__file__).parent.parent.parent


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen() -> str:
    """Return what a terminal is sent, by the demo's recipe in a folder of its own; nothing of bars, which go away."""
    out, before = _Terminal(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        for name in ("recipes", "examples"):
            shutil.copytree(_ROOT / name, Path(folder) / name)
        os.chdir(folder)
        try:
            for command in COMMANDS:
                out.write(f"\x1b[1m$ {command}\x1b[0m\n")
                with contextlib.redirect_stderr(io.StringIO()):
                    main(shlex.split(command.replace("\\\n>", ""))[1:])
                out.write("\n")
        finally:
            os.chdir(before)
    return out.getvalue()


def picture(text: str) -> str:
    """Return an SVG of what a terminal shows; it fetches no font."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    for line in Text.from_ansi(text).split("\n"):
        console.print(line, soft_wrap=True, highlight=False)
    drawn = console.export_svg(title="", unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


if __name__ == "__main__":
    os.environ.update(COLUMNS="80", TERM="xterm-256color")
    Path(__file__).with_suffix(".svg").write_text(picture(screen()))
