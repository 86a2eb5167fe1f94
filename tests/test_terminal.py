"""Text that anybody may have written, as a terminal shows it."""

import pickle
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_build.errors import PlanError, RecipeError
from lora_build.terminal import escaped, masked, without_secrets


@given(st.text(st.characters(codec=None), max_size=20))
@settings(max_examples=50)
def test_no_text_brings_along_what_a_terminal_would_obey(text: str) -> None:
    shown = escaped(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert escaped(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("‖s·B@A‖ ≤ 3, größer, 模型", "‖s·B@A‖ ≤ 3, größer, 模型"),
        ("\x1b]0;pwned\x07\x1b[2J\nlora-build: ok", r"\x1b]0;pwned\x07\x1b[2J\nlora-build: ok"),
        ("\x9b31m \x7f \r \t", r"\x9b31m \x7f \r \t"),
        ("a\u202eb\u2066c\u200fd\u061c", r"a\u202eb\u2066c\u200fd\u061c"),
        ("a\u2028b\u2029c\u200bd\ufeff\u2060\U000e0041", r"a\u2028b\u2029c\u200bd\ufeff\u2060\U000e0041"),
        ("b\udcff", r"b\udcff"),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_what_is_not_seen_is_written_out(text: str, shown: str) -> None:
    assert escaped(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@hub.acme/x", "https://***@hub.acme/x"),
        ("http://user:p@ss@hub.acme:8080/x y", "http://***@hub.acme:8080/x y"),
        ("see 'https://us'er:p'a!$&(b)*+,;=\"c@d@hub.acme/x', please", "see 'https://***@hub.acme/x', please"),
        ("https://user:pa#ss?word@hub.acme#x", "https://***@hub.acme#x"),
        ("https://user:p'w@hub.acme", "https://***@hub.acme"),
        ("https://hub.acme/x?a=b'c&d=e'f", "https://hub.acme/x?***"),
        ("('https://hub.acme/x?a=b'c').", "('https://hub.acme/x?***')."),
        ("'https://hub.acme/x?' and 'password=' here", "'https://hub.acme/x?' and 'password=' here"),
        ("password=it's", "password=***"),
        ("['password=it's', 'token=b']", "['password=***', 'token=***']"),
        ("at 'https://hub/x?token=1&a=2' now", "at 'https://hub/x?***' now"),
        ("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "hf_***"),
        ("token=abc and api_key=def", "token=*** and api_key=***"),
        ("authorization: Bearer abcdefgh12345", "authorization: Bearer ***"),
        ("/data/hf_datasets/hf_quant_config.json", "/data/hf_datasets/hf_quant_config.json"),
        ("acme/x@main", "acme/x@main"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize("piece", ["://", "://?", "hf_", "bearer ", "://a@", "token=", "?", "://'@", "token='.", "')"])
def test_no_text_takes_long_to_mask(piece: str) -> None:
    began = time.process_time()
    without_secrets(piece * 100_000)
    assert time.process_time() - began < 2


def test_secrets_are_masked_in_the_texts_of_json_and_not_in_the_json_of_texts() -> None:
    data = {"see": ['https://x/?q="a" for more', 'password=a"', 5, None, {"token=abcdefgh": True}]}
    assert masked(data) == {"see": ['https://x/?***"a" for more', 'password=***"', 5, None, {"token=***": True}]}


def test_an_error_has_only_the_lines_that_it_was_given() -> None:
    error = RecipeError(("one\n  two", "three"), issues=["one\ntwo"])
    assert str(error) == "one\\n  two\n  three"
    assert error.issues == ("one\\ntwo",)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.lines, again.issues) == (str(error), error.lines, error.issues)
    assert str(error.ending("; x")) == "one\\n  two\n  three; x"
    assert str(PlanError(["a: \x1b[2J\nb"])) == "cannot plan this build:\n  a: \\x1b[2J\\nb"
