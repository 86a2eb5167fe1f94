"""The tokenizer of a build, in a process of its own with bounded time and memory: it may be anybody's program.

So may a chat template, which transformers runs in a sandbox; what it takes in time and memory, the process bounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import SourceError
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.forward.apart import ApartError, done_apart

_AT_ONCE = 2_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokenizer of a folder."""

    folder: Path

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of texts, with those that the tokenizer puts around a text only if `special`."""
        return self._each(texts, lambda tokenizer, text: tokenizer(text, add_special_tokens=special)["input_ids"])

    def encode_chat(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts as a user's messages to which an answer begins, by the build's chat template.

        Raises:
            SourceError: it has none, or it does not take them.
        """

        def encode(tokenizer: Any, prompt: str) -> list[int]:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        return self._each(prompts, encode)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of ids, special tokens left out."""
        return self._each(ids, lambda tokenizer, of: tokenizer.decode(of, skip_special_tokens=True))

    def end(self) -> list[int]:
        """Return the id that ends a text, if there is one."""
        return self._each([None], lambda tokenizer, _: tokenizer.eos_token_id)[:1]

    def _each(self, items: Sequence[Any], work: Callable[[Any, Any], Any]) -> list[Any]:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # once, for all forks

        assert PreTrainedTokenizerFast is not None

        def done(part: Sequence[Any]) -> dict[str, Any]:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
                return {"done": [work(tokenizer, item) for item in part]}
            except FAULTS as error:
                return {"why": (str(error) or type(error).__name__).splitlines()[0]}
            except Exception as error:  # noqa: BLE001  # a template raises what it likes
                return {"why": f"{type(error).__name__}: {error}".splitlines()[0]}

        found: list[Any] = []
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            try:
                with quiet():
                    answer = done_apart(lambda part=part: done(part))  # type: ignore[misc]
            except ApartError as error:
                raise SourceError(f"{self.folder.name}: its tokenizer cannot read the data: {error}") from error
            if "why" in answer:
                raise SourceError(f"{self.folder.name}: its tokenizer cannot read the data: {answer['why'][:300]}")
            found += answer["done"]
        return found
