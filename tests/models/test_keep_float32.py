"""The table of what must keep its dtype is that of the transformers that it was made of."""

import json
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import FAULTS
from lora_build.models.keep_float32 import kept_by_table, matching
from makers import keep_float32

BIAS = ("e_score_correction_bias",)


def kept(**config: Any) -> Any:
    """Return what a config's model keeps, by the table."""
    return kept_by_table(ModelConfig.of(config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, {"F16": (), "BF16": ()}),
        ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, {"F16": BIAS, "BF16": BIAS}),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, {"F16": ("wo",), "BF16": ()}),
        ({"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": {}},
         {"F16": BIAS, "BF16": BIAS}),
        ({"model_type": "llava", "text_config": {"model_type": "deepseek_v3"}}, {"F16": BIAS, "BF16": BIAS}),
        ({"architectures": ["Nemotron3_5TranscribeForConditionalGeneration"], "model_type": "nemo_speechlm"},
         {"F16": ("audio_tower", "multi_modal_projector"), "BF16": ("audio_tower", "multi_modal_projector")}),
        ({"architectures": ["UnheardForCausalLM"], "model_type": "unheard"}, None),
        ({"model_type": "llava", "text_config": {"model_type": "unheard"}}, None),
    ],
)  # fmt: skip
def test_a_class_keeps_what_it_and_its_parts_keep(config: dict[str, Any], expected: Any) -> None:
    assert kept(**config) == expected


def test_a_glob_is_looked_for_anywhere_in_a_path() -> None:
    names = ["a.wo.weight", "a.wi.weight", "x.mlp.0.gate"]

    assert list(matching(names, ["wo", "mlp.*.gate"])) == ["a.wo.weight", "x.mlp.0.gate"]
    assert list(matching(names, [])) == []


@pytest.mark.parametrize("model_class", [transformers.T5ForConditionalGeneration, transformers.GptOssForCausalLM])
def test_the_table_says_what_the_installed_class_says(model_class: Any) -> None:
    table = json.loads(keep_float32.TABLE.read_text())

    assert table["transformers"] == transformers.__version__
    assert table["classes"][model_class.__name__] == keep_float32.globs(model_class)


@pytest.mark.long  # it imports every model of transformers
def test_the_table_is_that_of_the_installed_transformers() -> None:
    assert keep_float32.TABLE.read_text() == keep_float32.text()


# heads and wrappers of others, and two of convolutions: none has a config that an adapter is trained on
STATE_NO_WIDTH = {"sapiens2_head", "timm_wrapper", "uvdoc", "uvdoc_backbone"}


@pytest.mark.long  # it makes every config of transformers
def test_every_config_of_transformers_states_how_wide_its_model_is() -> None:
    without = set()
    for model_type in CONFIG_MAPPING:
        try:
            data = CONFIG_MAPPING[model_type]().to_diff_dict()
        except (*FAULTS, StrictDataclassError):  # it must be told something
            continue
        if not ModelConfig.of(data).states_width:
            without.add(model_type)
    assert without == STATE_NO_WIDTH
