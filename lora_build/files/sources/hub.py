"""A model repository on the Hub as a source, at one commit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lora_build.errors import LoraBuildError, SourceError, StorageError
from lora_build.files.hashing.hashed_file import check
from lora_build.files.hashing.seen import Seen
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import SourceFile
from lora_build.files.sources.local import read_range


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model repository on the Hub at one commit; the client's own cache holds what was fetched."""

    name: SourceName
    repo: str
    commit: str
    files: Mapping[str, SourceFile]
    seen: Seen = field(default_factory=Seen, repr=False)

    @property
    def uri(self) -> str:
        """`hf://org/name@<40 hex>`."""
        return f"hf://{self.repo}@{self.commit}"

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, which are then `seen`: the whole file is held to them."""
        data = self.data(name, start, end)
        self.seen.note(f"{self.name}/{name}", name, start, data)
        return data

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file: from the cache, else only this range of a weight file."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.commit)
        if not isinstance(cached, str) and name.endswith(".safetensors") and not name.startswith("adapter_"):
            return self._read_range(name, start, end)
        path, file = self.path(name), self.files[name]
        data = read_range(path, f"{self.name}/{name}", start, end, file.size_bytes)
        if (start, end) == (0, file.size_bytes):
            check(f"{self.name}/{name}", data, file.promised, path)
        return data

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return the file in the Hub client's cache, fetching it first if need be."""
        from huggingface_hub import hf_hub_download

        with _hub_errors(self.name, self.repo, self.commit), _progress_bars(shown=not quiet):
            return Path(hf_hub_download(self.repo, name, revision=self.commit))

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )  # fmt: skip

        wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with _hub_errors(self.name, self.repo, self.commit):
            url = hf_hub_url(self.repo, name, revision=self.commit)
            response = get_session().get(url, headers={**build_hf_headers(), **wanted}, follow_redirects=True)
            hf_raise_for_status(response)
            data = bytes(response.content)
        if response.status_code == 200:  # a server without ranges sends it all
            data = data[start:end]
        if len(data) != end - start:
            raise SourceError(f"{self.name}/{name}: ends at byte {start + len(data)}, expected {end} bytes at least")
        return data


def open_hub(source: SourceName, repo: str, revision: str | None, keep: Callable[[str], bool]) -> HubSource:
    """Return a Hub repository at the commit that `revision` (default: its main branch) names today.

    Args:
        source: the recipe's key.
        repo: `org/name`.
        revision: a branch, a tag or a commit.
        keep: which file names to list.

    Raises:
        SourceError: no such repository or revision, no permission, or offline and not in the cache.
        StorageError: the network failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(source, repo, revision):
        commit = str(api.resolve_revision(repo, revision=revision, local_files_only=_offline()).resolved)
    listed = _list_cached(repo, commit) if _offline() else None
    if listed is None:
        with _hub_errors(source, repo, revision):
            listed = _list_online(api, repo, commit)
    return HubSource(name=source, repo=repo, commit=commit, files={n: f for n, f in sorted(listed.items()) if keep(n)})


def _list_online(api: Any, repo: str, commit: str) -> dict[str, SourceFile]:
    from huggingface_hub.hf_api import RepoFile

    files = (
        entry for entry in api.list_repo_tree(repo, revision=commit, recursive=True) if isinstance(entry, RepoFile)
    )
    return {
        f.path: SourceFile(
            size_bytes=f.size, promised=Digest.of_hex(f.lfs.sha256) if f.lfs is not None else Digest.of_git(f.blob_id)
        )
        for f in files
    }


def _list_cached(repo: str, commit: str) -> dict[str, SourceFile] | None:
    """Return the files of a cached snapshot; the cache names each blob after the digest that the Hub promised."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    root = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots", commit)
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        blob = path.resolve().name
        digest_of = {64: Digest.of_hex, 40: Digest.of_git}.get(len(blob))
        promised = digest_of(blob) if digest_of and path.is_symlink() else None
        found[path.relative_to(root).as_posix()] = SourceFile(size_bytes=path.stat().st_size, promised=promised)
    return found or None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )  # fmt: skip

    before = are_progress_bars_disabled()
    if before or shown:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(source: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into one message with a remedy."""
    from huggingface_hub import errors

    http_error: type[Exception] = getattr(errors, "HTTPError", OSError)  # of the client's HTTP library, httpx2 by now
    try:
        yield
    except LoraBuildError:
        raise
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.HFValidationError,
            http_error, OSError) as error:  # fmt: skip
        _explain(source, repo, revision, error)


def _explain(source: str, repo: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    login = "set HF_TOKEN or run `hf auth login`"
    if is_a(errors.GatedRepoError):
        raise SourceError(
            f"{source}: {repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then {login}"
        ) from error
    if is_a(errors.RevisionNotFoundError):
        raise SourceError(f"{source}: {repo} has no revision '{revision}'; check the branch, tag or commit") from error
    if is_a(errors.RepositoryNotFoundError):
        raise SourceError(
            f"{source}: {repo} is not on {constants.ENDPOINT}, or it is private: check the name; "
            f"if it is private, {login}; for a folder write ./{repo}"
        ) from error
    if _offline():
        raise SourceError(
            f"{source}: {repo} is not in the cache and HF_HUB_OFFLINE is set; unset it to fetch"
        ) from error
    if is_a(errors.HFValidationError):
        raise SourceError(f"{source}: '{repo}' is not a repository name; for a folder write ./{repo}") from error
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(f"{source}: fetching {repo} failed: {error.strerror} ({error.filename})") from error
    raise StorageError(
        f"{source}: fetching {repo} from {constants.ENDPOINT} failed: {str(error).splitlines()[0]}"
    ) from error
