"""Loading: a checkpoint's folder as a live model of transformers, on the CPU, without any code from the checkpoint."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_build.errors import SourceError, VerificationError, some_of
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.sources import Source
from lora_build.models.architecture import FAULTS, class_and_config, quiet


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype, *, has_new_head: bool = False) -> nn.Module:
    """Return the model of a folder in evaluation mode.

    Args:
        folder: its files.
        config: its config.json, or that of the class that it is wanted as.
        dtype: what every floating-point tensor is converted to.
        has_new_head: whether the class is another one than that of the files; what they lack of it is zero then.

    Raises:
        SourceError: transformers does not know the architecture, or cannot load the files.
        VerificationError: files and model do not have the same tensors.
    """
    where = f"{folder.name}/config.json"
    model_class, settings = class_and_config(config, where)
    try:
        with quiet(), _no_progress_bar(), _without_adapter(folder) as plain:
            model, info = model_class.from_pretrained(
                plain, config=settings, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{where}: transformers cannot load this model: {reason}") from error
    if not has_new_head:
        _refuse_differences(where, type(model).__name__, info)
    state = model.state_dict()
    with torch.no_grad():
        for name in info["missing_keys"]:  # random otherwise, another time another way
            state[name].zero_()
    loaded: nn.Module = model.eval()
    return loaded


def _refuse_differences(where: str, model: str, info: Mapping[str, Iterable[Any]]) -> None:
    """Raise VerificationError if a model was not loaded from all of its files' tensors, or not by them alone."""
    said = {
        "missing_keys": f"the files lack what {model} needs",
        "unexpected_keys": f"the files hold what {model} has no use for, of which running it tells nothing",
        "mismatched_keys": f"the files hold in another shape than {model} needs",
    }
    found = []
    for key, text in said.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(key, ()))
        names = [name for name in names if not name.endswith(".num_batches_tracked")]  # counters, which nothing reads
        found += [f"{text}: {some_of(names)}"] if names else []
    if found:
        raise VerificationError(f"{where}: {'; '.join(found)}")


def folder_of(source: Source, names: tuple[str, ...]) -> Path:
    """Return the folder that holds some files of a source, fetching them first if need be."""
    paths = [source.path(name) for name in names]
    return paths[0].parent


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yield a folder with a model's files and no adapter, which transformers would load with them."""
    if not (folder / "adapter_config.json").exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lora-build-") as name:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                Path(name, path.name).symlink_to(path.resolve())
        yield Path(name)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
