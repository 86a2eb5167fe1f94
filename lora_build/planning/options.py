"""The options of a plan: the recipe's choices that decide the output, or what is proven of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.methods.combine.interface import Combination
from lora_build.models.keep_float32 import TABLE_ID
from lora_build.planning.combining import combination_of, recorded
from lora_build.recipe.identity import recorded_options
from lora_build.recipe.schema import DType, Numerics, Recipe
from lora_build.recipe.values import parse_size

# what `numerics/exact.py` and `engine/backends/peft.py` compute; another id means that bits may differ
NUMERICS = {Numerics.exact: "exact-1", Numerics.peft: "peft-0.21"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is asked of a recipe's options once it is planned, and all of them as a manifest records them.

    Attributes:
        combination: makes one change of several adapters' updates.
        numerics: in whose arithmetic.
        safe_merge: whether a value that is not finite is refused.
        max_shard_bytes: the size that no weight file may exceed; None keeps the files of the base.
        recorded: every option that the schema says is recorded, by its name in the manifest. Its canonical JSON is part
            of the build_key.
    """

    combination: Combination
    numerics: Numerics
    safe_merge: bool
    max_shard_bytes: int | None
    recorded: Mapping[str, Any]

    @classmethod
    def of(cls, recipe: Recipe) -> "PlanOptions":
        """Return the options of a recipe.

        Which of its keys are recorded, and by what name, its schema says. Three are not recorded as written: of
        numerics what it computes today, of sizes how many bytes they are, however they are spelled, and of the
        combination all parameters, those that are not written too. Where floats are narrowed, the table of those that
        are not is recorded besides.
        """
        options, combination = recorded_options(recipe), combination_of(recipe.combine)
        max_shard_bytes = parse_size(recipe.output.max_shard_size)
        return cls(
            combination=combination,
            numerics=recipe.numerics,
            safe_merge=recipe.safe_merge,
            max_shard_bytes=max_shard_bytes,
            recorded=options
            | {"max_shard_size": max_shard_bytes or "keep", "numerics": NUMERICS[recipe.numerics]}
            | {"combine": recorded(combination)}
            | ({"kept_dtypes": TABLE_ID} if narrows(recipe) else {}),
        )


def narrows(recipe: Recipe) -> bool:
    """Whether a recipe asks for floats of 16 bits, which some tensors are not to become."""
    asked = recipe.dtype.values() if isinstance(recipe.dtype, Mapping) else (recipe.dtype,)
    return recipe.numerics is Numerics.exact and not {DType.float16, DType.bfloat16}.isdisjoint(asked)
