"""What an adapter's config targets: its file may hold no factors of other modules, since peft would ignore them.

Semantics of `peft/tuners/tuners_utils.py` check_target_module_exists and _inject_parameters, peft 0.21. Both config and
keys are of the model as it was in memory when it was trained, so no base is needed to compare them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from lora_build.errors import some_of
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.patterns import PatternError, PatternMap, Patterns
from lora_build.methods.interface import Method
from lora_build.methods.trainable_tokens import TrainableTokens
from lora_build.planning.inputs import may_be_tied

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def config_problems(adapter: Adapter, method: Method, model_type: str | None = None) -> list[str]:
    """Return what in a config keeps its adapter from being merged, one line each.

    All its patterns are matched with all names here, once: what is asked of them later is remembered.

    Args:
        adapter: the adapter.
        method: its method.
        model_type: the base's, where there is one: it tells what peft targets if the config does not.
    """
    where, data = f"{adapter.source}/{CONFIG_NAME}", adapter.config.data
    if problems := [f"{where}: {problem}" for problem in method.check_config(data)]:
        return problems
    modules = list(adapter.parts.factors)
    parameters = {str(target).rpartition(".")[2] for target in data.get("target_parameters") or ()}
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := data.get(key), PatternMap):
            try:
                pattern.patterns.first_of([*modules, *(f"{m}.{p}" for m in modules for p in sorted(parameters))])
            except PatternError as error:
                problems.append(f"{where}: {key}: {error}")
    try:
        problems += [f"{adapter.source}: {line}" for line in _untargeted(adapter, modules, model_type)]
    except PatternError as error:
        problems.append(f"{where}: target_modules, exclude_modules or layers_pattern: {error}")
    return problems


def default_targets(peft_type: str, model_type: str | None) -> str | Sequence[str] | None:
    """Return the modules that peft adapts in a model of some type where a config names none; None where it knows none.

    Source: `peft/utils/constants.py` TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and its like.
    """
    table = _default_targets()
    of_method = table.get(peft_type, {})
    found: str | Sequence[str] | None = (table[of_method] if isinstance(of_method, str) else of_method).get(model_type)
    return found


@cache
def _default_targets() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(resources.files(__package__).joinpath("default_targets.json").read_text())
    return found


def _untargeted(adapter: Adapter, modules: list[str], model_type: str | None) -> Iterator[str]:
    """Yield a line for each reason for which peft would ignore factors, with their modules."""
    wrapped = adapter.parts.wrapped
    missed: dict[str, list[str]] = {}
    targets = Targets(adapter, model_type)
    for module in modules:
        why = targets.why_not(module)
        # out_proj lies inside an attention block that is targeted as a whole
        if why and not (module in wrapped and any(not targets.why_not(outer) for outer in _above(module))):
            missed.setdefault(why, []).append(module)
    keeps_ties = adapter.config.keeps_ties or adapter.peft_type == TrainableTokens.peft_type
    if keeps_ties and any(may_be_tied(m) and not targets.why_not(m) for m in modules):
        # with ensure_weight_tying, or where it trains tokens, peft adapts, and saves, what shares a targeted weight
        missed = {why: kept for why, names in missed.items() if (kept := [n for n in names if not may_be_tied(n)])}
    for why, names in missed.items():
        yield (
            f"holds factors of {some_of(names)}, but {why} in its {CONFIG_NAME}, so peft would ignore them; correct "
            "the config, or take these tensors out of the file"
        )


def _above(module: str) -> Iterator[str]:
    while module := module.rpartition(".")[0]:
        yield module


class Targets:
    """What a config says of which modules are adapted."""

    def __init__(self, adapter: Adapter, model_type: str | None) -> None:
        """Take an adapter and the base's model_type, None where that is not known."""
        data = adapter.config.data
        wanted = data.get("target_modules")
        parameters = [str(target) for target in data.get("target_parameters") or ()]
        self._unnamed = "target_modules does not name them"
        if wanted is None and (wanted := default_targets(adapter.peft_type, model_type)) is not None:
            shown = wanted if isinstance(wanted, str) else ", ".join(wanted)
            self._unnamed = f"target_modules is null, which for a {model_type} means {shown},"
        # a type that peft does not know may be adapted anywhere; all-linear is any Linear
        self._all = wanted == "all-linear" or (wanted is None and not parameters)
        self._owners = _Names([target.rpartition(".")[0] for target in parameters])
        self._wanted = _Names(wanted)
        self._excluded = _Names(data.get("exclude_modules"))
        self._saved = tuple(data.get("modules_to_save") or ())
        self._layers = _Layers(data) if data.get("layers_to_transform") not in (None, []) else None

    @property
    def are_all(self) -> bool:
        """Whether every Linear is adapted, whatever its name."""
        return self._all

    def look_at(self, modules: Iterable[str]) -> None:
        """Match all patterns with modules at once, in the time that there is for all of them.

        Raises:
            PatternError: it takes longer.
        """
        for names in (self._wanted, self._excluded):
            names.look_at(modules)

    def why_not(self, module: str) -> str:
        """Return why a module is not adapted, an empty text if it is."""
        if module in self._owners:
            return ""
        if module in self._excluded:
            return "exclude_modules names them"
        if any(f".{name}." in f".{module}." for name in self._saved):
            return "modules_to_save has them whole"
        if self._all:
            return ""
        if module not in self._wanted:
            return self._unnamed
        is_by_end = self._wanted.are_ends and module not in self._wanted.ends
        return "layers_to_transform leaves their layers out" if is_by_end and self._is_other_layer(module) else ""

    def _is_other_layer(self, module: str) -> bool:
        return self._layers is not None and module not in self._layers


class _Names:
    """A list of the ends of modules' paths (an empty one is of any), or one pattern of whole paths."""

    def __init__(self, written: str | Sequence[str] | None) -> None:
        self.are_ends = not isinstance(written, str)
        self.ends = frozenset(written or ()) if self.are_ends else frozenset[str]()
        self._pattern = Patterns([written]) if isinstance(written, str) and written != "all-linear" else None

    def look_at(self, modules: Iterable[str]) -> None:
        """Match the pattern with all of them at once."""
        if self._pattern is not None:
            self._pattern.first_of(modules)

    def __contains__(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.first(module) is not None
        parts = module.split(".")
        return any(".".join(parts[start:]) in self.ends for start in range(len(parts) + 1))


class _Layers:
    """The modules in the layers of `layers_to_transform`, which the first number in their path tells.

    With `layers_pattern` it is a number behind what matches that.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        written, behind = data["layers_to_transform"], data.get("layers_pattern") or ()
        self._numbers = frozenset([written] if isinstance(written, int) else written)
        numbers = "|".join(map(str, sorted(self._numbers)))
        self._behind = Patterns(
            rf"(?:.*\.)?(?:{pattern})\.0*(?:{numbers})\..*"
            for pattern in ([behind] if isinstance(behind, str) else behind)
        ) if behind else None  # fmt: skip

    def __contains__(self, module: str) -> bool:
        if self._behind is not None:
            return self._behind.first(module) is not None
        found = _FIRST_NUMBER.match(module)
        return found is not None and int(found[1]) in self._numbers
