"""Every method on every kind of layer and every way to store it, built, and held to recorded digests.

The inputs come from inputs.json.xz by names alone (makers/headers.py; make_inputs.py says how they were found), so that
no version of peft or transformers decides a byte of them. builds.json holds what is built. A golden changes only with
--update-goldens and a line under "Bytes changed" in CHANGELOG.md.
"""

import json
import lzma
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_build
from lora_build.errors import LoraBuildError
from makers import headers
from makers.weights import sha256_of_weights

pytestmark = pytest.mark.early

GOLDEN = Path(__file__).with_name("builds.json")
DIGESTS = ("manifest_hash", "build_key", "output_digest")
HALVES = ("bfloat16", "float16")
MACHINE = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
"""What the bits of `numerics: peft` and of singular vectors hang on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One build.

    `adapters` are name -> (entry, weight), `keys` the recipe's, `dtype` that of the base's floats if not its own.
    """

    id: str
    base: str
    adapters: Mapping[str, tuple[str, float]]
    keys: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None


@cache
def inputs() -> dict[str, Any]:
    """Return what make_inputs.py found."""
    found: dict[str, Any] = json.loads(lzma.decompress(Path(__file__).with_name("inputs.json.xz").read_bytes()))
    return found


def recorded(
    id: str, what: str = "", *, dtype: str | None = None, weights: tuple[float, ...] = (), **keys: Any
) -> Case:
    """Return the build of a recorded case, or `what` it is with other keys."""
    entry = inputs()["cases"][id]
    adapters = {
        name: (adapter, weights[i] if weights else weight)
        for i, (name, (adapter, weight)) in enumerate(entry["adapters"].items())
    }
    return Case(id=f"{id}{what}", base=entry["base"], adapters=adapters, keys=keys, dtype=dtype)


def together(what: str, *ids: str, weights: tuple[float, ...] = (), **keys: Any) -> Case:
    """Return the build of the first case's base with the adapters of all."""
    cases = [inputs()["cases"][id] for id in ids]
    found = [adapter for case in cases for adapter, _ in case["adapters"].values()]
    adapters = {f"a{i}": (name, weights[i] if weights else 1.0) for i, name in enumerate(found)}
    return Case(id=what, base=cases[0]["base"], adapters=adapters, keys=keys)


def halves() -> Iterator[Case]:
    """Yield the methods on bases of 16 bits; those of the families are that already."""
    for place in ("Linear", "Conv1D", "Embedding", "Conv2d", "experts", "Conv2d, groups"):
        for i, (id, case) in enumerate(inputs()["cases"].items()):
            if case["base"] == f"a {place}":
                yield recorded(id, f" in {HALVES[i % 2]}", dtype=HALVES[i % 2])


def as_peft() -> Iterator[Case]:
    """Yield builds with PEFT's own bits."""
    for id in (
        "llama-one", "gpt2-one", "phi3-one", "bert-one", "mixtral-experts-two", "mixtral-twin-bf16", "gpt_oss-experts-two",
        "llama-dora", "llama-dora-bf16", "gpt2-dora-bf16", "resnet-conv-bf16", "resnet-conv-dora", "llama-embedding-bf16",
        "llama-trainable-tokens", "llama-bdlora-bf16", "qwen2-lora-bias-bf16", "llama_tied-saved-both-tied",
        "llama-rslora", "vit-v4-names", "qwen2_vl-v4-names", "siglip-head-bf16", "llama-classifier-bf16",
        "LoRA on a Conv1d", "LoRA on a Conv3d",
    ):  # fmt: skip
        yield recorded(id, " as peft", weights=(1, 1, 1), numerics="peft")
        yield recorded(id, " as peft, unsafe", weights=(1, 1, 1), numerics="peft", safe_merge=False)
    yield recorded("llama-one", " as peft in float16", numerics="peft", dtype="float16")
    yield recorded("llama_tied-tied-embedding", " as peft, tied", numerics="peft", tied_embeddings="peft")
    yield recorded("llama_tied-tied-embedding", " as peft, untied", numerics="peft")
    yield together("llama: two as peft", "llama-one", "llama-rslora", numerics="peft")


def recipes() -> Iterator[Case]:
    """Yield other keys of a recipe than base and adapters."""
    for id in ("llama-one", "llama-embedding-two", "gpt2-dora", "mixtral-experts-two", "llama-oft", "resnet-conv"):
        for dtype in ("float32", *HALVES):
            case = recorded(id, f" to {dtype}")
            yield Case(id=case.id, base=case.base, adapters=case.adapters, keys={"dtype": dtype})
        yield recorded(id, " in shards", output={"max_shard_size": "9KB"})
        yield recorded(id, " in one file", output={"max_shard_size": "1GB"}, safe_merge=False)
    for id in ("llama_tied-tied-embedding", "llama_tied-tied-head", "llama_tied-saved-head", "gpt2-tied-embedding",
               "gemma3-tied-embedding", "bloom-tied-embedding", "llama_tied-trainable-tokens"):  # fmt: skip
        for tied in ("peft", "error"):
            yield recorded(id, f" tied: {tied}", tied_embeddings=tied)
    for id in ("mixtral-experts-two", "gpt_oss-only-down_proj", "qwen3_moe-experts-two"):
        case = recorded(id)
        spec = {name: {"expert_packing": "unsloth"} for name in case.adapters}
        yield Case(id=f"{id} of unsloth", base=case.base, adapters=case.adapters, keys={"adapters": spec})
    yield together("llama: the saved head of one", "llama-saved-lm_head", "llama-grown-saved", saved_modules_from="a1")
    yield together(
        "llama: the saved embedding of one",
        "llama-saved-embed_tokens",
        "llama-saved-embed_tokens",
        saved_modules_from="a1",
    )


def sums() -> Iterator[Case]:
    """Yield several adapters of one base."""
    weights = (0.5, -0.3, 0.7, 1.5)
    low = ("llama-one", "llama-rslora", "llama-patterns", "llama-gaussian")
    yield together("llama: four LoRA", *low, weights=weights)
    yield together("llama: the four turned round", *low[::-1], weights=weights[::-1])
    yield together("llama: BD-LoRA and LoRA", "llama-bdlora", "llama-patterns", weights=weights)
    yield together("llama: two OFT", "llama-oft", "llama-oft-shared")
    yield together("llama: two IA3", "llama-ia3", "llama-ia3")
    yield together("llama: two LoHa", "llama-loha", "llama-loha-bf16", weights=weights)
    yield together("llama: two LoKr", "llama-lokr", "llama-lokr-factor", weights=weights)
    yield together("llama: two AdaLoRA", "llama-adalora", "llama-adalora-bf16", weights=weights)
    yield together("llama: two VeRA", "llama-vera", "llama-vera-bf16", weights=weights)
    yield together("llama: PiSSA and LoRA", "llama-pissa", "llama-one")
    yield together("llama: OLoRA and LoRA", "llama-olora", "llama-one", weights=(0.5, 2))
    yield together("llama: tokens and a head", "llama-trainable-tokens", "llama-saved-lm_head")
    yield together("mixtral: stacks and single experts", "mixtral-experts-two", "mixtral-v4-names", weights=weights)
    yield together("phi3: fused and not", "phi3-one", "phi3-rslora", weights=weights)


QUICK = re.compile(
    r"[^`]* on a (Linear|Conv1D in .*|Embedding|Conv2d|experts in .*)|LoRA on a [^,]*"
    r"|LoHa.* on a Conv2d, groups in .*|.*(cp|decompose_both|block_share|coft|mica|pissa|olora)` on a Linear"
    r"|(bart|bert|bloom|clip|jamba|mamba|mllama|t5|wav2vec2)-one|(deepseek_v3|gpt_oss|jamba|mixtral)-experts-two"
    r"|(gpt_neox|mixtral|phimoe|qwen2_vl|qwen3_moe|vit|granitemoe)-v4-names"
    r"|llama-(.*dora.*|classifier|grown|layer.*)-bf16|mixtral-experts-of-peft.*|siglip-head-two|llama-parameters"
    r"|.*(bdlora|lora-bias|bias-all|dora-lora-dora|tying)|.* as peft|.*-.* (tied:|to|in|of) [^ ]*|[^ ]*: .*"
)
"""What `make test` builds: every method, every way to store, every key. `make test-long` builds all."""
CASES = [*map(recorded, sorted(inputs()["cases"])), *halves(), *as_peft(), *recipes(), *sums()]
PARTS = {f"{'long' if long else 'quick'} {part}": (long, part) for long in (False, True) for part in range(4)}
MARKED = [pytest.param(*spec, id=name, marks=[pytest.mark.long] * spec[0]) for name, spec in PARTS.items()]


class Inputs:
    """Writes each base and each adapter once."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[tuple[str, str | None], Path]()

    def base(self, name: str, dtype: str | None) -> Path:
        if (name, dtype) not in self._made:
            entry = inputs()["bases"][name]
            if dtype:
                entry = {**entry, "files": {f: {n: [dtype if "float" in t[0] else t[0], *t[1:]] for n, t in tensors.items()}
                                            for f, tensors in entry["files"].items()}}  # fmt: skip
            self._made[name, dtype] = headers.write(entry, self._folder(), "config.json", salt=name)
        return self._made[name, dtype]

    def adapter(self, name: str) -> Path:
        if (name, "") not in self._made:
            entry = inputs()["adapters"][name]
            self._made[name, ""] = headers.write(entry, self._folder(), "adapter_config.json", salt=name)
        return self._made[name, ""]

    def _folder(self) -> Path:
        return self._root / f"made-{len(self._made):04d}"


def build(case: Case, made: Inputs, out: Path) -> dict[str, str]:
    """Return the digests of a case's build, or that it is refused."""
    keys = dict(case.keys)
    specs = keys.pop("adapters", {})
    adapters = {
        name: {"source": str(made.adapter(entry)), "weight": weight, **specs.get(name, {})}
        for name, (entry, weight) in case.adapters.items()
    }
    output = {"dir": str(out), **keys.pop("output", {})}
    try:
        manifest = lora_build.build(
            {"base": str(made.base(case.base, case.dtype)), "adapters": adapters, "output": output, **keys}
        ).manifest
    except LoraBuildError as error:
        return {"refused": type(error).__name__, "why": str(error)}
    found = {digest: getattr(manifest, digest).removeprefix("sha256:")[:20] for digest in DIGESTS}
    found["weights_digest"] = sha256_of_weights(out)[:20]
    return found | ({} if manifest.reproducibility == "exact" else {"machine": MACHINE})


def same(found: Mapping[str, str], golden: Mapping[str, str]) -> bool:
    """Whether a build is the recorded one, as far as this machine can say."""
    if found.get("machine") != golden.get("machine"):
        return found.keys() == golden.keys()
    return {k: v for k, v in found.items() if k != "why"} == golden


@pytest.mark.parametrize(("long", "part"), MARKED)
def test_every_build_is_the_recorded_one(
    long: bool, part: int, tmp_path: Path, update_goldens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # a third of the time
    made = Inputs(tmp_path)
    cases = [case for case in CASES if (QUICK.fullmatch(case.id) is None) == long][part::4]
    found = {case.id: build(case, made, tmp_path / f"out-{i}") for i, case in enumerate(cases)}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if update_goldens:
        for digests in found.values():
            digests.pop("why", None)
        lines = (f" {json.dumps(id)}: {json.dumps(digests)}" for id, digests in sorted((golden | found).items()))
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        golden |= found

    other = {id: (digests, golden[id]) for id, digests in found.items() if not same(digests, golden[id])}
    assert other == {}


def test_every_recorded_build_is_made() -> None:
    golden = json.loads(GOLDEN.read_text())

    assert len(CASES) > 700
    assert sorted(golden) == sorted(case.id for case in CASES)
