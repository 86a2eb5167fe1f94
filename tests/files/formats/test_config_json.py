"""config.json: what is asked of it has one answer, nested configs included."""

import json

import pytest

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig


def test_a_config_is_parsed_once_and_changed_in_place() -> None:
    config = ModelConfig.parse('{\n  "model_type": "llama",\n  "vocab_size" : 8\n}\n', "base/config.json")
    changed = config.with_changes({"vocab_size": 10}).with_changes({"dtype": "bfloat16"})

    assert (config.vocab_size, changed.vocab_size) == (8, 10)
    assert changed.changes == {"vocab_size": 10, "dtype": "bfloat16"}
    assert changed.to_bytes() == b'{\n  "model_type": "llama",\n  "vocab_size" : 10,\n  "dtype": "bfloat16"\n}\n'
    assert config.to_bytes().decode() == config.text


def test_what_is_no_object_is_refused_by_its_name() -> None:
    with pytest.raises(SourceError, match=r"^base/config\.json: is not a JSON object"):
        ModelConfig.parse("[]", "base/config.json")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({"vocab_size": 8}, 8),
        ({"vocab_size": 8, "text_config": {"vocab_size": 9}}, 8),
        ({"text_config": {"vocab_size": 9}}, 9),
        ({"decoder": {"vocab_size": 9}}, None),
        ({"vocab_size": "many"}, None),
        ({"text_config": "llama"}, None),
    ],
)
def test_the_number_of_tokens_is_its_own_or_the_text_models(data: dict, size: int | None) -> None:
    config = ModelConfig.of(data)

    assert config.vocab_size == size
    assert config.with_changes(config.vocab_size_changes(16)).vocab_size == 16


def test_every_part_may_have_an_embedding() -> None:
    config = ModelConfig.of({"vocab_size": 8, "decoder": {"vocab_size": 9}, "vision_config": {"hidden_size": 4}})

    assert config.vocab_sizes == {8, 9}


def test_untying_reaches_each_config_that_ties() -> None:
    data = {"text_config": {"hidden_size": 8}, "vision_config": {}, "decoder": {"tie_word_embeddings": True}}
    config = ModelConfig.of(data)

    assert config.untying_changes() == {
        "tie_word_embeddings": False,
        "text_config": {"hidden_size": 8, "tie_word_embeddings": False},
        "decoder": {"tie_word_embeddings": False},
    }
    assert config.may_tie_embeddings
    assert not config.with_changes(config.untying_changes()).may_tie_embeddings


def test_a_dtype_is_set_wherever_it_is_named_and_named_where_it_is_not() -> None:
    inner = {"vision_config": {"dtype": "float32", "encoder_config": {"torch_dtype": "float32"}}}
    changed = {"vision_config": {"dtype": "bfloat16", "encoder_config": {"torch_dtype": "bfloat16"}}}

    assert ModelConfig.of(inner).dtype_changes("bfloat16") == {"dtype": "bfloat16"} | changed
    assert ModelConfig.of({"torch_dtype": "float32"}).dtype_changes("bfloat16") == {"torch_dtype": "bfloat16"}


def test_special_tokens_are_found_in_every_part() -> None:
    data = {"pad_token_id": 0, "eos_token_id": [1, 2], "text_config": {"image_token_index": 3}, "bos_token_id": None}

    assert ModelConfig.of(data).special_token_ids == {0, 1, 2, 3}


def test_text_that_was_read_is_what_it_says() -> None:
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "auto_map": {},
        "n_layer": 3,
        "num_experts": 4,
    }
    config = ModelConfig.parse(json.dumps(data))

    assert (config.architectures, config.model_type, config.has_code) == (("LlamaForCausalLM",), "llama", True)
    assert (config.layer_counts, config.expert_counts, config.is_quantized) == ({"n_layer": 3}, (4,), False)


@pytest.mark.parametrize("found", [["llama"], 3, None])
def test_a_model_type_that_is_no_text_is_none(found: object) -> None:
    assert ModelConfig.of({"model_type": found}).model_type is None
