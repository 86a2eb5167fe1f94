"""Asking transformers what a base is: in a process of its own, once, and remembered beside the digests of files.

To import transformers and to make a model takes seconds and 400 MB, which a plan can do without. So a child process is
asked, and what it says is kept for as long as config.json, the tensors' shapes and the version of transformers are the
same. Where this process has transformers loaded anyway, it answers itself.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import lora_build
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.hashing.remembered import recall_text, remember_text
from lora_build.models.facts import Facts
from lora_build.models.keep_float32 import TABLE_ID
from lora_build.models.names import NameIndex

_QUESTION = "architecture-2"
"""Changes with what is asked, and with how its answer is written."""

_SECONDS = 180
_SECONDS_TO_LEAVE = 5
_MAX_ANSWER_BYTES = 64 << 20


def ask(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], paths: Iterable[str] = ()) -> Facts:
    """Return what transformers says of a base, by its config.json and the shapes of its tensors on disk.

    Args:
        config: its config.json.
        shapes: of its tensors, by their names on disk.
        paths: that adapters have for parameters; older versions of transformers may have called them so.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return Facts(problem="transformers is not installed")
    on_disk = NameIndex(shapes)
    unknown = sorted({path for path in paths if on_disk.find(path) is None})
    tensors = {name: list(shapes[name]) for name in sorted(shapes)}
    question = json.dumps({"config": config.data, "tensors": tensors, "paths": unknown})
    key = hashlib.sha256(json.dumps([_QUESTION, version, TABLE_ID, question]).encode()).hexdigest()
    with contextlib.suppress(ValueError):
        return Facts.from_json(recall_text("architectures", key))
    if "torch" in sys.modules and "transformers" in sys.modules:
        return _answered_here(question)
    text = _ask_child(question)
    try:
        found = Facts.from_json(text)
    except ValueError:
        return Facts(problem=f"transformers gave no answer: {text}")
    remember_text("architectures", key, text)
    return found


@functools.lru_cache(maxsize=256)
def _answered_here(question: str) -> Facts:
    """Return what transformers says in this process, for it alone: other models that were made here may have a part."""
    from lora_build.models.ask import answer_question

    return answer_question(question)


def _ask_child(question: str) -> str:
    """Return the answer of another process, or why there is none."""
    root = str(Path(lora_build.__file__).parent.parent)
    program = f"import sys; sys.path.append({root!r}); from lora_build.models.ask import main; main()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],  # -P: nothing is imported from the working directory
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""},
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
