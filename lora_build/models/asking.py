"""Asking transformers what a base is: in a process of its own, once, and remembered beside the digests of files.

To import transformers and to make a model takes seconds and 400 MB, which a plan can do without. So a child process is
asked, and what it says is kept for as long as config.json, the tensors' shapes and the version of transformers are the
same. That it says nothing is kept, too, lest each plan wait for it. Where this process has transformers loaded anyway,
it answers itself.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lora_build
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.hashing.remembered import place_of, recall_text, remember_text
from lora_build.files.sources.hub_environment import READ_AT_IMPORT
from lora_build.models.facts import Facts
from lora_build.models.heads import Head, Shapes
from lora_build.models.keep_float32 import TABLE_ID
from lora_build.models.names import NameIndex

_QUESTION = "architecture-3"
"""Changes with what is asked, and with how its answer is written."""

_KIND, _NO_ANSWER = "architectures", "no answer"
_SECONDS = 180
_SECONDS_TO_LEAVE = 5
_ENOUGH_BYTES = 16 << 30  # of addresses; torch maps some gigabytes where it has libraries of a GPU
_MAX_ANSWER_BYTES = 64 << 20

_Record = TypeVar("_Record")


def ask(config: ModelConfig, shapes: Shapes, paths: Iterable[str] = ()) -> Facts:
    """Return what transformers says of a base, by its config.json and the shapes of its tensors on disk.

    Args:
        config: its config.json.
        shapes: of its tensors, by their names on disk.
        paths: that adapters have for parameters; older versions of transformers may have called them so.
    """
    question = {"config": config.data, "tensors": _sorted(shapes), "paths": _unknown(paths, shapes)}
    facts, why, again = _answer(question, Facts.from_json)
    if facts is None:
        return Facts(problem="; ".join(filter(None, (why, again))))
    return replace(facts, problem=f"{facts.problem}; {again}") if facts.may_change and again else facts


def ask_head(config: ModelConfig, shapes: Shapes, *, adapter: Adapter, paths: Iterable[str] = ()) -> Head:
    """Return which head an adapter brings that the base has not, and what transformers says of the model with it.

    Args:
        config: the base's config.json.
        shapes: of the base's tensors, by their names on disk.
        adapter: the adapter.
        paths: as for `ask`.
    """
    replaced = {path: tensor.shape for path, tensor in adapter.parts.replaced.items()}
    trained_as = [adapter.config.task_type, adapter.config.trained_class]
    head = {"trained_as": trained_as, "replaced": _sorted(replaced)}
    question = {"config": config.data, "tensors": _sorted(shapes), "paths": _unknown(paths, shapes), "head": head}
    found, why, again = _answer(question, Head.from_json)
    if found is None:
        why = "; ".join(filter(None, (why, again)))
        return Head(problems=(f"{adapter.source}: whether it brings a head is not known: {why}",))
    return found


def _sorted(shapes: Shapes) -> dict[str, list[int]]:
    return {name: list(shapes[name]) for name in sorted(shapes)}


def _unknown(paths: Iterable[str], shapes: Shapes) -> list[str]:
    """Return the paths that are not the names of tensors on disk."""
    on_disk = NameIndex(shapes)
    return sorted({path for path in paths if on_disk.find(path) is None})


def _answer(question: Mapping[str, Any], parse: Callable[[str], _Record]) -> tuple[_Record | None, str, str]:
    """Return the answer to a question, or None and why there is none; and how to have it asked again.

    The last is an empty text where it is asked again anyway.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None, "transformers is not installed", ""
    written = json.dumps(question)
    key = hashlib.sha256(json.dumps([_QUESTION, version, TABLE_ID, written]).encode()).hexdigest()
    again = f"that is remembered; to ask again, remove {place_of(_KIND, key)}"
    with contextlib.suppress(ValueError):
        return *_read(recall_text(_KIND, key), parse), again
    if "torch" in sys.modules and "transformers" in sys.modules:
        return parse(_answered_here(written)), "", ""
    text = _ask_child(written)
    try:
        found = _read(text, parse)
    except ValueError:
        found = None, f"transformers gave no answer: {text}"
        text = json.dumps({_NO_ANSWER: found[1]})
    if _lasts(found[0]):
        remember_text(_KIND, key, text)
    return *found, again if recall_text(_KIND, key) == text else ""


def _lasts(found: object) -> bool:
    """Whether an answer will be the same next time: one that failed may have, for what its process was not given."""
    limits = {resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)}
    facts = found.facts if isinstance(found, Head) else found
    failed = found is None or (isinstance(facts, Facts) and facts.may_change)
    return not failed or not any(0 <= limit < _ENOUGH_BYTES for limit in limits - {resource.RLIM_INFINITY})


def _read(text: str, parse: Callable[[str], _Record]) -> tuple[_Record | None, str]:
    """Return what a text is the record of, or None and why there was no answer; any other text is a ValueError."""
    if text.startswith(f'{{"{_NO_ANSWER}"'):
        return None, str(json.loads(text)[_NO_ANSWER])
    return parse(text), ""


@functools.lru_cache(maxsize=256)
def _answered_here(question: str) -> str:
    """Return what transformers says in this process, for it alone: other models that were made here may have a part."""
    from lora_build.models.ask import answer_question

    return answer_question(question)


def _ask_child(question: str) -> str:
    """Return the answer of another process, or why there is none."""
    root = str(Path(lora_build.__file__).parent.parent)
    program = f"import sys; sys.path.append({root!r}); from lora_build.models.ask import main; main()"
    others = {name: value for name, value in os.environ.items() if name not in READ_AT_IMPORT}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],  # -P: nothing is imported from the working directory
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**others, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""},
    ) as child:  # fmt: skip
        try:
            out, err = child.communicate(question.encode(), timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took longer than {_SECONDS} seconds"
        finally:
            _end(child)
    if child.returncode or len(out) > _MAX_ANSWER_BYTES:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        return " ".join((f"its process ended with {child.returncode}", *last))[:500]
    return out.decode()


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process that has not ended."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            child.kill()
