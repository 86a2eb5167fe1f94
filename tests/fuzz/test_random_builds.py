"""Random bases, adapters and recipes, built, and every element held to an oracle that knows nothing of lora_build.

A few in `make test`; `make fuzz` sets LORA_BUILD_FUZZ_BUILDS to how many it wants, and other seeds.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_build
from judges.oracle import base_tensors, expected_checkpoint, ulps_off
from makers.counts import Count, record

FEW = 12
COUNT = int(os.environ.get("LORA_BUILD_FUZZ_BUILDS", FEW))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a build is of: shapes of its linear layers, adapters, keys of the recipe."""

    shapes: list[tuple[int, int]]
    dtype: torch.dtype
    num_shards: int
    adapters: list[dict[str, Any]]
    keys: dict[str, Any]
    seed: int


@st.composite
def builds(draw: st.DrawFn) -> Drawn:
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
    layers = range(len(shapes))
    adapter = st.fixed_dictionaries(
        {
            "r": st.integers(1, 9),
            "alpha": st.one_of(st.integers(1, 64), st.floats(0.01, 100)),
            "use_rslora": st.booleans(),
            "weight": st.sampled_from([1.0, 0.5, -0.25, 0.3, 1e-3, 7.0]),
            "dtype": st.sampled_from(DTYPES),
            "scale": st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0]),
            "layers": st.lists(st.sampled_from(layers), min_size=1, unique=True),
            "rank_pattern": st.dictionaries(st.sampled_from([f"layers.{i}.proj" for i in layers]), st.integers(1, 9)),
            "alpha_pattern": st.dictionaries(st.sampled_from([f"layers.{i}.proj" for i in layers]), st.integers(1, 9)),
        }
    )
    return Drawn(
        shapes=shapes,
        dtype=draw(st.sampled_from(DTYPES)),
        num_shards=draw(st.integers(1, len(shapes))),
        adapters=draw(st.lists(adapter, min_size=1, max_size=3)),
        keys={
            "dtype": draw(st.sampled_from(["keep", "bfloat16", "float32"])),
            "safe_merge": draw(st.booleans()),
        }
        | draw(st.sampled_from([{}, {"max_shard_size": "1KB"}, {"max_shard_size": "1GB"}])),
        seed=draw(st.integers(0, 2**31)),
    )


def write(drawn: Drawn, folder: Path) -> dict[str, Any]:
    """Write the inputs of a build, and return its recipe."""
    random = torch.Generator().manual_seed(drawn.seed)

    def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        spread = torch.exp2(torch.randint(-6, 4, shape, generator=random).float())
        return (torch.randn(*shape, generator=random) * spread * scale).to(dtype)

    weights = {f"layers.{i}.proj.weight": values(*s, dtype=drawn.dtype) for i, s in enumerate(drawn.shapes)}
    weights["norm.weight"] = values(5, dtype=drawn.dtype)
    weights["layers.0.proj.bias"] = values(drawn.shapes[0][0], dtype=drawn.dtype)
    (folder / "base").mkdir()
    config = {"model_type": "unheard_of", "dtype": str(drawn.dtype).removeprefix("torch.")}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "tokenizer.json").write_text("{}")
    if drawn.num_shards == 1:
        save_file(weights, folder / "base" / "model.safetensors")
    else:
        n = drawn.num_shards
        places = {name: f"model-{1 + i % n:05d}-of-{n:05d}.safetensors" for i, name in enumerate(sorted(weights))}
        for shard in set(places.values()):
            save_file({k: t for k, t in weights.items() if places[k] == shard}, folder / "base" / shard)
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for at, adapter in enumerate(drawn.adapters):
        tensors = {}
        for i in adapter["layers"]:
            rows, columns = drawn.shapes[i]
            r, prefix = (
                adapter["rank_pattern"].get(f"layers.{i}.proj", adapter["r"]),
                f"base_model.model.layers.{i}.proj",
            )
            tensors[f"{prefix}.lora_A.weight"] = values(r, columns, dtype=adapter["dtype"])
            tensors[f"{prefix}.lora_B.weight"] = values(rows, r, dtype=adapter["dtype"], scale=adapter["scale"])
        home = folder / f"a{at}"
        home.mkdir()
        save_file(tensors, home / "adapter_model.safetensors")
        settings = {key: adapter[key] for key in ("r", "use_rslora", "rank_pattern", "alpha_pattern")}
        more = {"peft_type": "LORA", "lora_alpha": adapter["alpha"], "target_modules": ["proj"], "bias": "none"}
        (home / "adapter_config.json").write_text(json.dumps(settings | more))
    keys = dict(drawn.keys)
    shard_size = {"max_shard_size": keys.pop("max_shard_size")} if "max_shard_size" in keys else {}
    return {
        "base": str(folder / "base"),
        "adapters": {
            f"a{at}": {"source": str(folder / f"a{at}"), "weight": adapter["weight"]}
            for at, adapter in enumerate(drawn.adapters)
        },
        "output": {"dir": str(folder / "out"), **shard_size},
        **keys,
    }


def check(drawn: Drawn, folder: Path) -> None:
    recipe, refusal = write(drawn, folder), ""
    try:
        built = lora_build.build(recipe)
    except lora_build.LoraBuildError as error:
        refusal = str(error)
    if refusal:  # float16 overflows where others do not; a small update may change no value
        assert "finite" in refusal or "equal the base" in refusal
        assert not (folder / "out").exists()
        return
    adapters = [(Path(spec["source"]), spec["weight"]) for spec in recipe["adapters"].values()]
    expected = expected_checkpoint(folder / "base", adapters, dtype=recipe["dtype"])
    found = base_tensors(folder / "out")
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert found[name].dtype == entry.dtype
        if not entry.updates:
            assert found[name].view(torch.uint8).equal(entry.copied().view(torch.uint8))
        elif entry.dtype == torch.float16 and not found[name].isfinite().all():
            assert recipe["safe_merge"] is False
        else:
            limit = 1.0 if entry.dtype == torch.float32 else 0.51
            assert ulps_off(found[name], entry.exact(), entry.base, entry.dtype).max() <= limit, name
    assert lora_build.verify(built.dir).manifest_hash == built.manifest.manifest_hash
    assert (built.dir / "tokenizer.json").read_bytes() == b"{}"
    recipe["output"]["dir"] = str(folder / "again")
    recipe["adapters"] = dict(reversed(recipe["adapters"].items()))
    assert lora_build.build(recipe).manifest.manifest_hash == built.manifest.manifest_hash


def test_every_random_build_is_what_the_oracle_says(monkeypatch: pytest.MonkeyPatch, count: Count) -> None:
    num_builds = 0

    @settings(
        max_examples=COUNT, derandomize=COUNT == FEW, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(builds())
    def build_each(drawn: Drawn) -> None:
        nonlocal num_builds
        folder = Path(tempfile.mkdtemp(prefix="lora-build-random-"))
        try:
            check(drawn, folder)
        finally:
            shutil.rmtree(folder)
        num_builds += 1

    monkeypatch.setattr("os.fsync", lambda _: None)
    build_each()
    if count.update and COUNT > FEW:
        record("random builds that an oracle was asked about", num_builds, by=count.test)
