"""JSON that others wrote: each key once, no deeper and no more of it than a model's files have."""

import json

import pytest

from lora_build.errors import SourceError
from lora_build.files.formats import json_object
from lora_build.files.formats.json_object import decode_json, parse_object


def refusal(text: str) -> str:
    with pytest.raises(SourceError) as caught:
        parse_object(decode_json(text.encode(), "base/x.json:"), "base/x.json:")
    return str(caught.value)


@pytest.mark.parametrize("text", ['{"r": 1, "r": 2}', '{"a": [{"r": 1, "b": 0, "r": 1}]}'])
def test_a_key_that_is_there_twice_is_refused_on_any_level(text: str) -> None:
    assert refusal(text) == "base/x.json: names 'r' twice; delete the one that is wrong"


def test_the_last_of_many_keys_is_found_twice_in_linear_time() -> None:
    text = "{" + ",".join(f'"{n}": 0' for n in (*range(100_000), 99_999)) + "}"

    assert "names '99999' twice" in refusal(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 99 + "]" * 99, "is not a JSON object"),
        ('{"a": ' * 101 + "{}" + "}" * 101, "is nested more than 100 deep"),
        ('{"a": ' * 100_000, "is not JSON"),
        ('{"a": [' + "{}," * 750_000 + "0]}", "has more than 750000 values"),
        ('{"a": "' + "x" * 4_000_000 + 'é"}', "bytes and is not ASCII"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON (Exceeds the limit"),
        ("\ufeff{}", "is not JSON (Unexpected UTF-8 BOM"),
    ],
    ids=["a list", "deep", "deeper", "many values", "long and not ASCII", "a long number", "BOM"],
)
def test_what_no_model_has_is_refused(text: str, said: str) -> None:
    assert said in refusal(text)


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them() -> None:
    assert json.dumps(parse_object('{"a": -Infinity, "b": [NaN]}', "")) == '{"a": -Infinity, "b": [NaN]}'


@pytest.mark.parametrize("text", ["[0,0,0,0,0]", '{"a":{"a":{"a":{"a":{}}}}}', "[[[[[]]]]]"])
def test_values_are_counted_by_all_that_begins_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_object, "_MAX_VALUES", 5)
    assert decode_json(text.encode(), "x") == text

    monkeypatch.setattr(json_object, "_MAX_VALUES", 4)
    with pytest.raises(SourceError, match="has more than 4 values"):
        decode_json(text.encode(), "x")
