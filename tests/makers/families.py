"""Tiny models of many families: how to make each, and what its files are called."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCAB = 128

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
    the files on the Hub have. `flips` tells that `tie_word_embeddings` may be either, `tied` maps each tensor that
    the file leaves out to the tensor it is tied to (for families that are held to the file-only oracle), and `conv1d`
    says that the linear layers store `[in, out]`.
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
    tied: Mapping[str, str] = field(default_factory=dict)
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
    _decoder(
        "llama_tied",
        "LlamaForCausalLM",
        _TIED,
        model_type="llama",
        flips=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
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
        "gpt2",
        "GPT2LMHeadModel",
        _GPT,
        targets=("c_attn", "c_proj", "c_fc"),
        embedding="wte",
        conv1d=True,
        flips=True,
        tied={"lm_head.weight": "transformer.wte.weight"},
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
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
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
        tied={"lm_head.weight": "transformer.word_embeddings.weight"},
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
    _family(
        "bert",
        "BertForMaskedLM",
        _BERT,
        targets=("query", "key", "value", "dense"),
        embedding="word_embeddings",
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
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
        tied={
            "lm_head.weight": "shared.weight",
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
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

FAMILIES = {arch.name: arch for arch in (*_TEXT, *_MOE, *_SEQ2SEQ, *_SENSES, *_VISION_LANGUAGE)}


def reads_text(arch: Architecture) -> bool:
    """Whether a family's input is text and nothing else."""
    return arch.inputs in (_text, _translation)
