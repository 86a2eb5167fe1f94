"""Whose tokenizer the output has: the base's, or that of an adapter, as a whole.

The base's is used unless an adapter brings tokens that the base's lacks and was trained on the rows of tokens, be they
new or padding until then: without its own tokenizer no text would reach these. The recipe's `tokenizer` decides
otherwise, but never so that trained tokens are lost unseen. The token that ends a text follows the tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_build.errors import some_of
from lora_build.files.formats.checkpoint import GENERATION_CONFIG_NAME
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.json_object import PatchedJson, parse_object
from lora_build.files.formats.tokenizer import Tokenizer
from lora_build.files.identity import BASE, SourceName
from lora_build.models.heads import is_vocabulary
from lora_build.planning.inputs import Inputs
from lora_build.planning.planner import TensorPlan
from lora_build.recipe.schema import Recipe

_EOS = "eos_token_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """Whose tokenizer goes along, and what follows from it.

    Attributes:
        users: the adapters whose tokenizer it is, all with the same one; none where it is the base's.
        files: its files and its code.
        config_changes: top-level keys of config.json to set.
        generation: generation_config.json, where it changes.
        issues: what is wrong.
        notes: how tokenizers differ, and which is used.
    """

    users: tuple[SourceName, ...] = ()
    files: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    generation: PatchedJson | None = None
    issues: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose_tokenizer(recipe: Recipe, inputs: Inputs, planned: TensorPlan) -> TokenizerChoice:
    """Return whose tokenizer a build has."""
    base = inputs.tokenizers.get(BASE, Tokenizer(files={}))
    brought = {name: found for name, found in inputs.tokenizers.items() if not name.is_base}
    trained = _trained(inputs, planned, base)
    grown = {SourceName.of_adapter(name) for name in planned.regrown.values()}
    needed = [
        name for name, own in brought.items()
        if own.is_whole and (name in grown or (name in trained and new_tokens(own, base)))
    ]  # fmt: skip
    users, issues = _users(recipe, brought, needed, base)
    own = brought[users[0]] if users else base
    notes = [
        f"{name} brings {_what(found)}: {', '.join(_differences(found, base))}; "
        f"{_used(name, users, name in needed, brought)}"
        for name, found in brought.items()
        if found != base
    ]
    notes += [
        f"the vocabulary is that of {name}, which brings no whole tokenizer: check the base's"
        for name in sorted(grown)
        if name not in brought or not brought[name].is_whole
    ]
    notes += _without_text(inputs, grown, own, users[0] if users else BASE)
    unread = {name for name in trained - grown if name not in brought or not brought[name].is_whole}
    notes += _beyond_text(planned, unread, own, users[0] if users else BASE)
    if not users or issues:
        return TokenizerChoice(issues=tuple(issues), notes=tuple(notes))
    ends = _Ends.of(own, base, users[0], planned.config, inputs.generation_config)
    return TokenizerChoice(
        users=tuple(users), files=(*own.files, *own.code), config_changes=ends.config_changes,
        generation=ends.generation, issues=tuple(_misfits(users[0], own, base, inputs, planned.config)),
        notes=(*notes, *ends.notes),
    )  # fmt: skip


def new_tokens(own: Tokenizer, base: Tokenizer) -> list[str]:
    """Return the tokens that a tokenizer has and the base's has not; by name alone where a vocabulary is not known."""
    if own.tokens is None or base.tokens is None:
        return sorted(own.special - base.special)
    return sorted(own.tokens.keys() - base.tokens.keys(), key=lambda word: (own.tokens or {})[word])


def _users(
    recipe: Recipe, brought: Mapping[SourceName, Tokenizer], needed: Sequence[SourceName], base: Tokenizer
) -> tuple[list[SourceName], list[str]]:
    """Return the adapters whose tokenizer is used, by the recipe or because their tokens were trained."""
    wanted = recipe.tokenizer
    if wanted is None:
        if any(brought[name] != brought[needed[0]] for name in needed):
            named = " and ".join(needed)
            return [], [
                f"tokenizer: {named} were trained with tokens of their own, and their tokenizers differ; say whose is "
                f"used, tokenizer: {needed[0].adapter_name}, or merge only one of them"
            ]
        return list(needed), []
    if wanted == "base":
        return [], [
            f"tokenizer: base has no text for tokens that {name} was trained on "
            f"({_some(new_tokens(brought[name], base))}); leave it out, or write tokenizer: {name.adapter_name}"
            for name in needed
        ]
    name = SourceName.of_adapter(wanted)
    if name not in brought:
        return [], [
            f"tokenizer: {name} brings no tokenizer; expected base, or an adapter that brings one and is merged"
        ]
    if not brought[name].is_whole:
        files = ", ".join(brought[name].files)
        return [], [f"tokenizer: {name} brings only a part of a tokenizer ({files}); expected one with a vocabulary"]
    return [name], []


def _trained(inputs: Inputs, planned: TensorPlan, base: Tokenizer) -> set[SourceName]:
    """Return the adapters that were trained on rows of tokens: of an embedding, or of a head."""
    sizes = planned.config.vocab_sizes | inputs.base.config.vocab_sizes
    num_tokens = len(base.tokens or ()) or None
    found: set[str] = set()
    for op in planned.operations:
        if len(shape := op.source.shape) == 2 and is_vocabulary(op.name):
            many = num_tokens is not None and shape[0] >= num_tokens
            if many or shape[0] in sizes or op.name in planned.regrown:
                found.update(op.adapters)
    return {SourceName.of_adapter(name) for name in found}


def _without_text(inputs: Inputs, grown: set[SourceName], own: Tokenizer, user: SourceName) -> Iterator[str]:
    """Yield which adapters trained rows for which the tokenizer that is used has no token: no text reaches these."""
    if own.tokens is None:
        return
    numbers = set(own.tokens.values())
    for adapter in inputs.adapters:
        if adapter.source not in grown and (rows := sorted(adapter.config.trained_tokens - numbers)):
            yield (
                f"{adapter.source} trained rows for which the tokenizer of {user} has no token "
                f"({some_of([str(row) for row in rows])}): no text reaches them; put the tokenizer that it was trained "
                f"with into {adapter.source}"
            )


def _beyond_text(planned: TensorPlan, unread: set[SourceName], own: Tokenizer, user: SourceName) -> Iterator[str]:
    """Yield which adapters bring an embedding with more rows than the tokenizer has tokens, and no tokenizer of theirs.

    Args:
        planned: the output's tensors.
        unread: the adapters without a tokenizer.
        own: the tokenizer that is used.
        user: whose it is.
    """
    if not own.tokens:
        return
    last = max(own.tokens.values())
    rows = {
        op.source.source: op.source.shape[0] for op in planned.operations
        if op.source.source in unread and len(op.source.shape) == 2 and is_vocabulary(op.name)
    }  # fmt: skip
    for name in sorted(rows):
        if rows[name] > last + 1:
            yield (
                f"{name} trained all {rows[name]:,} rows for tokens, and the tokenizer of {user} has text for "
                f"the first {last + 1:,}: if it was trained with more tokens, put its tokenizer into {name}"
            )


def _misfits(name: SourceName, own: Tokenizer, base: Tokenizer, inputs: Inputs, config: ModelConfig) -> Iterator[str]:
    """Yield what keeps a tokenizer from a model: tokens that it has no rows for, code that is another there."""
    if own.tokens and config.vocab_sizes and (last := max(own.tokens.values())) >= max(config.vocab_sizes):
        yield (
            f"tokenizer: {name} has a token of the number {last}, the model only {max(config.vocab_sizes)} rows for "
            "tokens; expected the tokenizer that the base was resized for: merge the trained embedding, or write "
            "tokenizer: base"
        )
    for file, digest in own.code.items():
        if file in inputs.base.side_files and base.code[file] != digest:
            yield f"{name}/{file}: is another than the base's, whose code may need that; make the two the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """What says where a text ends, once a tokenizer with another such token is used."""

    config_changes: Mapping[str, Any] = field(default_factory=dict)
    generation: PatchedJson | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, own: Tokenizer, base: Tokenizer, name: SourceName, config: ModelConfig, generation: str | None
    ) -> "_Ends":
        """Return the changes for an adapter's tokenizer in place of the base's."""
        if own.eos is None or (own.eos, own.eos_id) == (base.eos, base.eos_id):
            return cls()
        if own.eos_id is None:
            return cls(
                notes=(f"{name} ends texts with {_shown(own.eos)}, whose number is not known: nothing follows it",)
            )
        changes: dict[str, Any] = {}
        if config.data.get(_EOS) is not None:
            changes = _with_eos(config.data, own.eos_id, base.eos_id)
        for key, part in config.nested.items():
            if part.get(_EOS) is not None and (inner := _with_eos(part, own.eos_id, base.eos_id)):
                changes[key] = {**part, **inner}
        patched = None
        if generation is not None:
            data = parse_object(generation, f"{BASE}/{GENERATION_CONFIG_NAME}:")
            if inner := _with_eos(data, own.eos_id, base.eos_id):
                patched = PatchedJson(text=generation, changes=inner)
        files = [GENERATION_CONFIG_NAME] * (patched is not None) + ["config.json"] * bool(changes)
        where = " and ".join(files) or "no file"
        note = f"{_EOS} of {name}'s tokenizer, {own.eos_id} for {_shown(own.eos)}, goes into {where}"
        return cls(config_changes=changes, generation=patched, notes=(note,))


def _with_eos(data: Mapping[str, Any], new: int, old: int | None) -> dict[str, Any]:
    """Return the key to set so that a text ends with a token: it takes the place of the old one among several."""
    ends = data.get(_EOS)
    if ends == new or (isinstance(ends, list) and new in ends):
        return {}
    return {_EOS: [new, *(end for end in ends if end != old)] if isinstance(ends, list) else new}


def _differences(own: Tokenizer, base: Tokenizer) -> Iterator[str]:
    """Yield how a tokenizer differs from the base's."""
    if not base.files:
        yield f"{len(own.tokens or ()):,} tokens, where the base has none" if own.tokens else "no tokenizer in the base"
        return
    found = [*_other_tokens(own, base)]
    if own.eos is not None and own.eos != base.eos:
        found.append(f"eos {_shown(own.eos)}, not {_shown(base.eos or 'none')}")
    if own.templates != base.templates and (own.templates or own.is_whole):
        both = bool(own.templates and base.templates)
        one = (
            "a chat template, where the base has none" if own.templates else "no chat template, where the base has one"
        )
        found.append("another chat template" if both else one)
    if not found:
        names = [name for name, digest in own.files.items() if base.files.get(name) != digest]
        found.append(f"other settings ({', '.join(names)})" if own.is_whole and names else "nothing new")
    yield from found


def _other_tokens(own: Tokenizer, base: Tokenizer) -> Iterator[str]:
    """Yield how the tokens differ from the base's, and which of them are special."""
    if own.tokens is not None and base.tokens is not None:
        new, gone = new_tokens(own, base), sorted(base.tokens.keys() - own.tokens.keys())
        if own.is_whole and own.tokens != base.tokens:
            more = [f"new: {_some(new)}"] if new else []
            more += [f"gone: {_some(gone)}"] if gone else []
            yield f"{len(own.tokens):,} tokens, not {len(base.tokens):,} ({'; '.join(more) or 'other numbers'})"
        elif new:
            yield f"tokens that the base's has not ({_some(new)})"
    if own.special != base.special and own.special:
        added, left = sorted(own.special - base.special), sorted(base.special - own.special)
        more = [f"special tokens {_some(added)}"] if added else []
        yield " ".join(more + ([f"without special {_some(left)}"] if left and own.is_whole else [])) or "fewer special"


def _what(own: Tokenizer) -> str:
    return "a tokenizer" if own.is_whole else f"a part of a tokenizer ({', '.join(own.files)})"


def _used(name: SourceName, users: Sequence[SourceName], needed: bool, brought: Mapping[SourceName, Tokenizer]) -> str:
    """Return which tokenizer is used, seen from one that an adapter brings, and why."""
    if name in users:
        return "it is used, as its tokens were trained" if needed else "it is used, as the recipe says"
    part = "" if brought[name].is_whole else "a part replaces nothing, "
    if not users:
        return f"{part}the base's is used"
    lost = new_tokens(brought[name], brought[users[0]]) if needed else []
    return f"{part}that of {users[0]} is used" + (f", and trained tokens have no text ({_some(lost)})" if lost else "")


def _some(words: Sequence[str]) -> str:
    return some_of([_shown(word) for word in words])


def _shown(word: str) -> str:
    """Return a token as a line may show it."""
    text = word if word.isprintable() else word.encode("unicode_escape").decode()
    return text if len(text) <= 40 else f"{text[:37]}..."
