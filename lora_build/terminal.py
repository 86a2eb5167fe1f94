r"""What may reach a terminal, a log or a page: untrusted text as one harmless line, secrets masked.

    "math\x1b[2J\nok"                           math\x1b[2J\nok
    "abc\u202edcb"                              abc\u202edcb
    "https://user:word@hub.acme/x?token=1"      https://***@hub.acme/x?***

Names of tensors and files, values of configs and recipes, answers of a Hub: whoever wrote them may want a terminal to
show something else. Errors escape what they are made of (errors.py), the command line what it writes (cli/output.py).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

_UNUSUAL = re.compile(r"[^ -~]")
_SECRETS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"(?<=://)[^\s/]+@"),
        "***@",
    ),  # whatever a password has in it, quotes too: up to the last @ of the host
    (re.compile(r"://[^\s\"]+"), lambda found: _without_query(found[0])),  # whole, lest each :// look for a ? alone
    (re.compile(r"\bhf_(?=[A-Za-z0-9]*[A-Z0-9]|[A-Za-z0-9]{16})[A-Za-z0-9]{8,}"), "hf_***"),  # no folder hf_datasets
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), r"\1***"),
    (
        re.compile(r"(?i)\b((?:access_|auth_)?token|password|secret|api_?key)=([^\s&\"]+)"),
        lambda found: f"{found[1]}=***{_after(found[2])}" if found[2] != _after(found[2]) else found[0],
    ),
)


def escaped(text: str, *, keep: str = "") -> str:
    """Return text as one line that a terminal shows as it is, but for characters to keep. The law: twice is once.

    What no screen shows, or shows elsewhere, is written as Python writes it in a text: controls, marks of direction,
    of zero width and of order of bytes, separators of lines, halves of a pair of surrogates.
    """
    return _UNUSUAL.sub(lambda found: _written(found[0], keep), without_secrets(text))


def without_secrets(text: str) -> str:
    """Return text without what URLs carry beside their place, and without tokens."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def masked(data: Any) -> Any:
    """Return a JSON value without secrets in any of its texts."""
    match data:
        case str():
            return without_secrets(data)
        case Mapping():
            return {masked(key): masked(value) for key, value in data.items()}
        case list() | tuple():
            return [masked(item) for item in data]
        case _:
            return data


def _without_query(url: str) -> str:
    place, _, query = url.partition("?")
    after = _after(query)
    return f"{place}?***{after}" if query != after else url


def _after(text: str) -> str:
    """Return the quote that ends a text, and the marks after it, which are of the sentence around."""
    bare = text.rstrip("])},.;:")
    return text[len(bare) - 1 :] if bare.endswith("'") else ""


def _written(character: str, keep: str) -> str:
    return character if character.isprintable() or character in keep else ascii(character)[1:-1]
