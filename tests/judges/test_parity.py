"""Merged checkpoints against the exact values, against peft and against transformers.

Nothing here knows how lora_build works: `oracle.py` computes what every tensor must be from the files, peft
gives the logits that users had before the merge, transformers loads the result. The oracle itself is held
against peft in float64 first.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
from judges.oracle import Expected, base_tensors, expected_checkpoint, ulps_off
from lora_build.errors import LoraBuildError
from makers.families import FAMILIES
from makers.zoo import Adapter, Base, Zoo, load_model, load_peft, logits, quiet

Adapters = tuple[tuple[str, Adapter, float], ...]
"""Name, adapter and weight of each adapter of a recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe over tiny models.

    `plain` marks what peft merges in one rounding: one LoRA adapter on linear layers, weight 1, nothing else.
    """

    id: str
    base: Base
    adapters: Adapters
    adapter_names: tuple[str, ...] | None = None
    dtype: str = "keep"
    tied: str = "untie"
    max_shard_size: str = "keep"
    safe_merge: bool = True
    plain: bool = False

    @property
    def merged(self) -> Adapters:
        by_name = {name: (name, adapter, weight) for name, adapter, weight in self.adapters}
        return tuple(by_name[name] for name in self.adapter_names or by_name)


def _lora(**fields: Any) -> Adapter:
    """Return an adapter; what is not a field of Adapter is an option of LoraConfig."""
    own = {name: fields.pop(name) for name in Adapter.__dataclass_fields__ if name in fields}
    own["edits"] = tuple(own.get("edits", {}).items())
    return Adapter(**own, options=tuple(fields.items()))


def _one(**fields: Any) -> Adapters:
    return (("math", _lora(**fields), 1.0),)


def _plain(arch: str, base: str, adapter: str, *, sharded: bool = False, **more: Any) -> Case:
    return Case(
        id=f"{arch}-{base}-plain-{adapter}" + ("-sharded" if sharded else ""),
        base=Base(arch=arch, dtype=base, sharded=sharded),
        adapters=_one(dtype=adapter),
        plain=True,
        **more,
    )


def _case(id: str, adapters: Adapters, **more: Any) -> Case:
    """Return a case whose id starts with the base's arch and dtype, as in `llama-bfloat16-rslora`."""
    arch, dtype, _ = id.split("-", 2)
    base = {field: more.pop(field) for field in Base.__dataclass_fields__.keys() & more.keys() - {"dtype"}}
    return Case(id=id, base=Base(arch=arch, dtype=dtype, **base), adapters=adapters, **more)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6, "v_proj": 3},
    "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 3, "down_proj": 5, "model.layers.1.self_attn.k_proj": 32},
}
GPT2_PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {r"h\.0\.attn\.c_proj": 7, "c_fc": 2},
    "alpha_pattern": {r"mlp\..*": 3, r"h\.\d\.attn\.c_attn": 1.5},
}
SMALL = "20KB"
QK = ("q_proj", "k_proj")
THREE: Adapters = (
    ("math", _lora(seed=1), 0.5),
    ("code", _lora(seed=2, rank=6, alpha=4, targets=(*QK, "down_proj"), dtype="bfloat16"), -0.3),
    ("chat", _lora(seed=3, rank=3, targets=("k_proj", "up_proj"), use_rslora=True), 2.0),
)

CASES = [
    # the plain case: every family, base dtype and adapter dtype
    _plain("llama", "float32", "float32"),
    _plain("llama", "bfloat16", "float32", sharded=True),
    _plain("llama", "bfloat16", "bfloat16"),
    _plain("llama", "float16", "float16"),
    _plain("llama_tied", "bfloat16", "float16"),
    _plain("qwen2", "bfloat16", "float32"),
    _plain("gpt2", "float32", "float32"),
    _plain("gpt2", "float16", "bfloat16", sharded=True),
    _plain("bert", "float16", "float32"),
    _plain("opt", "bfloat16", "float16"),
    _plain("t5", "float32", "bfloat16"),
    _plain("t5", "bfloat16", "float32", sharded=True),
    _plain("falcon", "bfloat16", "bfloat16"),
    _plain("falcon", "float32", "float32", sharded=True, safe_merge=False),
    # tensors of one file in different dtypes; a file without the model's prefix
    _case("llama-bfloat16-fp32-norms", _one(), fp32_norms=True),
    _case("gpt2-float32-bare-names", _one(), bare=True),
    # scaling and targets
    _case("llama-bfloat16-rslora", _one(rank=6, alpha=12, use_rslora=True)),
    _case("qwen2-float32-rslora", _one(rank=3, alpha=5, use_rslora=True)),
    _case("qwen2-float16-patterns", _one(**PATTERNS)),
    _case("llama-float32-patterns", _one(**PATTERNS, dtype="bfloat16")),
    _case("gpt2-float32-rslora-patterns", _one(**GPT2_PATTERNS)),
    _case("llama-float32-regex-targets", _one(targets=r".*\.1\.(self_attn\.[qv]|mlp\.down)_proj", alpha=3)),
    _case("llama-float32-layers", _one(layers_to_transform=[1])),
    _case("gpt2-bfloat16-fan-in-fan-out-false", _one(edits={"fan_in_fan_out": False})),
    _case("gpt2-float32-square-c_proj-only", _one(targets=r".*\.attn\.c_proj")),
    _case("llama-float32-fan-in-fan-out-true", _one(edits={"fan_in_fan_out": True})),
    # biases
    _case("qwen2-bfloat16-lora-bias", _one(targets=(*QK, "v_proj"), lora_bias=True)),
    _case("gpt2-float32-lora-bias", _one(lora_bias=True)),
    _case(
        "opt-float16-lora-bias",
        _one(targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), lora_bias=True, dtype="float16"),
    ),
    _case("falcon-float32-lora-bias", _one(lora_bias=True)),
    _case("qwen2-bfloat16-bias-all", _one(bias="all")),
    _case("gpt2-float32-bias-all", _one(bias="all")),
    _case("opt-float16-bias-all", _one(bias="all", targets=("q_proj", "fc1"))),
    _case("bert-float32-bias-all", _one(bias="all", targets=("query", "value"))),
    _case("gpt2-bfloat16-bias-lora-only", _one(bias="lora_only")),
    _case("bert-float32-bias-lora-only", _one(bias="lora_only", targets=("query", "value"))),
    _case(
        "opt-float32-bias-lora-only-and-lora-bias",
        _one(bias="lora_only", lora_bias=True, targets=("q_proj", "fc2")),
    ),
    # whole modules saved
    _case("llama-bfloat16-saved-head", _one(modules_to_save=["lm_head"])),
    _case("llama-float32-saved-embedding", _one(modules_to_save=["embed_tokens"])),
    _case("llama-float16-saved-norms", _one(modules_to_save=["norm"], targets=QK)),
    _case("llama_tied-float32-saved-head", _one(modules_to_save=["lm_head"])),
    _case("llama_tied-bfloat16-saved-embedding", _one(modules_to_save=["embed_tokens"])),
    _case("llama_tied-float32-saved-both", _one(modules_to_save=["embed_tokens", "lm_head"])),
    _case("gpt2-float32-saved-head", _one(modules_to_save=["lm_head"])),
    _case("bert-float32-saved-decoder", _one(modules_to_save=["decoder"], targets=("query",))),
    _case("bert-float32-saved-cls", _one(modules_to_save=["cls"], targets=("query",))),
    # embeddings, tied and not
    _case("llama-bfloat16-embedding", _one(targets=("embed_tokens", "q_proj"))),
    _case("llama-float32-embedding-and-head", _one(targets=("embed_tokens", "lm_head", "q_proj"))),
    _case("llama_tied-float32-embedding", _one(targets=("embed_tokens", "q_proj"))),
    _case("llama_tied-bfloat16-embedding", _one(targets=("embed_tokens", "q_proj")), sharded=True),
    _case("llama_tied-float32-head", _one(targets=("lm_head", "q_proj"))),
    _case("llama_tied-float32-embedding-and-head", _one(targets=("lm_head", "embed_tokens")), sharded=True),
    _case("llama_tied-float32-both-on-disk", _one(targets=("embed_tokens", "q_proj")), both_tied=True),
    _case("gpt2-float32-embeddings", _one(targets=("wte", "wpe"))),
    _case("gpt2-float16-head", _one(targets=("lm_head", "c_attn"))),
    _case("bert-float32-embedding", _one(targets=("word_embeddings", "position_embeddings", "query"))),
    _case("opt-float32-embedding", _one(targets=("embed_tokens", "q_proj"), dtype="float16")),
    _case("falcon-float32-embedding", _one(targets=("word_embeddings", "dense"))),
    _case("gpt2-float32-embedding-bare-names", _one(targets=("wte", "c_attn")), bare=True),
    _case("llama_tied-bfloat16-trained-in-float32", _one(targets=("embed_tokens",), loaded_as="float32")),
    _case("llama_tied-float32-peft-embedding", _one(targets=("embed_tokens", "q_proj")), tied="peft"),
    _case("llama_tied-float32-peft-head", _one(targets=("lm_head", "q_proj")), tied="peft"),
    _case("llama_tied-bfloat16-peft-both", _one(targets=("embed_tokens", "lm_head")), tied="peft"),
    # several adapters
    _case("llama-bfloat16-three", THREE),
    _case("llama-float32-three", THREE, sharded=True),
    _case("llama-float16-two-of-three", THREE, adapter_names=("chat", "math")),
    _case("llama-float32-one-of-three", THREE, adapter_names=("code",)),
    _case(
        "gpt2-float32-two-with-lora-bias",
        (
            ("math", _lora(seed=1, lora_bias=True), 0.5),
            ("code", _lora(seed=2, rank=2, targets=("c_proj",)), -0.3),
        ),
    ),
    _case(
        "llama_tied-float32-one-on-each-end",
        (
            ("math", _lora(seed=1, targets=("embed_tokens", "q_proj")), 0.5),
            ("code", _lora(seed=2, targets=("lm_head", "q_proj"), dtype="bfloat16"), -0.3),
        ),
    ),
    _case(
        "qwen2-float32-bias-all-and-another",
        (
            ("math", _lora(seed=1, bias="all"), 1.0),
            ("code", _lora(seed=2, targets=("q_proj", "up_proj")), -0.3),
        ),
    ),
    _case(
        "llama-float32-saved-head-and-another",
        (
            ("math", _lora(seed=1, modules_to_save=["lm_head"]), 1.0),
            ("code", _lora(seed=2, targets=QK), -0.3),
        ),
    ),
    # dtypes and shards
    _case("llama-float32-to-bfloat16", _one(), dtype="bfloat16", sharded=True),
    _case("gpt2-float32-to-float16", _one(), dtype="float16"),
    _case("llama-bfloat16-to-float32", THREE, dtype="float32"),
    _case("llama_tied-bfloat16-to-float32", _one(targets=("embed_tokens", "q_proj")), dtype="float32"),
    _case("bert-float16-to-bfloat16", _one(), dtype="bfloat16"),
    _case("opt-bfloat16-to-float16", _one(bias="all"), dtype="float16"),
    _case("llama-bfloat16-fp32-norms-to-float16", _one(), fp32_norms=True, dtype="float16"),
    _case("llama-bfloat16-saved-head-to-float16", _one(modules_to_save=["lm_head"]), dtype="float16"),
    _case("llama-float32-shards-to-one", _one(), sharded=True, max_shard_size="5GB"),
    _case("llama-float32-one-to-shards", _one(), max_shard_size=SMALL),
]
assert len({case.id for case in CASES}) == len(CASES) == 81, "an id stands twice, or a case was lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The folders of a case, and what must come of them."""

    base: Path
    adapters: dict[str, Path]
    weights: dict[str, float]
    expected: dict[str, Expected]

    @property
    def untied(self) -> bool:
        return not set(self.expected) <= set(base_tensors(self.base))


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A case that was built."""

    case: Case
    inputs: Inputs
    out: Path

    def tensors(self) -> dict[str, torch.Tensor]:
        return base_tensors(self.out)


def _inputs(case: Case, zoo: Zoo) -> Inputs:
    arch = FAMILIES[case.base.arch]
    folders = {name: zoo.adapter(case.base, adapter) for name, adapter, _ in case.adapters}
    expected = expected_checkpoint(
        zoo.base(case.base),
        [(folders[name], weight) for name, _, weight in case.merged],
        conv1d=arch.conv1d,
        tied=arch.tied,
        dtype=case.dtype,
        policy=case.tied,
    )
    weights = {name: weight for name, _, weight in case.merged}
    return Inputs(base=zoo.base(case.base), adapters=folders, weights=weights, expected=expected)


def _recipe(case: Case, inputs: Inputs, out: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base": str(inputs.base),
        "adapters": {n: {"source": str(inputs.adapters[n]), "weight": w} for n, _, w in case.adapters},
        "dtype": case.dtype,
        "safe_merge": case.safe_merge,
        "tied_embeddings": case.tied,
        "output": {"dir": str(out), "max_shard_size": case.max_shard_size},
    }
    if case.adapter_names:
        recipe["adapter_names"] = list(case.adapter_names)
    return recipe


@pytest.fixture(scope="module")
def builds(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Built]:
    """Return the function that builds a case, once for all tests."""

    @functools.cache
    def build(case_id: str) -> Built:
        case = next(case for case in CASES if case.id == case_id)
        inputs = _inputs(case, zoo)
        out = tmp_path_factory.mktemp("built") / case.id
        lora_build.build(_recipe(case, inputs, out))
        return Built(case=case, inputs=inputs, out=out)

    return lambda case: build(case.id)


@pytest.fixture
def built(request: pytest.FixtureRequest, builds: Callable[[Case], Built]) -> Built:
    """Return the case that this test is parametrised with, built."""
    return builds(request.param)


def each(*cases: Case) -> pytest.MarkDecorator:
    """Return the mark that runs a test on every case, building it first."""
    return pytest.mark.parametrize("built", cases, ids=[case.id for case in cases], indirect=True)


# --- the oracle itself: needs no lora_build -----------------------------------------------------------------


def _peft_can_merge(case: Case) -> bool:
    """Tell whether merge_and_unload means what the recipe means: not where it merges into a tied matrix."""
    tied_targets = {"lm_head", FAMILIES[case.base.arch].embedding}
    adapters = [adapter for _, adapter, _ in case.merged]
    touches_tie = any(not isinstance(a.targets, str) and tied_targets & set(a.targets or ()) for a in adapters)
    return case.tied == "peft" or not (touches_tie and FAMILIES[case.base.arch].tied)


@pytest.mark.parametrize("case", [case for case in CASES if _peft_can_merge(case)], ids=lambda case: case.id)
def test_the_oracle_agrees_with_peft_in_float64(case: Case, zoo: Zoo) -> None:
    inputs = _inputs(case, zoo)
    adapters = {name: inputs.adapters[name] for name in inputs.weights}
    peft = load_peft(load_model(case.base.arch, inputs.base, torch.float64), adapters, inputs.weights)

    with quiet():
        merged = peft.merge_and_unload(adapter_names=list(adapters)).state_dict()

    for name, expected in inputs.expected.items():
        exact = expected.exact().astype(np.float64)
        scale = max(1.0, float(np.abs(exact).max()))
        np.testing.assert_allclose(
            merged[_in_memory(name, merged)].numpy(), exact, rtol=0, atol=1e-13 * scale, err_msg=name
        )


@pytest.mark.parametrize("case", [case for case in CASES if len(case.adapters) > 1], ids=lambda case: case.id)
def test_long_double_agrees_with_rational_numbers(case: Case, zoo: Zoo) -> None:
    expected = {n: e for n, e in _inputs(case, zoo).expected.items() if e.updates}
    assert expected
    for entry in expected.values():
        exact, shape = entry.exact(), tuple(entry.base.shape)
        for index in itertools.islice(_spread(shape), 40):
            off = abs(Fraction(*exact[index].as_integer_ratio()) - entry.fraction(index))
            assert off <= Fraction(1, 2**50) * max(abs(entry.fraction(index)), Fraction(1, 2**10))


def _spread(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    generator = np.random.default_rng(0)
    while True:
        yield tuple(int(generator.integers(n)) for n in shape)


@pytest.mark.parametrize(
    ("dtype", "base", "value", "exact", "ulps"),
    [
        (torch.bfloat16, 1.0, 1.0, 1.0 + 2**-8, 0.5),
        (torch.bfloat16, 0.25, 1.0, 1.0 + 2**-7, 1.0),
        (torch.bfloat16, 4.0, 1.0, 1.0 + 2**-7, 0.25),
        (torch.float16, 0.0, 2**-24, 0.0, 1.0),
        (torch.float16, 2**-14, 2**-14, 2**-14 + 2**-25, 0.5),
        (torch.float32, 0.0, 0.0, 2**-149, 1.0),
        (torch.float32, -1.0, 3.0, 3.0 + 2**-23, 0.5),
    ],
)
def test_an_ulp_is_that_of_the_larger_of_base_and_value(
    dtype: torch.dtype, base: float, value: float, exact: float, ulps: float
) -> None:
    off = ulps_off(
        torch.tensor([value], dtype=dtype),
        np.array([exact], dtype=np.longdouble),
        torch.tensor([base]),
        dtype,
    )
    assert off.tolist() == [ulps]


# --- values -------------------------------------------------------------------------------------------------


@each(*CASES)
def test_every_merged_element_is_the_exact_sum_rounded_once(built: Built) -> None:
    tensors = built.tensors()
    updated = {name: entry for name, entry in built.inputs.expected.items() if entry.updates}
    assert updated
    for name, entry in updated.items():
        assert tensors[name].dtype == entry.dtype, name
        assert tensors[name].shape == entry.base.shape, name
        assert not torch.equal(tensors[name], entry.base.to(entry.dtype)), f"{name} was not merged"
        off = ulps_off(tensors[name], entry.exact(), entry.base, entry.dtype)
        limit = 1.0 if entry.dtype == torch.float32 else 0.51
        worst = np.unravel_index(int(off.argmax()), off.shape)
        assert off.max() <= limit, f"{name}{[int(i) for i in worst]} is {float(off.max()):.3f} ulp off"


@each(*CASES)
def test_all_other_tensors_keep_their_bytes(built: Built) -> None:
    tensors = built.tensors()
    assert set(tensors) == set(built.inputs.expected)
    for name, entry in built.inputs.expected.items():
        if not entry.updates:
            assert _bits(tensors[name]) == _bits(entry.copied()), name


@each(*(case for case in CASES if case.plain))
def test_one_plain_adapter_gives_the_bits_of_peft_or_better_ones(built: Built) -> None:
    model = load_model(built.case.base.arch, built.inputs.base)
    with quiet():
        peft = load_peft(model, built.inputs.adapters, built.inputs.weights).merge_and_unload()
    theirs, ours = peft.state_dict(), built.tensors()
    for name, entry in built.inputs.expected.items():
        for index in map(tuple, (ours[name] != theirs[name]).nonzero().tolist()):
            exact = entry.fraction(index)
            our_error = abs(Fraction(ours[name][index].item()) - exact)
            their_error = abs(Fraction(theirs[name][index].item()) - exact)
            halfway = our_error == their_error and _is_even(ours[name][index])
            assert halfway or our_error < their_error, f"{name}{list(index)}: {our_error / their_error} of peft's error"


def _has_logits(case: Case) -> bool:
    """Tell whether the output is what was trained, in float32, so that no rounding shows in the logits."""
    dtype = case.base.dtype if case.dtype == "keep" else case.dtype
    return dtype == "float32" and case.tied == "untie"


@each(*filter(_has_logits, CASES))
def test_the_merged_model_answers_as_the_unmerged_adapters_do(built: Built) -> None:
    arch, inputs = built.case.base.arch, built.inputs
    model = load_model(arch, inputs.base, torch.float32)
    before = logits(arch, model)
    unmerged = logits(arch, load_peft(model, {n: inputs.adapters[n] for n in inputs.weights}, inputs.weights))

    merged = logits(arch, load_model(arch, built.out, torch.float32))

    scale = unmerged.abs().max()
    assert (unmerged - before).abs().max() > 1e-2 * scale, "the adapter does nothing: the test shows nothing"
    assert (merged - unmerged).abs().max() <= 1e-4 * scale


# --- files --------------------------------------------------------------------------------------------------


@each(*CASES)
def test_transformers_loads_the_result_without_complaint(built: Built) -> None:
    with quiet():
        model, info = FAMILIES[built.case.base.arch].auto.from_pretrained(built.out, output_loading_info=True)

    assert {key: list(names) for key, names in info.items() if names} == {}
    dtype = built.case.base.dtype if built.case.dtype == "keep" else built.case.dtype
    assert model.dtype == getattr(torch, dtype)
    loaded = model.state_dict()
    for name, tensor in built.tensors().items():
        assert torch.equal(loaded[_in_memory(name, loaded)], tensor.to(model.dtype)), name


@each(*CASES)
def test_config_differs_from_the_bases_only_in_dtype_and_tie(built: Built) -> None:
    base = json.loads((built.inputs.base / "config.json").read_text())
    config = json.loads((built.out / "config.json").read_text())
    changes: dict[str, Any] = {} if built.case.dtype == "keep" else {"dtype": built.case.dtype}
    if built.inputs.untied or built.case.base.both_tied:
        changes["tie_word_embeddings"] = False
    assert config == base | changes


@each(*CASES)
def test_tokenizer_and_generation_config_are_carried_unchanged(built: Built) -> None:
    carried = {
        path.name: path.read_bytes()
        for path in built.inputs.base.iterdir()
        if path.name != "config.json" and "safetensors" not in path.name
    }
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(carried)
    assert {name: (built.out / name).read_bytes() for name in carried} == carried
    assert not list(built.out.glob("adapter_*"))


@each(*(case for case in CASES if case.max_shard_size == "keep"))
def test_tensors_lie_in_the_files_where_the_base_has_them(built: Built) -> None:
    base, out = _layout(built.inputs.base), _layout(built.out)
    assert set(out.values()) == set(base.values())
    assert base.items() <= out.items()
    assert (len(set(out.values())) > 1) == built.case.base.sharded


@each(*CASES)
def test_the_index_counts_every_byte_and_names_every_tensor(built: Built) -> None:
    layout, index = _layout(built.out), built.out / "model.safetensors.index.json"
    if len(set(layout.values())) == 1 and not index.exists():
        assert set(layout.values()) == {"model.safetensors"}
        return
    content = json.loads(index.read_text())
    assert content["weight_map"] == layout
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in built.tensors().values())
    if "total_parameters" in content["metadata"]:
        assert content["metadata"]["total_parameters"] == sum(t.numel() for t in built.tensors().values())


@each(*CASES)
def test_each_file_has_the_bytes_that_safetensors_would_write(built: Built, tmp_path: Path) -> None:
    files = sorted(built.out.glob("*.safetensors"))
    assert files
    for file in files:
        save_file(load_file(file), tmp_path / file.name, metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


@each(*(case for case in CASES if case.max_shard_size != "keep"))
def test_a_shard_size_cuts_the_files_anew(built: Built) -> None:
    files = list(built.out.glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    if built.case.max_shard_size == SMALL:
        assert len(sizes) > 1
        assert max(sizes) <= 20_000
    else:
        assert [file.name for file in built.out.glob("*.safetensors*")] == ["model.safetensors"]


# --- recipes ------------------------------------------------------------------------------------------------


def test_the_order_of_adapters_does_not_change_a_bit(zoo: Zoo, tmp_path: Path) -> None:
    outs = []
    for order in (THREE, THREE[::-1]):
        case = _case(f"llama-bfloat16-from-{order[0][0]}", order)
        outs.append(tmp_path / case.id)
        lora_build.build(_recipe(case, _inputs(case, zoo), outs[-1]))
    one, other = (base_tensors(out) for out in outs)
    assert {name: _bits(t) for name, t in one.items()} == {name: _bits(t) for name, t in other.items()}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_error_refuses_an_adapter_on_a_tied_matrix(target: str, zoo: Zoo, tmp_path: Path) -> None:
    case = _case("llama_tied-float32-error", _one(targets=(target, "q_proj")), tied="error")
    with pytest.raises(LoraBuildError, match=target):
        lora_build.build(_recipe(case, _inputs(case, zoo), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["shared", "lm_head"])
def test_a_tie_that_transformers_cannot_undo_is_refused(target: str, zoo: Zoo, tmp_path: Path) -> None:
    """T5Config sets tie_word_embeddings whatever the file says: an untied T5 cannot be loaded back."""
    case = _case("t5-float32-untie", _one(targets=(target, "q")))
    with pytest.raises(LoraBuildError, match="tie"):
        lora_build.build(_recipe(case, _inputs(case, zoo), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _in_memory(name: str, parameters: Mapping[str, torch.Tensor]) -> str:
    """Return the model's name of a tensor whose file may leave out the model's prefix."""
    return name if name in parameters else f"transformer.{name}"


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _is_even(element: torch.Tensor) -> bool:
    """Tell whether the last bit of the significand is zero: where round-half-to-even must end."""
    return element.contiguous().view(-1).view(torch.uint8)[0].item() % 2 == 0  # little-endian


def _layout(folder: Path) -> dict[str, str]:
    return {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
