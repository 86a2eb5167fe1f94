"""Tiny models of many families and adapters for them, made offline by transformers and peft themselves.

    workshop = Workshop(tmp_path)
    base = workshop.base(Base(arch="mixtral", dtype="bfloat16", sharded=True))        # a folder as on the Hub
    adapter = workshop.adapter(Base(arch="mixtral"), Adapter(experts=True))          # a folder as peft saves it
    truth = workshop.reference(Base(arch="mixtral"), (Adapter(experts=True),))       # what peft makes of them

Everything is seeded by the specs, so a spec names its bytes. Deltas are never zero: whatever peft initialises
is replaced or moved. `Reference` holds the tensors that peft merges in float64, under the names that
save_pretrained gives them, and what the unmerged adapter model answers. It knows nothing of lora_build.
"""

import copy
import functools
import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from judges.oracle import base_tensors, expected_checkpoint
from makers import pico
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

VOCAB = 80
SHARD = "20KB"

THIRD_PARTY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # peft misses patterns for parameters, and those that another pattern before them hides
    (r"The following (rank|alpha)_pattern keys did not match any targeted module", RuntimeWarning),
    (r"Already following adapters were merged a0. You are now additionally merging a1", UserWarning),
    (r"Specified to not (save|load) vera_A and vera_B", UserWarning),
    (r"LoRA adapter added to ConvNd layer with groups > 1", UserWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exactly the warnings that peft and transformers give for these models."""
    with pico.quiet(), warnings.catch_warnings():
        for message, category in THIRD_PARTY_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


# --- inputs -------------------------------------------------------------------------------------------------

IMAGE_TOKEN = VOCAB - 1
IDS = torch.arange(4, 44).reshape(2, 20)

Inputs = Callable[[], dict[str, torch.Tensor]]


def _wave(*shape: int) -> torch.Tensor:
    """Return smooth numbers from -1 to 1."""
    return torch.linspace(-30, 30, torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape)


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS}


def _translation() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)[:, :8]}


def _image(side: int) -> Inputs:
    return lambda: {"pixel_values": _wave(1, 3, side, side)}


def _pairs() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "pixel_values": _wave(2, 3, 16, 16)}


def _captioned(count: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a prompt of `count` image tokens and eight words."""
    ids = torch.cat([torch.full((1, count), IMAGE_TOKEN), IDS[:1, :8]], 1)
    return {"input_ids": ids, "pixel_values": _wave(1, 3, 16, 16)} | more


def _qwen_vl() -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.tensor([[77, IMAGE_TOKEN, 76]]), IDS[:1, :8]], 1)
    kinds = (ids == IMAGE_TOKEN).long()
    grid = torch.tensor([[1, 2, 2]])
    return {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": _wave(4, 384), "image_grid_thw": grid}


def _mllama() -> dict[str, torch.Tensor]:
    return _captioned(
        1,
        pixel_values=_wave(1, 1, 1, 3, 16, 16),
        aspect_ratio_ids=torch.tensor([[1]]),
        aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.long),
        cross_attention_mask=torch.ones(1, 9, 1, 1, dtype=torch.long),
    )


# --- the families -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family.

    `targets` are its linear layers as transformers 5 names them in memory, `experts` its stacks of experts for
    `target_parameters`, `v4` the names that its linear layers have in files, where these differ, and the names
    that transformers 4 gave them. `hub_names` renames what save_pretrained writes for a fresh model to what
    the files on the Hub have. `flips` tells that `tie_word_embeddings` may be either.
    """

    name: str
    model_type: str
    model_class: str
    options: Mapping[str, Any]
    targets: tuple[str, ...]
    inputs: Inputs = _text
    embedding: str = "embed_tokens"
    experts: tuple[str, ...] = ()
    v4: tuple[str, ...] = ()
    hub_names: tuple[tuple[str, str], ...] = ()
    flips: bool = False
    conv1d: bool = False

    def config(self) -> Any:
        """Return a fresh config."""
        config = transformers.AutoConfig.for_model(self.model_type, **copy.deepcopy(dict(self.options)))
        config._experts_implementation = "eager"  # the grouped product knows no float64
        return config

    @property
    def auto(self) -> Any:
        """Return the model's class."""
        return getattr(transformers, self.model_class)


_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TIED = _BERT | {"num_key_value_heads": 2, "tie_word_embeddings": True}
_FREE = _TIED | {"tie_word_embeddings": False}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = (*_ATTENTION, *_GATED)
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_BART_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_VIT_TARGETS = (*_ATTENTION, "fc1", "fc2")
_VIT_V4 = ("query", "key", "value", "dense")
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def _decoder(name: str, model_class: str, options: Mapping[str, Any], **more: Any) -> Architecture:
    """Return a llama-like family whose `tie_word_embeddings` may be either."""
    fields: dict[str, Any] = {"model_type": name, "targets": _LLAMA, "flips": True} | more
    return Architecture(name=name, model_class=model_class, options=options, **fields)


def _family(name: str, model_class: str, options: Mapping[str, Any], **more: Any) -> Architecture:
    return _decoder(name, model_class, options, **({"flips": False} | more))


_TEXT = (
    _decoder("llama", "LlamaForCausalLM", _FREE),
    _decoder("llama_tied", "LlamaForCausalLM", _TIED, model_type="llama", flips=False),
    _decoder("mistral", "MistralForCausalLM", _FREE),
    _decoder("qwen2", "Qwen2ForCausalLM", _FREE),
    _decoder("qwen3", "Qwen3ForCausalLM", _TIED | {"head_dim": 8}),
    _decoder("gemma", "GemmaForCausalLM", _TIED | {"head_dim": 8}),
    _decoder("gemma2", "Gemma2ForCausalLM", _TIED | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    _decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _TIED | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    _decoder("phi", "PhiForCausalLM", _FREE, targets=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    _decoder("phi3", "Phi3ForCausalLM", _FREE, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    _decoder("stablelm", "StableLmForCausalLM", _FREE),
    _decoder("cohere", "CohereForCausalLM", _TIED),
    _decoder("olmo2", "Olmo2ForCausalLM", _FREE),
    _decoder("granite", "GraniteForCausalLM", _FREE),
    _decoder("starcoder2", "Starcoder2ForCausalLM", _TIED, targets=(*_ATTENTION, "c_fc", "c_proj")),
    _decoder("glm4", "Glm4ForCausalLM", _FREE | {"head_dim": 8}, targets=(*_ATTENTION, "gate_up_proj", "down_proj")),
    _family(
        "gpt2", "GPT2LMHeadModel", _GPT, targets=("c_attn", "c_proj", "c_fc"), embedding="wte", conv1d=True, flips=True
    ),
    _family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
        embedding="wte",
        flips=True,
    ),
    _family(
        "gptj",
        "GPTJForCausalLM",
        _GPT | {"rotary_dim": 4},
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        embedding="wte",
    ),
    _family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _BERT | {"tie_word_embeddings": False},
        targets=_NEOX,
        embedding="embed_in",
        v4=(*_NEOX, "embed_out"),
        flips=True,
    ),
    _family(
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        targets=(*_BART_TARGETS, "project_in", "project_out"),
        flips=True,
    ),
    _family(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        targets=_NEOX,
        embedding="word_embeddings",
        flips=True,
    ),
    _family(
        "falcon",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        targets=_NEOX,
        embedding="word_embeddings",
        flips=True,
    ),
    _family(
        "mamba",
        "MambaForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        targets=("in_proj", "x_proj"),  # peft refuses out_proj, and dt_proj is not read through its layer
        embedding="embeddings",
        flips=True,
    ),
    _family("bert", "BertForMaskedLM", _BERT, targets=("query", "key", "value", "dense"), embedding="word_embeddings"),
    _family(
        "roberta",
        "RobertaForSequenceClassification",
        _BERT,
        targets=("query", "key", "value", "dense"),
        embedding="word_embeddings",
    ),
    _family(
        "distilbert",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        embedding="word_embeddings",
    ),
    _family(
        "electra",
        "ElectraForTokenClassification",
        _BERT | {"embedding_size": 16},
        targets=("embeddings_project", "query", "key", "value", "dense"),
        embedding="word_embeddings",
    ),
    _family(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        _BERT
        | {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        model_type="deberta-v2",
        targets=("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "dense"),
        embedding="word_embeddings",
    ),
    _family(
        "modernbert",
        "ModernBertForMaskedLM",
        _BERT | {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        targets=("Wqkv", "Wo", "Wi", "dense"),
        embedding="tok_embeddings",
        flips=True,
    ),
)

_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_MOE = (
    _decoder(
        "mixtral",
        "MixtralForCausalLM",
        _FREE | {"num_local_experts": 3, "num_experts_per_tok": 2},
        targets=_ATTENTION,
        experts=_EXPERTS,
        v4=(*_ATTENTION, "gate", "w1", "w2", "w3"),
    ),
    _decoder(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _FREE | _ROUTED | {"num_experts": 3, "shared_expert_intermediate_size": 24},
        targets=(*_LLAMA, "shared_expert_gate"),
        experts=_EXPERTS,
        v4=(*_LLAMA, "gate", "shared_expert_gate"),
    ),
    _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _FREE | _ROUTED | {"head_dim": 8, "num_experts": 3, "mlp_only_layers": [0]},
        experts=_EXPERTS,
        v4=(*_LLAMA, "gate"),
    ),
    _decoder(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _FREE
        | _ROUTED
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *_GATED),
        experts=_EXPERTS,
        v4=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *_GATED),
    ),
    _decoder(
        "gpt_oss",
        "GptOssForCausalLM",
        _FREE
        | {
            "intermediate_size": 24,
            "head_dim": 8,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
        targets=_ATTENTION,
        experts=_EXPERTS,
    ),
    _decoder(
        "granitemoe",
        "GraniteMoeForCausalLM",
        _FREE | {"num_local_experts": 3, "num_experts_per_tok": 2},
        targets=_ATTENTION,
        experts=_EXPERTS,
        v4=(*_ATTENTION, "layer"),
    ),
    _decoder(
        "llama4_text",
        "Llama4ForCausalLM",
        _FREE
        | {
            "intermediate_size": 24,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
        targets=_LLAMA,
        experts=_EXPERTS,
    ),
    _decoder(
        "olmoe",
        "OlmoeForCausalLM",
        _FREE | {"intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2},
        targets=_ATTENTION,
        experts=_EXPERTS,
        v4=(*_LLAMA, "gate"),
    ),
    _decoder(
        "jamba",
        "JambaForCausalLM",
        _FREE
        | {
            "intermediate_size": 20,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        targets=(*_LLAMA, "in_proj", "x_proj", "out_proj"),
        experts=_EXPERTS,
        v4=(*_LLAMA, "in_proj", "x_proj", "out_proj", "router"),
    ),
    _decoder(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _FREE
        | _ROUTED
        | {
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        experts=_EXPERTS,
        v4=_LLAMA,
    ),
    _decoder(
        "phimoe",
        "PhimoeForCausalLM",
        _FREE | {"num_local_experts": 3, "num_experts_per_tok": 2},
        targets=_ATTENTION,
        experts=_EXPERTS,
        v4=(*_ATTENTION, "gate", "w1", "w2", "w3"),
    ),
)

_SEQ2SEQ = (
    _family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        targets=("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        inputs=_translation,
        embedding="shared",
    ),
    _family(
        "bart",
        "BartForConditionalGeneration",
        _BART,
        targets=_BART_TARGETS,
        inputs=_translation,
        embedding="shared",
    ),
    _family(
        "mbart",
        "MBartForConditionalGeneration",
        _BART,
        targets=_BART_TARGETS,
        inputs=_translation,
        embedding="shared",
    ),
    _family(
        "marian",
        "MarianMTModel",
        _BART | {"decoder_vocab_size": VOCAB},
        targets=_BART_TARGETS,
        inputs=_translation,
        embedding="shared",
    ),
    _family(
        "pegasus",
        "PegasusForConditionalGeneration",
        _BART,
        targets=_BART_TARGETS,
        inputs=_translation,
        embedding="shared",
    ),
    _family(
        "whisper",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "num_mel_bins": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        targets=_BART_TARGETS,
        inputs=lambda: {"input_features": _wave(1, 8, 32), "decoder_input_ids": IDS[:1, :8]},
    ),
)

_SENSES = (
    _family("vit", "ViTForImageClassification", _VIT, targets=_VIT_TARGETS, inputs=_image(16), v4=_VIT_V4),
    _family("deit", "DeiTForImageClassification", _VIT, targets=_VIT_TARGETS, inputs=_image(16), v4=_VIT_V4),
    _family(
        "beit",
        "BeitForImageClassification",
        _VIT | {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        targets=_VIT_TARGETS,
        inputs=_image(16),
        v4=_VIT_V4,
    ),
    _family(
        "dinov2",
        "Dinov2ForImageClassification",
        {k: v for k, v in _VIT.items() if k != "intermediate_size"} | {"mlp_ratio": 2, "use_swiglu_ffn": True},
        targets=_LLAMA,
        inputs=_image(16),
        v4=(*_VIT_V4, "weights_in", "weights_out"),
    ),
    _family(
        "swin",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        targets=(*_VIT_TARGETS, "reduction"),
        inputs=_image(16),
        v4=(*_VIT_V4, "reduction"),
    ),
    _family(
        "convnext",
        "ConvNextForImageClassification",
        {
            "num_channels": 3,
            "patch_size": 4,
            "num_stages": 2,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "image_size": 32,
        },
        targets=("pwconv1", "pwconv2"),
        inputs=_image(32),
    ),
    _family(
        "resnet",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        targets=("convolution",),
        inputs=_image(32),
    ),
    _family(
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        targets=_VIT_TARGETS,
        inputs=_image(16),
        v4=(*_VIT_V4, "dense1", "dense2"),
    ),
    _family(
        "clip",
        "CLIPModel",
        {
            "text_config": _BERT | {"max_position_embeddings": 32},
            "vision_config": _VIT,
            "projection_dim": 16,
        },
        targets=(*_BART_TARGETS, "visual_projection", "text_projection"),
        inputs=_pairs,
    ),
    _family(
        "siglip",
        "SiglipModel",
        {"text_config": _BERT | {"max_position_embeddings": 32}, "vision_config": _VIT},
        targets=("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"),
        inputs=_pairs,
    ),
    _family(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {k: v for k, v in _BERT.items() if k != "max_position_embeddings"}
        | {
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
        },
        targets=("projection", "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
        inputs=lambda: {"input_values": _wave(1, 400)},
    ),
    _family(
        "ast",
        "ASTForAudioClassification",
        {k: v for k, v in _VIT.items() if k != "image_size"}
        | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8},
        model_type="audio-spectrogram-transformer",
        targets=_VIT_TARGETS,
        inputs=lambda: {"input_values": _wave(1, 16, 8)},
        v4=_VIT_V4,
    ),
)

_TOWER = ((r"^vision_tower\.", "vision_tower.vision_model."),)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION_LANGUAGE = (
    _decoder(
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_FREE},
            "vision_config": {"model_type": "clip_vision_model", **_VIT, "projection_dim": 16},
            "image_token_index": IMAGE_TOKEN,
            "tie_word_embeddings": False,
        },
        targets=(*_LLAMA, "out_proj", "fc1", "fc2", "linear_1", "linear_2"),
        inputs=lambda: _captioned(4),
        v4=(*_LLAMA, "out_proj", "fc1", "fc2", "linear_1", "linear_2"),
        hub_names=_TOWER,
    ),
    _decoder(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _FREE | {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 78,
            "vision_start_token_id": 77,
            "vision_end_token_id": 76,
            "tie_word_embeddings": False,
        },
        targets=(*_LLAMA, "qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"),
        inputs=_qwen_vl,
        v4=(*_LLAMA, "qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"),
    ),
    _decoder(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **_TIED, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_VIT, "vision_use_head": False},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        targets=(*_LLAMA, "out_proj", "fc1", "fc2", "linear"),
        inputs=lambda: _captioned(4, token_type_ids=torch.zeros(1, 12, dtype=torch.long)),
        v4=(*_LLAMA, "out_proj", "fc1", "fc2", "linear"),
        hub_names=_TOWER,
    ),
    _decoder(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "gemma3_text",
                **_TIED,
                "head_dim": 8,
                "sliding_window": 16,
                "query_pre_attn_scalar": 8,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                **(_VIT | {"image_size": 32}),
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 77,
            "eoi_token_index": 76,
        },
        targets=(*_LLAMA, "out_proj", "fc1", "fc2"),
        inputs=lambda: _captioned(
            4, pixel_values=_wave(1, 3, 32, 32), token_type_ids=torch.tensor([[1] * 4 + [0] * 8])
        ),
        v4=(*_LLAMA, "out_proj", "fc1", "fc2"),
        hub_names=_TOWER,
    ),
    _decoder(
        "mllama",
        "MllamaForConditionalGeneration",
        {
            "text_config": {k: v for k, v in _FREE.items() if k != "tie_word_embeddings"}
            | {"cross_attention_layers": [1], "rope_parameters": _ROPE},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 1,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE_TOKEN,
        },
        targets=(*_LLAMA, "fc1", "fc2", "multi_modal_projector"),
        inputs=_mllama,
        v4=(*_LLAMA, "fc1", "fc2", "multi_modal_projector"),
        flips=False,
    ),
    _decoder(
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **_FREE},
            "vision_config": _VIT | {"image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True},
            "image_token_id": IMAGE_TOKEN,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        },
        targets=(*_LLAMA, "projection_layer", "fc1", "fc2", "linear_1", "linear_2"),
        inputs=lambda: _captioned(4),
        v4=(*_LLAMA, "projection_layer", "fc1", "fc2", "linear_1", "linear_2"),
    ),
)

ARCHITECTURES = {arch.name: arch for arch in (*_TEXT, *_MOE, *_SEQ2SEQ, *_SENSES, *_VISION_LANGUAGE)}


# --- what is made of them -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base checkpoint; `flipped` has the other `tie_word_embeddings`, `options` are of its config."""

    arch: str
    dtype: str = "float32"
    sharded: bool = False
    flipped: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def architecture(self) -> Architecture:
        """Return its family."""
        return ARCHITECTURES[self.arch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter.

    `method` is the peft config's class without `Config`, `options` go to it, `experts` adds the family's
    stacks of experts. `model` is what is done to the base before training: `grown` vocabulary, or a
    sequence classifier (`classifier`). `v4` writes the file by hand with the names of the base's files;
    `rewrite` names a function of REWRITES that turns what peft saved into another file for the same deltas.
    """

    weight: float = 1.0
    seed: int = 0
    rank: int = 4
    alpha: float = 8
    dtype: str = "float32"
    method: str = "Lora"
    targets: str | tuple[str, ...] | None = None
    experts: bool = False
    model: str = "base"
    v4: bool = False
    rewrite: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    edits: tuple[tuple[str, Any], ...] = ()

    @property
    def file(self) -> "Adapter":
        """Return what decides the bytes of its files."""
        return replace(self, weight=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What peft makes of a base and adapters.

    `tensors` are the merged ones by their names in files, `before`, `unmerged` and `merged` the answers of the
    base, of the adapter model and of the merged model, as far as there are any.
    """

    tensors: Mapping[str, torch.Tensor]
    before: torch.Tensor | None = None
    unmerged: torch.Tensor | None = None
    merged: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Workshop:
    """Makes each base, adapter and reference once, under `root`."""

    root: Path
    _made: dict[str, Any] = field(default_factory=dict)

    def base(self, spec: Base) -> Path:
        """Return the folder of a base checkpoint."""
        return self._once(spec, lambda path: _make_base(spec, path))

    def adapter(self, base: Base, spec: Adapter) -> Path:
        """Return the folder of an adapter for this base, as it was trained in float32."""
        base = replace(base, dtype="float32", sharded=False)
        folder = self.base(base)
        return self._once((base, spec.file), lambda path: _make_adapter(base, folder, spec, path))

    def reference(
        self, base: Base, adapters: tuple[Adapter, ...], dtype: str = "float64", *, mute: bool = False
    ) -> Reference:
        """Return what peft, or for files with names of transformers 4 the file-only oracle, makes of them.

        Args:
            base: The base checkpoint.
            adapters: The adapters, in the recipe's order.
            dtype: The dtype in which peft merges.
            mute: Whether the unmerged adapter model is not asked for its answer.
        """
        key = repr((base, adapters, dtype))
        if key not in self._made:
            plain = tuple(replace(adapter, rewrite=None, edits=()) for adapter in adapters)
            folders = [self.adapter(base, adapter) for adapter in plain]
            if adapters[0].v4:
                expected = expected_checkpoint(
                    self.base(base), [(f, a.weight) for f, a in zip(folders, adapters, strict=True)]
                )
                tensors = {n: torch.from_numpy(e.exact().astype("float64")) for n, e in expected.items()}
                self._made[key] = Reference(tensors=tensors)
            else:
                self._made[key] = self._by_peft(base, dict(zip(folders, plain, strict=True)), dtype, mute)
        return self._made[key]

    def _by_peft(self, base: Base, adapters: Mapping[Path, Adapter], dtype: str, mute: bool) -> Reference:
        arch, first = base.architecture, next(iter(adapters.values()))
        model = load_model(self.base(base), arch, dtype, first.model)
        before = answer(arch, model)
        adapted = _load_adapters(model, adapters)
        unmerged = None if mute else answer(arch, adapted)
        if "layer_replication" in dict(first.options):
            return Reference(tensors=_one_layer_each(adapted), before=before, unmerged=unmerged, merged=unmerged)
        with quiet():
            merged = adapted.merge_and_unload(adapter_names=[f"a{i}" for i in range(len(adapters))])
        after = answer(arch, merged)
        path = self.root / "reference"
        with quiet():
            merged.save_pretrained(path)
        tensors = base_tensors(path)
        shutil.rmtree(path)
        return Reference(tensors=tensors, before=before, unmerged=unmerged, merged=after)

    def _once(self, spec: Any, make: Callable[[Path], None]) -> Path:
        if repr(spec) not in self._made:
            path = self.root / f"made-{len(self._made):04d}"
            make(path)
            self._made[repr(spec)] = path
        return self._made[repr(spec)]


def load_model(folder: Path, arch: Architecture, dtype: str, kind: str = "base") -> Any:
    """Return the model of a folder, prepared for training as `Adapter.model` says."""
    loader = arch.auto
    if kind == "classifier":
        loader = getattr(transformers, arch.model_class.replace("CausalLM", "SequenceClassification"))
    with quiet():
        torch.manual_seed(0)
        options = {"num_labels": 3} if kind == "classifier" else {}
        model = loader.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation="eager", **options
        ).eval()
        if kind == "grown":
            model.resize_token_embeddings(VOCAB + 4)
    return model


def answer(arch: Architecture, model: Any) -> torch.Tensor:
    """Return the model's logits for the family's fixed input, in float64."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in arch.inputs().items()
    }
    with torch.no_grad(), quiet():
        output = model(**inputs)
    logits: torch.Tensor = output.logits if "logits" in output else output.logits_per_image
    return logits.double()


def _load_adapters(model: Any, adapters: Mapping[Path, Adapter]) -> Any:
    """Return `model` with all adapters active, each layer's scaling multiplied by its adapter's weight."""
    with quiet():
        (first, *rest) = adapters
        adapted = peft.PeftModel.from_pretrained(model, first, adapter_name="a0")
        for i, folder in enumerate(rest, 1):
            adapted.load_adapter(folder, adapter_name=f"a{i}")
        if rest:
            adapted.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "scaling"):
            for i, adapter in enumerate(adapters.values()):
                if f"a{i}" in module.scaling and adapter.weight != 1:
                    module.scaling[f"a{i}"] *= adapter.weight
    return adapted.eval()


def _one_layer_each(adapted: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model whose replicated layers share a base but not their updates."""
    tensors = {}
    for name, tensor in adapted.base_model.model.state_dict().items():
        if ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = tensor.clone()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            tensors[f"{name}.weight"] += module.get_delta_weight("a0")
    return tensors


def _generator(*seed: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def _make_base(spec: Base, path: Path) -> None:
    arch = spec.architecture
    config = arch.config()
    for name, value in spec.options:
        setattr(config, name, value)
    if spec.flipped:
        tied = not config.get_text_config().tie_word_embeddings
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    with quiet():
        torch.manual_seed(0)
        model = arch.auto(config)
        generator = _generator("base", spec.arch, spec.options)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = torch.exp(torch.randn(parameter.shape, generator=generator))  # exponents far apart
            parameter.data += 0.05 * noise * spread
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
        model.tie_weights()
        model.to(getattr(torch, spec.dtype)).save_pretrained(path, max_shard_size=SHARD if spec.sharded else "5GB")
    if arch.hub_names:
        _rename_base(path, arch.hub_names)


def _rename_base(path: Path, renames: tuple[tuple[str, str], ...]) -> None:
    for file in path.glob("*.safetensors"):
        save_file({_renamed(n, renames): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for file in path.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {_renamed(name, renames): f for name, f in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    return functools.reduce(lambda text, rename: re.sub(*rename, text), renames, name)


def _make_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    if spec.v4:
        _write_v4_adapter(base, base_dir, spec, path)
    else:
        _train_adapter(base, base_dir, spec, path)
    if spec.rewrite:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(REWRITES[spec.rewrite](tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    if spec.edits:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(spec.edits), indent=2))


def _train_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    arch = base.architecture
    targets = arch.targets if spec.targets is None else spec.targets
    options: dict[str, Any] = {"target_modules": targets if isinstance(targets, str) else list(targets)}
    if spec.method == "Lora":
        options |= {"r": spec.rank, "lora_alpha": spec.alpha, "fan_in_fan_out": arch.conv1d}
    if spec.experts:
        options["target_parameters"] = list(arch.experts)
    with quiet():
        config = getattr(peft, f"{spec.method}Config")(**(options | dict(spec.options)))
    generator = _generator("adapter", base.arch, spec.seed)
    model = load_model(base_dir, arch, "float32", spec.model)
    with quiet():
        torch.manual_seed(1 + spec.seed)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                _train(name, parameter, generator, keep=isinstance(dict(spec.options).get("init_lora_weights"), str))
                parameter.data = parameter.data.to(getattr(torch, spec.dtype))
        adapted.save_pretrained(str(path))


def _train(name: str, parameter: torch.nn.Parameter, generator: torch.Generator, *, keep: bool) -> None:
    """Replace a parameter by what training might have left there, or `keep` it and move it a little."""
    noise = torch.randn(parameter.shape, generator=generator)
    factor = re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b", name)
    if factor and parameter.ndim > 1 and not keep:
        # rows of B from 2^-7 to 1: some updates drown in W, some rule it
        shape = (parameter.shape[0], *[1] * (parameter.ndim - 1))
        rows = 2.0 ** -torch.randint(0, 8, shape, generator=generator)
        values = 0.2 * noise * (rows if factor[1] in ("B", "embedding_A") else 1.0)
    else:
        size = parameter.data.abs().mean().item() or 1.0
        values = parameter.data.float() + 0.2 * size * noise
    parameter.data.copy_(values)  # in place: ensure_weight_tying makes one adapter's factors views of another's


def _write_v4_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    """Write an adapter with the names of the base's files, one pair of factors for each matrix there."""
    arch = base.architecture
    generator = _generator("v4", base.arch, spec.seed)
    dtype = getattr(torch, spec.dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in sorted(base_tensors(base_dir).items()):
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and name != module and module.endswith(tuple(f".{t}" for t in arch.v4) + arch.v4):
            rows = 2.0 ** -torch.randint(0, 8, (weight.shape[0], 1), generator=generator)
            B = 0.2 * rows * torch.randn(weight.shape[0], spec.rank, generator=generator)
            A = 0.2 * torch.randn(spec.rank, weight.shape[1], generator=generator)
            tensors[f"{pico.PREFIX}{module}.lora_A.weight"] = A.to(dtype)
            tensors[f"{pico.PREFIX}{module}.lora_B.weight"] = B.to(dtype)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(arch.v4), base_model_name_or_path=str(base_dir)
    )
    config.save_pretrained(str(path))
    file = path / "adapter_config.json"
    written = json.loads(file.read_text())
    del written["peft_version"]  # peft wrote none before 0.18
    file.write_text(json.dumps(written, indent=2))


# --- the same deltas in another file ------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def _experts_of_transformers_4(expert: str, gate: str, up: str, down: str) -> Callable[[Tensors], Tensors]:
    """Return the rewrite of stacks `[E, 2I, H]` and `[E, H, I]` into modules of single experts."""

    def rewrite(tensors: Tensors) -> Tensors:
        result = {}
        for key, A, B in _stacks(tensors):
            stem = re.sub(r"[^.]+\.experts(\.base_layer)?$", expert, key)
            for e in range(A.shape[0]):
                parts = {down: B[:, :, e]}
                if key.endswith(".base_layer"):
                    parts = dict(zip((gate, up), B[:, :, e].chunk(2), strict=True))
                for name, rows in parts.items():
                    result[f"{stem}.{e}.{name}.lora_A.weight"] = A[e].clone()
                    result[f"{stem}.{e}.{name}.lora_B.weight"] = rows.contiguous()
        return {k: t for k, t in tensors.items() if ".experts." not in k} | result

    return rewrite


def _experts_of_peft_0_18(tensors: Tensors) -> Tensors:
    """Exchange the sides of each stack: A there had the second dimension of the parameter, not the last."""
    result = dict(tensors)
    for key, A, B in _stacks(tensors):
        result[f"{key}.lora_A.weight"] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
        result[f"{key}.lora_B.weight"] = A.permute(2, 1, 0).flatten(1).contiguous()
    return result


def _stacks(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the wrapper's name, A `[E, r, in]` and B `[out, r, E]` of each stack of experts of rank 4."""
    for key, A in tensors.items():
        if key.endswith(("experts.lora_A.weight", "experts.base_layer.lora_A.weight")):
            module = key.removesuffix(".lora_A.weight")
            B = tensors[f"{module}.lora_B.weight"]
            yield module, A.reshape(-1, 4, A.shape[1]), B.reshape(B.shape[0], 4, -1)


def _names(*renames: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {_renamed(name, renames): tensor for name, tensor in tensors.items()}


REWRITES: dict[str, Callable[[Tensors], Tensors]] = {
    "experts of transformers 4": _experts_of_transformers_4("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "jamba of transformers 4": _experts_of_transformers_4("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral of transformers 4": _experts_of_transformers_4("block_sparse_moe.experts", "w1", "w3", "w2"),
    "experts of peft 0.18": _experts_of_peft_0_18,
    "vision tower of transformers 4": _names((r"\.vision_tower\.", ".vision_tower.vision_model.")),
    "vit of transformers 4": _names(
        (r"\.layers\.(\d+)\.attention\.o_proj", r".encoder.layer.\1.attention.output.dense"),
        (r"\.layers\.(\d+)\.attention\.q_proj", r".encoder.layer.\1.attention.attention.query"),
        (r"\.layers\.(\d+)\.attention\.k_proj", r".encoder.layer.\1.attention.attention.key"),
        (r"\.layers\.(\d+)\.attention\.v_proj", r".encoder.layer.\1.attention.attention.value"),
        (r"\.layers\.(\d+)\.mlp\.fc1", r".encoder.layer.\1.intermediate.dense"),
        (r"\.layers\.(\d+)\.mlp\.fc2", r".encoder.layer.\1.output.dense"),
    ),
    "qwen2_vl of transformers 4": _names((r"\.model\.language_model\.", ".model."), (r"\.model\.visual\.", ".visual.")),
}
