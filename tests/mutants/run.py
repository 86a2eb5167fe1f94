"""Which faults in a package no test finds: `python tests/mutants/run.py PACKAGE`; `make mutants` does it for all.

torch, transformers and pytest are imported once; then each mutant has a fork, which imports the package with the fault and
runs the package's own tests that execute the line, up to the first that fails. What survives that, and is not explained in
`record.toml`, is tried on all that execute anything of the module.

With `--json FILE` a run that was ended goes on where it was: what FILE says of a mutant holds for as long as the texts of
its module, and of the tests that it was tried on, are the same.
"""

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_PATH = (str(HERE / "plant"), str(HERE.parent.parent))
sys.path[:1] = [str(HERE.parent), *_PATH]

from mutants.choice import PACKAGES, ROOT, Mutant, chosen  # noqa: E402
from mutants.session import Chosen, Ended, run  # noqa: E402
from mutants.usual import Usual, Watching  # noqa: E402

RECORD = HERE / "record.toml"
_PREPARED = ("conftest", "hydra", "safetensors.torch")
"""What every test needs; the environment that is set first there decides what the Hub's client does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        name: its name.
        killed_by: `own` or `wider` tests, `time`, or an empty text.
        test: the one that failed, or hung.
        seconds: that it took.
        texts: a digest of the module and of the file of this test; of all of the package's tests where none failed.
    """

    name: str
    killed_by: str
    test: str
    seconds: float
    texts: str = ""


def tried(package: str, before: Mapping[str, Outcome]) -> Iterator[Outcome]:
    """Yield what becomes of the chosen mutants of a package, beginning with what became of them `before`.

    Then come the tests that fail without a fault.
    """
    explained, elsewhere = recorded(package)
    left = list[Mutant]()
    for mutant in chosen(package):
        known = before.get(mutant.name)
        holds = known and known.texts == _texts(mutant, known.test) and (known.killed_by or mutant.name in explained)
        if known and holds:
            yield known
        else:
            left.append(mutant)
    if not left:
        return
    usual = _usual(package)
    for test in usual.failed:
        yield Outcome(name="no fault", killed_by="own", test=test, seconds=usual.seconds[test])
    for mutant in left:
        start = time.monotonic()
        covering = usual.tests_of(mutant.file, mutant.lines)
        by, test = _killed(mutant, covering, usual)
        if not by and mutant.name in elsewhere:
            by, test = _judged(_run(mutant, [elsewhere[mutant.name]]), "wider")
        if not by and mutant.name not in explained:  # what is remembered is executed by its first user alone
            by, test = _killed(mutant, sorted({*usual.tests_of(mutant.file, None)} - {*covering}), usual)
        seconds = round(time.monotonic() - start, 1)
        yield Outcome(name=mutant.name, killed_by=by, test=test, seconds=seconds, texts=_texts(mutant, test))


def _texts(mutant: Mutant, test: str) -> str:
    files = (
        [ROOT / test.partition("::")[0]]
        if test
        else sorted((ROOT / "tests" / mutant.module.split(".")[1]).rglob("*.py"))
    )
    digest = hashlib.sha256()
    for file in (ROOT / mutant.file, *files):
        digest.update(hashlib.sha256(file.read_bytes() if file.exists() else b"").digest())
    return digest.hexdigest()


def tried_on(package: str, word: str, files: Sequence[str]) -> Iterator[Outcome]:
    """Yield what becomes of the chosen mutants of a package that have a word in their names, by some tests alone."""
    _prepare(_PREPARED)
    for mutant in chosen(package):
        if word in mutant.name:
            start = time.monotonic()
            by, test = _judged(_run(mutant, files), "own")
            yield Outcome(name=mutant.name, killed_by=by, test=test, seconds=round(time.monotonic() - start, 1))


def recorded(package: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return why mutants of a package may survive, and by which other tests some are killed."""
    record = tomllib.loads(RECORD.read_text(encoding="utf-8"))
    return record.get(package, {}).get("harmless", {}), record.get(package, {}).get("elsewhere", {})


def _killed(mutant: Mutant, tests: Sequence[str], usual: Usual) -> tuple[str, str]:
    if not tests:
        return "", ""
    files = sorted({test.partition("::")[0] for test in tests})
    return _judged(_run(mutant, files, Chosen({test: usual.seconds[test] for test in tests})), "own")


def _run(mutant: Mutant, files: Sequence[str], plugin: object = None) -> Ended:
    def before(folder: Path) -> None:
        from plant import plant

        (folder / "mutant.py").write_text(mutant.source, encoding="utf-8")
        plant(mutant.module, folder / "mutant.py")

    return run(files, plugin or object(), before=before)


def _judged(ended: Ended, by: str) -> tuple[str, str]:
    match ended.code:
        case 0:
            return "", ""
        case 1 | 2:
            return by, ended.last
        case code if code < 0:
            return "time" if code == -14 else by, ended.last
        case _:
            sys.exit(f"pytest ended with {ended.code}:\n{ended.output[-3000:]}")


def _usual(package: str) -> Usual:
    """Return what the tests of a package do without a fault, and have imported what they import."""
    _prepare(_PREPARED)
    with tempfile.TemporaryDirectory(prefix="lora-build-usual-") as work:
        result = Path(work, "usual.json")
        ended = run([f"tests/{package}"], Watching(result), to_the_end=True)
        if ended.code not in (0, 1):
            sys.exit(f"the tests cannot be run:\n{ended.output[-5000:]}")
        usual = Usual(**json.loads(result.read_text()))
    _prepare(usual.imported)
    return usual


def _prepare(names: Sequence[str]) -> None:
    """Import what forks need but for the package."""
    for name in names:
        with contextlib.suppress(Exception):  # some of what is in sys.modules cannot be imported by its name
            importlib.import_module(name)
    importlib.import_module("conftest").pytest_unconfigure(None)  # that of a fork makes a cache of its own
    assert "lora_build" not in sys.modules
    gc.collect()
    gc.freeze()  # else a fork copies what it only looks at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--word", default="", help="those that have it in their names, and only with --tests")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="try these tests alone")
    parser.add_argument("--json", type=Path, help="what came of it, and had come of it before")
    asked = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(_PATH)
    explained, _ = recorded(asked.package)
    before = {}
    if asked.json and asked.json.exists():
        before = {found["name"]: Outcome(**found) for found in json.loads(asked.json.read_text())}
    outcomes: list[dict[str, object]] = []
    for outcome in tried_on(asked.package, asked.word, asked.tests) if asked.tests else tried(asked.package, before):
        outcomes.append(dataclasses.asdict(outcome))
        how = outcome.killed_by or ("harmless" if outcome.name in explained else "SURVIVES")
        print(f"{how:<8} {outcome.seconds:6.1f} s  {outcome.name}  [{outcome.test}]", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
