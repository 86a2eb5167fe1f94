"""The demo's build, which answers sums and reverses words, and projects of a base that nobody can run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.proof.builds import BuildInputs
from lora_build.proof.scored import PlannedScore
from lora_build.recipe.scoring import METRICS
from lora_build.scores.interface import Metrics, ScoredBuild
from lora_build.scores.planning import whole_options
from lora_build.scores.scorers import SCORERS
from makers import small

TINY = Path(__file__).parent.parent.parent / "examples/tiny"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the demo's build."""
    out = tmp_path_factory.mktemp("demo") / "out"
    adapters = {name: str(TINY / name) for name in ("math", "text")}
    lora_build.build({"base": str(TINY / "base"), "adapters": adapters, "output": {"dir": str(out)}})
    return out


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a base and an adapter, and the working directory, with a cache of its own."""
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_BUILD_ALLOW_COMMANDS", raising=False)
    return tmp_path


Measure = Callable[..., Metrics]


@pytest.fixture
def measure(demo: Path, tmp_path: Path) -> Measure:
    """Return what scores a build, the demo's if no other is named, by a scorer with its options."""

    def inputs() -> BuildInputs:
        raise AssertionError("not asked")

    def run(scorer: str, folder: Path = demo, **options: Any) -> Metrics:
        manifest = lora_build.Manifest.from_bytes((demo / "lora-build.manifest.json").read_bytes())
        score = PlannedScore(
            name="x", scorer=scorer, options=whole_options(scorer, options), version=1, metrics=METRICS[scorer],
            folder=tmp_path,
        )  # fmt: skip
        build = ScoredBuild(folder=folder, manifest=manifest, inputs=inputs, tell=lambda *_: None)
        return SCORERS[scorer].measure(SCORERS[scorer].plan(score), build)

    return run


def write_rows(file: Path, *rows: Any) -> str:
    """Write JSON lines, and return the file's path as text."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
