"""The mistakes that people make, through the command line: one message with place and remedy, an exit code, no output."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_build.cli.main import main
from makers import small

RECIPE = "base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "recipes/prod.yaml").write_text(text) and None


def edit(where: str, **changes: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: small.edit(folder / where, **changes)


def poison(folder: Path) -> None:
    bad = small.values(1, 8, 2, dtype=torch.float32)
    bad[2, 0] = float("nan")
    small.edit(folder / "math", lora_B__weight=bad)


# what was done wrong, the words, the exit code, where it is, what to do
MISTAKES: dict[str, tuple[Callable[[Path], None], list[str], int, str, str]] = {
    "a mistyped key": (
        write(RECIPE + "safe_mrege: true\n"), [], 2, "recipes/prod.yaml: safe_mrege: unknown key", "did you mean 'safe_merge'?"),
    "an adapter for another base": (
        edit("math", lora_A__weight=torch.ones(2, 16)), [], 2, f"adapters.math: {Q_PROJ}", "was it trained on another base?"),
    "a tensor that nothing consumes": (
        edit("math", **{f"base_model.model.{Q_PROJ}.lora_X.weight": torch.ones(2)}), [], 2, f"{Q_PROJ}.lora_X.weight", "known leaves"),
    "lora_A without lora_B": (
        edit("math", lora_B__weight=None), [], 2, f"adapters.math: {Q_PROJ}", "the adapter's file is incomplete"),
    "a NaN with safe_merge": (
        poison, [], 1, f"{Q_PROJ}.weight[2, 0] is not finite", "adapter math has a NaN or infinity in B"),
    "a missing file": (
        lambda f: (f / "math/adapter_model.safetensors").unlink(), [], 2, "adapters.math: has no adapter_model.safetensors", "found adapter_config.json"),
    "an unquoted numeric revision": (
        write(RECIPE.replace("math: ./math", "math: {source: acme/math, revision: 0123456}")), [], 2,
        "recipes/prod.yaml: adapters.math.revision", "put what you wrote in quotes"),
    "an unquoted revision that reads as infinity": (
        write(RECIPE.replace("math: ./math", "math: {source: acme/math, revision: 7e12345}")), [], 2,
        "recipes/prod.yaml: adapters.math.revision", "put what you wrote in quotes"),
    "an unknown recipe": (lambda f: None, ["recipe=prdo"], 2, "no recipe 'prdo'", "did you mean 'prod'?"),
    "a secret from the environment": (
        write(RECIPE + "description: ${oc.env:HF_TOKEN}\n"), [], 2, "recipes/prod.yaml: description", "may be a secret"),
    "an output inside the base": (lambda f: None, ["recipe=prod", "output.dir=./base/out"], 2, "overlaps base", "choose a directory outside it"),
    "a folder without ./ in front": (
        write(RECIPE.replace("./math", "loras/x/math")), [], 2, "recipes/prod.yaml: adapters.math", "for a folder write ./loras/x/math"),
    "a web address": (
        write(RECIPE.replace("./math", '"https://huggingface.co/acme/math"')), [], 2, "recipes/prod.yaml: adapters.math", "; write acme/math"),
    "two revisions of one source": (
        write(RECIPE.replace("./math", "{source: acme/math@main, revision: v1}")), [], 2,
        "recipes/prod.yaml: adapters.math.revision: 'v1', but the source says '@main'", "write one of them"),
    "nothing behind the @": (
        write(RECIPE.replace("./math", "acme/math@")), [], 2, "recipes/prod.yaml: adapters.math", "a commit stands behind the @"),
    "a key of another tool": (
        write(RECIPE + "torch_dtype: torch.bfloat16\n"), [], 2, "recipes/prod.yaml: torch_dtype: unknown key", "write dtype: bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_with_its_place_and_its_remedy_and_leaves_no_output(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words, code, place, remedy = MISTAKES[mistake]
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text(RECIPE)
    make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)

    assert main([*(words or ["recipe=prod"]), "progressbar=false"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert re.findall("^error: ", said.err, re.MULTILINE) == ["error: "]
    assert place in said.err
    assert remedy in said.err
    assert not re.search(r"Traceback|Error\(|hydra|omegaconf", said.err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
