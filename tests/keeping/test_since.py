"""plan --since: what recipes make now beside what they made at a commit, from git's objects."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_build.cli.main import main
from lora_build.errors import RecipeError, SourceError
from lora_build.keeping.since import since
from makers import small
from makers.schemas import hold

PAGE = Path(__file__).parent.parent.parent / "docs/planning.md"
WEIGHTS = "adapter_model.safetensors"


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    root = tmp_path / "models"  # below the top of the repository
    small.make_base(root / "base")
    small.make_adapter(root / "math")
    small.make_adapter(root / "code", seed=90)
    (root / "recipes").mkdir()
    for name, text in {
        "_base": "base: ./base\n",
        "prod": "defaults: [_base, _self_]\nadapters: {math: ./math}\n",
        "both": "defaults: [_base, _self_]\nadapters: {math: ./math, code: {source: ./code, weight: 0.5}}\n",
        "only": "defaults: [_base, _self_]\nadapters: {code: ./code}\n",
    }.items():
        (root / f"recipes/{name}.yaml").write_text(text)
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.chdir(root)
    return root


def train(folder: Path) -> tuple[str, str]:
    """Train an adapter anew, and return the first digits of both digests."""
    was = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:4]
    small.edit(folder, lora_B__weight=small.values(77, 8, 2).float())
    return was, hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:4]


def test_nothing_has_changed_at_once_nor_by_what_decides_no_byte(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project / "recipes/prod.yaml"
    recipe.write_text(f"# why\n{recipe.read_text()}description: said anew\n")
    found = since("HEAD")
    assert (found.recipes, found.unchanged, found.notes) == ((), ("both", "only", "prod"), ())
    assert main(["plan", "--since", "main", "--exit-code"]) == 0
    assert capsys.readouterr().out.endswith(": 3 unchanged\n")


def test_what_has_changed_is_named_with_its_reason_and_as_markdown(
    project: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    was, now = train(project / "math")
    both = project / "recipes/both.yaml"
    both.write_text(both.read_text().replace("0.5", "0.25"))
    (project / "recipes/new.yaml").write_text("defaults: [prod, _self_]\ndtype: float32\n")
    (project / "recipes/only.yaml").unlink()

    math = f"adapters.math changed ({was}.. to {now}..), 2 of 3 tensors"
    found = since("HEAD")
    assert {one.name: (one.kind, one.reasons) for one in found.recipes} == {
        "prod": ("changed", (math,)),
        "both": ("changed", ("adapters.code weight 0.5 to 0.25, 2 of 3 tensors", math)),
        "new": ("added", ()),
        "only": ("removed", ()),
    }
    assert sorted(path.name for path in project.iterdir()) == ["base", "code", "math", "recipes"]
    assert main(["plan", "--since", "HEAD", "recipe=prod", "--json", "--exit-code"]) == 10
    printed: Any = json.loads(capsys.readouterr().out)
    hold(printed, "since")
    assert [one["name"] for one in printed["recipes"]] == ["prod"]
    assert main(["plan", "--since", "HEAD", "--markdown"]) == 0
    shown = re.sub(r"`[0-9a-f]{12}`", "`2f6c1e0d9b7a`", capsys.readouterr().out)
    text = PAGE.read_text()
    block = re.compile(r"(?<=```markdown\n).*?(?=```\n)", re.DOTALL)
    if update_goldens:
        PAGE.write_text(block.sub(lambda _: shown, text))
    else:
        assert block.search(text)[0] == shown


def test_a_pointer_of_lfs_gives_size_and_digest(project: Path) -> None:
    weights = project / "math" / WEIGHTS
    data = weights.read_bytes()
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n"
    )
    weights.write_text(pointer)
    git(project, "commit", "-q", "-a", "-m", "pointers")
    weights.write_bytes(data)  # as `git lfs pull` leaves it

    assert since("HEAD", ["prod"]).unchanged == ("prod",)
    was, now = train(project / "math")
    (changed,) = since("HEAD", ["prod"]).recipes
    assert changed.reasons == (f"adapters.math changed ({was}.. to {now}..), 2 of 3 tensors",)


def test_what_git_does_not_track_is_taken_as_it_is_and_named(project: Path) -> None:
    (project / ".gitignore").write_text("math/\n")
    git(project, "rm", "-r", "-q", "--cached", "math")
    git(project, "add", ".gitignore")
    git(project, "commit", "-q", "-m", "ignored")
    train(project / "math")

    found = since("HEAD", ["prod"])
    assert found.unchanged == ("prod",)
    assert found.notes == ("./math is not in git, and taken as it is now",)


def test_recipes_are_chosen_by_name_and_by_glob_as_they_are_then_and_now(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipes/both.yaml").rename(project / "recipes/brand-new.yaml")
    found = since("HEAD", ["glob(b*)", "prod"])
    assert {one.name: one.kind for one in found.recipes} == {"both": "removed", "brand-new": "added"}
    assert found.unchanged == ("prod",)
    assert main(["plan", "--since", "HEAD", "recipe=glob(b*)", "only"]) == 0
    assert capsys.readouterr().out.endswith(": 1 added, 1 removed, 1 unchanged\n")
    for words, said in (
        (["glob(z*)"], "glob(z*): no recipe is called so, neither now"),
        (["gone"], "no recipe 'gone'"),
    ):
        with pytest.raises(RecipeError) as caught:
            since("HEAD", words)
        assert said in str(caught.value)
    with pytest.raises(RecipeError, match="dtype: only recipes are chosen here"):
        since("HEAD", ["dtype=float32"])


def test_a_recipe_that_cannot_be_planned_is_not_known_and_stops_no_other(project: Path) -> None:
    shutil.rmtree(project / "code")
    found = since("HEAD")
    assert {one.name: one.kind for one in found.recipes} == {"both": "unknown", "only": "unknown"}
    assert found.recipes[0].reasons[0].startswith("now: adapters.code: ./code does not exist")
    assert found.unchanged == ("prod",)


def test_a_repository_has_nothing_run(project: Path) -> None:
    script = project / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {project}/ran\n")
    script.chmod(0o755)
    (project.parent / ".gitattributes").write_text("* diff=evil filter=evil\n")
    for key in ("core.fsmonitor", "diff.evil.textconv", "filter.evil.smudge", "core.pager", "core.sshCommand"):
        git(project, "config", key, str(script))
    (project / "ran").unlink(missing_ok=True)
    assert since("HEAD").recipes == ()
    assert not (project / "ran").exists()


@pytest.mark.parametrize("revision", ["nope", "-p", "HEAD:models", "main..main", "a\0b"])
def test_what_is_no_commit_is_refused(project: Path, revision: str) -> None:
    with pytest.raises(SourceError, match="--since: "):
        since(revision)


def test_without_git_or_a_repository_there_is_one_message(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project.parent / ".git")
    with pytest.raises(SourceError, match="is in no git repository"):
        since("HEAD")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SourceError, match="there is no git on this machine"):
        since("HEAD")


def test_untrusted_text_is_no_markdown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes/prod.yaml").write_text("defaults: [_base, _self_]\nadapters: {math: './<img src=x>|`@all`'}\n")
    assert main(["plan", "--since", "HEAD", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "<img" not in out
    (row,) = (line for line in out.splitlines() if line.startswith("| `prod`"))
    assert row.count("|") == 4
