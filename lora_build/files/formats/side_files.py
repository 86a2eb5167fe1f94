"""The files that go along with a model's weights: which are a tokenizer's, and which stay behind."""

import re

_SIDE_FILE = re.compile(
    r"generation_config\.json|tokenizer[\w.\-]*|added_tokens\.json|special_tokens_map\.json|vocab[\w.\-]*|merges\.txt"
    r"|[\w\-]*\.tiktoken|(sentencepiece[\w.\-]*|spiece)\.model|chat_template\.(jinja|json)|chat_templates/[\w.\-]+\.jinja"
    r"|additional_chat_templates/[\w.\-]+\.jinja|(pre|video_pre)?processor_config\.json|preprocessor_config\.json"
    r"|image_processor_config\.json|(LICENSE|NOTICE|USE_POLICY|Notice)[\w.\-]*"
)


_TOKENIZER_FILE = re.compile(
    r"tokenizer[\w.\-]*|added_tokens\.json|special_tokens_map\.json|vocab[\w.\-]*|merges\.txt|[\w\-]*\.tiktoken"
    r"|(sentencepiece[\w.\-]*|spiece)\.model|chat_template\.(jinja|json)"
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer, its chat template included."""
    return bool(_TOKENIZER_FILE.fullmatch(name)) and not name.endswith((".safetensors", ".py"))


def is_side_file(name: str, *, has_code: bool) -> bool:
    """Whether a file of the base goes along unchanged: tokenizer, templates, generation config, licence.

    Code (`*.py`) goes along only where config.json refers to it (`has_code`); it is copied, never imported.
    """
    return bool(_SIDE_FILE.fullmatch(name)) or (name.endswith(".py") and "/" not in name and has_code)
