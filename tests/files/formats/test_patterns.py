"""Patterns of an adapter's config: what Python's `re` says of them, in bounded time."""

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_build.files.formats.patterns import PatternError, PatternMap, Patterns

NAMES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")] + [
    "lm_head",
    "a b",
    "é.b",
]
PIECES = (
    "model", "layers", "0", ".", r"\.", ".*", r"\d+", "(q|up)_proj", "[^.]*", "lm_head$", "^", r"\b", "(?:mlp|x)", "é", " ",
    "_", "x?", "{1,2}", "(?!self)", "(?=mlp)", r"(a)\1", "[[:alpha:]]", "{,1}", r"\Z", "+", "*", "|", "(?i:LM)", r"\w",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join))
@example(r"x{,1}lm_head")
@example("[[:alpha:]]+")
@example(r".*(?<!up)_proj")
def test_a_pattern_means_what_it_means_to_python(pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(rf"(.*\.)?({pattern})$")
        expected = [re.match(rf"(.*\.)?({pattern})$", name) is not None for name in NAMES]
    except re.error:
        with pytest.raises(PatternError, match="is not a regular expression"):
            Patterns([pattern], of_last_parts=True)
        return
    found = Patterns([pattern], of_last_parts=True).first_of(NAMES)

    assert [found[name] is not None for name in NAMES] == expected


def test_the_first_key_that_matches_counts() -> None:
    patterns = PatternMap({"layers.0.*": 1, "self_attn.q_proj": 2, "up.proj": 3, "q_proj": 4})

    assert [patterns.value(name, 0) for name in NAMES[:5]] == [1, 1, 2, 3, 0]
    assert patterns == {"layers.0.*": 1, "self_attn.q_proj": 2, "up.proj": 3, "q_proj": 4}


def test_nested_repetition_is_no_trouble_where_it_is_regular() -> None:
    patterns = Patterns(["([a-z.0-9_]+)+!", ".*" * 30 + "#", "(.*a|.*)*#"], of_last_parts=True)

    assert patterns.first("model.layers.0.self_attn.q_proj.and.more.of.it") is None


def test_what_only_backtracks_is_given_a_second_and_then_refused() -> None:
    patterns = Patterns([r"(?!x)([a-z.0-9_]+)+!"])
    started = time.monotonic()

    with pytest.raises(PatternError, match="takes more than a second"):
        patterns.first_of(NAMES[:4])
    assert time.monotonic() - started < 20  # one second of a processor, however busy the machine is


def test_as_many_plain_names_as_modules_take_no_time() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(30) for j in range(100)]
    found = Patterns(names, of_last_parts=True).first_of(f"language_model.{name}" for name in names)

    assert list(found.values()) == list(range(3000))


def test_plain_names_of_too_many_shapes_are_refused() -> None:
    shapes = ["".join("." if place >> bit & 1 else "a" for bit in range(12)) for place in range(4096)]
    patterns = Patterns(shapes, of_last_parts=True)

    assert patterns.first("x.aaaaaaaaaaaa") == 0
    with pytest.raises(PatternError, match="of too many shapes for so many modules"):
        patterns.first_of(f"x.b{n:011d}" for n in range(600))


def test_too_many_patterns_for_too_many_names_are_refused() -> None:
    patterns = Patterns([f"never{i}.*" for i in range(300)], of_last_parts=True)

    with pytest.raises(PatternError, match="are too many for so many modules"):
        patterns.first_of(f"m{i}" for i in range(400))


def test_a_pattern_that_takes_long_to_compile_is_given_a_second_and_then_refused() -> None:
    sets = "".join(f"[\\x{n:02x}-\\uffff]" for n in range(1, 150))
    began = time.monotonic()
    with pytest.raises(PatternError, match="takes more than a second"):
        Patterns([f"(?i:{sets})"]).first("q_proj")
    assert time.monotonic() - began < 12


def test_a_caseless_pattern_that_is_none_is_refused() -> None:
    assert Patterns(["(?i)Q_PROJ"]).first("q_proj") == 0
    with pytest.raises(PatternError, match="is not a regular expression"):
        Patterns(["(?i)q_proj("])


def test_what_stands_before_a_mark_is_found_by_it_and_the_first_key_counts() -> None:
    patterns = PatternMap({"a.q": 1, "a.k": 2, "b": 3})

    for _ in range(2):
        assert patterns.before(".") == {"a": 1, "b": 3}
    assert patterns.before("#") == {"a.q": 1, "a.k": 2, "b": 3}
