"""Resolving: from what a recipe says to what that is today.

Opens sources and reads headers and configs; of weights only what `digests_of` has to compare.
"""

import os
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from lora_build.errors import LoraBuildError, PlanError, SourceError, did_you_mean
from lora_build.files.formats.adapter import Adapter, open_adapter
from lora_build.files.formats.checkpoint import Checkpoint, open_checkpoint, read_generation_config
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.modules import NO_MODULES, AdapterModules, compare_modules
from lora_build.files.formats.tokenizer import read_tokenizers
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources import Source
from lora_build.files.sources.hub import open_hub
from lora_build.files.sources.local import folders_in, open_local
from lora_build.methods.interface import key_rules
from lora_build.models.heads import is_vocabulary
from lora_build.planning.inputs import Inputs, digests_of, may_change_ties, standing_apart
from lora_build.planning.local_map import mapped
from lora_build.planning.mapped_source import open_mapped
from lora_build.planning.pins import NO_PINS, Pins, held
from lora_build.planning.questions import Answers, ask_for_plan
from lora_build.planning.shared import Shared, once
from lora_build.recipe.identity import selected
from lora_build.recipe.keys import check_adapter, raise_problems
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe, resolve_path
from lora_build.recipe.values import is_local, parse_source

_Opened = TypeVar("_Opened", Checkpoint, Adapter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A recipe's inputs and the sources that they come from, by `base` and `adapters.<name>`."""

    inputs: Inputs
    sources: Mapping[SourceName, Source]


def resolve(
    recipe: Recipe,
    *,
    for_planning: bool = True,
    given: Mapping[SourceName, Source] | None = None,
    pins: Pins = NO_PINS,
    shared: Shared | None = None,
) -> Resolved:
    """Return a recipe's inputs as they are today.

    Args:
        recipe: names them.
        for_planning: whether they are to be planned with: then transformers says what the base is, and tokenizers are
            compared.
        given: the sources that are open already.
        pins: what is locked of the others.
        shared: what plans before this one have opened.

    Raises:
        PlanError: several of them cannot be opened; names each.
        VerificationError: what was locked of them is not there.
        LoraBuildError: one of them cannot, with its own kind of error.
    """
    sources: dict[SourceName, Source] = {}
    failures: list[LoraBuildError] = []

    def attempt(role: SourceName, spec: BaseSpec | AdapterSpec, read: Callable[[Source], _Opened]) -> _Opened | None:
        try:
            sources[role] = source = (given or {}).get(role) or open_source(recipe, role, spec, pins)
            return read(source)
        except LoraBuildError as error:
            failures.append(error)
            return None

    base = attempt(BASE, recipe.base, lambda source: _opened(shared, source, open_checkpoint))
    adapters = []
    for name, spec in selected(recipe).items():

        def read(source: Source, spec: AdapterSpec = spec) -> Adapter:
            modules = NO_MODULES if base is None else compare_modules(source, sources[BASE], base.side_files)
            return _open_adapter(source, spec, modules, shared)

        adapters.append(attempt(SourceName.of_adapter(name), spec, read))
    if failures:
        raise together(failures)
    taking_part = tuple(adapter for adapter in adapters if adapter is not None)
    assert base is not None
    answers = _answers(recipe, base, taking_part, shared) if for_planning else Answers()
    inputs = _inputs(sources, base, taking_part, answers, for_planning=for_planning)
    return Resolved(inputs=replace(inputs, shared=shared), sources=sources)


def _opened(shared: Shared | None, source: Source, read: Callable[[Source], _Opened], key: Hashable = None) -> _Opened:
    return read(source) if shared is None else shared.opened(source, key, read)


def _open_adapter(source: Source, spec: AdapterSpec, modules: AdapterModules, shared: Shared | None) -> Adapter:
    packing, ignored = spec.expert_packing.value, spec.ignore_files
    read = partial(
        open_adapter, rules=key_rules, expert_packing=packing, ignore_files=ignored, modules=modules
    )  # fmt: skip
    return replace(_opened(shared, source, read, (packing, ignored, modules)), weight=spec.weight, density=spec.density)


def _answers(recipe: Recipe, base: Checkpoint, adapters: tuple[Adapter, ...], shared: Shared | None) -> Answers:
    """Return what transformers says of opened inputs; equal facts of one base are one object."""
    of = (base, *(part for adapter in adapters for part in (adapter.config, adapter.parts)))
    key = ("answers", recipe.numerics, str(recipe.dtype), *(adapter.source for adapter in adapters))
    size = len(base.tensors) + sum(len(adapter.tensors) for adapter in adapters)
    found = once(shared, of, key, lambda: ask_for_plan(recipe, base, adapters), size=size)
    model = found.facts and found.facts.model
    facts = once(shared, (base,), ("facts", model), lambda: found.facts, size=len(base.tensors))
    return replace(found, facts=facts) if facts == found.facts else found


def _inputs(
    sources: Mapping[SourceName, Source],
    base: Checkpoint,
    opened: tuple[Adapter, ...],
    answers: Answers,
    *,
    for_planning: bool,
) -> Inputs:
    """Return the inputs that opened sources are, with what is read of them beside headers."""
    trains_rows = any(_trains_rows(adapter, base.config) for adapter in opened)
    tokenizers = read_tokenizers(sources, trains_rows=trains_rows) if for_planning else {}
    return Inputs(
        base=base, adapters=opened, digests=digests_of(sources, opened), tokenizers=tokenizers,
        generation_config=read_generation_config(sources[BASE]) if tokenizers else None,
        facts=answers.facts, of_layers=answers.of_layers, heads=answers.heads,
        apart=standing_apart(sources[BASE], base, answers.facts) if any(map(may_change_ties, opened)) else frozenset(),
    )  # fmt: skip


def _trains_rows(adapter: Adapter, config: ModelConfig) -> bool:
    """Whether an adapter was trained on rows of tokens that it names, or on a whole embedding or head of them."""
    whole = (
        path for path, t in adapter.parts.replaced.items() if len(t.shape) == 2 and t.shape[0] in config.vocab_sizes
    )
    return bool(adapter.config.trained_tokens) or any(map(is_vocabulary, whole))


def together(failures: list[LoraBuildError]) -> LoraBuildError:
    """Return one error for all failures, of their own kind where they share it."""
    messages = [str(failure) for failure in failures]
    if len(set(messages)) == 1:  # one, or what none of them is the cause of, such as the environment
        return failures[0]
    kinds = {type(failure) for failure in failures}
    return (
        kinds.pop()((f"{len(messages)} inputs cannot be read:", *messages), issues=messages)
        if len(kinds) == 1
        else PlanError(messages)
    )


def open_source(recipe: Recipe, role: SourceName, spec: BaseSpec | AdapterSpec, pins: Pins = NO_PINS) -> Source:
    """Return where an input comes from: a directory, or a Hub repository at a commit, held to what is locked of it."""
    pin = pins.sources.get(role)
    revision = spec.revision if pin is None else pin.commit
    place = None if is_local(str(spec.source)) else mapped(recipe, str(spec.source), (revision, spec.revision))
    if place is None:
        source = open_named(recipe, role, spec, revision)
    else:
        source = open_mapped(role, str(spec.source), revision, place)
    return source if pin is None else held(source, pin, pins)


def open_named(recipe: Recipe, role: SourceName, spec: BaseSpec | AdapterSpec, revision: str | None) -> Source:
    """Return where an input is by its name: a directory, or a repository on the Hub itself at a revision."""
    assert spec.source is not None, "a recipe's build as a base is opened by who has built it"
    if is_local(spec.source):
        return open_local(role, spec.source, resolve_path(recipe, spec.source))
    try:
        return open_hub(role, spec.source, revision)
    except LoraBuildError as error:
        path = resolve_path(recipe, spec.source)
        if path.is_dir():
            raise error.ending(f"; there is a folder {spec.source} here: for it write ./{spec.source}") from error
        if "/" in spec.source and path.parent.is_dir():
            near = did_you_mean(path.name, folders_in(path.parent))
            raise error.ending(f"; nor is there a folder {spec.source} here{near}") from error
        raise


def split_reference(role: str, written: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return source and revision of what a user wrote; a folder that exists is meant before a repository."""
    text = os.fspath(written)
    path = resolve_path(Recipe(), text)
    if path.is_file():
        pickled = "; pickled weights are never opened: convert them to safetensors" if path.suffix == ".bin" else ""
        raise SourceError(f"{role}: {text} is a file; expected the folder that holds it: {path.parent}{pickled}")
    if is_local(text):
        return text, None
    if text and (path.is_dir() or not isinstance(written, str)):
        return f"./{text}", None
    no_repository = r"[\w.-]+(/[\w.-]+){2,}/?" + (r"|[\w.-]+" if role in ("adapter", "build") else "")
    if re.fullmatch(no_repository, text):
        near = did_you_mean(path.name, folders_in(path.parent))
        raise SourceError(f"{role}: there is no folder '{text}' here, and a Hub repository is org/name{near}")
    raise_problems(role, check_adapter({"source": text}))
    return parse_source(text)
