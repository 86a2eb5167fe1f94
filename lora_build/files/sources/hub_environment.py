"""What the environment says about the Hub, looked at before its client does, which falls over what it cannot read.

That reads some of it as it is imported, as transformers does too, wherever a model comes from, and the rest as it
connects.
"""

import os
import ssl
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lora_build.errors import RecipeError

_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_MOST_SECONDS = 86_400
_AGENT = "HF_HUB_USER_AGENT_ORIGIN"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_CERTIFICATES = "SSL_CERT_FILE"

READ_AT_IMPORT = frozenset({*_SECONDS, "HF_ENDPOINT", _AGENT})
"""What the client reads as it is imported; a process that has no use for the Hub is better off without."""


def refuse_client() -> None:
    """Raise RecipeError for what the Hub's client falls over as it is imported."""
    _refuse(_of_client(os.environ))


def refuse_connection() -> None:
    """Raise RecipeError for what the Hub's client falls over as it connects: proxies, certificates."""
    _refuse(_of_connection(os.environ))


def refuse_headers(headers: Mapping[str, str], token_path: str) -> None:
    """Raise RecipeError for headers of a request that none can have; what is in them is not shown.

    Args:
        headers: as the client makes them.
        token_path: the file that it reads a token from where the environment has none.
    """
    token = headers.get("authorization", "").removeprefix("Bearer ")
    if odd := sum(not "!" <= character <= "~" for character in token):
        name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), token_path)
        raise RecipeError(
            f"{name}: {odd} of its {len(token)} characters are in no token; expected one as the Hub shows it, hf_..."
        )


def proxy_of(url: str) -> str:
    """Return the words that say by which proxy a URL is asked for; an empty text if by none."""
    parts, proxies = urlsplit(url), getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return f" by the proxy {proxies[scheme].rpartition('@')[2]} of {scheme}_proxy"


def _refuse(issues: Iterable[str]) -> None:
    if found := list(issues):
        title = (f"{len(found)} variables of the environment cannot be used:",) if len(found) > 1 else ()
        raise RecipeError((*title, *found), issues=found)


def _of_client(environment: Mapping[str, str]) -> Iterator[str]:
    for name in _SECONDS:
        value = environment.get(name, "1").strip()
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= _MOST_SECONDS):
            yield f"{name} is {value[:100]!r}; expected whole seconds from 1 to {_MOST_SECONDS:,}, or unset it"
    endpoint = environment.get("HF_ENDPOINT")
    if endpoint is not None and (why := _why_no_url(endpoint, ("http", "https"))):
        yield f"HF_ENDPOINT is {why}; expected the URL of a Hub, such as https://huggingface.co, or unset it"
    agent = environment.get(_AGENT, "")
    if not (agent.isascii() and agent.isprintable()):
        yield f"{_AGENT} is {agent[:100]!r}; expected printable ASCII, or unset it"


def _of_connection(environment: Mapping[str, str]) -> Iterator[str]:
    for name in (*_PROXIES, *map(str.upper, _PROXIES)):
        value = environment.get(name, "")
        url = value if "://" in value else f"http://{value}"
        if value and (why := _why_no_url(url, ("http", "https", "socks5", "socks5h"))):
            yield f"{name} is {why}; expected a URL such as http://proxy.example:3128, or unset it"
        elif value and url.startswith("socks5") and find_spec("socksio") is None:
            yield f"{name} is a SOCKS proxy, which the package socksio is needed for: pip install socksio, or unset it"
    if path := environment.get(_CERTIFICATES):
        try:
            if not Path(path).is_file():
                raise OSError("no such file")
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
        except (OSError, ValueError) as error:
            yield f"{_CERTIFICATES} is {path[:200]!r} ({error.args[-1]}); expected a file of certificates, or unset it"


def _why_no_url(value: str, schemes: tuple[str, ...]) -> str:
    """Return what a text is if it is no URL, else an empty text; its credentials are not shown."""
    shown = repr(value.rpartition("@")[2][:100])
    if not value.isascii() or not value.isprintable() or " " in value:
        return f"{shown}, with characters that no URL has"
    try:
        parts = urlsplit(value)
        _ = parts.port  # read as it is asked for
    except ValueError as error:
        return f"{shown}, no URL ({error})"
    return (
        ""
        if parts.scheme in schemes and parts.hostname
        else f"{shown}, no URL of {' or '.join(schemes[:2])} with a host"
    )
