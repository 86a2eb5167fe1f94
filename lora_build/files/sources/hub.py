"""A model repository on the Hub as a source, at one commit."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from lora_build.errors import LoraBuildError, SourceError, StorageError, VerificationError, did_you_mean, some_of
from lora_build.files.hashing.hashed_file import check, hold_to_lock
from lora_build.files.hashing.seen import Seen
from lora_build.files.identity import Digest, SourceName
from lora_build.files.opening import refuse_link_away
from lora_build.files.sources import SourceFile, why_skipped
from lora_build.files.sources.hub_cache import Remote, Xet, fetch, remember_revision, snapshot_path
from lora_build.files.sources.hub_environment import refuse_client
from lora_build.files.sources.hub_listing import COMMIT, is_plain, list_files
from lora_build.files.sources.hub_requests import host, receive, receive_json, received, transport_error
from lora_build.files.sources.local import read_range

_INFO_BYTES = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model repository on the Hub at one commit; the client's own cache holds what was fetched.

    `xet` has the hashes of large files in the Hub's own protocol, where it told them.
    """

    name: SourceName
    repo: str
    commit: str
    files: Mapping[str, SourceFile]
    skipped: Mapping[str, str] = field(default_factory=dict)
    xet: Mapping[str, str] = field(default_factory=dict, repr=False)
    seen: Seen = field(default_factory=Seen, repr=False)

    @property
    def uri(self) -> str:
        """`hf://org/name@<40 hex>`."""
        return f"hf://{self.repo}@{self.commit}"

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, which are then `seen`: the whole file is held to them."""
        data = self.data(name, start, end)
        self.seen.note(self._where(name), name, start, data)
        return data

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file: from the cache, else only this range of a weight file."""
        if not self.is_here(name) and name.endswith(".safetensors") and not name.startswith("adapter_"):
            return self._read_range(name, start, end)
        path, file = self.path(name), self.files[name]
        data = read_range(path, self._where(name), start, end, file.size_bytes)
        if (start, end) == (0, file.size_bytes):
            hold_to_lock(self._where(name), check(self._where(name), data, file.promised, path), file.locked)
        return data

    def stream(self, name: str) -> Generator[bytes]:
        """Yield all bytes of a file as they come over the network, without keeping them."""
        size_bytes = self.files[name].size_bytes
        with _hub_errors(self.name, self.repo, self.commit):
            yield from received(self._where(name), self._remote(name).url, 0, size_bytes)

    def is_here(self, name: str) -> bool:
        """Whether the whole file is in the Hub client's cache."""
        return snapshot_path(self.repo, self.commit, name).exists()

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return the file in the Hub client's cache, fetching it first if need be."""
        shown = snapshot_path(self.repo, self.commit, name)
        if not shown.exists():
            if is_offline():
                raise SourceError(
                    f"{self._where(name)}: {self.uri} has it, but not the cache, and HF_HUB_OFFLINE is set; "
                    "unset it to fetch"
                )
            with _hub_errors(self.name, self.repo, self.commit), _progress(name, self.files[name], quiet) as progress:
                fetch(self._remote(name), shown, progress)
        refuse_link_away(snapshot_path(self.repo, self.commit, ""), name, self._where(name))
        if (found := shown.stat().st_size) != self.files[name].size_bytes:
            raise VerificationError(
                f"{self._where(name)}: damaged: has {found} bytes, its source promises {self.files[name].size_bytes}: "
                f"delete {shown.resolve()} and run again to fetch it anew"
            )
        return shown

    def _where(self, name: str) -> str:
        return f"{self.name}/{name}"

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        data = bytearray()
        with _hub_errors(self.name, self.repo, self.commit):
            receive(self._where(name), self._remote(name).url, start, end, data.extend)
        return bytes(data)

    def _remote(self, name: str) -> Remote:
        from huggingface_hub import constants

        url = f"{constants.ENDPOINT}/{self.repo}/resolve/{self.commit}/{quote(name)}"
        token_url = f"{_repository_url(self.repo)}/xet-read-token/{self.commit}"
        xet = Xet(file_hash=self.xet[name], token_url=token_url) if name in self.xet else None
        return Remote(where=self._where(name), url=url, file=self.files[name], xet=xet)


def open_hub(source: SourceName, repo: str, revision: str | None) -> HubSource:
    """Return a Hub repository at the commit that `revision` (default: its main branch) names today.

    Args:
        source: the recipe's key.
        repo: `org/name`.
        revision: a branch, a tag or a commit.

    Raises:
        SourceError: no such repository or revision, no permission, or offline and not in the cache.
        StorageError: the network failed.
        RecipeError: the environment says of the Hub what its client cannot use.
    """
    refuse_client()
    xet: Mapping[str, str] = {}
    with _hub_errors(source, repo, revision):
        commit = _commit(source, repo, revision)
        listed = list_snapshot(snapshot_path(repo, commit, "")) if is_offline() else None
        if listed is None:
            listed, xet = list_files(source, f"{_repository_url(repo)}/tree/{commit}?recursive=true&expand=false")
    reasons = {name: next(filter(None, map(why_skipped, name.split("/"))), None) for name in sorted(listed)}
    skipped = {name: why for name, why in reasons.items() if why}
    files = {name: listed[name] for name in reasons if name not in skipped}
    return HubSource(name=source, repo=repo, commit=commit, files=files, skipped=skipped, xet=xet)


def _commit(source: SourceName, repo: str, revision: str | None) -> str:
    """Return the commit that a revision is."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo)
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if is_offline():
        found = str(HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved)
    else:
        at = f"/revision/{quote(revision, safe='')}" if revision is not None else ""
        info, _ = receive_json(f"{source}: {repo}", f"{_repository_url(repo)}{at}", most_bytes=_INFO_BYTES)
        found = str(info.get("sha")) if isinstance(info, dict) else ""
    if not COMMIT.fullmatch(found):
        raise SourceError(f"{source}: {repo} is at commit {found[:60]!r} by its host; expected 40 hexadecimal digits")
    if not is_offline() and is_plain(named := revision or "main"):
        remember_revision(repo, named, found)
    return found


def _repository_url(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/api/models/{repo}"


def _others(source: str, repo: str, revision: str | None) -> str:
    """Return the end of a message: which branches and tags a repository has, the nearest of them first named."""
    from huggingface_hub.errors import HfHubHTTPError

    found: dict[str, list[str]] = {}
    with suppress(HfHubHTTPError, LoraBuildError, KeyError, TypeError):  # what was asked first is the error
        refs, _ = receive_json(f"{source}: {repo}", f"{_repository_url(repo)}/refs", most_bytes=_INFO_BYTES)
        found = {kind: [str(ref["name"]) for ref in refs[kind]] for kind in ("branches", "tags")}
    listed = [f"{kind}: {some_of(names)}" for kind, names in found.items() if names]
    near = did_you_mean(str(revision), [name for names in found.values() for name in names])
    return f"{near}; {'; '.join(listed)}" if listed else "; check the branch, tag or commit"


def list_snapshot(root: Path) -> dict[str, SourceFile] | None:
    """Return the files of a cached snapshot; the cache names each blob after the digest that the Hub promised."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        blob = path.resolve().name
        digest_of = {64: Digest.of_hex, 40: Digest.of_git}.get(len(blob))
        promised = digest_of(blob) if digest_of and path.is_symlink() else None
        found[path.relative_to(root).as_posix()] = SourceFile(size_bytes=path.stat().st_size, promised=promised)
    return found or None


def is_offline() -> bool:
    """Whether nothing is to be asked of a Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _progress(name: str, file: SourceFile, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Yield what is told how many more bytes of a file are there, and shows it."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    if quiet:
        yield lambda _: None
        return
    with tqdm(total=file.size_bytes, desc=name[-40:], unit="B", unit_scale=True) as bar:  # type: ignore[no-untyped-call]
        yield bar.update


@contextmanager
def _hub_errors(source: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into one message with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except LoraBuildError:
        raise
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.HFValidationError,
            transport_error(), OSError) as error:  # fmt: skip
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
            f"{source}: {repo} is gated: accept its terms at {host(constants.ENDPOINT)}/{repo}, then {login}"
        ) from error
    if is_a(errors.RevisionNotFoundError):
        raise SourceError(f"{source}: {repo} has no revision '{revision}'{_others(source, repo, revision)}") from error
    if is_a(errors.RepositoryNotFoundError):
        raise SourceError(
            f"{source}: {repo} is not on {host(constants.ENDPOINT)}, or it is private: check the name; "
            f"if it is private, {login}; for a folder write ./{repo}"
        ) from error
    if is_offline():
        raise SourceError(
            f"{source}: {repo} is not in the cache and HF_HUB_OFFLINE is set; unset it to fetch"
        ) from error
    if is_a(errors.HFValidationError):
        raise SourceError(f"{source}: '{repo}' is not a repository name; for a folder write ./{repo}") from error
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(f"{source}: fetching {repo} failed: {error.strerror}{_where_from(error)}") from error
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise StorageError(f"{source}: fetching {repo} from {host(constants.ENDPOINT)} failed: {reason}") from error


def _where_from(error: OSError) -> str:
    """Return the end of a message about a file: its name, and what decides where the cache is if it is there."""
    from huggingface_hub import constants

    if not isinstance(error.filename, str | bytes):
        return ""
    path, cache = Path(os.fsdecode(error.filename)), Path(constants.HF_HUB_CACHE).expanduser().absolute()
    is_cache = path.is_relative_to(cache) or cache.is_relative_to(path)
    hint = "; HF_HOME says where the cache is: set it to a folder that can be written" if is_cache else ""
    return f" ({path}){hint}"
