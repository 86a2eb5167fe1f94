"""Checkpoints of many families and kinds of adapters against peft and transformers.

One case is one build. peft merges the same adapters in float64 and save_pretrained gives the tensors their
names in files; that must be met to half an ulp. Where peft's merge is not what was trained (`apart`), the
unmerged adapter model's answers judge. Adapters trained with transformers 4 have names that peft does not
know any more: the file-only oracle judges them. Nothing is skipped: what cannot be built must be refused.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import BdLoraConfig, KasaConfig
from safetensors.torch import load_file

import lora_build
from judges.oracle import base_tensors, long, ulps_off
from lora_build.errors import LoraBuildError
from makers.families import FAMILIES, VOCAB
from makers.zoo import Adapter, Base, Reference, Zoo, answer, quiet

pytestmark = pytest.mark.early


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe over tiny models.

    `judge` is the dtype in which peft merges: float64, or float32 where it decomposes the base in that; then
    `error` is how far a value may be off, relative to its tensor's largest. `apart` matches the tensors that
    peft merges wrongly, so that only the answers judge them; `mute` tells that the unmerged model cannot
    answer, or not by the layers that were adapted. `added` and `removed` are tensors, `config` the changes of
    config.json by dotted key, where `...` may be anything.
    """

    id: str
    base: Base
    adapters: tuple[Adapter, ...]
    judge: str = "float64"
    apart: str | None = None
    mute: bool = False
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    tied: str = "untie"
    error: float = 0.0
    refused: str | None = None


HALF_ULP = 0.51
TWO = (Adapter(weight=0.5), Adapter(seed=1, weight=-0.3, rank=3, dtype="bfloat16"))
BF16: dict[str, Any] = {"dtype": "bfloat16", "sharded": True}


def _families() -> Iterator[Case]:
    """Yield what every family must pass."""
    for name, arch in FAMILIES.items():
        yield Case(id=f"{name}-one", base=Base(arch=name, **BF16), adapters=(Adapter(),))
        yield Case(id=f"{name}-two", base=Base(arch=name), adapters=TWO)
        if arch.flips:
            base = Base(arch=name, flipped=True, sharded=True)
            yield Case(id=f"{name}-other-tie", base=base, adapters=(Adapter(seed=2),))
        if arch.v4:
            yield Case(id=f"{name}-v4-names", base=Base(arch=name, **BF16), adapters=(Adapter(v4=True),))
            two = tuple(replace(adapter, v4=True) for adapter in TWO)
            yield Case(id=f"{name}-v4-names-two", base=Base(arch=name), adapters=two)
        if arch.experts:
            yield Case(id=f"{name}-experts", base=Base(arch=name, **BF16), adapters=(Adapter(experts=True),))
            two = tuple(replace(adapter, experts=True) for adapter in TWO)
            yield Case(id=f"{name}-experts-two", base=Base(arch=name), adapters=two)


def _lora(**fields: Any) -> Adapter:
    """Return an adapter; what is not a field of Adapter is an option of the peft config."""
    own = {name: fields.pop(name) for name in Adapter.__dataclass_fields__ if name in fields}
    own["edits"] = tuple(own.get("edits", {}).items())
    return Adapter(**own, options=tuple(fields.items()))


def _case(id: str, *adapters: Adapter, **more: Any) -> Case:
    """Return a float32 case whose id starts with the family, or a sharded bfloat16 one if it ends in `bf16`."""
    base: dict[str, Any] = {"arch": id.partition("-")[0], "options": more.pop("base", ())}
    base |= BF16 if id.endswith("-bf16") else {}
    return Case(id=id, base=Base(**base), adapters=adapters or (Adapter(),), **more)


def _both(id: str, *adapters: Adapter, **more: Any) -> tuple[Case, Case]:
    return _case(id, *adapters, **more), _case(f"{id}-bf16", *adapters, **more)


QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6, "v_proj": 3},
    "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 3, "down_proj": 5, "model.layers.1.self_attn.k_proj": 32},
}
VIT_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"attention.q_proj": 2, r"layers\.1\.mlp\..*": 6},
    "alpha_pattern": {r".*\.0\.attention\.v_proj": 3, "vit.layers.1.mlp.fc1": 32},
}


def _parameters_apart_from_layers() -> Iterator[Case]:
    yield _case("mamba-dt_proj", _lora(targets=("in_proj", "dt_proj")), mute=True)  # its forward reads the weight


def _scalings() -> Iterator[Case]:
    for name in ("llama", "gpt2", "vit", "llava", "phi3", "qwen2_vl"):
        yield _case(f"{name}-rslora", _lora(rank=6, alpha=12, use_rslora=True))
    yield from _both("mixtral-experts-rslora", _lora(experts=True, use_rslora=True))
    yield _case("llama-patterns", _lora(**PATTERNS))
    yield _case("llava-patterns-bf16", _lora(**PATTERNS))
    yield _case("gemma3-patterns", _lora(**PATTERNS))
    yield _case("vit-patterns", _lora(**VIT_PATTERNS))
    yield _case("mixtral-patterns-of-experts", _lora(experts=True, alpha_pattern={r".*\.gate_up_proj": 3}))
    yield _case("qwen3_moe-patterns-of-experts", _lora(experts=True, rank_pattern={"mlp.experts.down_proj": 2}))


def _biases() -> Iterator[Case]:
    yield from _both("qwen2-lora-bias", _lora(targets=("q_proj", "k_proj", "v_proj"), lora_bias=True))
    for name in ("gpt2", "vit", "bart", "wav2vec2"):
        yield _case(f"{name}-lora-bias", _lora(lora_bias=True))
    yield _case("vit-lora-bias-two", _lora(lora_bias=True, weight=0.5), _lora(seed=1, weight=-0.3, lora_bias=True))
    for name in ("qwen2", "gpt2", "vit", "gpt_neox", "bart", "clip", "swin"):
        yield _case(f"{name}-bias-all", _lora(bias="all"))
    yield _case("qwen2_vl-bias-all-bf16", _lora(bias="all"))
    for name in ("gpt2", "vit", "whisper"):
        yield _case(f"{name}-bias-lora-only", _lora(bias="lora_only"))


UNTIED: dict[str, Any] = {"added": ("lm_head.weight",), "config": (("tie_word_embeddings", False),)}


def _saved_modules() -> Iterator[Case]:
    for name, module in (
        ("llama", "lm_head"),
        ("llama", "embed_tokens"),
        ("vit", "classifier"),
        ("dinov2", "classifier"),
        ("roberta", "classifier"),
        ("segformer", "decode_head"),
        ("wav2vec2", "lm_head"),
        ("llava", "multi_modal_projector"),
        ("qwen2_vl", "merger"),
        ("mixtral", "gate"),
        ("gpt_neox", "lm_head"),
    ):
        targets = tuple(t for t in FAMILIES[name].targets if t not in ("mlp.0", "mlp.2"))  # of the merger
        yield _case(f"{name}-saved-{module}", _lora(targets=targets, modules_to_save=[module]))
    yield _case("mixtral-saved-experts", _lora(modules_to_save=["experts"]))
    yield _case("vit-saved-classifier-bf16", _lora(modules_to_save=["classifier"]))
    yield _case("llama_tied-saved-head", _lora(modules_to_save=["lm_head"]), **UNTIED)
    yield _case("llama_tied-saved-embedding", _lora(modules_to_save=["embed_tokens"]), **UNTIED)
    yield _case("llama_tied-saved-both-tied", _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True))


def _dora() -> Iterator[Case]:
    for name in ("gpt2", "phi3", "vit", "dinov2", "llava", "mixtral", "bart", "gpt_neox", "qwen2_moe"):
        yield _case(f"{name}-dora", _lora(use_dora=True))
    yield from _both("llama-dora", _lora(use_dora=True))
    yield _case("gpt2-dora-bf16", _lora(use_dora=True, use_rslora=True))
    yield _case("llama-dora-weighted", _lora(use_dora=True, weight=0.5))
    lora = {"dora-lora": (True, False), "lora-dora": (False, True), "dora-dora": (True, True)}
    for order, (first, second) in lora.items():
        adapters = _lora(use_dora=first, weight=0.5), _lora(use_dora=second, seed=1, rank=3, weight=-0.3)
        yield from _both(f"llama-{order}", *adapters)
        yield _case(f"gpt2-{order}", *adapters)
    three = _lora(use_dora=True, weight=0.5), _lora(seed=1, weight=-0.3), _lora(use_dora=True, seed=2, targets=QV)
    yield _case("llama-dora-lora-dora", *three)


def _embeddings() -> Iterator[Case]:
    for name, targets in (
        ("llama", ("embed_tokens", "lm_head")),
        ("llava", ("embed_tokens",)),
        ("qwen2_vl", ("embed_tokens",)),
        ("roberta", ("word_embeddings", "position_embeddings")),
        ("clip", ("token_embedding",)),
        ("gpt_neox", ("embed_in", "lm_head")),
    ):
        yield from _both(f"{name}-embedding", _lora(targets=(*targets, *FAMILIES[name].targets[:2])))
        dora = tuple(t for t in targets if t != "lm_head")
        yield _case(f"{name}-embedding-dora", _lora(targets=dora, use_dora=True))
    yield _case(
        "llama-embedding-two",
        _lora(targets=("embed_tokens", "q_proj"), weight=0.5),
        _lora(targets=("embed_tokens", "lm_head"), seed=1, weight=-0.3),
    )
    yield _case(
        "llama-embedding-dora-lora",
        _lora(targets=("embed_tokens", "q_proj"), weight=0.5, use_dora=True),
        _lora(targets=("embed_tokens",), seed=1, weight=-0.3),
    )


def _tied_embeddings() -> Iterator[Case]:
    tied = (
        ("llama_tied", "model.embed_tokens"),
        ("qwen3", "model.embed_tokens"),
        ("gemma", "model.embed_tokens"),
        ("gemma3_text", "model.embed_tokens"),
        ("cohere", "model.embed_tokens"),
        ("starcoder2", "model.embed_tokens"),
        ("gpt2", "transformer.wte"),
        ("bloom", "transformer.word_embeddings"),
        ("falcon", "transformer.word_embeddings"),
        ("opt", "model.decoder.embed_tokens"),
        ("mamba", "backbone.embeddings"),
    )
    for name, path in tied:
        embedding = path.rpartition(".")[2]
        apart = rf"({path}|lm_head)\.weight"
        yield _case(f"{name}-tied-embedding", _lora(targets=(embedding,)), apart=apart, **UNTIED)
        if name in ("llama_tied", "gpt2", "opt"):
            yield _case(f"{name}-tied-head", _lora(targets=("lm_head",)), apart=apart, **UNTIED)
    dora = _lora(targets=("embed_tokens",), use_dora=True)
    yield _case("llama_tied-tied-embedding-dora", dora, apart=r"(model\.embed_tokens|lm_head)\.weight", **UNTIED)
    nested = (("tie_word_embeddings", False), ("text_config.tie_word_embeddings", ...))
    for name in ("paligemma", "gemma3"):
        yield _case(
            f"{name}-tied-embedding",
            _lora(targets=("embed_tokens",)),
            apart=r".*(embed_tokens|lm_head)\.weight",
            added=("language_model.lm_head.weight",),
            config=nested,
        )
    yield _case(
        "llama_tied-ensure-weight-tying",
        _lora(targets=("embed_tokens", "q_proj"), ensure_weight_tying=True),
        apart=r"model\.embed_tokens\.weight",
    )
    yield _case("t5-tied-embedding", _lora(targets=("shared",)), refused="tie")


def _convolutions() -> Iterator[Case]:
    for name, targets in (
        ("convnext", ("patch_embeddings", "downsampling_layer.1")),
        ("resnet", ("convolution",)),
        ("clip", ("patch_embedding",)),
        ("vit", ("projection",)),
        ("segformer", ("linear_fuse", "sequence_reduction.sequence_reduction", "proj")),
        ("whisper", ("conv1", "conv2")),
        ("wav2vec2", ("conv_layers.0.conv", "conv_layers.1.conv")),
    ):
        mute = name == "whisper"  # it asks the wrapped layer for its stride
        yield from _both(f"{name}-conv", _lora(targets=targets), mute=mute)
        yield _case(f"{name}-conv-dora", _lora(targets=targets, use_dora=True), mute=mute)
    yield _case("resnet-conv-dora-lora", _lora(use_dora=True, weight=0.5), _lora(seed=1, weight=-0.3))
    yield _case("vit-conv-lora-bias", _lora(targets=("projection",), lora_bias=True))


def _tokens() -> Iterator[Case]:
    for name in ("llama", "llama_tied", "gpt2", "qwen2_vl", "gpt_neox"):
        tokens = {FAMILIES[name].embedding: [5, 6, 40]}
        yield _case(f"{name}-trainable-tokens", _lora(targets=FAMILIES[name].targets, trainable_token_indices=tokens))
    yield _case("llama-trainable-tokens-list-bf16", _lora(trainable_token_indices=[5, 6, 40]))
    both = {"embed_tokens": [5, 6], "lm_head": [7, 6]}
    yield _case("llama-trainable-tokens-of-head", _lora(trainable_token_indices=both))


def _parameters() -> Iterator[Case]:
    for name in ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "granitemoe", "qwen2_moe"):
        for stack in ("gate_up_proj", "down_proj"):
            adapter = _lora(targets=ATTENTION, target_parameters=[f"experts.{stack}"])
            yield _case(f"{name}-only-{stack}", adapter)
    for name, router in (
        ("mixtral", "gate"),
        ("qwen3_moe", "gate"),
        ("qwen2_moe", "gate"),
        ("gpt_oss", "router"),
        ("llama4_text", "router"),
        ("granitemoe", "router"),
    ):
        adapter = _lora(targets=ATTENTION, target_parameters=[f"{router}.weight", "experts.down_proj"])
        yield from _both(f"{name}-router", adapter)
    yield _case("llama-parameters", _lora(targets=("q_proj",), target_parameters=["up_proj.weight", "k_proj.weight"]))
    square = (("intermediate_size", 16),)
    for name in ("mixtral", "granitemoe", "gpt_oss", "llama4_text"):
        yield from _both(f"{name}-square-experts", _lora(experts=True, targets=ATTENTION), base=square)
    old = {"rewrite": "experts of peft 0.18", "edits": {"peft_version": "0.18.1"}}
    for name in ("mixtral", "qwen3_moe"):
        yield _case(f"{name}-experts-of-peft-0.18", _lora(experts=True, targets=ATTENTION, **old))
    yield _case("mixtral-square-experts-of-peft-0.18", _lora(experts=True, targets=ATTENTION, **old), base=square)


EXPERTS_V4: dict[str, Any] = {"target_parameters": None, "peft_version": "0.17.1"}


def _twins() -> Iterator[Case]:
    """Yield the deltas of `<family>-twin` again in files as transformers 4 named them."""
    for name, rewrite, modules in (
        ("mixtral", "mixtral of transformers 4", ("w1", "w2", "w3")),
        ("qwen2_moe", "experts of transformers 4", ("gate_proj", "up_proj", "down_proj")),
        ("qwen3_moe", "experts of transformers 4", ("gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3", "experts of transformers 4", ("gate_proj", "up_proj", "down_proj")),
        ("olmoe", "experts of transformers 4", ("gate_proj", "up_proj", "down_proj")),
        ("jamba", "jamba of transformers 4", ("gate_proj", "up_proj", "down_proj")),
    ):
        targets = ("o_proj",)
        adapter = _lora(experts=True, targets=targets)
        edits = tuple((EXPERTS_V4 | {"target_modules": [*targets, *modules]}).items())
        yield from _twin(name, adapter, rewrite, edits)
    vit = (("target_modules", ["query", "key", "value", "dense"]),)
    for name in ("vit", "deit"):
        yield from _twin(name, _lora(), "vit of transformers 4", vit)
    for name in ("llava", "gemma3", "paligemma"):
        yield from _twin(name, _lora(), "vision tower of transformers 4", ())
    yield from _twin("qwen2_vl", _lora(), "qwen2_vl of transformers 4", ())


def _twin(name: str, adapter: Adapter, rewrite: str, edits: tuple[tuple[str, Any], ...]) -> tuple[Case, Case]:
    return (
        _case(f"{name}-twin-bf16", adapter),
        _case(f"{name}-twin-of-transformers-4-bf16", replace(adapter, rewrite=rewrite, edits=edits)),
    )


def _attention() -> Iterator[Case]:
    head = r".*head\.attention"
    """Yield adapters of the attention in siglip's head; its in_proj and out_proj are one module to peft."""
    yield from _both("siglip-head", _lora(targets=head))
    yield _case("siglip-head-two", _lora(targets=head, weight=0.5), _lora(targets=head, seed=1, weight=-0.3))
    yield _case("siglip-head-rslora", _lora(targets=head, use_rslora=True))


def _models() -> Iterator[Case]:
    labels = {str(i): f"LABEL_{i}" for i in range(3)}
    classifier: dict[str, Any] = {
        "added": ("score.weight",),
        "removed": ("lm_head.weight",),
        "config": (
            ("architectures", ["LlamaForSequenceClassification"]),
            ("id2label", labels),
            ("label2id", {label: int(i) for i, label in labels.items()}),
        ),
    }
    yield from _both("llama-classifier", _lora(model="classifier", task_type="SEQ_CLS"), **classifier)
    grown = (("vocab_size", VOCAB + 4),)
    yield from _both("llama-grown", _lora(model="grown"), config=grown)
    yield _case("llama_tied-grown", _lora(model="grown"), config=grown)
    saved = _lora(model="grown", modules_to_save=["embed_tokens", "lm_head"])
    yield _case("llama-grown-saved", saved, config=grown)
    yield _case(
        "llama-layer-replication",
        _lora(layer_replication=[[0, 2], [1, 2]]),
        added=tuple(_layer_names(2)),
        config=(("num_hidden_layers", 3),),
    )


def _layer_names(layer: int) -> Iterator[str]:
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                   "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):  # fmt: skip
        yield f"model.layers.{layer}.{module}.weight"


def _methods() -> Iterator[Case]:
    for init in ("pissa", "olora"):
        yield _case(f"llama-{init}", _lora(init_lora_weights=init), judge="float32", error=5e-5)
    for init in ("gaussian", "orthogonal"):
        yield _case(f"llama-{init}", _lora(init_lora_weights=init))
    bd = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"],
        target_modules_bd_b=["q_proj", "up_proj"],
        nblocks=2,
        match_strict=False,
    )
    yield from _both("llama-bdlora", _lora(use_bdlora=bd))
    yield from _both("llama-kasa", _lora(kasa_config=KasaConfig()), judge="float32", error=1e-5)
    yield from _both("llama-adalora", _lora(method="AdaLora", init_r=4, target_r=2, total_step=10))
    yield from _both("llama-loha", _lora(method="LoHa", r=4, alpha=8))
    yield from _both("llama-lokr", _lora(method="LoKr", r=2, alpha=8))
    yield _case("llama-lokr-factor", _lora(method="LoKr", r=2, alpha=8, decompose_both=True, decompose_factor=4))
    yield from _both("llama-ia3", _lora(method="IA3", feedforward_modules=["down_proj"]))
    yield _case("qwen2-ia3", _lora(method="IA3", feedforward_modules=["down_proj"]))
    yield _case(
        "gpt2-ia3",
        _lora(method="IA3", targets=("c_attn", "mlp.c_proj"), feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    )
    yield from _both("llama-oft", _lora(method="OFT", r=0, oft_block_size=4))
    yield _case("llama-oft-shared", _lora(method="OFT", r=4, oft_block_size=0, block_share=True))
    yield from _both("llama-vera", _lora(method="Vera", targets=QV[:1], r=8))
    for method, options in (("LoHa", {"r": 4, "alpha": 8}), ("LoKr", {"r": 2, "alpha": 8})):
        yield _case(f"resnet-{method.lower()}-conv", _lora(method=method, **options))


def _refusals() -> Iterator[Case]:
    vera = _lora(method="Vera", targets=QV[:1], r=8, save_projection=False)
    yield _case("llama-vera-projection-not-saved", vera, refused="save_projection")
    yield _case("llama-alora", _lora(edits={"alora_invocation_tokens": [5, 6]}), refused="(?i)alora")
    yield _case("convnext-grouped-conv", _lora(targets=("dwconv",), rank=32), refused="(?i)group")
    yield _case("llama-qalora", _lora(edits={"use_qalora": True, "qalora_group_size": 16}), refused="(?i)qalora")
    yield _case("llama-pissa-niter", _lora(edits={"init_lora_weights": "pissa_niter_4"}), refused="pissa_niter")
    yield _case("llama-corda", _lora(edits={"init_lora_weights": "corda"}), refused="corda")
    yield _case("llama-lora-ga", _lora(edits={"init_lora_weights": "lora_ga"}), refused="lora_ga")
    yield _case("llama-loftq", _lora(edits={"init_lora_weights": "loftq"}), refused="loftq")
    yield _case("llama-arrow", _lora(edits={"arrow_config": {"top_k": 2}}), refused="(?i)arrow")
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "POLY", "XLORA"):
        yield _case(f"llama-{kind.lower()}", _lora(edits={"peft_type": kind}), refused=kind)


FAMILY_CASES = [*_families()]
OPTION_CASES = [
    *_scalings(), *_parameters_apart_from_layers(), *_biases(), *_saved_modules(), *_dora(), *_embeddings(), *_tied_embeddings(), *_convolutions(),
    *_tokens(), *_parameters(), *_twins(), *_attention(), *_models(), *_methods(), *_refusals(),
]  # fmt: skip
CASES = [*FAMILY_CASES, *OPTION_CASES]
BUILDABLE = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
LIKE_LLAMA = ("mistral", "gemma2", "stablelm", "olmo2", "granite", "deit", "mbart", "marian", "pegasus")
"""Families whose files differ from those of another one here in nothing but numbers."""


def params(cases: Iterable[Case]) -> list[Any]:
    """Return the parameters of tests, those of families that are like another one marked as long."""
    marks = {True: [pytest.mark.long], False: []}
    return [
        pytest.param(case, id=case.id, marks=marks[case.base.arch in LIKE_LLAMA and case in FAMILY_CASES])
        for case in cases
    ]


def test_many_architectures_are_covered_and_no_case_stands_twice() -> None:
    assert len(FAMILIES) >= 45
    assert {case.base.arch for case in CASES} == set(FAMILIES)
    assert len({arch.model_class for arch in FAMILIES.values()}) >= 45
    assert len({case.id for case in CASES}) == len(CASES)


# --- building -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A case that was built, and what it should be."""

    case: Case
    base: Path
    out: Path
    reference: Reference

    def untouched(self) -> set[str]:
        """Return the names of the base's tensors that peft leaves as they are."""
        theirs = self.reference.tensors
        return {
            name
            for name, tensor in base_tensors(self.base).items()
            if name in theirs
            and not re.fullmatch(self.case.apart or "", name)
            and theirs[name].shape == tensor.shape
            and torch.equal(theirs[name].double(), tensor.double())
        }


def _reference(case: Case, zoo: Zoo) -> Reference:
    return zoo.reference(case.base, case.adapters, case.judge, mute=case.mute)


def _recipe(case: Case, zoo: Zoo, out: Path) -> dict[str, Any]:
    adapters = {
        f"a{i}": {"source": str(zoo.adapter(case.base, adapter)), "weight": adapter.weight}
        for i, adapter in enumerate(case.adapters)
    }
    return {
        "base": str(zoo.base(case.base)),
        "adapters": adapters,
        "tied_embeddings": case.tied,
        "output": {"dir": str(out), "max_shard_size": "keep"},
    }


@pytest.fixture(scope="module")
def builds(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Built]:
    """Return the function that builds a case, once for all tests; a failure is raised again."""

    @functools.cache
    def build(case_id: str) -> Built | LoraBuildError:
        case = next(case for case in CASES if case.id == case_id)
        reference = _reference(case, zoo)
        out = tmp_path_factory.mktemp("built") / case.id
        try:
            lora_build.build(_recipe(case, zoo, out))
        except LoraBuildError as error:
            return error
        return Built(case=case, base=zoo.base(case.base), out=out, reference=reference)

    def built(case: Case) -> Built:
        result = build(case.id)
        if isinstance(result, LoraBuildError):
            raise result
        return result

    return built


@pytest.fixture
def built(request: pytest.FixtureRequest, builds: Callable[[Case], Built]) -> Built:
    """Return the case that this test is parametrised with, built."""
    return builds(request.param)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Return the mark that runs a test on every case, building it first."""
    return pytest.mark.parametrize("built", params(cases), indirect=True)


# --- the judge itself: needs no lora_build --------------------------------------------------------------------


@pytest.mark.parametrize("case", params(BUILDABLE))
def test_pefts_merge_answers_as_its_unmerged_adapters_unless_set_apart(case: Case, zoo: Zoo) -> None:
    reference = _reference(case, zoo)
    base = base_tensors(zoo.base(case.base))

    missing = set(base) - set(reference.tensors) - set(case.removed)
    unexpected = set(reference.tensors) - set(base) - set(case.added)
    assert not missing
    assert not unexpected
    changed = [n for n, t in base.items() if n not in reference.tensors or not _same(t, reference.tensors[n])]
    assert changed
    if reference.unmerged is None:
        assert case.mute or case.adapters[0].v4
        return
    scale = reference.unmerged.abs().max()
    assert (reference.unmerged - reference.before).abs().max() > 1e-3 * scale, "the adapter does nothing"
    off = (reference.merged - reference.unmerged).abs().max() / scale
    if case.apart:
        assert off > 1e-6, "peft's merge is right: nothing to set apart"
    else:
        assert off <= (1e-9 if case.judge == "float64" else 1e-5)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())


# --- values -------------------------------------------------------------------------------------------------


@each(BUILDABLE)
def test_every_adapted_tensor_is_the_merged_one_rounded_once(built: Built) -> None:
    case, base, ours = built.case, base_tensors(built.base), base_tensors(built.out)
    untouched, wrong = built.untouched(), []
    for name, theirs in built.reference.tensors.items():
        if name in untouched or re.fullmatch(case.apart or "", name):
            continue
        assert name in ours, f"{name} is missing"
        tensor, before = ours[name], base.get(name)
        assert tensor.shape == theirs.shape, name
        assert tensor.dtype == getattr(torch, case.base.dtype), name
        before = tensor if before is None or before.shape != tensor.shape else before
        if case.judge != "float64":
            step = 2.0**-8 if tensor.dtype == torch.bfloat16 else 0.0
            scale = theirs.abs().max().clamp(min=1e-6)
            off = (((tensor.double() - theirs.double()).abs() - step * theirs.double().abs()) / scale).max().item()
            limit = case.error
        else:
            off, limit = float(ulps_off(tensor, long(theirs), before, tensor.dtype).max()), HALF_ULP
        if off > limit:
            wrong.append(f"{name} is {off:.3g} off, allowed is {limit}")
    assert not wrong, f"{len(wrong)} tensors: " + "; ".join(wrong[:5])


@each(BUILDABLE)
def test_all_other_tensors_keep_their_bytes_and_their_files(built: Built) -> None:
    base, ours = base_tensors(built.base), base_tensors(built.out)
    assert set(ours) == set(base) - set(built.case.removed) | set(built.case.added)
    for name in sorted(built.untouched()):
        assert _bits(ours[name]) == _bits(base[name]), name
    theirs, layout = _layout(built.base), _layout(built.out)
    assert {n: f for n, f in layout.items() if n in theirs} == {n: f for n, f in theirs.items() if n in layout}
    assert (len(set(theirs.values())) > 1) == built.case.base.sharded


# --- the model ----------------------------------------------------------------------------------------------


@each(BUILDABLE)
def test_transformers_loads_the_result_and_it_answers_as_the_unmerged_adapters(built: Built) -> None:
    case, arch = built.case, built.case.base.architecture
    config = json.loads((built.out / "config.json").read_text())
    with quiet():
        model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
            built.out, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
        )
    assert {kind: sorted(names) for kind, names in info.items() if names} == {}

    theirs = built.reference.merged if case.mute else built.reference.unmerged
    if case.base.dtype == "float32" and theirs is not None:
        ours = answer(arch, model.eval())
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@each(BUILDABLE)
def test_config_differs_from_the_bases_only_as_expected(built: Built) -> None:
    theirs = json.loads((built.base / "config.json").read_text())
    ours = json.loads((built.out / "config.json").read_text())
    for key, value in built.case.config:
        *path, last = key.split(".")
        mine, base = ours, theirs
        for step in path:
            mine, base = mine[step], base[step]
        if value is ...:
            mine.pop(last, None)
            base.pop(last, None)
        else:
            base[last] = value
    assert ours == theirs


TWINS = [case for case in BUILDABLE if case.id.endswith("-twin-of-transformers-4-bf16")]


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.id)
def test_the_same_deltas_give_the_same_bytes_whichever_transformers_named_them(
    case: Case, builds: Callable[[Case], Built]
) -> None:
    other = next(c for c in BUILDABLE if c.id == case.id.replace("-of-transformers-4", ""))
    ours, theirs = base_tensors(builds(case).out), base_tensors(builds(other).out)
    assert {name: _bits(tensor) for name, tensor in ours.items()} == {n: _bits(t) for n, t in theirs.items()}


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_what_cannot_be_merged_is_refused_by_name_before_anything_is_written(
    case: Case, zoo: Zoo, tmp_path: Path
) -> None:
    with pytest.raises(LoraBuildError, match=case.refused):
        lora_build.build(_recipe(case, zoo, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _layout(folder: Path) -> dict[str, str]:
    return {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
