"""The recipe: what a user wrote, frozen. Its dataclasses are the one statement of the keys of a recipe.

What is checked, composed, completed and documented follows from the fields: their names, types and defaults. Each says
besides what it `affects`:

    bytes     values of the output; part of what tells two builds apart
    layout    into which files they are cut; the same
    nothing   what the output is called, where it goes, what is done besides

where the manifest records the key as one of the plan's options, under which name; and what it `says` to people, in the
markdown of docs/recipe.md, whose table, and the JSON Schema that editors read, have it from here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError
from lora_build.grading import Grading
from lora_build.recipe.combining import CombineSpec
from lora_build.recipe.composed import Composed
from lora_build.recipe.stated import affects, holds

MISSING: Any = "???"  # of a key that must be set; OmegaConf's word, so that a composed file may have it


class DType(Enum):
    """The dtype of the output's floating-point tensors; `keep` leaves each as the base has it."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ALL = "*"
"""The pattern of names that means every tensor for which no other one says more."""


class Numerics(Enum):
    """How values are computed.

    `exact` is one exact sum and one rounding, the same bits everywhere; `peft` repeats peft's own operations and
    roundings, for the bits that peft would write on this machine.
    """

    exact = "exact"
    peft = "peft"


class TiedEmbeddings(Enum):
    """What an adapter on one of two tied matrices means."""

    untie = "untie"
    peft = "peft"
    error = "error"


class Packing(Enum):
    """How an adapter packs the factors of an expert stack; its file does not say."""

    peft = "peft"
    unsloth = "unsloth"


class IfExists(Enum):
    """What to do when the output directory exists."""

    reuse = "reuse"
    fail = "fail"
    overwrite = "overwrite"


_SOURCE = "A folder or a Hub repository, `org/name` or `org/name@revision`, see [sources](#sources)."
_REVISION = "Branch, tag or commit of a Hub repository; null is its main branch. A folder has none."


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """The base model: a local path (starts with `/`, `./`, `../` or `~`), a Hub repository, or a recipe's build."""

    source: str | None = field(default=MISSING, metadata=affects("bytes", _SOURCE))
    revision: str | None = field(default=None, metadata=affects("bytes", _REVISION))
    recipe: str | None = field(
        default=None,
        metadata=affects(
            "bytes",
            "A recipe whose build is the base, in place of a source, see [recipes on recipes](#recipes-on-recipes).",
        ),
    )

    @property
    def is_recipe(self) -> bool:
        """Whether it is the build of another recipe."""
        return self.recipe is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One adapter: its source as for the base, its weight in the sum, and how it packs expert stacks."""

    source: str = field(
        default=MISSING,
        metadata=affects(
            "bytes", "As for the base. The folder holds `adapter_config.json` and `adapter_model.safetensors`."
        ),
    )
    revision: str | None = field(default=None, metadata=affects("bytes", "As for the base."))
    weight: float | Grading = field(
        default=1.0,
        metadata=affects(
            "bytes",
            "Multiplies the adapter's update, beside its own alpha/r. 0 leaves the adapter out, a negative weight "
            "subtracts. Rounded to 12 digits. What replaces or multiplies must have weight 1. A mapping has another "
            "one [by module and layer](combining.md#by-module-and-layer).",
        ),
    )
    density: float | Grading | None = field(
        default=None,
        metadata=affects(
            "bytes",
            "The part of the adapter's values that a [combination](combining.md) keeps; null is `combine.density`. A "
            "mapping as for `weight`.",
        ),
    )
    expert_packing: Packing = field(
        default=Packing.peft,
        metadata=affects("bytes", "How the factors of expert stacks are packed, see [experts](#experts)."),
    )
    ignore_files: tuple[str, ...] = field(
        default=(),
        metadata=affects(
            "nothing",
            "Patterns (`value_head.*`) of files beside the adapter that hold weights of their own: without this key "
            "they are [refused](#weights-beside-an-adapter).",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Where the checkpoint goes and how it is cut into shards."""

    dir: str = field(
        default="builds/${recipe.name}",
        metadata=affects(
            "nothing",
            "The folder of the build, see [existing output](#existing-output). It must not overlap an input, nor lie "
            "in another build.",
        ),
    )
    max_shard_size: str = field(
        default="keep",
        metadata=affects(
            "layout",
            "`keep` leaves the base's files; a size cuts anew: `5GB`, `500MB` (decimal: KB, MB, GB, TB), `5GiB` "
            "(binary), or a number of bytes.",
            recorded_as="max_shard_size",
        ),
    )
    if_exists: IfExists = field(
        default=IfExists.reuse,
        metadata=affects("nothing", "What to do when `output.dir` exists, see [existing output](#existing-output)."),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpec:
    """A comparison of the built model with base and adapters: on the prompts of a file, or on what a seed gives."""

    prompts: str | None = field(
        default=None,
        metadata=affects("nothing", "A text file with a prompt a line; null makes inputs from the seed."),
    )
    seed: int = field(default=0, metadata=affects("nothing", "What inputs are made from."))


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperSpec:
    """A comparison of the built tensors, byte by byte, with those of a live model that `LoraModel` merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksSpec:
    """What a build must pass before its output is published; None for no such check."""

    forward: ForwardSpec | None = field(
        default=None,
        metadata=affects("nothing", "Compare the built model with base and adapters; `{}` is enough."),
    )
    wrapper: WrapperSpec | None = field(
        default=None,
        metadata=affects("nothing", "Compare the build's tensors with a merge in memory; `{}` is enough."),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe. Every field is a key but `composed`, which is None where no file was composed."""

    name: str = field(
        default=MISSING,
        metadata=affects(
            "nothing",
            "A file name without `/`: `team--chat` of `recipes/team/chat.yaml`. The default `output.dir` uses it. It "
            "is not inherited.",
        ),
    )
    description: str = field(default="", metadata=affects("nothing", "Shown by `lora-build list`."))
    requires: str | None = field(
        default=None,
        metadata=affects(
            "nothing",
            'The versions of lora-build that the recipe is for, such as `">=0.2"` or `">=0.2,<1"`; any other refuses '
            "it. It goes into no digest.",
        ),
    )
    base: BaseSpec = field(
        default_factory=BaseSpec, metadata=holds("The model to merge into. `base: X` means `base: {source: X}`.")
    )
    adapters: Mapping[str, AdapterSpec] = field(
        default_factory=dict,
        metadata=holds(
            "The adapters; their order [rarely matters](how-it-works.md#several-adapters). `math: X` means "
            "`math: {source: X}`. In a list, `{name: math, source: X}` names one; any other is named after the last "
            "part of its source.",
            each="NAME has letters, digits, `_` and `-`, no digit first. null removes an inherited adapter.",
        ),
    )
    adapter_names: tuple[str, ...] | None = field(
        default=None, metadata=affects("bytes", "The adapters to merge; null means all.")
    )
    combine: CombineSpec = field(
        default_factory=CombineSpec,
        metadata=holds("How several adapters become one update. `combine: X` means `combine: {method: X}`."),
    )
    safe_merge: bool = field(
        default=True,
        metadata=affects(
            "bytes",  # numerics: peft rounds once more with it
            "Stop at a value that is NaN or infinite, in tensors that are only copied too, and name adapter, tensor "
            "and index. It changes no bit, but under `numerics: peft` those that it changes in PEFT.",
            recorded_as="safe_merge",
        ),
    )
    dtype: DType | Mapping[str, DType] = field(
        default=DType.keep,
        metadata=affects(
            "bytes",
            "The dtype of all floating-point tensors of the output; `keep` leaves each as the base has it. config.json "
            "is changed to match. See [dtypes](#dtypes).",
            recorded_as="dtype",
        ),
    )
    numerics: Numerics = field(
        default=Numerics.exact,
        metadata=affects(
            "bytes",
            "`exact`: one exact sum, one rounding, the same bits on every machine; see "
            "[how it works](how-it-works.md#exact-1). `peft`: the bits that PEFT writes on this machine, see "
            "[PEFT's own bits](#pefts-own-bits).",
            recorded_as="numerics",
        ),
    )
    tied_embeddings: TiedEmbeddings = field(
        default=TiedEmbeddings.untie,
        metadata=affects(
            "bytes",
            "What an adapter on one of two tied matrices means, see [tied embeddings](#tied-embeddings).",
            recorded_as="tied",
        ),
    )
    saved_modules_from: str | None = field(
        default=None,
        metadata=affects(
            "bytes", "The adapter that wins where two replace one parameter, see [modules to save](#modules-to-save)."
        ),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=affects(
            "bytes", "Whose tokenizer the output has; null decides by what was trained, see [tokenizers](#tokenizers)."
        ),
    )
    output: OutputSpec = field(
        default_factory=OutputSpec,
        metadata=holds("Where the checkpoint goes. `output: X` means `output: {dir: X}`."),
    )
    checks: ChecksSpec = field(
        default_factory=ChecksSpec,
        metadata=holds("What a build must pass before it is published, see [checks](#checks)."),
    )
    scores: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata=affects(
            "nothing",
            "How good a build is: names of yours, each with one scorer and its options, see "
            "[scoring](scoring.md#scores).",
        ),
    )
    gates: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata=affects(
            "nothing",
            "Which scores a build must have before it takes its place, by name and metric: `{sums: {exact_match: "
            '">= 0.9"}}`, see [gates](scoring.md#gates).',
        ),
    )
    objective: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=affects(
            "nothing",
            "The one number by which a sweep chooses: `{maximize: sums.exact_match}` or `{minimize: wiki.perplexity}`, "
            "see [the objective](scoring.md#the-objective).",
        ),
    )
    root: str = field(default=".", metadata=affects("nothing", "Where relative paths begin. It is not inherited."))
    composed: Composed | None = field(default=None, compare=False, metadata=affects("nothing", ""))


def resolve_path(recipe: Recipe, text: str) -> Path:
    """Return a path of the recipe, relative ones below its root; no file need be there, but one could."""
    try:
        path = Path(recipe.root, Path(text).expanduser())
        could_be = "\0" not in text and len(os.fsencode(path)) < 4096
        could_be = could_be and all(len(os.fsencode(part)) < 256 for part in path.parts)
    except (RuntimeError, UnicodeError) as error:
        raise RecipeError(f"{text}: {error}") from error
    if not could_be:
        raise RecipeError(f"{text}: no file can be called so; expected names of at most 255 bytes, a path of 4095")
    return path
