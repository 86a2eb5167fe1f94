"""Everything goes along that has no reason to stay; every reason is one that a user can check."""

import importlib.util
import re
from pathlib import Path

import pytest

from lora_build.files.formats.side_files import MAX_UNKNOWN_BYTES, is_tokenizer_file, why_left_out

GOES_ALONG = (
    "generation_config.json", "spm.model", "source.spm", "target.spm", "tokenizer.model.v3", "tekken.json", "tiktoken.model",
    "qwen.tiktoken", "hf_quant_config.json", "SYSTEM_PROMPT.txt", "LICENCE", "LICENSE.txt", "USE_POLICY.md", "NOTICE",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "preprocessor_config.json",
    "processor_config.json", "audio_tokenizer_config.json", "mel_filters.npz", "spk_dict.pt", "dict.de.json", "1_Pooling/config.json",
    "cache_autogptq_cuda_256.cpp", "language_model/5gram.bin", "alphabet.json", "decision_template.jinja", "special_tokens_map.json",
)  # fmt: skip
STAYS = (
    "consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "model.safetensors.index.fp16.json", "consolidated.00.pth", "model.pt", "model.ckpt", "model-Q4_K_M.gguf", "ggml-model.bin",
    "tf_model.h5", "flax_model.msgpack", "flax_model.msgpack.index.json", "model.onnx", "model.onnx_data", "rust_model.ot",
    "model.tflite", "saved_model.pb", "model.ckpt-1000.data-00000-of-00001", "openvino_model.xml", "weights.npz",
    "model.nemo", "model_state.pdparams", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "rng_state.pth", "scaler.pt",
    "trainer_state.json", "training_args.bin", "events.out.tfevents.1700000000.host.1.0", "random_states_0.pkl",
    "all_results.json", "README.md", "README_zh.md", "readme.txt", "modelcard.json", "MODEL_CARD.md", "params.json",
    "adapter_config.json", "adapter_model.safetensors", "lora-build.manifest.json", "lora-build.provenance.json",
    "model.sig", "model.sigstore.json", "tokenizer-e351c8d8-checkpoint125.safetensors", "a\x1b[31mb", "a\nb", "a\udcffb",
)  # fmt: skip


@pytest.mark.parametrize("name", GOES_ALONG)
def test_what_a_loader_may_need_goes_along(name: str) -> None:
    assert why_left_out(name, 1000) is None


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_behind_has_a_reason(name: str) -> None:
    assert why_left_out(name, 1000)


def test_a_large_file_goes_along_only_if_it_is_known() -> None:
    large = MAX_UNKNOWN_BYTES + 1

    assert why_left_out("voices.dat", large) == "larger than 64 MB, and nothing known"
    assert why_left_out("voices.dat", MAX_UNKNOWN_BYTES) is None
    assert [why_left_out(name, large) for name in ("tokenizer.json", "spiece.model", "tekken.json", "vocab.txt")] == [
        None
    ] * 4


def test_a_modules_own_weights_go_along_and_nobody_elses() -> None:
    assert why_left_out("2_Dense/model.safetensors", 10, weights=True) is None
    assert why_left_out("2_Dense/pytorch_model.bin", 10, weights=True) is None
    assert why_left_out("2_Dense/optimizer.pt", 10, weights=True)
    assert why_left_out("2_Dense/model.onnx", 10, weights=True)


def declared() -> dict[str, set[str]]:
    """Return the files that the tokenizers of the installed transformers say they have, by model."""
    (root,) = importlib.util.find_spec("transformers").submodule_search_locations
    found = {}
    for path in Path(root).glob("models/*/tokenization_*.py"):
        for names in re.findall(r"VOCAB_FILES_NAMES[^=\n]*= (\{.*?\})", path.read_text(), re.DOTALL):
            found.setdefault(path.parent.name, set()).update(re.findall(r':\s*"([^"]+)"', names))
    return found


def test_every_file_that_a_tokenizer_of_transformers_declares_goes_along_as_its_own() -> None:
    by_model = declared()
    names = sorted({name for files in by_model.values() for name in files})

    assert len(by_model) > 60
    assert len(names) >= 25
    assert [name for name in names if why_left_out(name, MAX_UNKNOWN_BYTES + 1) or not is_tokenizer_file(name)] == []
