"""Write the builds that this version is held to for ever: `python tests/golden/releases/make.py`, once for each release.

A folder is never written again, or changed: what a release has built, every later one must read and verify.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import lora_build
from makers import small

HASHES = Path(__file__).with_name("hashes.json").resolve()


def make(folder: Path) -> None:
    """Build a plain base and two adapters on a base in shards, in another dtype."""
    hashes = json.loads(HASHES.read_text()) if HASHES.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        os.chdir(inputs)  # sources are relative, so that no path of this machine is in the provenance
        small.make_base(inputs / "base")
        small.make_base(inputs / "sharded", shards=True)
        small.make_adapter(inputs / "math")
        small.make_adapter(inputs / "code", seed=90)
        for build, base, adapters, more in (
            ("plain", "./base", {"math": "./math"}, {}),
            (
                "shards",
                "./sharded",
                {"math": "./math", "code": {"source": "./code", "weight": 0.3}},
                {"dtype": "float16"},
            ),
        ):
            recipe = {"base": base, "adapters": adapters, "output": {"dir": str(folder / build)}, **more}
            hashes[f"{folder.name}/{build}"] = lora_build.build(recipe).manifest.manifest_hash
    HASHES.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    place = Path(__file__).parent.resolve() / lora_build.__version__
    if place.exists():
        sys.exit(f"{place} is there; what a release has built is not written again")
    make(place)
