"""What is installed from a wheel works on its own: config, demo recipe and example travel along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.early

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("compiler", ["", "/nowhere/c++"], ids=["compiled", "without a compiler"])
def test_the_demo_builds_from_a_wheel_in_an_empty_folder(tmp_path: Path, compiler: str) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path / "dist"), str(ROOT)], check=True, capture_output=True,
                   env={**os.environ, "CXX": compiler})  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("lora_build-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert wheel.name.endswith("-py3-none-any.whl") == bool(compiler)
    assert (tmp_path / "site/lora_build/_native/library.so").exists() != bool(compiler)
    assert (tmp_path / "site/lora_build/schemas/recipe.schema.json").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "lora_build", *words], cwd=empty, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ("no compiled loops" in done.stdout) == (bool(compiler) and words[0] == "recipe=demo")
        return done.stdout

    assert "demo" in run("list")
    golden = (ROOT / "tests/golden/demo.txt").read_text().strip()
    assert run("recipe=demo", "progressbar=false").splitlines()[-1] == f"manifest  {golden}"
    assert golden in run("verify", "builds/demo")
    assert "built     builds/other" in run("recipe=demo", "output.dir=builds/other", "progressbar=false")
    assert sorted(p.name for p in empty.iterdir()) == ["builds"]
    where = run("plan", "recipe=demo", "--json")
    assert str(tmp_path / "site") not in where.partition('"target"')[2].partition(",")[0]
    assert os.fspath(empty / "builds/demo") in where
