"""What is installed from a wheel works on its own: config, demo recipe and example travel along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.early

ROOT = Path(__file__).parent.parent


def install(folder: Path, compiler: str = "") -> str:
    """Build a wheel, unpack it into `folder/site`, and return the wheel's name."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder / "dist"), str(ROOT)], check=True, capture_output=True,
                   env={**os.environ, "CXX": compiler})  # fmt: skip
    (wheel,) = (folder / "dist").glob("lora_build-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel.name


def run(folder: Path, here: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run what is installed in a folder, in another one."""
    env = {**os.environ, "PYTHONPATH": str(folder / "site")}
    command = [sys.executable, "-m", "lora_build", *words]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["", "/nowhere/c++"], ids=["compiled", "without a compiler"])
def test_the_demo_builds_from_a_wheel_in_an_empty_folder(tmp_path: Path, compiler: str) -> None:
    name = install(tmp_path, compiler)
    assert name.endswith("-py3-none-any.whl") == bool(compiler)
    assert (tmp_path / "site/lora_build/_native/library.so").exists() != bool(compiler)
    assert (tmp_path / "site/lora_build/schemas/recipe.schema.json").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()

    def said(*words: str) -> str:
        done = run(tmp_path, empty, *words)
        assert done.returncode == 0, done.stderr
        assert ("no compiled loops" in done.stdout) == (bool(compiler) and words[0] == "recipe=demo")
        return done.stdout

    assert "demo" in said("list")
    golden = (ROOT / "tests/golden/demo.txt").read_text().strip()
    assert said("recipe=demo", "progressbar=false").splitlines()[-1] == f"manifest  {golden}"
    assert golden in said("verify", "builds/demo")
    assert "built     builds/other" in said("recipe=demo", "output.dir=builds/other", "progressbar=false")
    assert sorted(p.name for p in empty.iterdir()) == ["builds"]
    where = said("plan", "recipe=demo", "--json")
    assert str(tmp_path / "site") not in where.partition('"target"')[2].partition(",")[0]
    assert os.fspath(empty / "builds/demo") in where


@pytest.mark.long
def test_the_demo_of_a_wheel_is_rebuilt_wherever_it_lies_and_held_to_its_sources(tmp_path: Path) -> None:
    install(tmp_path)
    empty, away = tmp_path / "empty", tmp_path / "away"
    empty.mkdir()
    away.mkdir()
    assert run(tmp_path, empty, "recipe=demo").returncode == 0
    for here, build in ((empty, empty / "builds/demo"), (away, away / "demo")):
        if here == away:
            (empty / "builds/demo").rename(build)
        done = run(tmp_path, here, "verify", "--rebuild", str(build.relative_to(here)))
        assert (done.returncode, done.stderr) == (0, "")
        assert "the same bytes, the same manifest" in done.stdout
        assert sorted(path.name for path in here.iterdir()) == [build.relative_to(here).parts[0]]
    assert run(tmp_path, away, "verify", "--forward", "demo").returncode == 0
    weights = tmp_path / "site/lora_build/examples/tiny/math/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = run(tmp_path, away, "verify", "--rebuild", "demo")
    assert done.returncode == 3
    assert f"adapters.math: {weights} has sha256:" in done.stderr
