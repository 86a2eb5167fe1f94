"""lora-build: merged LoRA checkpoints from recipes in git; same recipe, same bytes.

    import lora_build

    built = lora_build.build({"base": "./base", "adapters": {"math": "./math"}, "output": {"dir": "./merged"}})
    built = lora_build.build(lora_build.load_recipe("prod_math", ["dtype=float32"]))
    built.manifest.manifest_hash, built.warnings
    lora_build.verify("./merged")
    lora_build.score("./merged", {"sums": {"exact_match": "./sums.jsonl"}}).scores["sums"].metrics
    lora_build.merge("./base", "./math", output="./merged").build.manifest
    lora_build.init("acme/math-lora")
    lora_build.lock("prod_math")

Nothing is printed; what there is to say is logged below the logger `lora_build`.
"""

from lora_build._version import VERSION

__version__ = VERSION

TYPE_CHECKING = False  # as in typing, whose import takes as long as all that a command line needs before its first line
if TYPE_CHECKING:
    from lora_build.errors import (
        LoraBuildError,
        MergeError,
        PlanError,
        RecipeError,
        ScoreError,
        SourceError,
        StorageError,
        VerificationError,
    )  # fmt: skip
    from lora_build.keeping.checking import CheckedFile, check
    from lora_build.keeping.collecting import Collected, gc
    from lora_build.keeping.explaining import Explanation, explain
    from lora_build.keeping.listing import ListedBuild, builds
    from lora_build.keeping.pins import pin, unpin
    from lora_build.keeping.promoting import promote
    from lora_build.keeping.reporting import Reported, report
    from lora_build.pages.content import Report
    from lora_build.pipeline import build, plan
    from lora_build.planning.inspection.inspecting import inspect
    from lora_build.planning.inspection.result import Inspection
    from lora_build.planning.locking import Locking, lock
    from lora_build.proof.aliases import Alias
    from lora_build.proof.builds import Build, Plan
    from lora_build.proof.comparing.result import BuildDiff
    from lora_build.proof.diff import diff
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.manifest import Manifest
    from lora_build.proof.verify import Verification, verify
    from lora_build.proof.wrapper_check import WrapperReport
    from lora_build.recipe.compose import load_recipe
    from lora_build.recipe.schema import Recipe
    from lora_build.scores.scoring import Scored, score
    from lora_build.start.init import NewRecipe, init
    from lora_build.start.merge import Merged, merge
    from lora_build.wrapper.model import LoraModel

__all__ = [
    "Alias", "Build", "BuildDiff", "CheckedFile", "Collected", "Explanation", "ForwardReport", "Inspection",
    "ListedBuild", "Locking", "LoraBuildError", "LoraModel", "Manifest", "MergeError", "Merged", "NewRecipe", "Plan",
    "PlanError", "Recipe", "RecipeError", "Report", "Reported", "ScoreError", "Scored", "SourceError", "StorageError",
    "Verification", "VerificationError", "WrapperReport", "__version__", "build", "builds", "check", "diff",
    "explain", "gc", "init", "inspect", "load_recipe", "lock", "merge", "pin", "plan", "promote", "report", "score",
    "unpin", "verify",
]  # fmt: skip

_HOMES = {
    "LoraBuildError": "errors",
    "MergeError": "errors",
    "PlanError": "errors",
    "RecipeError": "errors",
    "ScoreError": "errors",
    "SourceError": "errors",
    "StorageError": "errors",
    "VerificationError": "errors",
    "build": "pipeline",
    "plan": "pipeline",
    "Build": "proof.builds",
    "Plan": "proof.builds",
    "diff": "proof.diff",
    "BuildDiff": "proof.comparing.result",
    "load_recipe": "recipe.compose",
    "verify": "proof.verify",
    "Manifest": "proof.manifest",
    "Verification": "proof.verify",
    "Recipe": "recipe.schema",
    "inspect": "planning.inspection.inspecting",
    "Inspection": "planning.inspection.result",
    "lock": "planning.locking",
    "Locking": "planning.locking",
    "LoraModel": "wrapper.model",
    "ForwardReport": "proof.forward.report",
    "WrapperReport": "proof.wrapper_check",
    "score": "scores.scoring",
    "Scored": "scores.scoring",
    "init": "start.init",
    "NewRecipe": "start.init",
    "builds": "keeping.listing",
    "ListedBuild": "keeping.listing",
    "check": "keeping.checking",
    "CheckedFile": "keeping.checking",
    "gc": "keeping.collecting",
    "explain": "keeping.explaining",
    "Explanation": "keeping.explaining",
    "Collected": "keeping.collecting",
    "pin": "keeping.pins",
    "promote": "keeping.promoting",
    "Alias": "proof.aliases",
    "unpin": "keeping.pins",
    "report": "keeping.reporting",
    "Report": "pages.content",
    "Reported": "keeping.reporting",
    "merge": "start.merge",
    "Merged": "start.merge",
}


def __getattr__(name: str) -> object:
    """Import what is asked for and no more: `lora-build --help` needs none of it."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"lora_build.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lora_build' has no attribute '{name}'")
