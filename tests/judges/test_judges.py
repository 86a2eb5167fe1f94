"""Independent judges: programs of others that look at base, adapter and merge, and know nothing of lora_build.

deltalint 0.1 replays each merge. Our builds must pass it. Where it fails or passes wrongly, a test pins that with
peft's own merge, or with one that was spoilt on purpose: so the fault is the judge's, and its verdict there says nothing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deltalint import cli
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from judges.oracle import expected_checkpoint, ulps_off
from makers.zoo import Adapter, Base, Zoo, load_model, load_peft, quiet

PASS, FAIL, INCONCLUSIVE = 0, 1, 3
PREFIX = "base_model.model."
BF16, FP32 = Base(dtype="bfloat16"), Base(dtype="float32")


def lora(**options: Any) -> Adapter:
    """Return an adapter; what is not a field of Adapter is an option of LoraConfig."""
    own = {name: options.pop(name) for name in Adapter.__dataclass_fields__ if name in options}
    return Adapter(**own, options=tuple(options.items()))


class Judge:
    """Runs `deltalint check` and keeps what it said of each layer."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.said: dict[str, Any] = {}

    def __call__(self, base: Path, adapter: Path, merged: Path) -> int:
        self.capsys.readouterr()
        code = cli.main(
            ["check", "--base", str(base), "--adapter", str(adapter), "--merged", str(merged), "--json"]
        )  # fmt: skip
        self.said = json.loads(self.capsys.readouterr().out)
        return int(code)


@pytest.fixture
def judge(capsys: pytest.CaptureFixture[str]) -> Judge:
    return Judge(capsys)


def ours(folder: Path, base: Path, adapters: Mapping[str, Any]) -> Path:
    named = {name: value if isinstance(value, dict) else str(value) for name, value in adapters.items()}
    lora_build.build({"base": str(base), "adapters": named, "output": {"dir": str(folder / "out")}})
    return folder / "out"


def pefts(folder: Path, arch: str, base: Path, adapters: Sequence[Path], **merge: Any) -> Path:
    """Save what peft merges, one adapter after the other."""
    named = {f"adapter{i}": adapter for i, adapter in enumerate(adapters)}
    peft = load_peft(load_model(arch, base), named, dict.fromkeys(named, 1.0))
    with quiet():
        peft.merge_and_unload(**merge).save_pretrained(folder / "peft")
    return folder / "peft"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def copy_of(folder: Path, name: str, **changes: Tensor) -> Path:
    """Return a copy of a folder with one weight file, some of whose tensors (`__` for `.`) are others."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    save_file(load_file(file) | {k.replace("__", "."): t for k, t in changes.items()}, file, {"format": "pt"})
    return copy


def faint(adapter: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Return an adapter whose update is so small that the judge has to replay every bit of the merge."""
    smaller = {k: (t / 64 if "lora_B" in k else t).to(dtype) for k, t in tensors(adapter).items()}
    folder.mkdir()
    save_file(smaller, folder / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", folder)
    return folder


# --- our builds pass ----------------------------------------------------------------------------------------

PLAIN: dict[str, tuple[Base, Adapter]] = {
    "llama, bf16 base": (BF16, lora()),
    "llama, fp32 base": (FP32, lora()),
    "llama, fp16 base": (Base(dtype="float16"), lora()),
    "rslora": (BF16, lora(rank=6, alpha=12, use_rslora=True)),
    "other ranks and alphas for some layers": (
        BF16, lora(rank_pattern={"q_proj": 2, "down_proj": 6}, alpha_pattern={"v_proj": 3}),
    ),
    "an embedding, fp32 base": (FP32, lora(targets=("q_proj", "embed_tokens"))),
    "a head that was trained whole": (BF16, lora(targets=("q_proj",), modules_to_save=["lm_head"])),
    "qwen2 with biases": (Base(arch="qwen2", dtype="bfloat16"), lora()),
    "gpt2, stored transposed": (Base(arch="gpt2", dtype="bfloat16"), lora()),
    "t5": (Base(arch="t5", dtype="bfloat16"), lora()),
    "shards": (Base(dtype="bfloat16", sharded=True), lora()),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_deltalint_passes_our_builds(case: str, zoo: Zoo, judge: Judge, tmp_path: Path) -> None:
    spec, adapter = PLAIN[case]
    base, math = zoo.base(spec), zoo.adapter(spec, adapter)

    assert judge(base, math, ours(tmp_path, base, {"math": math})) == PASS, judge.said
    assert judge.said["layers"]


def test_deltalint_passes_our_builds_of_faint_updates_bit_by_bit(zoo: Zoo, judge: Judge, tmp_path: Path) -> None:
    base = zoo.base(BF16)
    math = faint(zoo.adapter(BF16, lora()), tmp_path / "math")

    assert judge(base, math, ours(tmp_path, base, {"math": math})) == PASS, judge.said
    methods = {layer["method"] for layer in judge.said["layers"]}
    assert "fingerprint" in methods


def concatenated(folder: Path, adapters: Mapping[Path, float]) -> Path:
    """Return one plain adapter for the weighted sum: the A's stacked, the B's side by side, weight and scaling in B."""
    rows: dict[str, list[Tensor]] = {}
    for adapter, weight in adapters.items():
        config = json.loads((adapter / "adapter_config.json").read_text())
        scale = weight * config["lora_alpha"] / config["r"]
        for key, t in tensors(adapter).items():
            rows.setdefault(key, []).append(t * scale if "lora_B" in key else t)
    factors = {k: torch.cat(ts, dim=1 if "lora_B" in k else 0).contiguous() for k, ts in rows.items()}
    rank = next(t.shape[0] for k, t in factors.items() if "lora_A" in k)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
    return folder


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.25), (2.0, 0.125)], ids=str)
def test_deltalint_passes_our_weighted_sums_against_one_concatenated_adapter(
    weights: tuple[float, float], zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    base, a, b = zoo.base(BF16), zoo.adapter(BF16, lora(seed=1)), zoo.adapter(BF16, lora(seed=2, rank=6, alpha=3))
    # weights and scalings are powers of two, so that folding them into B rounds nothing
    weighted = {name: {"source": str(p), "weight": w} for name, p, w in zip("ab", (a, b), weights, strict=True)}
    both = concatenated(tmp_path / "both", dict(zip((a, b), weights, strict=True)))

    assert judge(base, both, ours(tmp_path, base, weighted)) == PASS, judge.said


def test_deltalint_passes_our_sum_of_faint_adapters_and_fails_pefts_which_rounds_twice(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    base = zoo.base(BF16)
    a, b = (faint(zoo.adapter(BF16, lora(seed=seed)), tmp_path / name) for seed, name in ((1, "a"), (2, "b")))
    both = concatenated(tmp_path / "both", {a: 1.0, b: 1.0})

    assert judge(base, both, ours(tmp_path, base, {"a": a, "b": b})) == PASS, judge.said
    assert judge(base, both, pefts(tmp_path, "llama", base, [a, b], adapter_names=["adapter0", "adapter1"])) == FAIL


# --- the judge can tell -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", ["unmerged", "twice", "another adapter"])
def test_deltalint_fails_merges_that_are_wrong(spoilt: str, zoo: Zoo, judge: Judge, tmp_path: Path) -> None:
    base, math = zoo.base(BF16), zoo.adapter(BF16, lora())
    match spoilt:
        case "unmerged":
            merged = base
        case "twice":
            merged = ours(tmp_path, base, {"math": {"source": str(math), "weight": 2.0}})
        case _:
            merged = ours(tmp_path, base, {"other": zoo.adapter(BF16, lora(seed=3))})

    assert judge(base, math, merged) == FAIL


# --- where the judge is wrong: peft's own merge is the proof ------------------------------------------------


def test_deltalint_fails_pefts_own_merge_and_ours_where_alpha_pattern_is_a_regular_expression(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    # peft matches `(.*\.)?KEY$`, deltalint compares the ends of names
    base, math = zoo.base(BF16), zoo.adapter(BF16, lora(alpha_pattern={r".*\.0\.self_attn\.v_proj": 64}))

    for merged in (pefts(tmp_path, "llama", base, [math]), ours(tmp_path, base, {"math": math})):
        assert judge(base, math, merged) == FAIL
        assert failed(judge) == ["model.layers.0.self_attn.v_proj"]


def failed(judge: Judge) -> list[str]:
    return sorted(layer["name"] for layer in judge.said["layers"] if layer["verdict"] == "FAIL")


def test_deltalint_fails_pefts_own_safe_merge_of_a_faint_update(zoo: Zoo, judge: Judge, tmp_path: Path) -> None:
    # it replays one rounding, as peft does without safe_merge; ours is that one too, with and without
    base = zoo.base(BF16)
    math = faint(zoo.adapter(BF16, lora()), tmp_path / "math")

    assert judge(base, math, pefts(tmp_path, "llama", base, [math], safe_merge=True)) == FAIL
    assert judge(base, math, ours(tmp_path, base, {"math": math})) == PASS


def test_deltalint_fails_pefts_own_merge_and_ours_of_a_faint_update_that_is_stored_in_bf16(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    # it rounds the update to the dtype of the file, but peft loads factors as float32
    base = zoo.base(BF16)
    math = faint(zoo.adapter(BF16, lora()), tmp_path / "math", torch.bfloat16)

    assert judge(base, math, pefts(tmp_path, "llama", base, [math])) == FAIL
    assert judge(base, math, ours(tmp_path, base, {"math": math})) == FAIL


def test_deltalint_fails_our_embedding_which_is_rounded_once_and_passes_pefts_which_is_rounded_twice(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    # peft rounds the update of an embedding to the base's dtype before it adds it, and deltalint replays that
    base, math = zoo.base(BF16), zoo.adapter(BF16, lora(targets=("q_proj", "embed_tokens")))
    theirs, mine = pefts(tmp_path, "llama", base, [math]), ours(tmp_path, base, {"math": math})
    name = "model.embed_tokens.weight"
    expected = expected_checkpoint(base, [(math, 1.0)])[name]
    off = [ulps_off(tensors(m)[name], expected.exact(), expected.base, torch.bfloat16).max() for m in (theirs, mine)]

    assert judge(base, math, theirs) == PASS
    assert off[0] > 0.51
    assert judge(base, math, mine) == FAIL
    assert failed(judge) == ["model.embed_tokens"]
    assert off[1] <= 0.51


@pytest.mark.parametrize(
    ("options", "verdict"),
    [({"use_dora": True}, "UNSUPPORTED"), ({"trainable_token_indices": [5, 9]}, "UNKNOWN")],
    ids=["DoRA", "trained tokens"],
)
def test_deltalint_does_not_judge_everything_that_peft_merges(
    options: dict[str, Any], verdict: str, zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    base, math = zoo.base(BF16), zoo.adapter(BF16, lora(targets=("q_proj",), **options))

    assert judge(base, math, pefts(tmp_path, "llama", base, [math])) == INCONCLUSIVE
    assert verdict in {layer["verdict"] for layer in judge.said["layers"]}


# --- where the judge is blind: our own check is not ---------------------------------------------------------


def test_deltalint_passes_a_merge_whose_head_and_embedding_are_zero_and_verify_does_not(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    # it looks only at what the adapter adapts
    base, math = zoo.base(BF16), zoo.adapter(BF16, lora())
    merged = ours(tmp_path, base, {"math": math})
    zeros = {name: torch.zeros_like(tensors(base)[name]) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    spoilt = copy_of(merged, "spoilt", **zeros)

    assert judge(base, math, spoilt) == PASS
    with pytest.raises(lora_build.VerificationError):
        lora_build.verify(spoilt)
    untouched = {n for n in tensors(base) if f"{PREFIX}{n.removesuffix('.weight')}.lora_A.weight" not in tensors(math)}
    assert {n for n in untouched if not torch.equal(tensors(spoilt)[n], tensors(base)[n])} == set(zeros)
    assert {n for n in untouched if not torch.equal(tensors(merged)[n], tensors(base)[n])} == set()


def test_deltalint_passes_a_merge_that_is_two_percent_too_strong_and_its_digest_is_another(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    # an update that is large beside the weight's resolution is judged to 5 %
    base, math = zoo.base(FP32), zoo.adapter(FP32, lora())
    right = ours(tmp_path / "right", base, {"math": math})
    strong = ours(tmp_path / "strong", base, {"math": {"source": str(math), "weight": 1.02}})

    assert judge(base, math, strong) == PASS
    digests = {json.loads((m / "lora-build.manifest.json").read_text())["weights_digest"] for m in (right, strong)}
    assert len(digests) == 2


def test_deltalint_passes_a_merge_that_dropped_lora_bias_and_ours_has_it(
    zoo: Zoo, judge: Judge, tmp_path: Path
) -> None:
    spec = Base(arch="qwen2", dtype="bfloat16")
    base, math = zoo.base(spec), zoo.adapter(spec, lora(targets=("q_proj", "v_proj"), lora_bias=True))
    merged = ours(tmp_path, base, {"math": math})
    biases = {n: t for n, t in tensors(base).items() if n.endswith(("q_proj.bias", "v_proj.bias"))}
    assert len(biases) == 4
    assert not any(torch.equal(tensors(merged)[name], bias) for name, bias in biases.items())

    assert judge(base, math, merged) == PASS
    assert judge(base, math, copy_of(merged, "dropped", **biases)) == PASS
