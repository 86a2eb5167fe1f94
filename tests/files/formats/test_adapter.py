"""Adapters: what adapter_config.json says, and tensors sorted once, when an adapter is opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig
from safetensors.torch import save_file

from lora_build.errors import SourceError
from lora_build.files.formats import adapter
from lora_build.files.formats.adapter import Adapter, KeyRules, open_adapter
from lora_build.files.formats.adapter_config import AdapterConfig
from lora_build.files.identity import SourceName
from lora_build.files.sources.local import open_local

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def opened(folder: Path, *keys: str, **config: object) -> Adapter:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file({key: torch.full((1,), i) for i, key in enumerate(keys)}, folder / "adapter_model.safetensors")
    rules = {"LORA": KeyRules(leaves=("lora_A.weight", "lora_B.weight"), shared_leaves=("pool",), ignored=("ranknum",))}
    return open_adapter(open_local(SourceName.of_adapter("math"), "math", folder), rules=rules.get)


def test_every_tensor_is_sorted_once(tmp_path: Path) -> None:
    keys = {
        "A": f"{MODULE}.lora_A.weight",
        "B": f"{MODULE}.base_layer.lora_B.weight",
        "pool": "base_model.pool",
        "rank": f"{MODULE}.ranknum",
        "head": "base_model.model.lm_head.modules_to_save.weight",
        "again": "base_model.model.lm_head.weight",
        "frozen": "base_model.model.score.base_layer.weight",
        "tokens": "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "stray": f"{MODULE}.lora_A.default.weight",
        "bare": "lm_head.weight",
    }
    adapter = opened(tmp_path, *keys.values())
    parts, tensors = adapter.parts, adapter.tensors
    path = MODULE.removeprefix("base_model.model.")

    assert (adapter.name, adapter.source, adapter.weight) == ("math", "adapters.math", 1.0)
    assert parts.factors == {path: {"lora_A.weight": tensors[keys["A"]]}} | {
        f"{path}.base_layer": {"lora_B.weight": tensors[keys["B"]]}
    }
    assert parts.shared == {"pool": tensors["base_model.pool"]}
    assert parts.ignored == [keys["rank"]]
    assert parts.replaced == {"lm_head.weight": tensors[keys["head"]]}
    assert parts.copies == {"lm_head.weight": [tensors[keys["again"]]]}
    assert parts.frozen == {"score.weight": tensors[keys["frozen"]]}
    assert parts.tokens == {"embed_tokens": tensors[keys["tokens"]]}
    assert [problem.partition(";")[0] for problem in parts.problems] == [
        f"adapters.math: nothing here consumes tensor '{keys['stray']}'",
        "adapters.math: tensor 'lm_head.weight' does not start with 'base_model.model.' as PEFT's keys do",
    ]


def test_the_tensors_of_a_method_that_nobody_knows_are_left_unsorted(tmp_path: Path) -> None:
    adapter = opened(tmp_path, f"{MODULE}.lora_A.weight", peft_type="UNHEARD")

    assert (adapter.peft_type, len(adapter.tensors)) == ("UNHEARD", 1)
    assert adapter.parts.factors == adapter.parts.replaced == {}
    assert adapter.parts.problems == []


@pytest.mark.parametrize(("text", "problem"), [("[]", "is not a JSON object"), ("{}", "has no peft_type")])
def test_a_config_without_a_method_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SourceError, match=rf"^adapters\.math/adapter_config\.json: {problem}"):
        AdapterConfig.parse(text, "adapters.math/adapter_config.json")


def test_a_config_says_what_is_asked_of_every_method() -> None:
    noted = {"parent_library": "transformers.models.llama.modeling_llama", "base_model_class": "LlamaForCausalLM"}
    config = AdapterConfig.parse(json.dumps({
        "peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": ["score"], "layer_replication": [[0, 2]],
        "ensure_weight_tying": True, "auto_mapping": noted, "r": 8,
    }))  # fmt: skip
    plain = AdapterConfig.parse('{"peft_type": "OFT", "auto_mapping": {"parent_library": "mine"}, "task_type": null}')

    assert (config.peft_type, config.task_type, config.trained_class) == ("LORA", "SEQ_CLS", "LlamaForCausalLM")
    assert (config.saved_modules, config.layer_replication, config.keeps_ties) == (("score",), [[0, 2]], True)
    assert config.data["r"] == 8
    assert (plain.task_type, plain.trained_class, plain.saved_modules) == (None, None, ())
    assert (plain.layer_replication, plain.keeps_ties) == (None, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": "false"}, "use_rslora: expected true, false or null, found 'false'"),
        ({"use_dora": 1}, "use_dora: expected true, false or null, found 1"),
        ({"bias": None}, "bias: expected none, all or lora_only, found None"),
        ({"bias": "All"}, "bias: expected none, all or lora_only, found 'All'"),
        ({"lora_dropout": "x"}, "lora_dropout: expected a number or null, found 'x'"),
        ({"peft_version": 5}, "peft_version: expected text or null, found 5"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names or null, found 'lm_head'"),
        ({"target_modules": {"q_proj": 1}}, "target_modules: expected a list of names, a pattern or null"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform: expected a whole number, a list of them or null"),
        ({"trainable_token_indices": {"wte": "1"}}, "trainable_token_indices: expected a list of tokens"),
        ({"rank_pattern": ["a"]}, "rank_pattern: expected a mapping or null, found ['a']"),
    ],
)
def test_a_value_of_another_kind_than_peft_declares_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        opened(tmp_path, f"{MODULE}.lora_A.weight", **changes)
    assert f"adapters.math/adapter_config.json: {said}" in str(caught.value)


def test_all_values_of_another_kind_are_named_at_once() -> None:
    with pytest.raises(SourceError) as caught:
        AdapterConfig.parse('{"peft_type": "LORA", "use_dora": 0, "bias": 1}', "x")
    assert len(caught.value.issues) == 2


def test_ranks_that_adalora_pruned_away_are_no_accident(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({f"{MODULE}.lora_A.weight": torch.empty(0, 6)}, tmp_path / "adapter_model.safetensors")

    assert open_adapter(open_local(SourceName.of_adapter("math"), "math", tmp_path), rules=lambda _: None).tensors


def test_numbers_may_be_whole_where_peft_takes_fractions_and_null_where_it_has_no_default() -> None:
    text = '{"peft_type": "LORA", "fan_in_fan_out": null, "lora_dropout": 0, "layers_to_transform": 3, "layers_pattern": null, "rank_pattern": null}'

    assert AdapterConfig.parse(text).data["lora_dropout"] == 0


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, OFTConfig, LoHaConfig, LoKrConfig, VeraConfig])
def test_what_peft_itself_declares_is_of_its_kind(config: Any) -> None:
    written = json.loads(
        json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config().to_dict().items()}, default=vars)
    )

    assert AdapterConfig.parse(json.dumps(written)).peft_type == config().peft_type.value


def test_an_adapter_of_mlx_is_named() -> None:
    with pytest.raises(SourceError, match="an adapter of MLX, not of peft"):
        AdapterConfig.parse('{"fine_tune_type": "lora"}')


def test_an_adapter_without_tensors_is_refused_with_what_may_have_happened(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no tensors: .* save the trained model once more"):
        opened(tmp_path)


def test_tensors_that_zero_3_did_not_gather_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({f"{MODULE}.lora_A.weight": torch.empty(0)}, tmp_path / "adapter_model.safetensors")

    with pytest.raises(SourceError, match=r"1 of 1 tensors have no values, .*ZeRO-3 without gathering.*zero_to_fp32"):
        open_adapter(open_local(SourceName.of_adapter("math"), "math", tmp_path), rules=lambda _: None)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"])
def test_a_key_through_a_wrapper_of_training_is_named_as_such(tmp_path: Path, wrapper: str) -> None:
    inside = f"{MODULE.replace('.self_attn', f'.{wrapper}.self_attn')}.lora_A.weight"
    outside = f"base_model.model.{wrapper}.{MODULE.removeprefix('base_model.model.')}.lora_A.weight"
    problems = opened(tmp_path, inside, outside).parts.problems

    assert [problem.partition("take ")[2] for problem in problems] == [f"'{wrapper}.' out of the keys"] * 2


def test_a_folder_of_mlx_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(SourceError, match=r"adapters\.safetensors is how MLX saves adapters"):
        open_adapter(open_local(SourceName.of_adapter("math"), "math", tmp_path), rules=lambda _: None)


FLAGS = (
    "block_share", "coft", "decompose_both", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
    "init_ia3_weights", "lora_bias", "rank_dropout_scale", "save_projection", "use_cayley_neumann", "use_dora",
    "use_effective_conv2d", "use_qalora", "use_rslora",
)  # fmt: skip
NUMBERS = (
    "beta1", "beta2", "d_initial", "deltaT", "eps", "lora_dropout", "module_dropout", "orth_reg_weight",
    "qalora_group_size", "rank_dropout", "target_r", "tfinal", "tinit", "total_step", "vera_dropout",
)  # fmt: skip
MAPPINGS = (
    "alpha_pattern", "arrow_config", "auto_mapping", "corda_config", "eva_config", "kasa_config", "loftq_config",
    "lora_ga_config", "megatron_config", "monteclora_config", "rank_pattern", "runtime_config", "velora_config",
)  # fmt: skip


@pytest.mark.parametrize("key", [*FLAGS, *NUMBERS, *MAPPINGS])
def test_no_flag_number_or_mapping_is_a_text(key: str) -> None:
    with pytest.raises(SourceError, match=f"^x: {key}: expected .* or null, found 'false'$"):
        AdapterConfig.parse(json.dumps({"peft_type": "LORA", key: "false"}), "x")


def test_a_config_may_be_as_large_as_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, f"{MODULE}.lora_A.weight")
    size = (tmp_path / "adapter_config.json").stat().st_size
    monkeypatch.setattr(adapter, "MAX_CONFIG_BYTES", size)
    assert opened(tmp_path, f"{MODULE}.lora_A.weight").tensors

    monkeypatch.setattr(adapter, "MAX_CONFIG_BYTES", size - 1)
    with pytest.raises(SourceError, match=f"has {size} bytes, expected at most {size - 1}"):
        opened(tmp_path, f"{MODULE}.lora_A.weight")
