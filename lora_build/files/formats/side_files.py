"""The files that lie beside a model's weights: which stay behind and why, which are a tokenizer's.

Everything goes along that has no reason to stay: what a loader may need, nobody can list. The reasons are short texts,
which plan, build and manifest show.
"""

import re

MAX_UNKNOWN_BYTES = 64_000_000

WEIGHTS = "weights in another format"
UNNAMED = "safetensors that no index names"
OTHER_FRAMEWORK = "weights of another framework"
ADAPTER = "a part of an adapter, and none of the model"
TRAINING = "state of a training run"
RESULTS = "results that the merged model has not"
PARAMS = "the config of weights in another format, which servers look for first"
CARD = "the base's model card"
SIGNATURE = "a signature of the base's files"
OURS = "the base's own proof by lora-build"
NAME = "a name that no terminal shows"
LARGE = f"larger than {MAX_UNKNOWN_BYTES // 1_000_000} MB, and nothing known"
CODE = "code that no file of the model names"

_ORDINARY = re.compile(r"model\.safetensors|pytorch_model\.bin", re.IGNORECASE)
_REASONS = (
    (OURS, r"lora-build\.(manifest|survival|provenance)\.json"),
    (ADAPTER, r"adapter_config\.json|adapter_model\..*"),
    (
        TRAINING,
        r"(optimizer|scheduler|scaler)[\w.\-]*\.(pt|pth|bin|pkl|safetensors)|rng_state\w*\.pth|random_states_\d+\.pkl"
        r"|train(er_state|ing_args)\.\w+|trainer_log\.jsonl|events\.out\.tfevents.*|zero_to_fp32\.py|latest|.*\.distcp",
    ),
    (RESULTS, r"(all|train|eval|test|predict)_results\.json"),
    (CARD, r"(readme|model_?card)([._-].*)?"),
    (PARAMS, r"params\.json"),
    (SIGNATURE, r".*\.(sig|sigstore|sigstore\.json)|model\.signature"),
    ("a cache", r".*\.py[co]|thumbs\.db"),
)
_CODES = tuple((why, re.compile(pattern, re.IGNORECASE)) for why, pattern in _REASONS)
_KNOWN = re.compile(r"spk_dict\.pt|language_model/[\w.\-]+")  # voices of Qwen-Omni's talker; pyctcdecode's decoder
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|ggml\w*|llamafile|nemo|engine|plan|exl2|joblib)([._-]?\d+)?"
    r"|.*\.(safetensors|bin|pt|pth)\.index([.\w-]*)\.json|.*\.(gguf|safetensors|bin)[.\-]?(part|split)[\w.\-]*",
    re.IGNORECASE,
)
_OTHER_FRAMEWORK = re.compile(
    r".*\.(h5|hdf5|keras|msgpack|onnx|onnx[_.]data.*|tflite|pb|pbtxt|ot|mar|pdparams|pdiparams|pdmodel|pdopt|mlmodel|params)"
    r"|.*\.(h5|msgpack)\.index\.json|openvino.*\.xml|.*\.ckpt\.\w+|.*\.ckpt-\d+.*|.*\.data-\d+-of-\d+|checkpoint"
    r"|(weights|model|mlx)[\w.\-]*\.npz",
    re.IGNORECASE,
)

_TOKENIZER_FILE = re.compile(
    r"tokenizer[\w.\-]*|added_tokens\.json|special_tokens_map\.json|vocab[\w.\-]*|[\w\-]*_vocab\.(json|txt)"
    r"|merges[\w.\-]*\.txt|bpe[\w.\-]*|dict[\w.\-]*\.(txt|json)|[\w.\-]+\.(model|spm|codes|tiktoken|tokenizer|bpe|vocab)"
    r"|tekken[\w.\-]*\.json|normalizer\.json|byte_maps\.json|emoji\.json|word_(shape|pronunciation)\.json"
    r"|chat_template\.(jinja|json)|(additional_)?chat_templates/[\w.\-]+\.jinja"
)

_MODEL_CODE = re.compile(
    r"((fast_|slow_)?tokenization|modeling|modelling|configuration|processing|(image|video|audio)_processing"
    r"|feature_extraction|generation)_\w+\.py"
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer, its chat templates included; its code does not."""
    return bool(_TOKENIZER_FILE.fullmatch(name)) and not name.endswith(".py") and not _is_weights(name)


def is_model_code(name: str) -> bool:
    """Whether a file of code bears a name as transformers gives them, such as `tokenization_x.py`."""
    return bool(_MODEL_CODE.fullmatch(name))


def why_left_out(name: str, size_bytes: int, *, weights: bool = False) -> str | None:
    """Return why a file stays behind, None where it goes along.

    Args:
        name: below its folder; the reasons look at the last part.
        size_bytes: its size.
        weights: whether its folder is a module's, whose own weights go along.
    """
    last = name.rpartition("/")[2]
    if not name.isprintable():
        return NAME
    if reason := next((why for why, pattern in _CODES if pattern.fullmatch(last)), None):
        return reason
    if _KNOWN.fullmatch(name) or (weights and _ORDINARY.fullmatch(last)) or is_tokenizer_file(last):
        return None
    if _OTHER_FRAMEWORK.fullmatch(last):
        return OTHER_FRAMEWORK
    if _WEIGHTS.fullmatch(last):
        return UNNAMED if last.lower().endswith(".safetensors") else WEIGHTS
    return LARGE if size_bytes > MAX_UNKNOWN_BYTES else None


def _is_weights(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name)) or bool(_OTHER_FRAMEWORK.fullmatch(name))
