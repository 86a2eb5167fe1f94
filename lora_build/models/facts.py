"""Facts: what transformers says of a base, as a record that planning reads and that is remembered between runs.

transformers is asked once (`asking`), of a config.json and of the names and shapes of the tensors beside it. It says
what it would say while it loads them: which parameters it would not find, which tensors it has no use for, whose shapes
do not fit; and what it fixes: which parameters share a tensor, and which stay in float32.

    {"problem": "", "may_change": false, "body": "LlamaModel", "prefix": "model", "missing": ["lm_head.weight"],
     "unexpected": [], "mismatched": {"model.norm.weight": "[48], by config.json [64]"}, "tied": {}, "untied": {},
     "float32": {"F16": [], "BF16": []}, "stays": {"F16": [], "BF16": []}}
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Ties:
    """Which parameters of a model share one tensor.

    Attributes:
        tied: parameter to the one whose tensor it uses, as the config stands.
        untied: the same once `tie_word_embeddings` is false.
    """

    tied: Mapping[str, str]
    untied: Mapping[str, str]

    def group(self, parameter: str) -> frozenset[str]:
        """Return all parameters that share the tensor of this one, itself included."""
        root = self.tied.get(parameter, parameter)
        return frozenset({root, *(name for name, source in self.tied.items() if source == root)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What transformers says of a base. `Facts.from_json(f.to_json()) == f`.

    Attributes:
        problem: why it says nothing; the rest is empty then.
        may_change: whether it may say something if it is asked again: it took too long, or a library was missing.
        body: the class of the model without its head; empty where it has none.
        prefix: where in the model that is.
        missing: the parameters that no tensor on disk becomes, those aside that share one or that it does not expect.
        unexpected: the tensors on disk that it has no use for, those aside that it says it ignores.
        mismatched: parameters whose tensors have another shape than config.json says, each with both.
        tied: see `Ties`.
        untied: see `Ties`.
        float32: the tensors on disk that it loads in float32 where F16 or BF16 is asked for, by that dtype.
        stays: the same by our own table of them; `keep_float32`.
        model: what it makes of the tensors; the text of an `in_memory.Model`.
    """

    problem: str = ""
    may_change: bool = False
    body: str = ""
    prefix: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    float32: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stays: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: str = ""

    @property
    def ties(self) -> Ties:
        """Which parameters share one tensor."""
        return Ties(self.tied, self.untied)

    def to_json(self) -> str:
        """Return the record's text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        """Return the record of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            names = {key: tuple(data[key]) for key in ("missing", "unexpected")}
            by_dtype = {key: {dtype: tuple(of) for dtype, of in data[key].items()} for key in ("float32", "stays")}
            return cls(**{**data, **names, **by_dtype})
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"no record of facts: {error}") from error
