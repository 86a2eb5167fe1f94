"""Hubs that are busy, slow, broken or hostile: fetched all the same, or refused in bounded time, and nothing escapes."""

import email.utils
import itertools
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.errors import SourceError, StorageError, VerificationError
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import hub_cache, hub_listing, hub_requests, read_whole
from lora_build.files.sources.hub import HubSource, open_hub
from lora_build.files.sources.known import known_digest
from makers import hub_server, small
from makers.hub_server import Handler, Hub

WEIGHTS = "big.safetensors"
DATA = bytes(range(256)) * 8_000


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between attempts; nobody waits so long."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, monotonic=time.monotonic)
    monkeypatch.setattr(hub_requests, "time", clock)
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    base = small.make_base(tmp_path / "base", shards=True)
    (base / WEIGHTS).write_bytes(DATA)
    with hub_server.serve({"acme/base": base, "acme/math": small.make_adapter(tmp_path / "math")}) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        yield server
        close_session()


def opened() -> HubSource:
    return open_hub(SourceName("base"), "acme/base", None)


def requests_of(hub: Hub, name: str) -> list[str | None]:
    """Return the ranges that were asked of a file."""
    return [wanted for _, path, wanted in hub.requests if path.endswith(name)]


def times(count: int, part: str, answer: Callable[[Handler], object]) -> Callable[[Handler, str], bool]:
    """Return what answers the first requests to paths with a part in them in its own way."""
    left = [count]

    def instead(handler: Handler, path: str) -> bool:
        if part not in path or left[0] == 0:
            return False
        left[0] -= 1
        answer(handler)
        return True

    return instead


def busy(status: int, **headers: str) -> Callable[[Handler], object]:
    return lambda handler: handler.reply(status, {"error": "x"}, {n.replace("_", "-"): v for n, v in headers.items()})


def half(handler: Handler, *, reset: bool = False) -> None:
    """Send half of the data, and then end the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(DATA)))
    handler.end_headers()
    handler.wfile.write(DATA[: len(DATA) // 2])
    handler.wfile.flush()
    if reset:
        time.sleep(0.2)  # for what was sent to arrive before the reset does
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def slowly(handler: Handler, data: bytes) -> None:
    try:
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True


def trickle(handler: Handler) -> None:
    start = int((handler.headers.get("Range") or "").removeprefix("bytes=").partition("-")[0])
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(DATA) - start))
    handler.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
    handler.end_headers()
    slowly(handler, b"x" * 1000)


@pytest.mark.parametrize(
    ("part", "status"),
    [("/api/models/acme/base", 429), ("/tree/", 503), *(("/resolve/", status) for status in (408, 429, 500, 502, 504))],
)
def test_a_hub_that_is_busy_for_a_while_is_asked_again(hub: Hub, waits: list[float], part: str, status: int) -> None:
    hub.instead = times(2, part, busy(status))

    assert opened().path(WEIGHTS).read_bytes() == DATA
    assert waits == [1, 2]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": "in half a minute"}, pytest.approx(28, abs=3)),
        ({"Retry_After": "soon"}, 1),
        ({"RateLimit": '"api";r=0;t=55'}, 56),
    ],
)
def test_a_hub_says_when_to_ask_again(hub: Hub, waits: list[float], headers: dict[str, str], expected: Any) -> None:
    at = email.utils.formatdate(time.time() + 30, usegmt=True)
    found = {name: at if value == "in half a minute" else value for name, value in headers.items()}
    hub.instead = times(1, "/tree/", busy(429, **found))

    opened()
    assert waits == [expected]


def test_nobody_waits_for_an_hour(hub: Hub, waits: list[float]) -> None:
    hub.instead = times(-1, "/", busy(429, Retry_After="3600"))

    with pytest.raises(StorageError, match=r"429 Too Many Requests, to be asked again after 3,600 seconds; run again"):
        opened()
    assert waits == []


def test_the_attempts_are_counted_and_said(hub: Hub, waits: list[float]) -> None:
    hub.instead = times(-1, "/resolve/", busy(503))

    with pytest.raises(
        StorageError, match=rf"base/{WEIGHTS}: fetching from {hub.url} failed after 4 attempts: it answ"
    ):
        opened().path(WEIGHTS)
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("reset", [False, True])
def test_what_was_cut_off_goes_on_where_it_stopped(hub: Hub, reset: bool) -> None:
    hub.instead = times(1, WEIGHTS, lambda handler: half(handler, reset=reset))

    assert opened().path(WEIGHTS).read_bytes() == DATA
    first, second = requests_of(hub, WEIGHTS)
    assert first == f"bytes=0-{len(DATA) - 1}"
    assert second == f"bytes={len(DATA) // 2}-{len(DATA) - 1}"


@pytest.mark.parametrize("part", [DATA[:1000], b"x" * 1000, DATA + b"more"])
def test_what_an_earlier_run_left_is_used_if_it_is_right(hub: Hub, part: bytes) -> None:
    source = opened()
    blobs = hub_cache.repository_folder("acme/base") / "blobs"
    blobs.mkdir(parents=True)
    promised = source.files[WEIGHTS].promised
    assert promised
    (blobs / f"{promised.hex}.lora-build.part").write_bytes(part)

    assert source.path(WEIGHTS).read_bytes() == DATA
    assert requests_of(hub, WEIGHTS)[0] == f"bytes={1000 if len(part) == 1000 else 0}-{len(DATA) - 1}"
    assert sorted(p.name for p in blobs.iterdir()) == [promised.hex]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (trickle, r"failed after \d attempts: \d+ bytes in 0 seconds are too few"),
        (lambda handler: slowly(handler, b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 100), "no answer in 1 seconds"),
        (lambda handler: time.sleep(1), "failed after"),
    ],
)
def test_what_comes_byte_by_byte_ends(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Handler], object], said: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.instead = times(-1, WEIGHTS, answer)
    source, began = opened(), time.monotonic()

    with pytest.raises(StorageError, match=said):
        source.path(WEIGHTS)
    assert time.monotonic() - began < 12


def nothing_for_long(handler: Handler, how: str) -> None:
    """Send headers at once, then what a client makes no byte of: the length of a chunk, or empty blocks of gzip."""
    encoding = "Content-Encoding: gzip\r\n" if how == "gzip" else ""
    handler.wfile.write(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{encoding}\r\n".encode())
    blocks = itertools.chain([b"\x1f\x8b\x08\0\0\0\0\0\0\x03"], itertools.repeat(b"\0\0\0\xff\xff"))
    handler.close_connection = True
    try:
        handler.wfile.write(b"5;" if how == "chunk" else b"")
        for _ in range(200):
            block = next(blocks) if how == "gzip" else b"x"
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if how == "gzip" else block)
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize("how", ["chunk", "gzip"])
@pytest.mark.parametrize("what", ["/tree/", WEIGHTS])
def test_a_body_of_which_a_client_makes_nothing_ends(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.instead = times(-1, what, lambda handler: nothing_for_long(handler, how))
    began = time.monotonic()

    with pytest.raises(StorageError, match=r"0 bytes in 0 seconds are too few"):
        opened().path(WEIGHTS)
    assert time.monotonic() - began < 8


def test_a_server_without_ranges_is_left_once_there_is_enough(hub: Hub) -> None:
    sent = [0]

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        try:
            while sent[0] < 1 << 28:
                sent[0] += handler.wfile.write(DATA)
        except OSError:
            pass
        handler.close_connection = True

    hub.instead = times(-1, WEIGHTS, endless)

    assert opened().data(WEIGHTS, 1000, 3000) == DATA[1000:3000]
    assert sent[0] < 1 << 26


@pytest.mark.parametrize("reply", ["bytes 5-/9", "bytes 9-", "", "items 0-4"])
def test_another_range_than_was_asked_for_is_not_taken(hub: Hub, reply: str) -> None:
    hub.instead = times(-1, WEIGHTS, lambda handler: handler.reply(206, DATA, {"Content-Range": reply}))

    with pytest.raises(StorageError, match="another range"):
        opened().data(WEIGHTS, 0, 8)


def test_a_header_that_is_not_that_of_the_file_is_refused(hub: Hub, tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    file = hub.repos["acme/base"][shard]
    lie = file.replace(b"model.norm", b"model.mron")

    def instead(handler: Handler, path: str) -> bool:
        wanted = handler.headers.get("Range") or ""
        if not path.endswith(shard) or wanted == f"bytes=0-{len(file) - 1}":
            return False
        start, end = map(int, wanted.removeprefix("bytes=").split("-"))
        handler.reply(206, lie[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(file)}"})
        return True

    hub.instead = instead
    index = json.loads(hub.repos["acme/base"]["model.safetensors.index.json"])
    index["weight_map"]["model.mron.weight"] = index["weight_map"].pop("model.norm.weight")
    hub.repos["acme/base"]["model.safetensors.index.json"] = json.dumps(index).encode()

    with pytest.raises(VerificationError, match=f"base/{shard}: has changed since it was read for the plan"):
        lora_build.build(small.recipe(tmp_path, base="acme/base"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("refs", "said"),
    [
        (None, "no revision 'mian'; did you mean 'main'?; branches: main"),
        ({"branches": [], "tags": [{"name": f"v{i}"} for i in range(9)]}, "'mian'; tags: v0, v1, v2 and 6 more"),
        ({"branches": [{"name": "\x1b[2J\nx"}], "tags": []}, r"'mian'; branches: \x1b[2J\nx"),
        ({"branches": 1}, "no revision 'mian'; check the branch, tag or commit"),
        (["x"], "no revision 'mian'; check the branch, tag or commit"),
    ],
)
def test_a_revision_that_is_not_there_is_answered_with_those_that_are(hub: Hub, refs: object, said: str) -> None:
    if refs is not None:
        hub.instead = times(-1, "/refs", lambda handler: handler.reply(200, refs))

    with pytest.raises(SourceError) as caught:
        open_hub(SourceName("base"), "acme/base", "mian")
    assert said in str(caught.value)


def test_without_a_network_a_part_of_a_repository_says_what_it_lacks(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = small.recipe(tmp_path, base="acme/base", adapters={"math": "acme/math"})
    lora_build.plan(recipe)  # which fetches no weights of the base
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(SourceError, match=r"names model-00001-of-00002\.safetensors, which is missing; is the"):
        lora_build.plan(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_bit_that_is_flipped_in_the_cache_is_found_and_said_how_to_mend(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_offline: bool
) -> None:
    recipe = small.recipe(tmp_path, base="acme/base", adapters={"math": "acme/math"})
    whole = lora_build.build(recipe).manifest.manifest_hash
    shutil.rmtree(tmp_path / "out")
    blob = hub_cache.snapshot_path("acme/base", hub.commit("acme/base"), "model-00002-of-00002.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)

    with pytest.raises(VerificationError, match=f"damaged: .*delete {blob} and run again to fetch it anew"):
        lora_build.build(recipe)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    blob.unlink()
    assert lora_build.build(recipe).manifest.manifest_hash == whole


def test_what_is_damaged_is_not_kept(hub: Hub) -> None:
    hub.corrupt = WEIGHTS
    with pytest.raises(VerificationError, match=f"base/{WEIGHTS}: damaged: .*: run again to fetch it anew"):
        opened().path(WEIGHTS)
    hub.corrupt = ""

    assert not [p for p in hub_cache.repository_folder("acme/base").rglob("*") if p.is_file() and p.name != "main"]
    assert opened().path(WEIGHTS).read_bytes() == DATA


def test_a_link_to_nowhere_in_the_cache_is_mended(hub: Hub) -> None:
    path = opened().path(WEIGHTS)
    path.unlink()
    path.symlink_to("../../blobs/nowhere")

    assert opened().path(WEIGHTS).read_bytes() == DATA


def test_a_cached_file_that_was_cut_is_named(hub: Hub) -> None:
    path = opened().path(WEIGHTS)
    path.resolve().write_bytes(DATA[:100])

    with pytest.raises(
        VerificationError, match=f"has 100 bytes, its source promises {len(DATA)}: delete {path.resolve()}"
    ):
        opened().path(WEIGHTS)


def test_another_host_gets_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    told: list[str | None] = []

    class Other(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            told.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA)

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        asked: list[str | None] = []

        def redirect(handler: Handler) -> None:
            asked.append(handler.headers.get("Authorization"))
            handler.reply(302, b"", {"Location": f"http://localhost:{other.server_address[1]}/{WEIGHTS}"})

        hub.instead = times(-1, WEIGHTS, redirect)
        assert opened().path(WEIGHTS).read_bytes() == DATA
        other.shutdown()
    assert (asked, told) == ([f"Bearer {hub_server.TOKEN}"], [None])


@pytest.mark.parametrize("etag", ["../../../../evil", '"', "x" * 10_000, "/tmp/evil", ""])
def test_no_header_becomes_a_path(hub: Hub, tmp_path: Path, etag: str) -> None:
    before = set(tmp_path.iterdir())
    headers = {"ETag": etag, "X-Linked-Etag": etag, "X-Repo-Commit": etag, "X-Linked-Size": "-1"}
    hub.instead = times(
        1, "config.json", lambda handler: handler.reply(200, hub.repos["acme/base"]["config.json"], headers)
    )
    source = opened()
    read_whole(source, "config.json")

    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}
    found = {p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if not p.is_dir()}
    promised = source.files["config.json"].promised
    assert promised
    assert found == {
        f"models--acme--base/{name}"
        for name in ("refs/main", f"blobs/{promised.hex}", f"snapshots/{source.commit}/config.json")
    }


def listing(*entries: dict[str, Any], link: str = "") -> Callable[[Handler], object]:
    return lambda handler: handler.reply(200, list(entries), {"Link": f'<{link}>; rel="next"'} if link else {})


def entry(path: str = "config.json", **more: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": 2, "oid": "0" * 40} | more


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "a/../../evil", "a//b", "./a", "a/.", "", "a\0b", "..\\evil", "C:\\evil", "a\nb", "\x1b[31mred",
     "\u202eevil", "\ud800", "x" * 300, "/".join(["x" * 200] * 10)],
)  # fmt: skip
def test_names_that_are_no_files_are_refused(hub: Hub, name: str) -> None:
    hub.instead = times(1, "/tree/", listing(entry(name)))

    with pytest.raises(SourceError, match=r"base: the listing of .* has a file .*; expected a path below it"):
        opened()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (listing(entry(), entry()), "has 'config.json' twice"),
        (listing(entry(size=-1)), "has size '-1'"),
        (listing(entry(size="2")), "has size '2'"),
        (listing(entry(size=True)), "has size 'True'"),
        (listing(entry(size=1 << 63)), "has size '9223372036854775808'"),
        (listing(entry(oid="../../x")), "has digest '../../x'; expected hexadecimal digits"),
        (listing(entry(lfs={"oid": "0" * 40})), "has digest '000"),
        (listing(entry(lfs={"oid": None})), "has digest 'None'"),
        (lambda handler: handler.reply(200, {"a": 1}), "is not a list of files; is HF_ENDPOINT a Hub"),
        (lambda handler: handler.reply(200, [1]), "is not a list of files"),
        (lambda handler: handler.reply(200, b"<html>"), "answers with what is not JSON; is HF_ENDPOINT a Hub"),
        (lambda handler: handler.reply(200, b"[" * 100_000), "answers with what is not JSON"),
        (lambda handler: handler.reply(200, b" " * 9_000_000), "answers with over 8 MB of JSON"),
        (listing(link="http://localhost:1/next"), "goes on at another host, http://localhost:1"),
    ],
)
def test_listings_that_are_none_are_refused(hub: Hub, answer: Callable[[Handler], object], said: str) -> None:
    hub.instead = times(1, "/tree/", answer)

    with pytest.raises(SourceError) as refused:
        opened()
    assert said in str(refused.value)


def test_listings_without_an_end_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_listing, "_MOST_PAGES", 5)
    page = iter(range(1000))
    hub.instead = times(-1, "/tree/", listing(link="?cursor=same"))
    with pytest.raises(SourceError, match="comes back to a page that was there before"):
        opened()

    hub.instead = times(-1, "/tree/", lambda handler: listing(link=f"?cursor={next(page)}")(handler))
    with pytest.raises(SourceError, match="has no end: 0 files on 6 pages so far"):
        opened()

    hub.instead = times(-1, "/tree/", lambda h: listing(*[entry(f"{n}-{next(page)}") for n in range(20)])(h))
    monkeypatch.setattr(hub_listing, "_MOST_FILES", 10)
    with pytest.raises(SourceError, match="has no end: 20 files"):
        opened()


def test_pages_of_a_listing_are_joined(hub: Hub) -> None:
    hub.instead = times(1, "/tree/", listing(entry("first"), link="?cursor=2"))

    assert {"first", "config.json", WEIGHTS} <= set(opened().files)


@pytest.mark.parametrize("sha", ["../../../evil", "main", "0" * 39, 7, None, "A" * 40])
def test_a_commit_that_is_none_is_refused(hub: Hub, tmp_path: Path, sha: Any) -> None:
    hub.instead = times(1, "/api/models/acme/base", lambda handler: handler.reply(200, {"sha": sha}))

    with pytest.raises(SourceError, match="expected 40 hexadecimal digits"):
        opened()
    assert not (tmp_path / "cache").exists()


def test_a_revision_is_remembered_for_when_there_is_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened()
    source.path("config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert opened().commit == source.commit


@pytest.mark.parametrize("fails", [None, RuntimeError("no such server"), hub_requests.transport_error()("no network")])
def test_large_files_come_by_xet_where_it_is_there_and_are_held_to_their_digest(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fails: Exception | None
) -> None:
    def xet_get(*, incomplete_path: Path, **more: Any) -> None:
        asked.append((more["xet_file_data"].file_hash, more["xet_file_data"].refresh_route))
        assert more["headers"]["authorization"] == "Bearer hf_mine"
        if fails:
            raise fails
        incomplete_path.write_bytes(DATA)

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(huggingface_hub.file_download, "is_xet_available", lambda: True)
    monkeypatch.setattr(huggingface_hub.file_download, "xet_get", xet_get)
    monkeypatch.setattr(hub_cache, "_XET_BYTES", 1000)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    lfs = {"oid": hub_cache.hashlib.sha256(DATA).hexdigest()}
    hub.instead = times(1, "/tree/", listing(entry(WEIGHTS, size=len(DATA), lfs=lfs, xetHash="e" * 64)))
    source = opened()

    assert source.path(WEIGHTS).read_bytes() == DATA
    assert asked == [("e" * 64, f"{hub.url}/api/models/acme/base/xet-read-token/{source.commit}")]
    assert len(requests_of(hub, WEIGHTS)) == (1 if fails else 0)


def test_a_disk_without_room_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened()
    monkeypatch.setattr(hub_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))

    with pytest.raises(
        StorageError, match=rf"base/{WEIGHTS}: fetching it needs 2\.0 MB, .* set HF_HOME to another disk"
    ):
        source.path(WEIGHTS)
    assert requests_of(hub, WEIGHTS) == []


def test_of_a_small_file_the_digest_is_known_once_it_is_in_the_cache(hub: Hub) -> None:
    source = opened()
    assert known_digest(source, "config.json") is None
    data = source.path("config.json").read_bytes()
    assert known_digest(source, "config.json") == Digest.sha256(data)
