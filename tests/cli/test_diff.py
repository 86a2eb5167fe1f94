"""`lora-build diff`: what is typed, what is said, in text and in Markdown, and the exit code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import save_file

import lora_build
from lora_build.cli.main import main
from lora_build.cli.markdown import code, fenced, table
from makers import small
from makers.schemas import hold

HOSTILE = "a|b`c``<img src=x onerror=y>[z](https://evil.example)@team #1 **b** \\| ~~s~~ https://evil.example\n# t"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diff")
    small.make_base(root / "base")
    small.make_adapter(root / "math")
    small.make_adapter(root / "code", seed=90)
    (root / "recipes").mkdir()
    (root / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (root / "recipes/two.yaml").write_text("base: ./base\nadapters: {math: ./math, code: ./code}\ndtype: float32\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        for recipe, out in (("prod", "builds/prod"), ("two", "builds/two"), ("prod", "builds/dtype=keep")):
            lora_build.build(lora_build.load_recipe(recipe, [f"output.dir='{out}'"]))
    return root


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["diff", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_differs_is_said_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "builds/prod", "builds/two", "--weights", "--no-progress")

    assert (code, err) == (10, "")
    lines = out.splitlines()
    assert lines[0].startswith("before    builds/prod  sha256:")
    assert lines[2:9] == [
        "input     adapters.code added, 2 of 3 tensors",
        "option    dtype: keep to float32",
        "config    config.json: dtype: bfloat16 to float32",
        "tensors   changed  model.layers.*.self_attn.q_proj.weight  2 of 2  merge math to merge code, math, BF16 to F32",
        "tensors   changed  model.norm.weight                       1 of 1  copy to convert, BF16 to F32",
        "weights   of what differs in  norm    after   change  cosine    largest  in",
        "weights   model.layers.0      4.0503  3.9121  0.822   0.979266  0.264    self_attn.q_proj",
    ]
    assert lines[-1] == "different 1 input, 1 option, 1 key, 3 of 3 tensors"


@pytest.mark.parametrize(
    "words",
    [["builds/prod", "./builds/prod"], ["recipe=prod"], ["recipe=prod", "builds/dtype=keep"],
     ["builds/dtype=keep", "recipe=prod"], ["builds/prod/lora-build.manifest.json", "builds/dtype=keep"],
     ["base", "base", "--weights"], ["recipe=prod", "dtype=keep"]],
)  # fmt: skip
def test_equals_are_said_to_be(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("equal     ")
    code, out, _ = run(capsys, *words, "-q")
    assert (code, out.count("\n")) == (0, 1)


def test_a_recipe_stands_where_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, names in (
        (["builds/two", "recipe=prod", "dtype=float16"], ["builds/two", "recipe prod"]),
        (["recipe=prod", "dtype=float16", "builds/two"], ["recipe prod", "builds/two"]),
        (["dtype=float16", "recipe=prod", "output.dir=builds/prod"], ["builds/prod", "recipe prod"]),
    ):
        code, out, _ = run(capsys, *words, "--json")
        found = json.loads(out)
        hold(found, "diff")
        assert code == 10
        assert [found[side]["name"] for side in ("before", "after")] == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "diff compares two, found nothing; lora-build diff [--weights] A B, or lora-build diff recipe=NAME"),
        (["builds/prod"], "diff compares two, found 'builds/prod'"),
        (["a", "b", "c"], "diff compares two, found 'a' and 'b' and 'c'"),
        (["builds/prod", "dtype=float16"], "'dtype=float16' is of a recipe, and none is named"),
        (["prod", "builds/prod"], "'prod' is the name of a recipe, which is written so: lora-build diff recipe=prod"),
        (["two", "nope"], "'two' is the name of a recipe"),
        (["builds/nope", "builds/prod"], "builds/nope"),
        (["recipe=nope"], "nope"),
        (["recipe=prod", "recipe=two"], "diff takes one recipe, found recipe=prod and recipe=two; build one, and name"),
        (["recipe=prod", "dtype=keep,float32"], "has several values, and diff takes one recipe"),
        (["recipe=prod", "sweep=x"], "is of a sweep, and diff takes one recipe"),
        (["recipe=prod", "--weights"], "recipe prod: is not built, and has no weights yet"),
        (["recipe=prod", "output.dir=new"], "new: there is no build of prod yet to compare it with; build it first"),
        (["base/config.json", "base"], "base/config.json: is not a manifest of lora-build"),
        (["builds/prod", "builds/prod", "--json", "--markdown"], "two forms of one answer"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_message(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = run(capsys, *words)
    assert code in (2, 3)
    assert said in err
    assert err.count("error: ") == 1
    assert "bug" not in err
    assert "Traceback" not in out + err


# --- Markdown ------------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[str]:
    """Return the kinds of all that a reader of GitHub's Markdown finds in a text."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [part.type for block in parser.parse(text) for part in (block, *(block.children or ()))]


def test_markdown_is_a_table_that_a_reader_finds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "builds/prod", "builds/two", "--weights", "--markdown")
    assert code == 10
    assert out.startswith(
        "### `builds/prod` to `builds/two`\n\n**Different**: 1 input, 1 option, 1 key, 3 of 3 tensors\n"
    )
    assert tokens(out).count("table_open") == 3
    assert "- `adapters.code added, 2 of 3 tensors`\n" in out


@pytest.mark.parametrize("text", [HOSTILE, "`", "``x", "|", "\\", "\\|", " a ", "", "<b>", "a\nb", "\u202ex", "a`|`b"])
def test_nothing_in_code_is_read_as_markdown(text: str) -> None:
    inline = tokens(f"x {code(text)} y\n")
    cells = tokens("\n".join(table(("a", "b"), [(code(text), code(text))])) + "\n")
    allowed = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline", "html_inline"}
    assert set(inline) <= allowed
    assert inline.count("html_inline") in (0, 2)  # <code> and </code> of our own
    assert set(cells) - allowed == {
        f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")
    }
    assert cells.count("td_open") == 2
    block = fenced([text, "````", "+```x"], "diff")
    assert tokens("\n".join(block) + "\n\n# t\n") == ["fence", "heading_open", "inline", "text", "heading_close"]


def test_hostile_names_break_neither_markdown_nor_a_terminal(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = HOSTILE.replace("\n", " ")
    for folder, value in (("one", 0.0), ("two", 1.0)):
        (tmp_path / folder).mkdir()
        save_file({name: torch.full((2,), value)}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({HOSTILE: folder}))
        (tmp_path / folder / "chat_template.jinja").write_text(f"````\n{folder}\n\x1b[2J{HOSTILE}")
    code, out, _ = run(capsys, str(tmp_path / "one"), str(tmp_path / "two"), "--markdown", "--weights")
    assert code == 10
    assert not {"link_open", "image", "html_block", "em_open", "s_open"} & set(tokens(out))
    assert tokens(out).count("strong_open") == 1
    assert "\x1b" not in out
    code, out, _ = run(capsys, str(tmp_path / "one"), str(tmp_path / "two"))
    assert "\x1b" not in out


def test_an_answer_is_bounded_however_much_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, value in (("one", 0.0), ("two", 1.0)):
        (tmp_path / folder).mkdir()
        save_file({f"tensor{n}": torch.full((1,), value) for n in range(500)}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({f"key{n}": value for n in range(500)}))
    sides = str(tmp_path / "one"), str(tmp_path / "two")
    assert run(capsys, *sides, "--weights")[1].count("\n") < 300
    assert len(run(capsys, *sides, "--weights", "--markdown")[1]) < 65_000  # of a comment on GitHub
    assert len(json.loads(run(capsys, *sides, "--json")[1])["tensors"]) == 500


def test_a_folder_that_moved_is_equal(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(project, tmp_path / "moved")
    assert run(capsys, "builds/prod", str(tmp_path / "moved/builds/prod"))[0] == 0
