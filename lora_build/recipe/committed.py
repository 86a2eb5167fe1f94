"""Which commit of which git repository a recipe's file is of, asked of git without trusting the repository.

A repository may come with the recipe, from anybody. So git runs no hook, no filter and no monitor that its config
names, fetches nothing, locks nothing, and has a few seconds: what it has not said by then is not known.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 5.0  # for all of it; a tree of 100,000 files takes a tenth
_MOST_BYTES = 1 << 20  # of an answer
_OFF = {
    "core.fsmonitor": "false", "core.hooksPath": os.devnull, "core.untrackedCache": "false",
    "maintenance.auto": "false", "safe.bareRepository": "explicit", "submodule.recurse": "false",
}  # fmt: skip
_KEPT = ("GIT_CEILING_DIRECTORIES", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_SYSTEM")
_ENVIRONMENT = {  # of protocols `none` alone may be used, and there is none of this name
    "GIT_ALLOW_PROTOCOL": "none", "GIT_LITERAL_PATHSPECS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C",
}  # fmt: skip
_FILTER = re.compile(r"filter\.([\w./ -]+)\.\w+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """Where a recipe's file stands in git.

    Attributes:
        commit: what is checked out, 40 hexadecimal digits (64 in a repository of SHA-256).
        dirty: whether a tracked file is another one than there, or a recipe is not tracked at all; None where that
            was not found out in time.
        file: the recipe's file, from the top of the repository.
    """

    commit: str
    dirty: bool | None
    file: str


def committed(file: Path, recipes: Path) -> Committed | None:
    """Return where a recipe's file stands in git; None where there is no git, or no repository that holds it.

    Args:
        file: the recipe's file.
        recipes: the folder of recipes that it is in, of which others may be a part of it.
    """
    file, recipes = Path(os.path.realpath(file)), Path(os.path.realpath(recipes))
    git = shutil.which("git")
    if git is None or not any(os.path.lexists(up / ".git") for up in file.parents):
        return None
    asked = Git(path=git, folder=file.parent, until=time.monotonic() + _SECONDS)
    said = asked.run("rev-parse", "--show-toplevel", "HEAD^{commit}")
    found = re.fullmatch(rb"(.+)\n([0-9a-f]{40}|[0-9a-f]{64})\n", said or b"", re.DOTALL)
    is_there = ("--cached", "--others", "--exclude-standard", "--")  # not so where git leaves a file out
    tag = asked.run("ls-files", "-z", "-t", *is_there, file.name)
    if found is None or not tag:
        return None
    dirty = tag.startswith(b"?") or _has_untracked(asked, recipes) or _is_changed(asked)
    top = os.path.realpath(os.fsdecode(found[1]))
    return Committed(commit=found[2].decode(), dirty=dirty, file=os.path.relpath(file, top))


def _has_untracked(asked: "Git", recipes: Path) -> bool:
    """Whether the folder of recipes has recipes, or a lock, that are in no commit."""
    listed = asked.run("ls-files", "-z", "--others", "--exclude-standard", "--", str(recipes)) or b""
    return any(name.endswith((b".yaml", b".lock")) for name in listed.split(b"\0"))


def _is_changed(asked: "Git") -> bool | None:
    """Whether a tracked file is another one than in the commit; None where that is not known.

    Files whose times alone differ are compared, through filters such as LFS's: those of the user's own config, and none
    that the repository names.
    """
    listed = asked.run("config", "-z", "--show-scope", "--name-only", "--list")
    if listed is None:
        return None
    words = listed.split(b"\0")
    off = []
    for scope, key in zip(words[::2], words[1::2], strict=False):
        if scope in (b"local", b"worktree") and key.lower().startswith(b"filter."):
            found = _FILTER.fullmatch(os.fsdecode(key))
            if found is None:
                return None
            off += [f"filter.{found[1]}.{part}" for part in ("clean=", "process=", "required=false")]
    said = asked.run("status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=dirty", off=off)
    return None if said is None else bool(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Git:
    """How git is asked."""

    path: str
    folder: Path
    until: float
    most_bytes: int = _MOST_BYTES

    def run(self, *words: str, off: Sequence[str] = ()) -> bytes | None:
        """Return what a command of git says, the beginning of it where it is much; None where it fails or is late."""
        settings = [word for text in (*(f"{k}={v}" for k, v in _OFF.items()), *off) for word in ("-c", text)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key in _KEPT}
        try:
            process = subprocess.Popen(
                [self.path, "--no-pager", *settings, "-C", str(self.folder), *words], env=kept | _ENVIRONMENT,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            return None
        late = threading.Timer(max(0.0, self.until - time.monotonic()), _end, [process])
        late.daemon = True
        late.start()
        with process:
            try:
                assert process.stdout is not None
                data = process.stdout.read(self.most_bytes)
                return data if len(data) == self.most_bytes or process.wait() == 0 else None
            finally:
                late.cancel()
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it has started, unless it has ended by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
