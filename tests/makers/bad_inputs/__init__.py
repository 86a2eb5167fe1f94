"""Bad inputs: what people, or somebody who means harm, put in the place of a recipe, an output, a base or an adapter.

Each is a row: what is done to a small project that would build, the command, its exit code and what its one message says.
A new one goes into the module of its kind. `tests/cli/test_bad_inputs.py` runs them all.

    project/recipes/prod.yaml    base: ./base, adapters: {math: ./math}, output: {dir: ./out}
    project/base, project/math   two layers of q_proj [8, 6] and a norm in bf16; rank 2
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n"
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
FIRST = f"base_model.model.{MODULES[0]}"
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

Change = Callable[[Path], object]
Tensors = dict[str, tuple[str, list[int], bytes]]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A bad input.

    Attributes:
        change: what is done to the project.
        says: what the message has to say, each of them.
        code: the exit code.
        words: the command.
        first: a command that succeeds before the change, such as the build that is then tampered with.
        env: more of the environment.
        asks: whether transformers is asked, which takes seconds.
    """

    change: Change
    says: Sequence[str]
    code: int = 2
    words: Sequence[str] = ("recipe=prod", "progressbar=false")
    first: Sequence[str] = ()
    env: Mapping[str, str] | None = None
    asks: bool = False


def bad(change: Change, *says: str, **more: Any) -> Bad:
    """Return a row; `code`, `words` and the like are keywords."""
    return Bad(change=change, says=says, **more)


def nothing(project: Path) -> None:
    """Change nothing: the command is what is bad."""


def both(*changes: Change) -> Change:
    """Return changes, one after the other."""
    return lambda project: [change(project) for change in changes]


# --- the project ----------------------------------------------------------------------------------------------


def values(seed: int, *shape: int, dtype: str = "F32") -> bytes:
    """Return bytes of numbers between -1 and 1."""
    numbers = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else numbers.tobytes()


def base_tensors() -> Tensors:
    """Return the tensors of the base: name -> dtype, shape, bytes."""
    found: Tensors = {f"{m}.weight": ("BF16", [8, 6], values(i, 8, 6, dtype="BF16")) for i, m in enumerate(MODULES)}
    return found | {"model.norm.weight": ("BF16", [6], values(9, 6, dtype="BF16"))}


def adapter_tensors() -> Tensors:
    """Return the tensors of the adapter."""
    found: Tensors = {}
    for i, module in enumerate(MODULES):
        found[f"base_model.model.{module}.lora_A.weight"] = ("F32", [2, 6], values(50 + i, 2, 6))
        found[f"base_model.model.{module}.lora_B.weight"] = ("F32", [8, 2], values(57 + i, 8, 2))
    return found


def safetensors(tensors: Tensors, edit: Callable[[Any], object] | None = None, header: bytes | None = None) -> bytes:
    """Return a safetensors file that may lie: `edit` changes its header, `header` takes its place."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    if edit:
        edit(entries)
    text = json.dumps(entries, separators=(",", ":")).encode() if header is None else header
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def make_project(folder: Path) -> Path:
    """Write the project that would build."""
    for name in ("base", "math", "recipes"):
        (folder / name).mkdir(parents=True)
    (folder / "base" / WEIGHTS).write_bytes(safetensors(base_tensors()))
    (folder / "base/config.json").write_text(json.dumps(BASE_CONFIG, indent=2) + "\n")
    (folder / "base/tokenizer.json").write_text("{}")
    (folder / "math" / ADAPTER_WEIGHTS).write_bytes(safetensors(adapter_tensors()))
    (folder / "math/adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    (folder / "recipes/prod.yaml").write_text(RECIPE)
    (folder / "precious.txt").write_text("precious")
    return folder


# --- what is done to it ---------------------------------------------------------------------------------------


def recipe(text: str, *, more: str = "") -> Change:
    """Return a change of the recipe to a text."""
    return write("recipes/prod.yaml", text + more)


def added(text: str) -> Change:
    """Return a change of the recipe to what it is and a text."""
    return recipe(RECIPE, more=text)


def output(text: str) -> Change:
    """Return a change of the recipe to another output.dir, as YAML writes it."""
    return recipe(RECIPE.replace("./out", text))


def write(name: str, content: str | bytes) -> Change:
    """Return the writing of a file."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")

    def change(project: Path) -> None:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(data)

    return change


def remove(name: str) -> Change:
    """Return the removal of a file."""
    return lambda project: (project / name).unlink()


def link(name: str, target: str) -> Change:
    """Return the placing of a link, in the place of what is there."""

    def change(project: Path) -> None:
        (project / name).unlink(missing_ok=True)
        (project / name).symlink_to(target)

    return change


def pipe(name: str) -> Change:
    """Return the placing of a FIFO, in the place of what is there."""

    def change(project: Path) -> None:
        (project / name).unlink(missing_ok=True)
        os.mkfifo(project / name)

    return change


def adapter_config(text: str | None = None, **keys: Any) -> Change:
    """Return a change of the adapter's config: to a text, or of keys."""
    return write("math/adapter_config.json", json.dumps(ADAPTER_CONFIG | keys) if text is None else text)


def base_config(text: str | None = None, **keys: Any) -> Change:
    """Return a change of the base's config: to a text, or of keys."""
    return write("base/config.json", json.dumps(BASE_CONFIG | keys) if text is None else text)


def adapter_weights(edit: Callable[[Tensors], object], header: Callable[[Any], object] | None = None) -> Change:
    """Return a change of the adapter's tensors, and of the header that tells of them."""
    return _weights(f"math/{ADAPTER_WEIGHTS}", adapter_tensors, edit, header)


def base_weights(edit: Callable[[Tensors], object], header: Callable[[Any], object] | None = None) -> Change:
    """Return a change of the base's tensors, and of the header that tells of them."""
    return _weights(f"base/{WEIGHTS}", base_tensors, edit, header)


def _weights(
    file: str, made: Callable[[], Tensors], edit: Callable[[Tensors], object], header: Callable[[Any], object] | None
) -> Change:
    def change(project: Path) -> None:
        tensors = made()
        edit(tensors)
        (project / file).write_bytes(safetensors(tensors, header))

    return change
