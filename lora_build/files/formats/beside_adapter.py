"""What lies beside an adapter's two files: other weights that were trained with it, and what training left behind.

LLaVA saves its projector as non_lora_trainables.bin, LLaMA-Factory a value_head.safetensors, others a tower or new
embeddings. peft reads none of them, and a merge without them is another model than was trained.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lora_build.errors import some_of
from lora_build.files.formats.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_build.files.formats.modules import MODULES_NAME, NO_MODULES, AdapterModules

_PICKLED = "adapter_model.bin"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|npz|h5|msgpack)", re.IGNORECASE)
_OF_TRAINING = re.compile(
    r"(.*/)?((checkpoint-|global_?step|epoch[-_]?|step[-_]?)\d+|runs|logs|wandb)/.*"
    r"|(.*/)?(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state|dataloader)[^/]*"
    r"|(.*/)?[^/]*(zero_pp_rank|mp_rank|optim_states|optimizer_states)[^/]*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesBeside:
    """The files beside an adapter's own that hold values, sorted by what they are.

    Attributes:
        weights: what may have been trained and is in none of the adapter's own files.
        of_training: the state of its training.
        of_others: the folders of other adapters, and of whole models such as a merged one.
        ignored: weights that a recipe leaves aside on purpose.
        is_twice: whether its weights are there pickled, too.
        unmatched: patterns of a recipe that match no file; a snapshot of the Hub may lack files that nobody fetched.
        problems: what is wrong, one line each.
    """

    weights: tuple[str, ...]
    of_training: tuple[str, ...]
    of_others: tuple[str, ...]
    ignored: tuple[str, ...]
    is_twice: bool
    unmatched: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, one line each."""
        lines = (
            (self.ignored, f"built without {some_of(self.ignored)}, as ignore_files says"),
            (self.unmatched, f"no file matches {some_of(self.unmatched)} of ignore_files"),
            (self.is_twice, f"{_PICKLED} is not read: {WEIGHTS_NAME} is there"),
            (self.of_training, f"the state of its training is left aside: {some_of(self.of_training)}"),
            (
                self.of_others,
                f"other adapters or models in it are left aside: {some_of(self.of_others)}",
            ),
        )
        return tuple(line for is_so, line in lines if is_so)


def look_beside(
    names: Iterable[str],
    *,
    where: str,
    ignore_files: Collection[str] = (),
    modules: AdapterModules = NO_MODULES,
) -> FilesBeside:
    """Return what lies beside an adapter, of all files in its folder.

    Args:
        names: all files, those of folders with their path.
        where: what messages call the adapter.
        ignore_files: patterns of names (`value_head.*`, `towers/*`) that a recipe leaves aside.
        modules: those of sentence-transformers beside the base's; weights that the base has too lose nothing.
    """
    names = frozenset(names)
    found = sorted(names - {CONFIG_NAME, WEIGHTS_NAME})
    folders = {folder for name in found for folder in _folders_above(name)[-1:] if _is_whole(folder, names)}
    weights = [name for name in found if _WEIGHTS.fullmatch(name) and name != _PICKLED and name not in modules.same]
    of_training = {name: None for name in weights if _OF_TRAINING.fullmatch(name)}
    above = {folder for name in weights for folder in _folders_above(name)}
    of_others = sorted(f for f in folders if not _OF_TRAINING.fullmatch(f) and f in above)
    own = [n for n in weights if n not in of_training and folders.isdisjoint(_folders_above(n))]
    ignored = [name for name in own if any(fnmatchcase(name, pattern) for pattern in ignore_files)]
    return FilesBeside(
        weights=tuple(own),
        of_training=tuple(of_training),
        of_others=tuple(of_others),
        ignored=tuple(ignored),
        is_twice=_PICKLED in found,
        unmatched=tuple(p for p in ignore_files if not any(fnmatchcase(name, p) for name in found)),
        problems=tuple(_problems(where, [n for n in own if n not in ignored], ignore_files, modules)),
    )


def _is_whole(folder: str, names: Collection[str]) -> bool:
    """Whether a folder holds another adapter, or a whole model: a tower or a layer has no tokenizer of its own."""
    return f"{folder}{CONFIG_NAME}" in names or (
        f"{folder}config.json" in names and f"{folder}tokenizer_config.json" in names
    )


def _folders_above(name: str) -> list[str]:
    """Return the folders that a file lies in, with a `/` at their ends."""
    return [name[: at + 1] for at, letter in enumerate(name) if letter == "/"]


def _problems(where: str, weights: list[str], ignore_files: Collection[str], modules: AdapterModules) -> Iterable[str]:
    if others := [name for name in weights if name not in modules.weights]:
        yield (
            f"{where}: {some_of(others, 6)} may hold weights that were trained with it (a projector, a head, "
            f"embeddings), and only {WEIGHTS_NAME} is merged; list them in {where}.ignore_files to build without, or "
            "once they are saved into the base"
        )
    if others := [name for name in weights if name in modules.weights]:
        yield (
            f"{where}: {some_of(others, 6)} of its modules is not the base's, and only {WEIGHTS_NAME} is merged; copy "
            f"{MODULES_NAME} and the folders that it names into a copy of the base to build with them, or list them in "
            f"{where}.ignore_files to build without"
        )
    for pattern in ignore_files:
        if fnmatchcase(CONFIG_NAME, pattern) or fnmatchcase(WEIGHTS_NAME, pattern):
            yield f"{where}.ignore_files: '{pattern:.80}' matches the adapter's own files, which a merge is made of"
