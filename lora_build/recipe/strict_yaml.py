"""YAML without what can hurt: no tags, no aliases, no duplicate keys, nothing large."""

import errno
import itertools
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from lora_build.errors import RecipeError, label

_MAX_SIZE_BYTES = 2**20
_MAX_NODES = 5_000
_MAX_DEPTH = 64


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file, an empty one for an empty file.

    Raises:
        RecipeError: the file cannot be read, is not YAML or uses what recipes do without.
    """
    where = label(file)
    try:
        text = _bytes_of(file)
        if len(text) > _MAX_SIZE_BYTES:
            raise RecipeError(f"{where}: larger than 1 MiB, which no recipe is")
        if _depth(text) > _MAX_DEPTH:  # the loader would look a thousand brackets ahead at each of a thousand
            raise RecipeError(f"{where}: nested too deeply")
        data = yaml.load(text.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # as `requires: >=0.2` is read: to YAML, > and | begin a text of several lines
        hint = "; put a value that begins with > or | in quotes" if "block scalar" in str(error.context) else ""
        raise RecipeError(f"{where}: not valid YAML{place}: {error.problem}{hint}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply") from error
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read: {error.strerror}") from error
    if not isinstance(data, dict | None):
        raise RecipeError(f"{where}: expected keys and values, found a {type(data).__name__}")
    return data or {}


def parse_scalar(text: str) -> Any:
    """Return the value that a plain text without spaces is to YAML: `7e1` is a number, `./x` a text."""
    return yaml.load(text, Loader=_Loader)


def _depth(text: bytes) -> int:
    """Return how deep brackets are nested, those in quotes counted too."""
    steps = (1 if found[0] in b"[{" else -1 for found in re.finditer(rb"[\[\]{}]", text))
    return max(itertools.accumulate(steps), default=0)


def _bytes_of(file: Path) -> bytes:
    """Return what a file holds, at most a byte more than is read; a pipe or a device is not waited for."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        return stream.read(_MAX_SIZE_BYTES + 1)


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it (1e-3 is a number, a date is text) without tags, aliases, duplicate keys.

    Aliases can blow a small file up to gigabytes; `defaults` and `${recipe.x}` say the same in a recipe.
    """

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise _refusal(f"more than {_MAX_NODES} keys and values, which no recipe has", event)
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases are not for recipes; use defaults or ${recipe.KEY} instead", event)
        if getattr(event, "tag", None):
            raise _refusal(f"tags ({event.tag}) are not for recipes", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refusal(f"the key '{key.value}' is there twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != f"{_TAG}timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
