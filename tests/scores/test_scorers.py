"""What scorers say, held to the demo's own program and to transformers asked token by token."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_build.errors import LoraBuildError, RecipeError, ScoreError, SourceError
from lora_build.scores.exact_match import normalized
from lora_build.scores.perplexity import windows
from scores.conftest import TINY, Measure, write_rows

TEXT = "Q: 12+34\nA: 46\nQ: reverse lamo\nA: omal\n"


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_score", TINY / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def live(demo: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(demo)


def log_p(live: tuple[Any, Any], ids: list[int], place: int) -> float:
    """Return log p of the token at a place after those before it, the model asked for it alone."""
    with torch.no_grad():
        logits = live[0](torch.tensor([ids[:place]])).logits[0, -1].double()
    return float(logits.log_softmax(-1)[ids[place]])


@pytest.mark.parametrize("skill", ["math", pytest.param("text", marks=pytest.mark.long)])
def test_exact_match_counts_the_answers_that_the_demo_s_own_program_counts(
    program: Any, measure: Measure, demo: Path, tmp_path: Path, skill: str
) -> None:
    asked = program.questions(skill)[:20]
    given = program.answers(demo, [question for question, _ in asked])
    right = sum(answer == expected for answer, (_, expected) in zip(given, asked, strict=True))
    data = write_rows(tmp_path / "x.jsonl", *({"prompt": q, "answer": a} for q, a in asked))
    found = measure("exact_match", data=data, max_new_tokens=8)
    assert found.metrics == {"exact_match": right / 20}
    assert found.details["of"] == 20
    assert right >= 17


def test_a_prompt_without_the_chat_template_is_the_text_itself(measure: Measure, tmp_path: Path) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", {"prompt": "12+34", "answer": "46"})
    plain = write_rows(tmp_path / "plain.jsonl", {"prompt": "Q: 12+34\nA: ", "answer": ["x", "46"]})
    assert measure("exact_match", data=chat).metrics == {"exact_match": 1.0}
    assert measure("exact_match", data=plain, chat=False).metrics == {"exact_match": 1.0}
    assert measure("exact_match", data=chat, chat=False).metrics == {"exact_match": 0.0}


def test_an_answer_ends_at_the_stop(measure: Measure, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "x.jsonl", {"prompt": "12+34", "answer": "4"})
    assert measure("exact_match", data=data, stop="6").metrics == {"exact_match": 1.0}
    assert measure("exact_match", data=data, max_new_tokens=1).metrics == {"exact_match": 1.0}
    wrong = measure("exact_match", data=data).details["wrong"]
    assert wrong == [{"prompt": "12+34", "expected": "4", "answer": "46"}]


def test_normalizing_compares_less_of_two_answers() -> None:
    assert normalized(" A  b\n", "none") == " A  b\n"
    assert normalized(" A  b\n", "strip") == "A  b"
    assert normalized(" A  b\n", "fold") == "a b"


@pytest.mark.long
def test_how_many_are_asked_at_once_changes_no_answer(measure: Measure, program: Any, tmp_path: Path) -> None:
    rows = [{"prompt": q, "answer": a} for skill in ("math", "text") for q, a in program.questions(skill)[:8]]
    data = write_rows(tmp_path / "x.jsonl", *rows)
    found = [measure("exact_match", data=data, batch_size=size, max_new_tokens=8) for size in (1, 5, 16)]
    assert found[0] == found[1] == found[2]


def test_every_token_but_the_first_is_scored_once_with_some_before_it() -> None:
    tried = 0
    for length in range(1, 40):
        for window in range(2, 12):
            for stride in range(1, window):
                found = windows(length, window, stride)
                scored = [place for _, first, end in found for place in range(first, end)]
                assert scored == list(range(1, length))
                assert all(start < first <= end <= start + window for start, first, end in found)
                tried += 1
    assert tried == 39 * 55


def test_perplexity_is_that_of_each_token_after_those_of_its_window(
    measure: Measure, live: tuple[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    ids = live[1](TEXT)["input_ids"]
    logs = []
    begin = end = 0
    while end < len(
        ids
    ):  # as transformers' page has it: windows of 16, 8 on; those of a token that another had are left out
        stop = min(begin + 16, len(ids))
        logs += [log_p(live, ids[begin:stop], place - begin) for place in range(max(end, 1), stop)]
        begin, end = begin + 8, stop
    expected = math.exp(-math.fsum(logs) / len(logs))
    for size in (1, 3):
        found = measure("perplexity", data="x.txt", window=16, stride=8, batch_size=size)
        assert found.metrics["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found.details == {"tokens": len(ids) - 1}


def test_choice_takes_the_option_that_is_the_likeliest_token_by_token(
    measure: Measure, live: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Q: 12+34\nA: ", "options": ["47", "46", "4"], "answer": 1},
        {"prompt": "Q: reverse lamo\nA: ", "options": ["omal", "lamo"], "answer": "omal"},
        {"prompt": "Q: 1+1\nA: ", "options": ["2", "17"], "answer": "17"},
    ]
    data = write_rows(tmp_path / "x.jsonl", *rows)
    for how in ("none", "tokens", "bytes"):
        right = 0
        for row in rows:
            prompt = live[1](row["prompt"])["input_ids"]
            values = []
            for option in row["options"]:
                ids = prompt + live[1](option, add_special_tokens=False)["input_ids"]
                total = math.fsum(log_p(live, ids, place) for place in range(len(prompt), len(ids)))
                values.append(total / {"none": 1, "tokens": len(ids) - len(prompt), "bytes": len(option)}[how])
            chosen = values.index(max(values))
            right += row["answer"] in (chosen, row["options"][chosen])
        found = measure("choice", data=data, normalize=how, batch_size=2)
        assert found.metrics == {"accuracy": right / 3}


def test_a_model_without_numbers_has_no_score(measure: Measure, demo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {k: torch.full_like(t, math.nan) for k, t in tensors.items()}, broken / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "x.txt").write_text(TEXT)
    data = write_rows(tmp_path / "x.jsonl", {"prompt": "a", "options": ["1", "2"], "answer": 0})
    assert math.isnan(measure("perplexity", broken, data="x.txt").metrics["perplexity"])
    assert math.isnan(measure("choice", broken, data=data).metrics["accuracy"])


def test_a_prompt_that_is_longer_than_the_model_takes_is_named(measure: Measure, demo: Path, tmp_path: Path) -> None:
    longest = json.loads((demo / "config.json").read_text())["max_position_embeddings"]
    data = write_rows(tmp_path / "x.jsonl", {"prompt": "1", "answer": "1"}, {"prompt": "1" * longest, "answer": "1"})
    with pytest.raises(ScoreError, match=rf"row 2 has \d+ tokens, expected 1 to {longest - 1}, since"):
        measure("exact_match", data=data)


def test_a_text_of_one_token_has_no_perplexity(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1")
    with pytest.raises(ScoreError, match="the text has 1 token"):
        measure("perplexity", data="x.txt")


BROKEN = {
    "exact_match": {
        b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"\n': "line 3: is not JSON",
        b'{"prompt": "a"}\n': "line 1: has no 'answer'; expected prompt, answer",
        b'{"prompt": "a", "answer": 3}': "line 1: expected text as answer, or a list of texts",
        b'{"prompt": "a", "answer": []}': "line 1: expected text as answer",
        b'{"prompt": "", "answer": "a"}': "line 1: expected text as prompt",
        b'{"prompt": "a", "answer": "a", "x\\u001b": 1}': r"line 1: has 'x\x1b'; expected prompt, answer and no more",
        b'["a"]': "line 1: expected an object",
        b'{"prompt": "a", "prompt": "b", "answer": "c"}': "line 1: is not JSON",
        b"\n\n": "is empty",
        b'{"prompt": "a", "answer": "b"}\n\xff': "line 2: is not UTF-8 text",
    },
    "choice": {
        b'{"prompt": "a", "options": ["b"], "answer": 0}': "line 1: expected 2 to 100 options",
        b'{"prompt": "a", "options": ["b", "b"], "answer": 0}': "line 1: expected options that are texts, each another",
        b'{"prompt": "a", "options": ["b", "c"], "answer": 2}': "line 1: expected the answer's number, 0 to 1",
        b'{"prompt": "a", "options": ["b", "c"], "answer": "d"}': "line 1: its answer is none of its options",
        b'{"prompt": "a", "options": ["b", "c"], "answer": true}': "line 1: expected the answer's number",
    },
    "perplexity": {b"": "is empty", b"a\n\xff": "line 2: is not UTF-8 text"},
}


@pytest.mark.parametrize(("scorer", "data"), [(scorer, data) for scorer in BROKEN for data in BROKEN[scorer]])
def test_a_broken_line_of_data_is_named_with_its_number(
    measure: Measure, tmp_path: Path, scorer: str, data: bytes
) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        measure(scorer, data="./x")
    assert BROKEN[scorer][data] in str(caught.value)
    assert "scores.x: ./x" in str(caught.value)


def test_all_broken_lines_are_named_up_to_a_few(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{\n" * 50)
    with pytest.raises(LoraBuildError) as caught:
        measure("choice", data="x")
    assert len(caught.value.issues) == 5


def test_data_that_is_not_there_is_named_with_where_it_was_looked_for(measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"scores\.x\.choice\.data: \./no is not a file \(looked at .*/no\)"):
        measure("choice", data="./no")


def test_a_tokenizer_that_is_broken_is_an_error_and_no_traceback(measure: Measure, demo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    data = write_rows(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"})
    with pytest.raises(SourceError, match="its tokenizer cannot read the data"):
        measure("exact_match", broken, data=data)
