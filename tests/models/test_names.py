"""Names are judged by transformers itself: every parameter of a tiny model that it saved is put together from disk."""

import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.core_model_loading import Concatenate, Interleave, PermuteForRope, Transpose

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import Module, read_architecture
from lora_build.models.ask import answer
from lora_build.models.conversion import Conversion, Memory, UnsupportedConversionError, convert
from lora_build.models.experts import KNOWN, known_stack
from lora_build.models.facts import Facts
from lora_build.models.names import Names, Parameter, Part, read_ties

ROPE_3D = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
LATENT = {
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "patch_size": 4}


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **IDS,
    } | more


def vision(model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    } | more


def both(model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text, "vision_config": vision} | more


CONFIGS: dict[str, dict[str, Any]] = {
    # the same on disk as in memory, up to a prefix
    "LlamaForCausalLM": text("llama"),
    "GPT2LMHeadModel": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "BloomForCausalLM": {"model_type": "bloom", "vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": text("opt", ffn_dim=24, word_embed_proj_dim=16),
    "Phi3ForCausalLM": text("phi3"),
    "BertForMaskedLM": text("bert"),
    "T5ForConditionalGeneration": {"model_type": "t5", "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24}
    | {"num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "WhisperForConditionalGeneration": {"model_type": "whisper", "vocab_size": 64, "num_mel_bins": 8, **SEQ2SEQ, **IDS}
    | {"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1},
    "MambaForCausalLM": {"model_type": "mamba", "vocab_size": 64, "hidden_size": 16, "state_size": 4}
    | {"num_hidden_layers": 2, **IDS},
    "CLIPModel": both("clip", text("clip_text_model"), vision("clip_vision_model"), projection_dim=8),
    "SiglipModel": both("siglip", text("siglip_text_model"), vision("siglip_vision_model")),
    "SiglipVisionModel": vision("siglip_vision_model"),
    "Wav2Vec2ForCTC": text("wav2vec2", conv_dim=[8, 8], conv_kernel=[3, 3], conv_stride=[2, 2])
    | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    "ConvNextForImageClassification": {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1]}
    | {"num_stages": 2},
    "GptOssForCausalLM": text("gpt_oss", **MOE, head_dim=8),
    "Llama4ForCausalLM": text("llama4_text", **MOE, intermediate_size_mlp=24, head_dim=8),
    # renamed
    "GPTNeoXForCausalLM": text("gpt_neox"),
    "EsmForMaskedLM": text("esm", pad_token_id=1, mask_token_id=3),
    "ViTModel": vision("vit"),
    "ViTForImageClassification": vision("vit"),
    "DeiTForImageClassification": vision("deit"),
    "BeitForImageClassification": vision("beit"),
    "Dinov2Model": vision("dinov2"),
    "DINOv3ViTModel": vision("dinov3_vit"),
    "SwinForImageClassification": {"model_type": "swin", "image_size": 16, "patch_size": 2, "embed_dim": 8}
    | {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "SegformerForSemanticSegmentation": {"model_type": "segformer", "num_encoder_blocks": 2, "depths": [1, 1]}
    | {"sr_ratios": [2, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "patch_sizes": [7, 3]}
    | {"strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
    "YolosForObjectDetection": vision("yolos", image_size=[16, 16], num_detection_tokens=3),
    "VideoMAEForVideoClassification": vision("videomae", num_frames=4),
    "ASTForAudioClassification": vision("audio-spectrogram-transformer", max_length=32, num_mel_bins=16)
    | {"frequency_stride": 4, "time_stride": 4},
    "DetrForObjectDetection": {"model_type": "detr", **SEQ2SEQ, "num_queries": 5}
    | {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    | {
        "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
        | {"out_features": ["stage2"]}
    },
    "GraniteMoeForCausalLM": text("granitemoe", **MOE),
    # vision and language: prefixes changed
    "Qwen2VLForConditionalGeneration": both(
        "qwen2_vl",
        text("qwen2_vl_text", hidden_size=32, num_attention_heads=2, rope_parameters=ROPE_3D),
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2},
    ),
    "Qwen2_5_VLForConditionalGeneration": both(
        "qwen2_5_vl",
        text("qwen2_5_vl_text", hidden_size=32, num_attention_heads=2, rope_parameters=ROPE_3D),
        QWEN_VISION | {"out_hidden_size": 32},
    ),
    "Qwen3VLMoeForConditionalGeneration": both(
        "qwen3_vl_moe",
        text("qwen3_vl_moe_text", **MOE, head_dim=8),
        QWEN_VISION | {"out_hidden_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "LlavaForConditionalGeneration": both("llava", text("llama"), vision("clip_vision_model")),
    "LlavaNextForConditionalGeneration": both("llava_next", text("llama"), vision("clip_vision_model")),
    "PaliGemmaForConditionalGeneration": both(
        "paligemma", text("gemma", head_dim=8), vision("siglip_vision_model"), projection_dim=16
    ),
    "Gemma3ForConditionalGeneration": both(
        "gemma3", text("gemma3_text", head_dim=8), vision("siglip_vision_model"), mm_tokens_per_image=4
    ),
    "MllamaForConditionalGeneration": both(
        "mllama",
        text("mllama_text_model", cross_attention_layers=[1]),
        vision("mllama_vision_model", attention_heads=4, num_global_layers=1, vision_output_dim=32)
        | {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
    ),
    "InternVLForConditionalGeneration": both(
        "internvl", text("qwen2"), vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4])
    ),
    "AriaForConditionalGeneration": both(
        "aria",
        text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision("idefics3_vision"),
        projector_patch_to_query_dict={"16": 4},
    ),
    # experts stacked
    "MixtralForCausalLM": text("mixtral", **MOE),
    "PhimoeForCausalLM": text("phimoe", **MOE),
    "OlmoeForCausalLM": text("olmoe", **MOE),
    "Qwen2MoeForCausalLM": text("qwen2_moe", **MOE),
    "Qwen3MoeForCausalLM": text("qwen3_moe", **MOE, head_dim=8),
    "Qwen3NextForCausalLM": text("qwen3_next", **MOE, **LINEAR_ATTENTION, head_dim=8),
    "DeepseekV3ForCausalLM": text("deepseek_v3", **{**MOE, **LATENT}),
    "Glm4MoeForCausalLM": text("glm4_moe", **{**MOE, **LATENT}),
    "Lfm2MoeForCausalLM": text("lfm2_moe", **MOE, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "JambaForCausalLM": text("jamba", **MOE, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2)
    | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "NemotronHForCausalLM": text("nemotron_h", **MOE, layers_block_type=["mamba", "moe", "attention"], n_group=2)
    | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2, "topk_group": 1}
    | {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 24},
    "Ernie4_5_VLMoeForConditionalGeneration": both(
        "ernie4_5_vl_moe",
        text("ernie4_5_vl_moe_text", hidden_size=32, num_attention_heads=2, rope_parameters=ROPE_3D)
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [20, 12], "moe_num_shared_experts": 1}
        | {"mlp_layer_types": ["dense", "sparse"]},
        QWEN_VISION,
    ),
    # one tensor split into several, several joined into one
    "Dinov2ForImageClassification": vision("dinov2", use_swiglu_ffn=True),
    "NomicBertModel": text("nomic_bert"),
    "OlmoHybridForCausalLM": text("olmo_hybrid", **LINEAR_ATTENTION),
    "KimiLinearForCausalLM": text("kimi_linear", **{**MOE, **LATENT}),
    "Kimi_K25ForConditionalGeneration": both(  # its rows are permuted as well
        "kimi_k25",
        text("deepseek_v3", **{**MOE, **LATENT}),
        vision("kimi_k25_vision", pos_emb_height=4, pos_emb_width=4, pos_emb_time=1),
        projection_hidden_size=16,
    ),
}


@dataclass(frozen=True)
class Saved:
    """A model whose elements all differ, in memory and as transformers saved it."""

    config: ModelConfig
    disk: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor]
    tied: dict[str, str]
    convolutions: frozenset[str]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.disk.items()}

    @cached_property
    def names(self) -> Names:
        return Names(self.config, self.shapes)


@cache
def saved(architecture: str) -> Saved:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**CONFIGS[architecture]))
    start = 0
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            stop = start + tensor.numel()
            tensor.copy_(torch.arange(start, stop, dtype=torch.float32).reshape(tensor.shape))
            start = stop
    assert start < 2**24, "float32 no longer counts in ones"
    model.tie_weights()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        disk = load_file(Path(folder) / "model.safetensors")
        config = ModelConfig.parse((Path(folder) / "config.json").read_text())
    memory = model.state_dict()
    convolutions = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
    }
    return Saved(config, disk, memory, model.all_tied_weights_keys, frozenset(convolutions))


def put_together(parameter: Parameter, disk: Mapping[str, torch.Tensor], *, is_kernel: bool) -> torch.Tensor:
    """Return a parameter made of its parts, after a look that these hold each element once."""
    made, times = torch.zeros(parameter.shape), torch.zeros(parameter.shape)
    for part in parameter.parts:
        tensor = disk[part.name].float()
        if part.transposed:
            assert (part.rows, part.first) == (None, 0)
            tensor = tensor.transpose(-1, -2)
        is_stack = part.expert is None and len(parameter.shape) == 3 and not is_kernel
        into, count = (made, times) if part.expert is None else (made[part.expert], times[part.expert])
        if part.rows is None:
            into += tensor.reshape(into.shape)
            count += 1
            continue
        axis = 1 if is_stack else 0
        rows = torch.tensor(part.rows)
        there = tensor.narrow(axis, part.first, len(rows))
        into.index_add_(axis, rows, there)
        count.index_add_(axis, rows, torch.ones_like(there))
    assert (times == 1).all()
    return made


def trivial(name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(name=name, shape=shape, parts=(Part(name=name),))


def owner(parameter: str) -> str:
    return parameter.rpartition(".")[0].partition(".parametrizations.")[0]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_parameter_is_put_together_from_what_transformers_saved(architecture: str) -> None:
    model = saved(architecture)
    facts = answer(model.config, model.shapes)
    assert (facts.missing, facts.unexpected, facts.mismatched) == ((), (), {})
    names = Names(model.config, model.shapes, Facts.from_json(facts.to_json()))
    lost = []
    for name, expected in model.memory.items():
        found = names.find(name)
        if found is None:
            lost.append(name)
            continue
        made = put_together(found, model.disk, is_kernel=owner(name) in model.convolutions)
        assert torch.equal(made, expected.float()), name
    assert set(lost) <= model.tied.keys(), "only what shares another's tensor may have none of its own"


@pytest.mark.parametrize("architecture", KNOWN)
def test_stacks_that_are_known_are_what_transformers_makes_of_the_checkpoint(architecture: str) -> None:
    model = saved(architecture)
    asked = model.names._load()
    stacks = [name for name in asked.parameters if ".experts." in name]

    for name in stacks:
        assert known_stack(model.config, model.shapes, name) == (
            asked.parameters[name],
            asked.module_of(name),
        )
    assert {name.rpartition(".")[2] for name in stacks} == KNOWN[architecture].stacks.keys()


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"num_experts": 5}, ""),
        ({"num_local_experts": 5}, ""),
        ({"architectures": ["LlamaForCausalLM"]}, ""),
        ({"architectures": None}, ""),
        ({"architectures": 5}, ""),
        ({"architectures": [["Qwen3MoeForCausalLM"]]}, ""),
        ({"num_experts": [4]}, ""),
        ({}, ".experts.3.gate_proj.weight"),
        ({}, ".experts.3.up_proj.weight"),
        ({}, ".experts.0.gate_proj.weight"),
    ],
)
def test_stacks_of_which_anything_is_unusual_are_not_known(changes: dict[str, Any], lost: str) -> None:
    model = saved("Qwen3MoeForCausalLM")
    path = "model.layers.1.mlp.experts.gate_up_proj"
    data = {key: value for key, value in model.config.data.items() if key != "num_local_experts"} | {"num_experts": 4}
    config = ModelConfig.of(data)
    assert known_stack(config, model.shapes, path)
    shapes = {name: shape for name, shape in model.shapes.items() if not (lost and name.endswith(lost))}

    assert known_stack(config.with_changes(changes), shapes, path) is None
    for unlike in ((3, 3), (20,)):
        assert known_stack(config, shapes | {"model.layers.1.mlp.experts.2.up_proj.weight": unlike}, path) is None
    for other in ("layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down", f"x.{path}"):
        assert known_stack(config, model.shapes, other) is None


@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_tensor_on_disk_is_found_by_its_own_name(architecture: str) -> None:
    model = saved(architecture)
    names = model.names
    assert len(model.shapes) > 10
    for name, shape in model.shapes.items():
        assert names.find(name) == trivial(name, shape)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_names_of_older_transformers_find_what_is_stored_under_todays(architecture: str) -> None:
    model = saved(architecture)
    todays = {name: tuple(t.shape) for name, t in model.memory.items()}
    names = Names(model.config, todays)
    renamed = {
        found.parts[0].name: name
        for name in todays
        if (found := model.names.find(name)) and found.shape == model.shapes.get(found.parts[0].name)
    }
    for older, today in renamed.items():
        found = names.find(older)
        assert found is not None, older
        assert found.name == today or model.tied.get(today) == found.name


@pytest.mark.parametrize(
    ("architecture", "name", "on_disk"),
    [
        ("GPT2LMHeadModel", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        (
            "ViTForImageClassification",
            "encoder.layer.0.attention.attention.query.weight",
            "vit.encoder.layer.0.attention.attention.query.weight",
        ),
        (
            "ViTForImageClassification",
            "layers.1.attention.q_proj.weight",
            "vit.encoder.layer.1.attention.attention.query.weight",
        ),
        (
            "LlavaForConditionalGeneration",
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
        ),
        (
            "LlavaForConditionalGeneration",
            "model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
        ),
        (
            "Qwen2VLForConditionalGeneration",
            "language_model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
        ),
        ("GPTNeoXForCausalLM", "lm_head.weight", "embed_out.weight"),
    ],
)
def test_a_name_of_any_age_with_or_without_its_prefix_is_found(architecture: str, name: str, on_disk: str) -> None:
    model = saved(architecture)

    found = model.names.find(name)

    assert found is not None
    assert (found.shape, found.parts) == (model.shapes[on_disk], (Part(name=on_disk),))


def test_a_fused_stack_is_made_of_rows_of_each_expert() -> None:
    found = saved("MixtralForCausalLM").names.find("model.layers.0.mlp.experts.gate_up_proj")

    assert found is not None
    assert found.shape == (4, 48, 16)
    experts = "model.layers.0.block_sparse_moe.experts"
    assert found.parts[:3] == (
        Part(name=f"{experts}.0.w1.weight", expert=0, rows=range(24)),
        Part(name=f"{experts}.0.w3.weight", expert=0, rows=range(24, 48)),
        Part(name=f"{experts}.1.w1.weight", expert=1, rows=range(24)),
    )


def test_a_split_tensor_gives_each_parameter_its_rows() -> None:
    model = saved("NomicBertModel")

    key = model.names.find("layers.0.self_attn.k_proj.weight")

    assert key is not None
    (part,) = key.parts
    assert (part.rows, part.first) == (range(16), 16)
    assert model.shapes[part.name] == (48, 16)


def test_a_stack_that_is_transposed_on_disk_says_so() -> None:
    model = saved("Qwen3VLMoeForConditionalGeneration")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert model.shapes[name] == (4, 40, 16)

    found = Names(model.config, model.shapes | {name: (4, 16, 40)}).find(name)

    assert found == Parameter(name=name, shape=(4, 40, 16), parts=(Part(name=name, transposed=True),))


def test_a_kernel_that_a_linear_layer_reads_keeps_its_rows() -> None:
    class Conv3dToLinear:
        pass

    conversion = Conversion(
        target="proj.weight",
        tensors={"proj.weight": ("proj.weight",)},
        sources=("proj.weight",),
        targets=("proj.weight",),
        operations=(Conv3dToLinear(),),
    )
    memory = Memory(config=None, shapes={"proj.weight": (8, 24)}, kernels=frozenset())

    (found,) = convert(conversion, {"proj.weight": (8, 3, 2, 2, 2)}, memory)

    assert found == Parameter(name="proj.weight", shape=(8, 24), parts=(Part(name="proj.weight"),))


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (Interleave(dim=0), {"a": (6, 3)}),
        (Interleave(dim=1), {"a": (2, 6, 3)}),
        (Interleave(dim=1, inverse=True), {"a": (2, 6, 3)}),
        (Concatenate(dim=0), {"a": (4, 3), "b": (2, 3)}),
        (Concatenate(dim=1), {"a": (2, 4, 3), "b": (2, 2, 3)}),
        (Transpose(0, 1), {"a": (4, 3)}),
        (Transpose(1, 2), {"a": (2, 4, 3)}),
        (PermuteForRope(), {"a": (8, 3)}),
        (PermuteForRope(inverse=True), {"a": (8,)}),
    ],
    ids=repr,
)
def test_an_operation_moves_rows_as_transformers_does(operation: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    disk = {name: torch.rand(shape) for name, shape in shapes.items()}
    config = SimpleNamespace(num_attention_heads=2)
    collected = {name: [tensor] for name, tensor in disk.items()}
    expected = operation.convert(collected, [*shapes], ["target"], config=config, model=None)["target"]
    conversion = Conversion(
        target="target",
        tensors={name: (name,) for name in shapes},
        sources=tuple(shapes),
        targets=("target",),
        operations=(operation,),
    )

    (found,) = convert(
        conversion, shapes, Memory(config=config, shapes={"target": tuple(expected.shape)}, kernels=frozenset())
    )

    assert torch.equal(put_together(found, disk, is_kernel=False), expected)


def test_an_operation_nobody_has_heard_of_is_named() -> None:
    class Whirl:
        pass

    conversion = Conversion(target="a", tensors={"b": ("b",)}, sources=("b",), targets=("a",), operations=(Whirl(),))

    with pytest.raises(UnsupportedConversionError, match=r"^Whirl$"):
        convert(conversion, {"b": (2, 2)}, Memory(config=None, shapes={"a": (2, 2)}, kernels=frozenset()))


def test_a_stack_that_lacks_an_expert_is_not_found_and_says_why() -> None:
    model = saved("MixtralForCausalLM")
    shapes = {name: shape for name, shape in model.shapes.items() if ".0.block_sparse_moe.experts.3." not in name}
    names = Names(model.config, shapes)

    assert names.find("model.layers.0.mlp.experts.down_proj") is None
    assert "MergeModulelist to [3, 16, 24] where the config says (4, 16, 24)" in names.unsupported(
        "model.layers.0.mlp.experts.down_proj"
    )
    assert names.find("model.layers.1.mlp.experts.down_proj") is not None


def test_what_cannot_be_followed_is_found_by_its_disk_name_only() -> None:
    config = {
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "text_config": text("inkling_text", mlp_layer_types=["dense", "dense"]),
    }
    shapes = {"model.llm.layers.0.mlp.w13_dn.weight": (48, 16)}
    names = Names(ModelConfig.of(config), shapes)
    gate = "model.language_model.layers.0.mlp.gate_proj.weight"

    assert names.find(gate) is None
    assert names.unsupported(gate) == (
        "transformers stores it through Chunk of permuted rows, which cannot be followed yet"
    )
    for name, shape in shapes.items():
        assert names.find(name) == trivial(name, shape)


def test_an_unknown_name_is_not_found_and_has_neighbours() -> None:
    model = saved("MixtralForCausalLM")
    names = model.names
    unknown = "model.layers.0.mlp.experts.gate_up_prj"

    assert names.find(unknown) is None
    assert names.unsupported(unknown) == ""
    assert "model.layers.0.mlp.experts.gate_up_proj" in names.nearest(unknown)


def test_a_name_with_two_meanings_is_not_found() -> None:
    names = saved("CLIPModel").names

    assert names.find("encoder.layers.0.self_attn.q_proj.weight") is None


def test_an_unknown_architecture_still_has_its_disk_names() -> None:
    names = Names(ModelConfig.of({"architectures": ["Unheard"], "model_type": "unheard"}), {"model.a.weight": (2, 3)})

    assert names.find("model.a.weight") == names.find("a.weight") == trivial("model.a.weight", (2, 3))
    assert names.find("b.weight") is None
    assert "transformers has no architecture ['Unheard']" in names.unsupported("b.weight")
    assert names.module("model.a.weight") is None


def test_a_base_of_many_experts_resolves_in_a_couple_of_seconds() -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_experts": 128,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
    }
    sizes = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": size
        for layer in range(48)
        for expert in range(128)
        for leaf, size in sizes.items()
    }
    names = Names(ModelConfig.of(config), shapes)

    start = time.process_time()
    found = [names.find(f"layers.{layer}.mlp.experts.gate_up_proj") for layer in range(48)]
    known = [names.find(f"model.layers.{layer}.mlp.experts.gate_up_proj") for layer in range(48)]
    near = names.nearest("model.layers.3.mlp.expert.4.gate_proj.weight")
    seconds = time.process_time() - start

    assert [(one.shape, len(one.parts)) for one in found if one] == [((128, 1536, 2048), 256)] * 48
    assert known == found
    assert "model.layers.3.mlp.experts.4.gate_proj.weight" in near
    assert seconds < 10  # 1.5 s on an idle core


@pytest.mark.parametrize(
    ("architecture", "parameter", "module"),
    [
        ("GPT2LMHeadModel", "transformer.h.0.attn.c_attn.weight", Module(layer_type="Conv1D")),
        ("GPT2LMHeadModel", "h.0.attn.c_attn.weight", Module(layer_type="Conv1D")),
        ("LlamaForCausalLM", "model.embed_tokens.weight", Module(layer_type="Embedding")),
        (
            "ViTForImageClassification",
            "vit.encoder.layer.0.attention.attention.query.weight",
            Module(layer_type="Linear"),
        ),
        (
            "SiglipModel",
            "vision_model.head.attention.in_proj_weight",
            Module(layer_type="MultiheadAttention"),
        ),
        (
            "Wav2Vec2ForCTC",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
            Module(layer_type="Conv1d", groups=2, dilation=(1,)),
        ),
        (
            "SegformerForSemanticSegmentation",
            "segformer.encoder.patch_embeddings.0.proj.weight",
            Module(layer_type="Conv2d", groups=1, dilation=(1, 1)),
        ),
    ],
)
def test_a_module_is_known_by_any_name_of_its_parameter(architecture: str, parameter: str, module: Module) -> None:
    found = saved(architecture).names.module(parameter)

    assert found is not None
    assert (found.layer_type, found.groups, found.dilation) == (module.layer_type, module.groups, module.dilation)


def test_ties_of_a_nested_text_config_can_be_cut() -> None:
    ties = read_ties(saved("PaliGemmaForConditionalGeneration").config)

    assert ties.tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert ties.untied == {}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": [], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "model_type": "unheard"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "many"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 0},
    ],
)
def test_a_config_that_makes_no_model_is_one_clear_error(config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"^base/config\.json: how transformers names its parameters cannot be told"):
        read_architecture(ModelConfig.of(config))


def test_neither_torch_nor_transformers_is_imported_while_disk_names_and_known_stacks_answer() -> None:
    script = """
import sys
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.names import Names
config = ModelConfig.of({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
names = Names(config, {"h.0.attn.c_attn.weight": (16, 48)})
assert names.find("h.0.attn.c_attn.weight") == names.find("transformer.h.0.attn.c_attn.weight") is not None
shapes = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (8, 4) for e in range(3)}
config = ModelConfig.of({"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 3})
names = Names(config, shapes)
assert names.find("model.layers.0.mlp.experts.down_proj").shape == (3, 8, 4)
assert names.module("model.layers.0.mlp.experts.down_proj").is_transposed is False
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["pipeline", "logging", "AutoModel", "LlamaConfig"])
def test_a_config_can_name_models_and_nothing_else_of_transformers(name: str) -> None:
    config = {"architectures": [name], "model_type": "llama"}
    names = Names(ModelConfig.of(config), {"weight_on_disk": (2, 2)})

    assert names.find("model.embed_tokens.weight") is None
    assert f"{name} is no model" in names.unsupported("model.embed_tokens.weight")
