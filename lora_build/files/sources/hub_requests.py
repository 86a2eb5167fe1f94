"""Requests to a Hub that may be busy, slow or hostile: bounded in attempts, time and bytes.

Its client retries little, waits as long as a server says, and has no bound on a body that comes byte by byte. So what
is sent and how an answer is read is decided here; the session, its credentials and its errors are the client's.
"""

import contextlib
import email.utils
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from urllib.parse import urlsplit

from lora_build.errors import RecipeError, SourceError, StorageError
from lora_build.files.sources.hub_environment import proxy_of, refuse_connection, refuse_headers

ATTEMPTS = 4  # in a row that bring less than a megabyte
FIRST_WAIT_SECONDS = 1.0  # before the second attempt; twice as long before each further one
_LONGEST_WAIT_SECONDS = 60.0  # that a server may ask for
_LEAST_BYTES_PER_SECOND = 10_000
_PROGRESS_BYTES = 1_000_000
_ERROR_BYTES = 65_536
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class _AgainError(Exception):
    """An attempt that failed in a way that may pass; `after` is how long the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def host(url: str) -> str:
    """Return where a URL leads: its scheme and host, without credentials and path."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


@dataclass(kw_only=True)
class _Patience:
    """How often something is tried: some times in a row that bring little, and not for long."""

    where: str
    url: str
    attempts: int = 0
    began: float = field(default_factory=time.monotonic)

    def wait(self, failure: _AgainError, *, progress: bool = False) -> None:
        """Wait before another attempt, or raise StorageError."""
        if progress:
            self.attempts, self.began = 0, time.monotonic()
        self.attempts += 1
        seconds = FIRST_WAIT_SECONDS * 2 ** (self.attempts - 1) if failure.after is None else failure.after
        is_late = time.monotonic() - self.began > 3 * timeout_seconds()
        if self.attempts == ATTEMPTS or is_late or seconds > _LONGEST_WAIT_SECONDS:
            tried = f" after {self.attempts} attempts" if self.attempts > 1 else ""
            asked = f", to be asked again after {seconds:,.0f} seconds" if seconds > _LONGEST_WAIT_SECONDS else ""
            reason = f"fetching from {host(self.url)}{proxy_of(self.url)} failed{tried}: {failure}{asked}"
            raise StorageError(f"{self.where}: {reason}; run again later") from failure
        time.sleep(seconds)
        self.began += seconds


def received(where: str, url: str, start: int, end: int) -> Generator[bytes]:
    """Yield the bytes [start, end) of a file, in order and each once; what fails goes on where it stopped.

    Raises:
        StorageError: it failed several times in a row.
        huggingface_hub.errors.HfHubHTTPError: it was refused.
    """
    patience, at = _Patience(where=where, url=url), start
    while at < end:
        before = at
        try:
            with _answer(url, {"Range": f"bytes={at}-{end - 1}"}) as answer:
                for chunk in _part(answer, at, end):
                    at += len(chunk)
                    yield chunk
            if at < end:
                raise _AgainError(f"it ends at byte {at}, expected {end}")
        except _AgainError as failure:
            patience.wait(failure, progress=at - before >= _PROGRESS_BYTES)


def receive(where: str, url: str, start: int, end: int, put: Callable[[bytes], object]) -> None:
    """Hand on what `received` yields."""
    for chunk in received(where, url, start, end):
        put(chunk)


def receive_json(where: str, url: str, *, most_bytes: int) -> tuple[Any, Any]:
    """Return what a page of JSON says, and the answer itself, for its headers.

    Raises:
        SourceError: it is none, or has more bytes than that.
        StorageError: it failed several times in a row.
        huggingface_hub.errors.HfHubHTTPError: it was refused.
    """
    patience = _Patience(where=where, url=url)
    until = time.monotonic() + 6 * timeout_seconds()
    while True:
        try:
            with _answer(url, {}) as answer:
                data = bytearray()
                for chunk in _chunks(answer):
                    data += chunk
                    if len(data) > most_bytes:
                        raise SourceError(f"{where}: {host(url)} answers with over {most_bytes / 1e6:.0f} MB of JSON")
                    if time.monotonic() > until:
                        raise _AgainError(
                            f"{len(data)} bytes of JSON in {6 * timeout_seconds():.0f} seconds are too few"
                        )
        except _AgainError as failure:
            patience.wait(failure)
            continue
        try:
            return json.loads(data), answer
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: {host(url)} answers with what is not JSON; is HF_ENDPOINT a Hub?") from error


def timeout_seconds() -> float:
    """Return how long to wait for the next bytes: HF_HUB_DOWNLOAD_TIMEOUT, as the Hub's client does."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def transport_error() -> type[Exception]:
    """Return the error of the library that the Hub's client makes requests with, httpx2 by now."""
    from huggingface_hub import errors

    found: type[Exception] = getattr(errors, "HTTPError", OSError)
    return found


@contextmanager
def _answer(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Yield the answer to a request, its body unread; another host, asked in its place, gets no credentials."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    def send() -> Any:
        refuse_connection()
        session = get_session()
        sent = {**_headers(), "Accept-Encoding": "identity", **headers}  # which may ask for something itself
        request = session.build_request("GET", url, headers=sent, timeout=timeout_seconds())
        return session.send(request, stream=True, follow_redirects=True)

    try:
        answer = _in_time(send)
        try:
            _refuse_status(answer)
            yield answer
        finally:
            answer.close()  # what was not read of it is not fetched
    except errors.HfHubHTTPError:
        raise
    except transport_error() as error:
        raise _AgainError(str(error) or type(error).__name__) from error


def _headers() -> dict[str, str]:
    """Return the client's headers, the user's token among them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        found: dict[str, str] = build_hf_headers()
    except OSError as error:
        raise RecipeError(
            f"{error.filename or constants.HF_TOKEN_PATH}: the Hub's token cannot be read: {error.strerror or error}; "
            "HF_HOME or HF_TOKEN_PATH says where it is: expected a file, or none"
        ) from error
    refuse_headers(found, constants.HF_TOKEN_PATH)
    return found


def _in_time(send: Callable[[], Any]) -> Any:
    """Return an answer whose headers come in time; those that come byte by byte would keep a plain call for ever."""
    came: Future[Any] = Future()

    def work() -> None:
        answer, error = None, None
        try:
            answer = send()
        except BaseException as raised:  # noqa: BLE001  # for who waits
            error = raised
        if came.set_running_or_notify_cancel():
            came.set_result(answer) if error is None else came.set_exception(error)
        elif answer is not None:  # nobody waits any more
            answer.close()

    threading.Thread(target=work, daemon=True, name="lora-build request").start()
    try:
        return came.result(2 * timeout_seconds())
    except TimeoutError:
        if came.cancel():
            raise _AgainError(f"no answer in {2 * timeout_seconds():.0f} seconds") from None
        return came.result()


def _refuse_status(answer: Any) -> None:
    """Raise what an answer's status means, unless that is success."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    status = answer.status_code
    if status in _BUSY:
        raise _AgainError(f"it answers {status} {answer.reason_phrase}".strip(), _asked_to_wait(answer.headers))
    if status >= 400:
        body = bytearray()
        with contextlib.suppress(_AgainError):
            for chunk in _chunks(answer):
                body += chunk
                if len(body) > _ERROR_BYTES:
                    break
        plain = {name: value for name, value in answer.headers.items() if name.lower().startswith("x-")}
        hf_raise_for_status(type(answer)(status, headers=plain, content=bytes(body), request=answer.request))
    if status not in (200, 206):
        raise _AgainError(f"it answers {status}, expected 200 or 206")


def _asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which a server wants to be asked again: a number, a date, or its limit's next window."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    with contextlib.suppress(ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date - datetime.now(date.tzinfo)).total_seconds())
    window = re.search(r";\s*t=(\d{1,9})\b", headers.get("ratelimit", ""))
    return float(window[1]) + 1 if window else None


def _part(answer: Any, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes [start, end) of a file from an answer that begins there, or from one of the whole file."""
    at = 0
    if answer.status_code == 206:
        found = re.match(r"bytes (\d{1,19})-", answer.headers.get("content-range", ""))
        if not found or int(found[1]) != start:
            raise _AgainError("it answers with another range than was asked for")
        at = start
    for chunk in _chunks(answer):  # a server without ranges sends all of it, and is left once there is enough
        useful = chunk[max(0, start - at) : end - at]
        at += len(chunk)
        if useful:
            yield useful
        if at >= end:
            return


def _chunks(answer: Any) -> Iterator[bytes]:
    """Yield the body of an answer as it comes, as long as enough of it comes."""
    with _Watch(answer) as watch:
        chunks = answer.iter_bytes()
        while True:
            try:
                with watch.waiting():
                    chunk = next(chunks, None)
            except transport_error() as error:
                raise _AgainError(watch.why or str(error) or type(error).__name__) from error
            if watch.why:
                raise _AgainError(watch.why)
            if chunk is None:
                return
            watch.received += len(chunk)
            yield chunk


class _Watch:
    """Cuts off an answer of which too few bytes come, also where its library waits for ever to make some of them.

    What it makes of them may be nothing for long: empty blocks of a compressed body, a chunk's endless length. Only the
    time counts in which somebody waits for bytes.
    """

    def __init__(self, answer: Any) -> None:
        self.received, self.why = 0, ""
        self._answer, self._window = answer, timeout_seconds() / 2
        self._waited, self._since = 0.0, None
        self._is_over = threading.Event()

    _since: float | None

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, daemon=True, name="lora-build watch").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            since, self._since = self._since, None
            self._waited += time.monotonic() - since

    def _work(self) -> None:
        while not self._is_over.wait(self._window / 4):
            since = self._since
            seconds = self._waited + (time.monotonic() - since if since is not None else 0)
            if seconds < self._window:
                continue
            if self.received < _LEAST_BYTES_PER_SECOND * seconds:
                self.why = f"{self.received} bytes in {seconds:.0f} seconds are too few"
                self._cut()
                return
            self.received, self._waited = 0, 0.0
            if since is not None:
                self._since = time.monotonic()

    def _cut(self) -> None:
        """Have whoever reads from the connection see its end."""
        stream = getattr(self._answer, "extensions", {}).get("network_stream")
        connection = stream.get_extra_info("socket") if stream is not None else None
        with contextlib.suppress(OSError):
            if connection is not None:
                connection.shutdown(socket.SHUT_RDWR)
