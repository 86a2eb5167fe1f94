"""The list of builds: their states, by hand-made causes; filters; and what is broken is listed, not fatal."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_build
from keeping.conftest import PROD, TWO
from lora_build.cli.main import main
from lora_build.files.sources import known
from lora_build.keeping import today
from lora_build.keeping.today import State, composed
from lora_build.proof import known_digests
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME
from lora_build.recipe.identity import effective
from makers import small


def states() -> dict[str, str]:
    """Return the state of each build, its name cut where those of sweeps become long."""
    return {build.name.partition("+")[0]: build.state.value for build in lora_build.builds()}


def why(name: str) -> str:
    return next(build.why for build in lora_build.builds() if build.name == name)


def test_builds_of_recipes_overrides_and_sweeps_are_current(project: Path) -> None:
    assert states() == {
        "prod": "current",
        "two-code@0.1": "current",
        "two-code@0.2": "current",
        "two-code@0.5": "current",
    }
    prod = lora_build.builds(recipe="prod")[0]
    manifest = lora_build.verify(prod.dir)
    assert (prod.recipe, prod.overrides, prod.manifest_hash) == ("prod", (), manifest.manifest_hash)
    assert prod.when is not None
    assert prod.size_bytes == sum(
        (prod.dir / name).stat().st_size for name in ("config.json", "model.safetensors", "tokenizer.json")
    )


def other_adapter(project: Path) -> None:
    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))


def comment(project: Path) -> None:
    (project / "recipes/prod.yaml").write_text(f"# production\n{PROD}description: ours\n")


CAUSES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "one adapter": (other_adapter, "stale", "adapters.math changed (ad40.. to "),
    "one option": (lambda p: (p / "recipes/prod.yaml").write_text(f"{PROD}dtype: float32\n"), "stale", "option dtype: keep to float32"),
    "a comment": (comment, "current", ""),
    "no recipe": (lambda p: (p / "recipes/prod.yaml").unlink(), "unlisted", "recipes/prod.yaml is not there"),
    "a recipe of nonsense": (lambda p: (p / "recipes/prod.yaml").write_text("base: [\n"), "unknown", "recipes/prod.yaml cannot be planned: "),
    "no adapter": (lambda p: shutil.rmtree(p / "math"), "unknown", "adapters.math: ./math does not exist"),
    "another size": (lambda p: (p / "builds/prod/config.json").write_text("{}"), "changed", "config.json changed since it was built, or went"),
    "another byte": (lambda p: flip(p / "builds/prod/model.safetensors"), "changed", "model.safetensors changed"),
    "no weights": (lambda p: (p / "builds/prod/model.safetensors").unlink(), "changed", "model.safetensors changed since"),
    "no provenance": (lambda p: (p / "builds/prod" / PROVENANCE_NAME).unlink(), "unknown", PROVENANCE_NAME),
    "no manifest to read": (lambda p: (p / "builds/prod" / MANIFEST_NAME).write_text("{}"), "broken", "is not a manifest"),
    "a manifest that is a pipe": (lambda p: as_pipe(p / "builds/prod" / MANIFEST_NAME), "broken", "not a build of lora-build"),
    "an edited manifest": (lambda p: edit(p / "builds/prod" / MANIFEST_NAME, b"keep", b"kept"), "broken", "was edited"),
    "a newer manifest": (lambda p: edit(p / "builds/prod" / MANIFEST_NAME, b"manifest/v2", b"manifest/v9"), "broken", "newer lora-build"),
    "a revision on the Hub": (
        lambda p: (p / "recipes/prod.yaml").write_text(PROD.replace("./math", "acme/math")), "unknown", "adapters.math is acme/math@main on the Hub, which is not asked"),
}  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edit(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_build_is_in_the_state_that_its_cause_says_also_where_the_index_knew_another(
    project: Path, cause: str, is_warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, state, reason = CAUSES[cause]
    if is_warm:
        monkeypatch.setattr(today, "_SETTLED_NS", 0)
        lora_build.builds()
    change(project)
    (found,) = (build for build in lora_build.builds() if build.name == "prod")
    assert (found.state.value, reason in found.why) == (state, True), found.why


def test_a_moved_project_and_a_moved_build_are_as_they_were(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_build.builds()
    (project / "builds/prod").rename(project / "builds/kept")
    project.rename(project.with_name("moved"))
    monkeypatch.chdir(project.with_name("moved"))
    assert states()["kept"] == "current"


def test_a_build_on_a_recipe_that_is_gone_is_unknown(project: Path) -> None:
    (project / "recipes/dpo.yaml").write_text("base: {recipe: prod}\nadapters: ./code\n")
    lora_build.build(lora_build.load_recipe("dpo"))
    (project / "recipes/prod.yaml").unlink()
    assert (states()["dpo"], why("dpo")) == ("unknown", "recipes/dpo.yaml cannot be planned: no recipe 'prod'")


def test_a_build_from_python_is_of_no_recipe(project: Path) -> None:
    lora_build.build({"base": "./base", "adapters": "./math", "output": "builds/mine"})
    assert (states()["mine"], why("mine")) == ("unlisted", "was made without a recipe's file")


def test_an_output_elsewhere_is_found_and_its_neighbours_are_not(project: Path) -> None:
    (project / "recipes/prod.yaml").write_text(f"{PROD}output: ../out/prod\n")
    lora_build.build(lora_build.load_recipe("prod"))
    lora_build.build({"base": "./base", "adapters": "./math", "output": "../out/theirs"})
    assert [build.name for build in lora_build.builds(recipe="prod")] == ["prod", "prod"]
    assert "theirs" not in states()
    assert [build.name for build in lora_build.builds("../out")] == ["prod", "theirs"]


@pytest.mark.parametrize(("words", "recipes"), [
    (["--adapter", "code"], "two two two"), (["--adapter", "./math"], "prod two two two"),
    (["--adapter", "{project}/code"], "two two two"), (["--adapter", "ad40b73e526f"], "prod two two two"),
    (["--adapter", "base"], ""), (["--adapter", "./base"], ""), (["--adapter", "acme/math"], ""),
    (["--recipe", "prod"], "prod"), (["--recipe", "recipes/two.yaml"], "two two two"),
    (["--recipe", "prod", "--adapter", "code"], ""), (["--hash", "{hash}"], "prod"),
])  # fmt: skip
def test_a_filter_picks_builds(
    project: Path, words: list[str], recipes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = lora_build.verify("builds/prod").manifest_hash[:19]
    assert main(["builds", *(word.format(project=project, hash=digits) for word in words), "--json"]) == 0
    assert [build["recipe"] for build in json.loads(capsys.readouterr().out)["builds"]] == recipes.split()


def test_an_adapter_that_moved_is_found_by_what_is_in_it(project: Path) -> None:
    (project / "code").rename(project / "code2")
    assert len(lora_build.builds(adapter="./code2")) == 3


def test_a_hash_that_is_none_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["builds", "--hash", "xyz"]) == 2
    assert "expected 4 to 64 hexadecimal digits" in capsys.readouterr().err


def test_no_link_is_followed_and_nothing_hidden_is_looked_into(project: Path, tmp_path: Path) -> None:
    shutil.copytree("builds/prod", tmp_path / "theirs/deep")
    Path("builds/link").symlink_to(tmp_path / "theirs")
    Path("builds/loop").symlink_to(".")
    shutil.copytree("builds/prod", "builds/.hidden/prod")
    assert [build.name for build in lora_build.builds(recipe="prod")] == ["prod"]


def test_names_that_terminals_obey_are_shown_harmless(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("builds/prod", "builds/a\x1b[2J\nb")
    assert main(["builds"]) == 0
    assert "builds/a\\x1b[2J\\nb" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_a_warning(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("builds/secret").mkdir(mode=0)
    assert main(["builds"]) == 0
    assert "builds/secret: Permission denied" in capsys.readouterr().err


def test_a_large_file_that_nobody_has_read_is_unknown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "fresh"))
    for module in (known, known_digests):
        monkeypatch.setattr(module, "SMALL_BYTES", 250)
    monkeypatch.setattr("lora_build.files.hashing.remembered._SETTLED_SECONDS", 0)
    found = lora_build.builds(recipe="prod")[0]
    assert (found.state, "adapters.math/adapter_model.safetensors" in found.why) == (State.unknown, True)
    lora_build.build({"base": "./base", "adapters": "./math", "output": "../else"})  # which reads all inputs
    found = lora_build.builds(recipe="prod")[0]
    assert (found.state, "model.safetensors not read since" in found.why) == (State.unknown, True)
    lora_build.verify("builds/prod")
    assert lora_build.builds(recipe="prod")[0].state is State.current


WORDS = (
    ["dtype=float32"], ["~adapters.math"], ["adapters.more=./math"], ["base=./base"], ["adapter_names=[code]"],
    ["adapters.code.weight=0.25", "combine=linear"], ["output.max_shard_size=1KB"], ["recipe.dtype=keep"], [],
)  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (None, ["adapters.code.weight=0.25", "~adapters.math"]),
        ("grid", ["adapters.code.weight=0.25"]),
        *(pytest.param(sweep, words, marks=pytest.mark.long) for sweep in (None, "grid") for words in WORDS),
    ],
)
def test_a_recipe_composed_without_hydra_is_the_one_that_hydra_composes(
    project: Path, sweep: str | None, words: list[str]
) -> None:
    given = words if sweep is None else [f"sweep={sweep}", *words]
    assert effective(composed("two", words, sweep)) == effective(lora_build.load_recipe("two", given))


def test_a_recipe_that_only_hydra_can_compose_is_composed_by_it(project: Path) -> None:
    (project / "recipes/adapter").mkdir()
    (project / "recipes/adapter/code.yaml").write_text("source: ./code\nweight: 0.7\n")
    (project / "recipes/two.yaml").write_text(f"{TWO}defaults: [{{adapter@adapters.more: code}}, _self_]\n")
    words = ["adapter@adapters.more=code"]
    assert effective(composed("two", words)) == effective(lora_build.load_recipe("two", words))


def test_a_build_on_a_build_is_current_while_that_one_is(project: Path) -> None:
    small.make_adapter(project / "dpo", seed=70)
    (project / "recipes/dpo.yaml").write_text("base: {recipe: prod}\nadapters: {dpo: ./dpo}\n")
    lora_build.build(lora_build.load_recipe("dpo"))
    assert states()["dpo"] == "current"
    other_adapter(project)
    assert (states()["prod"], states()["dpo"]) == ("stale", "unknown")
    assert "the build of recipe prod, is not what that recipe makes today" in why("dpo")
