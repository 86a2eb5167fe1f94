"""lora-build: merged LoRA checkpoints from recipes in git; same recipe, same bytes.

    import lora_build

    manifest = lora_build.build({"base": "./base", "adapters": {"math": "./math"}, "output": {"dir": "./merged"}})
    manifest = lora_build.build(lora_build.load_recipe("prod_math", ["recipe.dtype=float32"]))
    lora_build.verify("./merged")

Nothing is printed; what there is to say is logged below the logger `lora_build`.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from lora_build.errors import (
    LoraBuildError,
    MergeError,
    PlanError,
    RecipeError,
    SourceError,
    StorageError,
    VerificationError,
)  # fmt: skip

if TYPE_CHECKING:
    from lora_build.cli.main import load_recipe
    from lora_build.pipeline import build
    from lora_build.planning.inspection.inspecting import inspect
    from lora_build.planning.inspection.result import Inspection
    from lora_build.proof.forward.check import ForwardReport, verify_forward
    from lora_build.proof.manifest import Manifest
    from lora_build.proof.verify import Verified, verify
    from lora_build.recipe.schema import Recipe
    from lora_build.wrapper.model import LoraModel

__all__ = [
    "ForwardReport", "Inspection", "LoraBuildError", "LoraModel", "Manifest", "MergeError", "PlanError", "Recipe",
    "RecipeError", "SourceError", "StorageError", "VerificationError", "Verified", "__version__", "build", "inspect",
    "load_recipe", "verify", "verify_forward",
]  # fmt: skip

_HOMES = {
    "build": "pipeline",
    "load_recipe": "cli.main",
    "verify": "proof.verify",
    "Manifest": "proof.manifest",
    "Verified": "proof.verify",
    "Recipe": "recipe.schema",
    "inspect": "planning.inspection.inspecting",
    "Inspection": "planning.inspection.result",
    "LoraModel": "wrapper.model",
    "ForwardReport": "proof.forward.check",
    "verify_forward": "proof.forward.check",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more: `lora-build --help` needs none of it."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"lora_build.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lora_build' has no attribute '{name}'")
