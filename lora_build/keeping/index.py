"""The index of builds: what was read of them, so that a list of a thousand takes no longer than looking where they are.

    builds/.lora-build/index.sqlite    manifests: folder, signature of its files, what they say
                                       verdicts:  folder, stamp of the build and its recipe, what holds of them

It holds nothing that is not in the builds, the recipes and their inputs: whoever cannot read it, or trust it, reads
those. So whatever is wrong with it is no error. It is done without where it belongs to somebody else, is a link, was
made by a newer version, is in use for long, or cannot be written; what is no database of ours is made anew.
"""

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = ".lora-build"
_NAME = "index.sqlite"
_VERSION = 1
_SECONDS = 0.5  # for which another process is waited for
_TABLES = (
    "CREATE TABLE manifests (folder TEXT PRIMARY KEY, signature TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE verdicts (folder TEXT PRIMARY KEY, stamp TEXT NOT NULL, verdict TEXT NOT NULL) WITHOUT ROWID",
)


class Index:
    """The index of one output folder; `get` and `put` never fail. To be closed, which writes what was put."""

    def __init__(self, folder: Path | None) -> None:
        """Open the index of an output folder, which need not be there; None has nothing known, and nothing kept."""
        self._path = None if folder is None else folder / FOLDER / _NAME
        self._fresh: dict[str, dict[str, tuple[str, str]]] = {"manifests": {}, "verdicts": {}}
        self._gone: list[str] = []
        self._known: dict[str, dict[str, tuple[str, str]]] = {"manifests": {}, "verdicts": {}}
        if self._path is not None and _is_ours(self._path):
            self._known = _read(self._path)

    def get(self, table: str, folder: str, stamp: str) -> str | None:
        """Return what is known of a folder, if it was put with the same stamp."""
        found = self._known[table].get(folder)
        return found[1] if found is not None and found[0] == stamp else None

    def put(self, table: str, folder: str, stamp: str, value: str) -> None:
        """Have a value known of a folder for as long as its stamp is the same."""
        self._fresh[table][folder] = (stamp, value)

    def forget_all_but(self, folders: Iterable[str]) -> None:
        """Forget builds that are not there any more."""
        left = self._known["manifests"].keys() - set(folders)
        self._gone = sorted(folder for folder in left if not os.path.lexists(folder))

    def close(self) -> None:
        """Write what was put, if there is where to."""
        if self._path is None or not (any(self._fresh.values()) or self._gone):
            return
        if not self._path.parent.parent.is_dir():
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o755, exist_ok=True)
        if not _is_ours(self._path.parent) or (os.path.lexists(self._path) and not _is_ours(self._path)):
            return
        try:
            self._write(self._path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, read-only, or a disk that is full
                log.debug("%s: %s", self._path, error)
                return
            with contextlib.suppress(OSError, sqlite3.Error):
                self._path.unlink()
                self._write(self._path)

    def _write(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # by a mode that only its user may write by, whatever is usual here
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        with _opened(path, mode="rwc") as database:
            if not _is_current(database) and not _is_made(database):
                return
            with database:
                for table, rows in self._fresh.items():
                    values = [(key, stamp, value) for key, (stamp, value) in rows.items()]
                    database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", values)
                for table in self._fresh:
                    gone = [(folder,) for folder in self._gone]
                    database.executemany(f"DELETE FROM {table} WHERE folder = ?", gone)


def _read(path: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Return what an index holds; nothing where it is none of this version."""
    found: dict[str, dict[str, tuple[str, str]]] = {"manifests": {}, "verdicts": {}}
    try:
        with _opened(path, mode="ro") as database:
            if _is_current(database):
                for table, rows in found.items():
                    for key, stamp, value in database.execute(f"SELECT * FROM {table}"):
                        if all(isinstance(text, str) for text in (key, stamp, value)):
                            rows[key] = (stamp, value)
    except sqlite3.Error as error:
        log.debug("%s: %s", path, error)
    return found


@contextlib.contextmanager
def _opened(path: Path, *, mode: str) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_SECONDS)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA synchronous = OFF")  # what a crash breaks is made anew
        yield database
    finally:
        database.close()


def _is_current(database: sqlite3.Connection) -> bool:
    """Whether a database has our tables, and nothing else: no view or trigger that somebody has put there."""
    made = {text for (text,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    return made == set(_TABLES) and _version(database) == _VERSION


def _is_made(database: sqlite3.Connection) -> bool:
    """Make the tables of a database that is empty, or of an older version; a newer one is left alone."""
    if _version(database) > _VERSION:
        return False
    with database:
        names = database.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if names:
            raise sqlite3.DatabaseError("is no index of this version")  # and is made anew
        for text in _TABLES:
            database.execute(text)
        database.execute(f"PRAGMA user_version = {_VERSION}")
    return True


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _is_ours(path: Path) -> bool:
    """Whether a file or a folder is there, no link, and nobody's but its user's to write to."""
    try:
        found = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_plain and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
