"""A Hub on loopback: as much of its HTTP interface as `huggingface_hub` needs to resolve and download models.

    with serve({"acme/base": folder}) as hub: ...   # hub.url, hub.commit("acme/base"), hub.requests

Files of at least LFS_BYTES are served as LFS files, with their SHA-256; smaller ones with git's blob id. A repository
whose name ends in -private needs the token, one that ends in -gated needs terms that nobody has accepted. `hub.move` gives
its main branch another commit; the ones before are served for ever.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_BYTES = 400
TOKEN = "hf_abcdefghijklmnop"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    kept: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    corrupt: str = ""
    down: bool = False
    instead: Callable[["Handler", str], bool] = lambda *_: (
        False
    )  # answers a request to a path in its own way, if it does

    def commit(self, repo: str) -> str:
        """The commit of the main branch of a repository: it follows from its content."""
        listing = sorted((name, git_oid(data)) for name, data in self.repos[repo].items())
        return hashlib.sha1(json.dumps([repo, listing]).encode()).hexdigest()

    def move(self, repo: str, **files: bytes) -> str:
        """Move the main branch of a repository to a commit with other files (`__` for a dot), and return that."""
        self.kept[repo, self.commit(repo)] = self.repos[repo]
        self.repos[repo] = self.repos[repo] | {name.replace("__", "."): data for name, data in files.items()}
        return self.commit(repo)

    def files(self, repo: str, commit: str) -> dict[str, bytes]:
        """The files of a repository at a commit."""
        return self.kept.get((repo, commit), self.repos[repo])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.instead(self, path):
            return None
        if self.hub.down:
            return self.reply(503, {"error": "down for repairs"})
        for pattern, answer in (
            (r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([\w.-]+/[\w.-]+)/(refs)", self.refs),
            (r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.file),
        ):
            if found := re.fullmatch(pattern, path):
                return self.route(answer, *(part or "main" for part in found.groups()))
        return self.reply(404, {"error": "no such page"})

    def route(self, answer: Callable[..., None], repo: str, revision: str, *rest: str) -> None:
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.repos or (repo.endswith("-private") and not has_token):
            return self.fail(404 if has_token else 401, "RepoNotFound", "Repository not found")
        commit = self.hub.commit(repo)
        if answer != self.refs and revision not in ("main", commit) and (repo, revision) not in self.hub.kept:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return answer(repo, revision if (repo, revision) in self.hub.kept else commit, *rest)

    def info(self, repo: str, commit: str) -> None:
        files = [{"rfilename": name} for name in sorted(self.hub.files(repo, commit))]
        self.reply(200, {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [],
                         "downloads": 0, "likes": 0, "siblings": files})  # fmt: skip

    def refs(self, repo: str, commit: str) -> None:
        named = [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit}]
        self.reply(200, {"branches": named, "tags": [], "converts": [], "pullRequests": []})

    def tree(self, repo: str, commit: str) -> None:
        entries = []
        for name, data in sorted(self.hub.files(repo, commit).items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if len(data) >= LFS_BYTES:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 120}
            entries.append(entry)
        self.reply(200, entries)

    def file(self, repo: str, commit: str, name: str) -> None:
        if repo.endswith("-gated"):
            return self.fail(403, "GatedRepo", f"Access to model {repo} is restricted")
        data = self.hub.files(repo, commit).get(name)
        if data is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{git_oid(data)}"'}
        if len(data) >= LFS_BYTES:
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if self.hub.corrupt == name:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(found[1]), min(int(found[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        self.reply(status, data, headers)
        return None

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def reply(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """A server that says nothing of clients that leave before it has sent all."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serve(repos: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders as model repositories for as long as the block runs."""
    hub = Hub(repos={repo: {p.name: p.read_bytes() for p in folder.iterdir()} for repo, folder in repos.items()})
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
