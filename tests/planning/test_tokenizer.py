"""Whose tokenizer the output has: the base's, unless an adapter trained tokens that only its own knows."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.errors import SourceError
from lora_build.files.formats.tokenizer import read_tokenizers
from lora_build.files.identity import BASE
from lora_build.files.sources.local import open_local
from lora_build.pipeline import prepare
from lora_build.planning.plan import MergePlan
from lora_build.recipe.validate import from_mapping
from makers import small

ROWS, TOKENS = 16, 12
END = "<end>"


def words(*new: str, count: int = TOKENS) -> list[str]:
    return ["<unk>", "</s>", *(f"w{i}" for i in range(count - 2)), *new]


def write_tokenizer(folder: Path, tokens: Sequence[str], *, eos: str = "</s>", template: str | None = None) -> None:
    vocab = {word: number for number, word in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab}})
    )
    config = {"eos_token": eos, "unk_token": "<unk>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_base(root: Path, **config: Any) -> Path:
    """Write the small base with an embedding of more rows than there are tokens."""
    base = small.make_base(root / "base", **{"vocab_size": ROWS, "eos_token_id": 1} | config)
    tensors = load_file(base / "model.safetensors")
    tensors |= {f"{name}.weight": small.values(3, ROWS, 6) for name in ("model.embed_tokens", "lm_head")}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    write_tokenizer(base, words())
    (base / "generation_config.json").write_text('{\n  "eos_token_id": 1,\n  "temperature": 0.5\n}\n')
    return base


def make_adapter(
    root: Path, name: str = "x", *, trains: str | None = "tokens", new: Sequence[str] = ("<call>", END)
) -> Path:
    """Write an adapter that brings a tokenizer with new tokens, and was trained on rows of tokens or not."""
    more: dict[str | None, dict[str, Any]] = {
        "tokens": {"trainable_token_indices": {"embed_tokens": [TOKENS, TOKENS + 1]}},
        "saved": {"modules_to_save": ["embed_tokens"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
    }
    folder = small.make_adapter(root / name, **more.get(trains, {}))
    key = "base_model.model.model.embed_tokens"
    if trains == "tokens":
        small.edit(folder, **{f"{key}.token_adapter.trainable_tokens_delta": torch.ones(2, 6)})
    if trains == "saved":
        small.edit(folder, **{f"{key}.weight": torch.ones(ROWS, 6)})
    if trains == "head":
        head = "base_model.model.lm_head.lora_"
        small.edit(folder, **{f"{head}A.weight": torch.ones(2, 6), f"{head}B.weight": torch.ones(ROWS, 2)})
    write_tokenizer(folder, words(*new), eos=END if END in new else "</s>", template="{{ messages }}")
    return folder


def plan(root: Path, *adapters: str, **more: Any) -> MergePlan:
    return prepare(from_mapping(small.recipe(root, *adapters or ("x",), **more))).merge_plan


def about_tokenizers(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(note for note in notes if "tokenizer" in note)


def refusal(root: Path, *adapters: str, **more: Any) -> str:
    with pytest.raises(lora_build.LoraBuildError) as caught:
        plan(root, *adapters, **more)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("trains", ["tokens", "saved", "head"])
def test_tokens_that_were_trained_in_padding_rows_bring_their_tokenizer(tmp_path: Path, trains: str) -> None:
    make_base(tmp_path)
    own = make_adapter(tmp_path, trains=trains)
    built = lora_build.build(small.recipe(tmp_path, "x"))

    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (built.dir / name).read_bytes() == (own / name).read_bytes()
    assert json.loads((built.dir / "generation_config.json").read_text()) == {
        "eos_token_id": TOKENS + 1,
        "temperature": 0.5,
    }
    assert (built.dir / "generation_config.json").read_text() == '{\n  "eos_token_id": 13,\n  "temperature": 0.5\n}\n'
    assert json.loads((built.dir / "config.json").read_text())["eos_token_id"] == TOKENS + 1
    assert about_tokenizers(built.manifest.notes or ()) == (
        "adapters[0] brings a tokenizer: 14 tokens, not 12 (new: <call>, <end>), special tokens <end> without special </s>, "
        "eos <end>, not </s>, a chat template, where the base has none; it is used, as its tokens were trained",
        "eos_token_id of adapters[0]'s tokenizer, 13 for <end>, goes into generation_config.json and config.json",
    )


def test_a_tokenizer_whose_tokens_nobody_trained_is_said_and_not_used(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    make_adapter(tmp_path, trains=None)
    built = lora_build.build(small.recipe(tmp_path, "x"))

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (built.dir / name).read_bytes() == (base / name).read_bytes()
    (note,) = about_tokenizers(built.manifest.notes or ())
    assert note.endswith("a chat template, where the base has none; the base's is used")
    assert {file.path: file.why for file in built.manifest.left_out or ()} == {
        "tokenizer.json": "of a tokenizer that is not used",
        "tokenizer_config.json": "of a tokenizer that is not used",
    }


def test_a_file_that_is_no_tokenizers_for_its_size_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path)
    os.truncate(make_adapter(tmp_path) / "tokenizer.json", 3 << 40)  # more than there is memory for

    with pytest.raises(SourceError, match=r"adapters.x/tokenizer.json: \d{13} bytes are too many for a file of a tok"):
        plan(tmp_path)


def test_trained_tokens_that_the_base_knows_keep_its_tokenizer(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, trains="saved", new=())

    found = plan(tmp_path)
    assert found.side_files["tokenizer.json"] == "base"
    assert any("a chat template, where the base has none; the base's is used" in note for note in found.notes)


def token(content: str, **more: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, "special": True, **flags, **more}


# what the files beside a tokenizer.json of 12 tokens say, and the numbers that transformers 5.23 gives what is new
ADDED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "a list": ({"config": {"extra_special_tokens": ["<a>", "<b>"]}}, {"<a>": 12, "<b>": 13}),
    "a mapping": ({"config": {"extra_special_tokens": {"z_token": "<z>", "a_token": "<a>"}}}, {"<z>": 12, "<a>": 13}),
    "the older key": ({"config": {"additional_special_tokens": ["<a>", token("<b>", __type="AddedToken")]}}, {"<a>": 12, "<b>": 13}),
    "the newer key wins": (
        {"config": {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}}, {"<b>": 12},
    ),
    "the map alone": ({"map": {"additional_special_tokens": ["<a>"]}}, {"<a>": 12}),
    "the map, hidden": (
        {"map": {"additional_special_tokens": ["<a>"]}, "config": {"added_tokens_decoder": {"0": token("<unk>")}}}, {},
    ),
    "names in transformers' order": (
        {"config": {"image_token": "<i>", "cls_token": "<c>", "pad_token": "<p>", "extra_special_tokens": ["<a>"]}},
        {"<p>": 12, "<c>": 13, "<i>": 14, "<a>": 15},
    ),
    "the config's own numbers": (
        {"config": {"added_tokens_decoder": {"20": token("<x>"), "15": token("<y>")}, "pad_token": "<p>"}},
        {"<y>": 12, "<x>": 13, "<p>": 14},
    ),
    "the older file": ({"added": {"<x>": 12, "<y>": 13}, "map": {"pad_token": "<p>"}}, {"<x>": 12, "<y>": 13, "<p>": 14}),
    "the older file, hidden": (
        {"added": {"<x>": 12}, "config": {"added_tokens_decoder": {"0": token("<unk>")}}}, {},
    ),
    "behind a gap": (
        {"words": [token("<t>", id=15)], "config": {"extra_special_tokens": ["<a>"]}}, {"<t>": 12, "<a>": 13},
    ),
}  # fmt: skip


def write_added(folder: Path, said: dict[str, Any]) -> None:
    names = {"map": "special_tokens_map.json", "added": "added_tokens.json", "config": "tokenizer_config.json"}
    for key, name in names.items():
        if key in said or key == "config":
            kind = {"tokenizer_class": "PreTrainedTokenizerFast"} if key == "config" else {}
            (folder / name).write_text(json.dumps({**kind, **said.get(key, {})}))
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words())}, "unk_token": "<unk>"}
    text = {"version": "1.0", **rest, "added_tokens": said.get("words", []), "model": model, "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(text))


@pytest.mark.parametrize("case", ADDED)
def test_tokens_are_numbered_as_transformers_numbers_them(tmp_path: Path, case: str) -> None:
    said, numbers = ADDED[case]
    write_added(tmp_path, said)

    found = read_tokenizers({BASE: open_local(BASE, "here", tmp_path)}, trains_rows=True)[BASE].tokens
    assert found == {word: n for n, word in enumerate(words())} | numbers


@pytest.mark.long
@pytest.mark.parametrize("case", ADDED)
def test_the_table_of_numbers_is_what_transformers_gives(tmp_path: Path, case: str) -> None:
    from transformers import AutoTokenizer

    said, numbers = ADDED[case]
    write_added(tmp_path, said)

    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == {word: n for n, word in enumerate(words())} | numbers


@pytest.mark.parametrize("case", ["a list", "a mapping", "the map alone", "names in transformers' order"])
def test_tokens_that_only_a_config_names_count_as_tokens(tmp_path: Path, case: str) -> None:
    make_base(tmp_path)
    folder = make_adapter(tmp_path)
    write_added(folder, ADDED[case][0])

    assert plan(tmp_path).side_files["tokenizer.json"] == "adapters.x"
    assert "tokenizer: base has no text for tokens that adapters.x was trained on" in refusal(
        tmp_path, tokenizer="base"
    )


def test_trained_rows_that_no_tokenizer_reaches_are_said(tmp_path: Path) -> None:
    make_base(tmp_path)
    folder = make_adapter(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said = "adapters.x trained rows for which the tokenizer of base has no token (12, 13): no text reaches them; "
    assert any(note.startswith(said) for note in plan(tmp_path).notes)
    write_tokenizer(folder, words())
    assert any(note.startswith(said) for note in plan(tmp_path).notes)
    write_tokenizer(folder, words("<call>"))
    last = "adapters.x trained rows for which the tokenizer of adapters.x has no token (13): no text reaches them; "
    assert any(note.startswith(last) for note in plan(tmp_path).notes)
    write_tokenizer(folder, words("<call>", END))
    assert not any("trained rows for which" in note for note in plan(tmp_path).notes)


def test_a_whole_embedding_without_its_tokenizer_is_said_where_it_has_more_rows_than_there_are_tokens(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path)
    folder = make_adapter(tmp_path, trains="saved")
    for file in folder.glob("tokenizer*"):
        file.unlink()

    (note,) = about_tokenizers(plan(tmp_path).notes)
    assert note.startswith(
        "adapters.x trained all 16 rows for tokens, and the tokenizer of base has text for the first 12"
    )
    write_tokenizer(base, words(count=ROWS))
    assert about_tokenizers(plan(tmp_path).notes) == ()


def test_an_equal_tokenizer_needs_no_note(tmp_path: Path) -> None:
    make_base(tmp_path)
    write_tokenizer(small.make_adapter(tmp_path / "x"), words())

    assert about_tokenizers(plan(tmp_path).notes) == ()


def test_the_recipe_may_ask_for_an_adapters_tokenizer(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, trains=None)

    found = plan(tmp_path, tokenizer="x")
    assert found.side_files["tokenizer.json"] == "adapters.x"
    assert found.input_files["adapters.x"][2:] == ("tokenizer.json", "tokenizer_config.json")
    assert any(note.endswith("it is used, as the recipe says") for note in found.notes)


def test_the_base_is_refused_where_trained_tokens_would_have_no_text(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path)

    said = refusal(tmp_path, tokenizer="base")
    assert "tokenizer: base has no text for tokens that adapters.x was trained on (<call>, <end>)" in said
    assert said.endswith("leave it out, or write tokenizer: x")


def test_two_adapters_that_need_different_tokenizers_ask_for_a_word(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, "one", trains="head")
    make_adapter(tmp_path, "two", trains="head", new=("<other>",))

    said = refusal(tmp_path, "one", "two")
    assert "adapters.one and adapters.two were trained with tokens of their own, and their tokenizers differ" in said
    found = plan(tmp_path, "one", "two", tokenizer="one")
    assert found.side_files["tokenizer.json"] == "adapters.one"
    assert any(
        "that of adapters.one is used, and trained tokens have no text (<other>)" in note for note in found.notes
    )


def test_two_adapters_with_one_tokenizer_agree_and_neither_name_nor_order_matters(tmp_path: Path) -> None:
    make_base(tmp_path)
    for name in ("one", "two"):
        make_adapter(tmp_path, name, trains="head")
    hashes = {
        lora_build.build(
            small.recipe(tmp_path, adapters=adapters, output={"dir": str(tmp_path / f"out-{i}")})
        ).manifest.manifest_hash
        for i, adapters in enumerate(
            (
                {"one": str(tmp_path / "one"), "two": str(tmp_path / "two")},
                {"a": str(tmp_path / "two"), "an": str(tmp_path / "one")},
            )
        )
    }

    assert len(hashes) == 1


@pytest.mark.parametrize("file", ["added_tokens.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_part_of_a_tokenizer_replaces_nothing(tmp_path: Path, file: str) -> None:
    make_base(tmp_path)
    folder = make_adapter(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / file).write_text(json.dumps({"<call>": TOKENS}))

    assert plan(tmp_path).side_files["tokenizer.json"] == "base"
    assert any("a part replaces nothing, the base's is used" in note for note in plan(tmp_path).notes)
    assert f"adapters.x brings only a part of a tokenizer ({file})" in refusal(tmp_path, tokenizer="x")


def test_a_grown_vocabulary_with_a_part_of_a_tokenizer_keeps_the_bases_whole_and_says_so(tmp_path: Path) -> None:
    make_base(tmp_path)
    folder = small.make_adapter(tmp_path / "x", modules_to_save=["embed_tokens", "lm_head"])
    for name in ("model.embed_tokens", "lm_head"):
        small.edit(folder, **{f"base_model.model.{name}.weight": torch.ones(ROWS + 2, 6)})
    (folder / "added_tokens.json").write_text(json.dumps({"<call>": ROWS}))

    found = plan(tmp_path)
    assert found.side_files["tokenizer.json"] == "base"
    assert "the vocabulary is that of adapters.x, which brings no whole tokenizer: check the base's" in found.notes
    assert any("tokens that the base's has not (<call>)" in note for note in found.notes)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, trains=None, new=[f"<new{i}>" for i in range(9)])

    assert "has a token of the number 20, the model only 16 rows for tokens" in refusal(tmp_path, tokenizer="x")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("y", "tokenizer: expected base or an adapter's name, found 'y'"),
        ("xx", "found 'xx'; did you mean 'x'?"),
        ("plain", "tokenizer: adapters.plain brings no tokenizer; expected base, or an adapter that brings one"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path, wanted: str, said: str) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, trains=None)
    small.make_adapter(tmp_path / "plain")

    assert said in refusal(tmp_path, "x", "plain", tokenizer=wanted)


def test_an_adapter_called_base_makes_the_word_ambiguous(tmp_path: Path) -> None:
    adapters = {"base": str(small.make_adapter(tmp_path / "x"))}

    with pytest.raises(
        lora_build.RecipeError, match="'base' is the base and an adapter of that name; give the adapter another"
    ):
        from_mapping({"base": "./base", "adapters": adapters, "tokenizer": "base"})


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 13), ([1, 5], [13, 5]), ([5, 13], [5, 13]), (13, 13), (None, 13), ([], [13])],
)
def test_what_ends_a_text_follows_the_tokenizer(tmp_path: Path, before: Any, after: Any) -> None:
    base = make_base(tmp_path, text_config={"eos_token_id": 1, "vocab_size": ROWS})
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": before, "pad_token_id": 0}))
    make_adapter(tmp_path)
    built = lora_build.build(small.recipe(tmp_path, "x")).dir

    assert json.loads((built / "generation_config.json").read_text()) == {"eos_token_id": after, "pad_token_id": 0}
    config = json.loads((built / "config.json").read_text())
    assert (config["eos_token_id"], config["text_config"]["eos_token_id"]) == (13, 13)


def test_another_choice_is_another_build(tmp_path: Path) -> None:
    make_base(tmp_path)
    make_adapter(tmp_path, trains=None)
    keys = {
        lora_build.build(
            small.recipe(tmp_path, "x", tokenizer=wanted, output={"dir": str(tmp_path / f"out-{wanted}")})
        ).manifest.build_key
        for wanted in ("base", "x", None)
    }

    assert len(keys) == 2


def test_the_code_of_a_tokenizer_goes_with_it(tmp_path: Path) -> None:
    make_base(tmp_path)
    folder = make_adapter(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (folder / "own.py").write_text("from .inner import x\n")
    (folder / "inner.py").touch()

    files = plan(tmp_path).side_files
    assert {name for name, source in files.items() if source == "adapters.x"} == {
        "tokenizer.json", "tokenizer_config.json", "own.py", "inner.py",
    }  # fmt: skip


@pytest.mark.parametrize("of_tokenizer", [False, True], ids=["the model's", "the tokenizer's"])
def test_the_code_of_a_tokenizer_never_takes_the_place_of_other_code_of_the_base(
    tmp_path: Path, of_tokenizer: bool
) -> None:
    base = make_base(tmp_path, **({} if of_tokenizer else {"auto_map": {"AutoConfig": "own.Config"}}))
    folder = make_adapter(tmp_path)
    for where in (folder, base) if of_tokenizer else (folder,):
        config = json.loads((where / "tokenizer_config.json").read_text())
        config["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
        (where / "tokenizer_config.json").write_text(json.dumps(config))
    for where in (folder, base):
        (where / "own.py").write_text("x = 1\n")
    assert plan(tmp_path).side_files["own.py"] == "adapters.x"
    (folder / "own.py").write_text("x = 2\n")

    assert "adapters.x/own.py: is another than the base's, whose code may need that" in refusal(tmp_path)


def test_files_that_some_file_systems_take_for_one_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    small.make_adapter(tmp_path / "x")
    (base / "Tokenizer.json").touch()

    assert "'Tokenizer.json' and 'tokenizer.json' are one file where case or accents do not count" in refusal(tmp_path)
