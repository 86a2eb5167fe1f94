"""What an adapter's config promises and its file lacks: trainers lose tensors (DeepSpeed, FSDP, their own state_dict).

Of a module that was trained whole, of trained tokens and of a task's head peft raises KeyError, and so it is an issue
here. Factors that are missing it takes for an update of nothing, and warns: a remark, since who is to have some only
transformers tells.
Source: `peft/utils/save_and_load.py` set_peft_model_state_dict, `peft/utils/other.py` AuxiliaryTrainingWrapper.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.patterns import PatternError
from lora_build.methods.trainable_tokens import TrainableTokens
from lora_build.planning.adapters import MergeableAdapter
from lora_build.planning.inputs import Inputs, may_be_tied
from lora_build.planning.layout import Layout, is_plain
from lora_build.planning.shared import once
from lora_build.planning.targets import Targets

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# what peft adds to modules_to_save by itself, whichever of them a model has; and the end of the classes that have one
_HEADS = {
    "SEQ_CLS": (("classifier", "score"), "ForSequenceClassification"),
    "TOKEN_CLS": (("classifier", "score"), "ForTokenClassification"),
    "QUESTION_ANS": (("qa_outputs",), "ForQuestionAnswering"),
}
_ADAPTED = ("Linear", "Conv1D", "Embedding")
_REMEDY = "it was lost when the adapter was saved: save it once more with peft's save_pretrained, without a state_dict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What is missing that cannot be done without, and what can."""

    issues: tuple[str, ...]
    remarks: tuple[str, ...]


def promises(layout: Layout, adapters: Sequence[MergeableAdapter], inputs: Inputs) -> Promises:
    """Return what the configs of adapters promise and their files lack.

    Args:
        layout: the output's tensors.
        adapters: those that are merged.
        inputs: what they were read from; where transformers says nothing of the base, less is told.
    """
    is_known = inputs.facts is not None and not inputs.facts.problem
    found = [_of_adapter(layout, mergeable, inputs, is_known=is_known) for mergeable in adapters]
    return Promises(
        issues=tuple(issue for one in found for issue in one.issues),
        remarks=tuple(remark for one in found for remark in one.remarks),
    )


def _of_adapter(layout: Layout, mergeable: MergeableAdapter, inputs: Inputs, *, is_known: bool) -> Promises:
    """Return what one adapter's config promises and its file lacks."""

    def look() -> Promises:
        step = _Promised(layout, mergeable, is_known=is_known)
        more = is_known and layout.layers is None
        return Promises(
            issues=(*step.saved(), *step.tokens(), *(step.saved_elsewhere() if more else ())),
            remarks=tuple(step.factors() if more else ()),
        )

    of = (layout, mergeable.adapter.config, mergeable.parts)
    return once(inputs.shared, of, ("promises", is_known), look, size=len(mergeable.adapter.tensors))


class _Promised:
    """One adapter, beside the output's layout."""

    def __init__(self, layout: Layout, mergeable: MergeableAdapter, *, is_known: bool) -> None:
        self._layout = layout
        self._adapter = mergeable.adapter
        self._is_known = is_known
        self._where = f"{mergeable.adapter.source}/{CONFIG_NAME}"

    def saved(self) -> Iterator[str]:
        """Yield an issue for each module that was trained whole, and of which the file holds nothing."""
        config = self._adapter.config
        own, in_base = _modules(self._adapter.parts.replaced), _modules(self._layout.base.tensors)
        heads, end = _HEADS.get(config.task_type or "", ((), ""))
        if self._adapter.peft_type == TrainableTokens.peft_type:  # which trains nothing else, whatever the task
            heads = ()
        if heads and not _has(own, heads):
            classes = self._layout.base.config.architectures
            if _has(in_base, heads) or not any(name.endswith(end) for name in classes):
                yield (
                    f"{self._where}: task_type {config.task_type} promises a trained {' or '.join(heads)}, and the "
                    f"adapter's file holds none; {_REMEDY}; or, if {', '.join(classes) or 'the base'} itself was "
                    "trained, set task_type to null there and take these names out of modules_to_save"
                )
        for name in config.saved_modules:
            if name in heads or _has(own, (name,)):
                continue
            if _has(in_base, (name,)) or self._is_tied(name):
                yield (
                    f"{self._where}: modules_to_save promises a trained {name}, which the base has, and the adapter's "
                    f"file holds nothing of it; {_REMEDY}; or take {name} out of modules_to_save to leave it as it is"
                )

    def saved_elsewhere(self) -> Iterator[str]:
        """Yield an issue if a module that was trained whole in every layer is in the file for some layers only."""
        names, saved = self._layout.names, self._adapter.config.saved_modules
        covered: set[str] = set()
        paths: dict[str, str] = {}
        for path in self._adapter.parts.replaced:
            if (found := names.find(path)) is not None and is_plain(found) and _has(_modules([path]), saved):
                covered.add(disk := found.parts[0].name)
                paths[_NUMBER.sub("*", disk)] = _NUMBER.sub("*", path)
        missing = [
            name for name in self._layout.base.tensors
            if name not in covered and (template := paths.get(_NUMBER.sub("*", name))) and names.is_in_memory(name)
            and _has(_modules([_in_layer(template, name)]), saved)
        ]  # fmt: skip
        if missing:
            yield (
                f"{self._where}: modules_to_save ({', '.join(saved)}) promises {len(missing)} trained tensors that the "
                f"adapter's file holds for other layers alone, such as {missing[0]}; {_REMEDY}; or name the modules by "
                "their layers there"
            )

    def tokens(self) -> Iterator[str]:
        """Yield an issue for each embedding whose trained rows the file lacks."""
        asked = self._adapter.config.data.get("trainable_token_indices")
        own = self._adapter.parts.tokens
        for name in asked if isinstance(asked, dict) else ["the embedding"] if asked else ():
            is_there = any(path.endswith(name) for path in own) if isinstance(asked, dict) else bool(own)
            if is_there or (isinstance(asked, dict) and (not asked[name] or (own and self._is_tied(name)))):
                continue
            yield (
                f"{self._where}: trainable_token_indices promises trained tokens of {name}, and the adapter's file "
                f"holds none; {_REMEDY}; or set trainable_token_indices to null to merge the rest"
            )

    def _is_tied(self, module: str) -> bool:
        return self._is_known and self._layout.tied_weights.shared(f"{module}.weight")

    def factors(self) -> Iterator[str]:
        """Yield a remark if the config targets modules beside those of the file that it holds no factors for."""
        if self._adapter.peft_type == TrainableTokens.peft_type or self._adapter.parts.wrapped:
            return
        targets = Targets(self._adapter, self._layout.base.config.model_type)
        candidates = dict(self._beside())
        try:
            targets.look_at(candidates)
            missing = [name for module, name in candidates.items() if not targets.why_not(module)]
        except PatternError as error:
            yield f"{self._adapter.source}: whether factors are missing cannot be told: {error}"
            return
        names = self._layout.names
        types = {name: module.layer_type for name in missing if (module := names.module(name))}
        adapted = _ADAPTED[:2] if targets.are_all else _ADAPTED
        missing = [name.removesuffix(".weight") for name in missing if types.get(name) in adapted]
        if missing:
            yield (
                f"{self._adapter.source}: its config targets {len(missing)} modules for which its file holds no "
                f"factors, such as {missing[0]}; they stay as they are in the base, as in peft, which warns of them"
            )

    def _beside(self) -> Iterator[tuple[str, str]]:
        """Yield modules that lie beside those with factors, in any layer, by their paths at training time.

        Elsewhere may be what the adapter's model had not got: the tower of a model of pictures, layers that predict
        more tokens. Each comes with its tensor on disk, of which transformers makes a parameter as it is.
        """
        names, factors = self._layout.names, self._adapter.parts.factors
        covered: set[str] = set()
        parents: dict[str, str] = {}
        for module in factors:
            found = names.find(f"{module}.weight")
            if found is None or not is_plain(found):
                continue
            disk = found.parts[0].name
            covered.add(disk)
            parents.setdefault(_NUMBER.sub("*", _parent(disk)), _NUMBER.sub("*", _parent(f"{module}.weight")))
        for name, tensor in self._layout.base.tensors.items():
            if (
                name in covered
                or not name.endswith(".weight")
                or len(tensor.shape) != 2
                or not names.is_in_memory(name)
            ):
                continue
            above = _parent(name)
            template = parents.get(_NUMBER.sub("*", above))
            if template is not None and not may_be_tied(name):
                yield _in_layer(template, above) + name.removeprefix(above).removesuffix(".weight"), name


def _in_layer(template: str, name: str) -> str:
    """Return a path with `*` for its numbers in the layers that the name of another one lies in."""
    numbers = iter(_NUMBER.findall(name))
    return re.sub(r"\*", lambda _: next(numbers, "*"), template)


def _parent(parameter: str) -> str:
    """Return the path of what a parameter's module is in, with a dot at its end: `model.layers.0.self_attn.`."""
    outer = parameter.rpartition(".")[0].rpartition(".")[0]
    return f"{outer}." if outer else ""


def _modules(parameters: Iterable[str]) -> frozenset[str]:
    """Return the modules that parameters lie in, the outer ones too."""
    found: set[str] = set()
    for path in parameters:
        while (path := path.rpartition(".")[0]) and path not in found:
            found.add(path)
    return frozenset(found)


def _has(modules: Iterable[str], names: Sequence[str]) -> bool:
    """Whether one of some modules ends in one of some names, as peft compares them."""
    return any(module.endswith(tuple(names)) for module in modules)
