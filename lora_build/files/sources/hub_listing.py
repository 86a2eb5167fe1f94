"""What a repository on a Hub has, by its listing: pages of JSON from a server that need not be honest.

Names become paths and digests become names of files, so both are checked here, once.
"""

import re
import time
import unicodedata
from typing import Any
from urllib.parse import urljoin

from lora_build.errors import SourceError
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import SourceFile
from lora_build.files.sources.hub_requests import host, receive_json

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PAGE_BYTES = 8_000_000  # a Hub's have some hundred kilobytes
_MOST_FILES = 100_000
_MOST_PAGES = 200
_MOST_SECONDS = 300


def list_files(source: SourceName, url: str) -> tuple[dict[str, SourceFile], dict[str, str]]:
    """Return the files of a repository by name, and those of the hashes in the Hub's own protocol that it tells.

    Raises:
        SourceError: the listing is none, or has no end.
        StorageError: the network failed.
    """
    files: dict[str, SourceFile] = {}
    xet: dict[str, str] = {}
    where, pages, until = f"{source}: the listing of {host(url)}", 0, time.monotonic() + _MOST_SECONDS
    asked, following = {url}, url
    while True:
        page, answer = receive_json(str(source), following, most_bytes=_PAGE_BYTES)
        for entry in _entries(where, page):
            name = _name(where, entry)
            if name in files:
                raise SourceError(f"{where} has {name!r} twice")
            files[name] = _file(f"{where}, {name!r}", entry)
            if isinstance(found := entry.get("xetHash"), str) and _SHA256.fullmatch(found):
                xet[name] = found
        pages += 1
        if len(files) > _MOST_FILES or pages > _MOST_PAGES or time.monotonic() > until:
            raise SourceError(f"{where} has no end: {len(files)} files on {pages} pages so far")
        link = answer.links.get("next", {}).get("url")
        if not link:
            return files, xet
        following = urljoin(following, link)
        if host(following) != host(url):
            raise SourceError(f"{where} goes on at another host, {host(following)}; it is not followed there")
        if following in asked:
            raise SourceError(f"{where} has no end: it comes back to a page that was there before")
        asked.add(following)


def is_plain(name: str) -> bool:
    """Whether a name is that of a file below a folder, on any system, and can be shown."""
    return (
        "\\" not in name
        and not any(unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp") for c in name)
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))
        and len(name.encode()) <= 1024
    )


def _entries(where: str, page: Any) -> list[dict[str, Any]]:
    if not isinstance(page, list) or not all(isinstance(entry, dict) for entry in page):
        raise SourceError(f"{where} is not a list of files; is HF_ENDPOINT a Hub?")
    return [entry for entry in page if entry.get("type") == "file"]


def _name(where: str, entry: dict[str, Any]) -> str:
    name = entry.get("path")
    if not isinstance(name, str) or not is_plain(name):
        raise SourceError(
            f"{where} has a file {str(name)[:80]!r}; expected a path below it in printable characters without '\\': "
            "copy what you need of it to a folder, and name that"
        )
    return name


def _file(where: str, entry: dict[str, Any]) -> SourceFile:
    lfs = entry.get("lfs")
    size, digest = entry.get("size"), lfs.get("oid") if isinstance(lfs, dict) else entry.get("oid")
    kind = _SHA256 if isinstance(lfs, dict) else COMMIT
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise SourceError(f"{where}: has size {str(size)[:40]!r}; expected a number of bytes")
    if not isinstance(digest, str) or not kind.fullmatch(digest):
        raise SourceError(f"{where}: has digest {str(digest)[:80]!r}; expected hexadecimal digits")
    return SourceFile(size_bytes=size, promised=Digest.of_hex(digest) if kind is _SHA256 else Digest.of_git(digest))
