"""Ten minutes of atheris on every parser, and of random builds held to an oracle: `make fuzz`.

    python tests/fuzz/fuzz.py [--seconds 600] [--update-counts] [PARSER ...]

Each parser is fuzzed in a process of its own, from what lies in `corpus/PARSER`; what finds a new way through the code
is added there if it is small. `pytest tests/fuzz` replays the corpus. What breaks a law is left as `crash-*` beside it,
to be replayed for ever once it is mended. With --update-counts docs/reliability.md says how many inputs a run of all
parsers gave them, if none broke one.
"""

import argparse
import contextlib
import hashlib
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from makers import counts  # noqa: E402

CORPUS = HERE / "corpus"
MOST_BYTES, MOST_FILES = 3000, 80
"""Of what is kept for a parser."""


def fuzz_one(parser: str, arguments: list[str]) -> None:
    """Let atheris loose on one parser, in this process, which it ends."""
    import atheris
    from mutators import MUTATORS

    with atheris.instrument_imports(include=["lora_build", "parsers"]):
        import parsers

    def mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
        choose = random.Random(seed)
        if parser in MUTATORS and choose.random() < 0.8:
            with contextlib.suppress(ValueError, RecursionError):  # what is mutated may be no JSON any more
                return MUTATORS[parser](data, choose)[:most_bytes]
        changed: bytes = atheris.Mutate(data, most_bytes)
        return changed

    atheris.Setup([sys.argv[0], *arguments], lambda data: parsers.accepts(parser, data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(parser: str, seconds: int, work: Path) -> tuple[int, list[Path]]:
    """Return how many inputs a parser was given, and what it broke at."""
    kept, found = CORPUS / parser, work / parser
    before = set(kept.iterdir())
    found.mkdir(parents=True)
    begin = [sys.executable, __file__, "--one", parser]
    limits = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-rss_limit_mb=2048",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    done = subprocess.run(
        [*begin, *limits, f"-artifact_prefix={kept}/", str(found), str(kept)],
        capture_output=True, text=True, check=False, cwd=HERE,
    )  # fmt: skip
    counted = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    broken = sorted({p for p in kept.iterdir() if p.name.startswith(("crash-", "timeout-", "oom-"))} - before)
    if done.returncode and not broken:
        sys.exit(f"{parser}: {done.stderr[-3000:]}")
    if broken:
        print(done.stderr[-3000:], file=sys.stderr)
    _keep(found, kept)
    return int(counted[1]) if counted else 0, broken


def _keep(found: Path, kept: Path) -> None:
    """Add to a corpus what went a new way, the smallest first, as long as it stays small."""
    there = {path.read_bytes() for path in kept.iterdir()}
    new = {data for path in found.iterdir() if len(data := path.read_bytes()) <= MOST_BYTES} - there
    for data in sorted(new, key=lambda data: (len(data), data))[: max(0, MOST_FILES - len(there))]:
        (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parsers", nargs="*", metavar="PARSER")
    parser.add_argument("--seconds", type=int, default=600, help="all together")
    parser.add_argument("--update-counts", action="store_true", help="write how many into docs/reliability.md")
    asked = parser.parse_args()
    names = asked.parsers or sorted(p.name for p in CORPUS.iterdir())
    broken: list[Path] = []
    total = 0
    with tempfile.TemporaryDirectory(prefix="lora-build-fuzz-") as work:
        for name in names:
            count, failed = fuzz(name, asked.seconds // len(names), Path(work))
            print(f"{name:<16} {count:>10,} inputs, {len(failed)} broke it", flush=True)
            broken += failed
            total += count
    for path in broken:
        print(f"broken by {path}")
    print(f"{total:,} inputs in all")
    if asked.update_counts and not broken and not asked.parsers:
        counts.record("bytes that a fuzzer gave to the parsers", total, by="tests/fuzz/fuzz.py")
        counts.write_page()
    return 1 if broken else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
    sys.exit(main())
