"""A build of 270 MB that is killed a hundred times at any moment, and sixteen at once: nothing is lost, nothing left."""

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lora_build
from benchmarks.models import Shape, make_adapter, make_base
from lora_build.proof.manifest import read_manifest
from makers import forked
from makers.counts import Count

SMOLLM = Shape(layers=30, hidden=576, inner=1536, kv=192, vocab=49_152)  # SmolLM2-135M
NUM_KILLS, MOST_TRIES = 100, 200
ENDED = (-signal.SIGKILL, -signal.SIGTERM, 130, 143)
RECIPE = "base: ./base\nadapters: {{math: {{source: ./math, weight: {weight}}}}}\noutput: {{dir: ./builds/{name}}}\n"

pytestmark = pytest.mark.long


@dataclass
class Project:
    """Recipes on a base of 270 MB, each of which merges its adapter with another weight, and what they build."""

    folder: Path
    server: forked.Server

    def build(self, *words: str, kill: forked.Kill | None = None) -> forked.Ran:
        return self.server.run(self.folder, *words, "progressbar=false", seconds=300, kill=kill)

    def recipe(self, name: str, weight: float) -> None:
        (self.folder / f"recipes/{name}.yaml").write_text(RECIPE.format(name=name, weight=weight))

    def hash_of(self, name: str) -> str:
        """Return the hash of a recipe's build, by one that nothing disturbs."""
        calm = self.folder / "calm"
        ran = self.build(f"recipe={name}", "recipe.output.dir=./calm")
        assert ran.code == 0, ran.err
        found = read_manifest(calm).manifest_hash
        shutil.rmtree(calm)
        return found

    def check_folder(self, *builds: str) -> None:
        """Hold what is beside the builds: somebody's file, and nothing that a build leaves."""
        there = sorted(path.name for path in (self.folder / "builds").iterdir())
        assert there == sorted([*builds, "precious.txt"])
        assert (self.folder / "builds/precious.txt").read_text() == "precious"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("soak")
    make_base(folder / "base", SMOLLM)
    make_adapter(folder / "math", SMOLLM, 8)
    for name in ("recipes", "builds"):
        (folder / name).mkdir()
    (folder / "builds/precious.txt").write_text("precious")
    with forked.started() as server:
        yield Project(folder, server)
    shutil.rmtree(folder)


@pytest.fixture
def builds(project: Project) -> Iterator[Path]:
    yield project.folder / "builds"
    for path in (project.folder / "builds").iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def test_a_build_that_is_killed_at_any_moment_loses_nothing(project: Project, builds: Path, count: Count) -> None:
    """Every other one would replace an older build, and every fifth is asked to end."""
    target, choose = builds / "prod", random.Random(15)
    hashes = []
    for weight in (0.5, 1.0):
        project.recipe("prod", weight)
        hashes.append(project.hash_of("prod"))
    seconds, kills, of_each = 1.0, 0, [0, 0]
    for attempt in range(MOST_TRIES):
        old = read_manifest(target).manifest_hash if attempt % 2 and target.exists() else None
        if old is None:
            shutil.rmtree(target, ignore_errors=True)
        new = next(found for found in hashes if found != old)
        project.recipe("prod", (0.5, 1.0)[hashes.index(new)])
        how = signal.SIGTERM if attempt % 5 == 4 else signal.SIGKILL
        ran = project.build("recipe=prod", kill=forked.Kill(after=choose.uniform(0, seconds), signal=how))

        assert "Traceback" not in ran.err
        assert ran.code in (0, *ENDED), ran.err
        kills += ran.code != 0
        of_each[old is not None] += ran.code != 0
        if target.exists():
            assert lora_build.verify(target).manifest_hash in (old, new)
        else:
            assert old is None
        if how == signal.SIGTERM:
            project.check_folder(*(["prod"] if target.exists() else []))
        whole = project.build("recipe=prod")
        assert whole.code == 0, whole.err
        assert read_manifest(target).manifest_hash == new
        project.check_folder("prod")
        if "up to date" not in whole.out:
            seconds = whole.seconds
        if attempt % 2:  # it goes away before the next
            assert lora_build.verify(target).manifest_hash == new
        if kills == NUM_KILLS:
            break
    assert kills == NUM_KILLS
    assert min(of_each) >= NUM_KILLS // 3
    count("kills at random moments of a build of 270 MB", kills)


def test_sixteen_builds_at_once_are_all_there_in_the_end(project: Project, builds: Path, count: Count) -> None:
    """Eight of one recipe into one folder, half of which build anew whatever is there; the others of four recipes."""
    names = ["same", *(f"other{i}" for i in range(4))]
    for number, name in enumerate(names):
        project.recipe(name, 0.25 + number / 4)
    expected = {name: project.hash_of(name) for name in names}
    again = "recipe.output.if_exists=overwrite"
    commands = [["recipe=same", *([again] if i % 2 else [])] for i in range(8)]
    commands += [[f"recipe={name}", *more] for name in names[1:] for more in ([], [again])]
    assert len(commands) == 16

    ran = project.server.run_all(project.folder, [[*words, "progressbar=false"] for words in commands], seconds=600)

    assert [(of.code, of.err) for of in ran if of.code or "Traceback" in of.err] == []
    assert {name: str(lora_build.verify(builds / name).manifest_hash) for name in names} == expected
    project.check_folder(*names)
    assert all(expected[words[0].removeprefix("recipe=")] in of.out for words, of in zip(commands, ran, strict=True))
    count("builds at once, into the same folders and others", len(commands))
