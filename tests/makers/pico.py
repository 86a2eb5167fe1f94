"""Tiny random models and adapters, made offline from configs by transformers and peft themselves.

    zoo = Zoo(tmp_path)
    base = zoo.base(PicoBase(arch="llama", dtype="bfloat16"))               # a folder as on the Hub
    adapter = zoo.adapter(PicoBase(arch="llama"), PicoAdapter(rank=4))      # a folder as peft saves it

Everything is seeded by the spec itself, so a spec names its bytes. Deltas are never zero: peft's zero lora_B
is replaced by random values, and so are the zero biases of gpt2 and opt.
"""

import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VOCAB = 128
PREFIX = "base_model.model."

THIRD_PARTY_WARNINGS = (
    # peft 0.21 asks transformers >= 5.20 for an attribute that was renamed there
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    # what peft says about the very cases that the tests are about
    (r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
    (r"Model with `tie_word_embeddings=True` and the tied_target_modules", UserWarning),
    (r"Input and output embeddings are no longer tied after merging", UserWarning),
    (r"Setting `save_embedding_layers` to `True`", UserWarning),
    (r"fan_in_fan_out is set to (True|False) but the target module is", UserWarning),
    # peft takes the one-dimensional lora_B.bias of lora_bias=True for a DeepSpeed artefact
    (r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape", UserWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exactly the warnings that peft and transformers give for these models."""
    with warnings.catch_warnings():
        for message, category in THIRD_PARTY_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A family: how to make its config, the class that loads it, and what an oracle cannot read from files.

    `targets` are its linear layers; `tied` maps each tensor that the file leaves out to the tensor it is tied
    to; `conv1d` says that the linear layers store `[in, out]`.
    """

    config: Callable[[], transformers.PreTrainedConfig]
    auto: Any
    targets: tuple[str, ...]
    embedding: str
    tied: dict[str, str] = field(default_factory=dict)
    conv1d: bool = False


def _llama(*, tied: bool) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def _qwen2() -> transformers.PreTrainedConfig:
    return transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _gpt2() -> transformers.PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def _bert() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )


def _opt() -> transformers.PreTrainedConfig:
    return transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )


def _t5() -> transformers.PreTrainedConfig:
    return transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )


def _falcon() -> transformers.PreTrainedConfig:
    return transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    )


_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ARCHS: dict[str, Arch] = {
    "llama": Arch(
        config=lambda: _llama(tied=False),
        auto=transformers.AutoModelForCausalLM,
        targets=_LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "llama_tied": Arch(
        config=lambda: _llama(tied=True),
        auto=transformers.AutoModelForCausalLM,
        targets=_LLAMA_TARGETS,
        embedding="embed_tokens",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "qwen2": Arch(
        config=_qwen2,
        auto=transformers.AutoModelForCausalLM,
        targets=_LLAMA_TARGETS,
        embedding="embed_tokens",
    ),
    "gpt2": Arch(
        config=_gpt2,
        auto=transformers.AutoModelForCausalLM,
        targets=("c_attn", "c_proj", "c_fc"),
        embedding="wte",
        tied={"lm_head.weight": "transformer.wte.weight"},
        conv1d=True,
    ),
    "bert": Arch(
        config=_bert,
        auto=transformers.AutoModelForMaskedLM,
        targets=("query", "key", "value", "dense"),
        embedding="word_embeddings",
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "opt": Arch(
        config=_opt,
        auto=transformers.AutoModelForCausalLM,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        embedding="embed_tokens",
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    ),
    "t5": Arch(
        config=_t5,
        auto=transformers.AutoModelForSeq2SeqLM,
        targets=("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        embedding="shared",
        tied={
            "lm_head.weight": "shared.weight",
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
    ),
    "falcon": Arch(
        config=_falcon,
        auto=transformers.AutoModelForCausalLM,
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        embedding="word_embeddings",
        tied={"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PicoBase:
    """A base checkpoint.

    `shard_size` cuts it into shards, `fp32_norms` stores the norms in float32, `both_tied` stores a tied head
    although it need not be, `bare` leaves out the prefix `transformer.`, as gpt2 on the Hub does.
    """

    arch: str = "llama"
    dtype: str = "float32"
    shard_size: str | None = None
    fp32_norms: bool = False
    both_tied: bool = False
    bare: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PicoAdapter:
    """An adapter.

    `dtype` is that of its tensors, `loaded_as` that of the base while it was trained. `options` go to
    LoraConfig; `edits` change adapter_config.json after peft wrote it.
    """

    targets: str | tuple[str, ...] | None = None
    rank: int = 4
    alpha: float = 8
    dtype: str = "float32"
    loaded_as: str = "auto"
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    edits: tuple[tuple[str, Any], ...] = ()


class Zoo:
    """Makes each base and adapter once, under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Path] = {}

    def base(self, spec: PicoBase) -> Path:
        """Return the folder of a base checkpoint."""
        return self._once(f"base {spec}", lambda path: _make_base(spec, path))

    def adapter(self, base: PicoBase, spec: PicoAdapter) -> Path:
        """Return the folder of an adapter that peft saved for this base."""
        base_dir = self.base(base)
        return self._once(f"adapter {base} {spec}", lambda path: _make_adapter(base, base_dir, spec, path))

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._made:
            path = self.root / f"{name.split()[0]}-{len(self._made):03d}"
            make(path)
            self._made[name] = path
        return self._made[name]


def load_model(arch: str, path: Path, dtype: str | torch.dtype = "auto") -> Any:
    """Return the model of a folder as transformers loads it, in evaluation mode."""
    with quiet():
        return ARCHS[arch].auto.from_pretrained(path, dtype=dtype).eval()


def load_peft(model: Any, adapters: dict[str, Path], weights: dict[str, float]) -> PeftModel:
    """Return `model` with the adapters loaded by peft's defaults, all active, each scaled by its weight.

    peft multiplies the whole update of a layer, lora_B.bias included, by `layer.scaling[name]`.
    """
    first, *rest = adapters
    with quiet():
        peft = PeftModel.from_pretrained(model, adapters[first], adapter_name=first)
        for name in rest:
            peft.load_adapter(adapters[name], adapter_name=name)
        if rest:
            peft.base_model.set_adapter(list(adapters))
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= weights[name]
    return peft.eval()


def logits(arch: str, model: Any) -> torch.Tensor:
    """Return the logits of a fixed batch of two sentences that holds every token id but the special ones."""
    ids = torch.arange(4, 4 + 2 * 60).reshape(2, 60)[:, torch.randperm(60, generator=_generator("ids"))]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if arch == "t5":
        inputs["decoder_input_ids"] = ids.flip(0)[:, :20]
    with torch.no_grad(), quiet():
        result: torch.Tensor = model(**inputs).logits
    return result


def _generator(*seed: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def _make_base(spec: PicoBase, path: Path) -> None:
    arch = ARCHS[spec.arch]
    with quiet():
        model = arch.auto.from_config(arch.config(), dtype=torch.float32)
        generator = _generator("base", spec.arch)
        for name, parameter in model.named_parameters():
            mean = 1.0 if re.search(r"(norm|\.ln_\w)\.weight$", name.lower()) else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            spread = torch.exp(torch.randn(parameter.shape, generator=generator))  # exponents far apart
            parameter.data = mean + 0.05 * noise * spread
        model.tie_weights()
        model.to(getattr(torch, spec.dtype)).save_pretrained(path, max_shard_size=spec.shard_size or "5GB")
    _save_tokenizer(path)
    if spec.fp32_norms or spec.both_tied or spec.bare:
        _rewrite(spec, path / "model.safetensors")


def _rewrite(spec: PicoBase, path: Path) -> None:
    tensors = load_file(path)
    if spec.fp32_norms:
        tensors = {k: t.float() if "norm" in k else t for k, t in tensors.items()}
    if spec.both_tied:
        tensors |= {head: tensors[source].clone() for head, source in ARCHS[spec.arch].tied.items()}
    if spec.bare:
        tensors = {k.removeprefix("transformer."): t for k, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    specials = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: i for i, word in enumerate((*specials, *(f"w{i}" for i in range(4, VOCAB))))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)


def _make_adapter(base: PicoBase, base_dir: Path, spec: PicoAdapter, path: Path) -> None:
    arch = ARCHS[base.arch]
    targets = arch.targets if spec.targets is None else spec.targets
    options = {"fan_in_fan_out": arch.conv1d, **dict(spec.options)}
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        **options,
    )
    generator = _generator("adapter", base.arch, spec.seed)
    model = load_model(base.arch, base_dir, spec.loaded_as)
    with quiet():
        peft = get_peft_model(model, config)
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                _train(name, parameter, generator)
                parameter.data = parameter.data.to(getattr(torch, spec.dtype))
        peft.save_pretrained(str(path))
    if spec.edits:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(spec.edits), indent=2))


def _train(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
    """Replace a parameter by what training might have left there."""
    noise = torch.randn(parameter.shape, generator=generator)
    if "lora_" in name and parameter.ndim > 1:
        # rows of B from 2^-10 to 1: some updates drown in W, some rule it
        rows = 2.0 ** -torch.randint(0, 11, (parameter.shape[0], 1), generator=generator)
        parameter.data = 0.2 * noise * (rows if "lora_B" in name or "embedding_A" in name else 1.0)
    else:
        parameter.data = parameter.data.float() + 0.1 * noise
