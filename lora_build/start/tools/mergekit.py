"""mergekit's YAML, where it merges adapters into one base: models that are `base+lora`.

    merge_method: task_arithmetic            # base + lambda · Σ weight · ΔW
    base_model: org/base
    models:
      - {model: org/base@v1+acme/math@v2, parameters: {weight: 0.5}}
    dtype: bfloat16

    merge_method: linear                     # Σ weight · (base + ΔW), by default divided by Σ weight

Both are a sum of adapters, so a recipe says them; `passthrough` of one model is it itself. Methods that choose among
values are not taken over: what mergekit's parameters mean is not what those of `combine` do. Merges of whole models no
recipe says. Keys as in its config.py, common.py (ModelReference), merge_methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.guesses import meant_value
from lora_build.recipe.shorthand import names_of
from lora_build.start.inputs import Reference
from lora_build.start.tools.names import unique
from lora_build.start.tools.paths import Paths
from lora_build.start.tools.taken import Taken, left_of

_TAKEN = ("merge_method", "base_model", "models", "dtype", "out_dtype", "parameters", "tokenizer_source")
_WHY = {
    "tokenizer": "a tokenizer goes along as a whole: the base's, or an adapter's (tokenizer: NAME)",
    "chat_template": "a chat template goes along with its tokenizer",
    "name": "a recipe is called after its file",
}
_OWN = ("ties", "dare_linear", "dare_ties", "slerp")  # which a recipe has too, with parameters of its own
_OF_A_SUM = ("weight", "normalize", "lambda")
_NO_MATTER = {"int8_mask": "nothing is masked", "density": "all values of an update are merged",
              "rescale": "nothing is left out that would be made up for"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A model of the file: a base, maybe with an adapter on it, and its weight."""

    base: Reference
    adapter: Reference | None
    weight: float


def is_of(data: Mapping[str, Any]) -> bool:
    """Whether a file is one of mergekit's."""
    return "merge_method" in data and not data.keys().isdisjoint(("models", "slices", "modules"))


def read(data: Mapping[str, Any], paths: Paths) -> Taken:
    """Return what a recipe takes of a file.

    Raises:
        RecipeError: it merges whole models, or in a way that is no sum.
    """
    method = data["merge_method"]
    if method not in ("linear", "task_arithmetic", "passthrough"):
        own = f"; a recipe's own is combine: {method}, whose weights and densities docs/combining.md says"
        raise RecipeError(
            f"merge_method: {method!r:.80} is no sum of updates, which can be taken over; linear, task_arithmetic and "
            f"passthrough of one model are{own if method in _OWN else ''}"
        )
    if "models" not in data:
        raise RecipeError("slices, modules: a recipe keeps every layer of the base where it is; expected models")
    models = _models(data, paths)
    base = _base(data, models, paths)
    weights = _weights(data, models)
    merged = [(model, weight) for model, weight in zip(models, weights, strict=True) if model.adapter is not None]
    if not merged:
        raise RecipeError("models: none of them is base+lora, so there is no adapter to merge")
    names = unique(names_of([model.adapter.source for model, _ in merged if model.adapter]))
    adapters = {
        name: {"source": model.adapter, "weight": weight} for name, (model, weight) in zip(names, merged, strict=True)
    }
    keys: dict[str, Any] = {"base": base, "adapters": adapters}
    left = left_of(data, _TAKEN, _WHY, "no recipe says such a thing")
    if (dtype := data.get("out_dtype") or data.get("dtype")) is not None:
        if (known := meant_value("dtype", dtype)) is None:
            raise RecipeError(f"dtype: {dtype!r:.80} is none that a build writes: float32, bfloat16, float16")
        keys["dtype"] = known
    keys |= _tokenizer(data, base, adapters, paths, left)
    left |= {f"parameters.{key}": why for key, why in _NO_MATTER.items() if key in _all_parameters(data)}
    return Taken(tool="mergekit", keys=keys, left=left, notes=_notes(data))


def _models(data: Mapping[str, Any], paths: Paths) -> list[_Model]:
    listed = data["models"]
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) and "model" in item for item in listed):
        raise RecipeError("models: expected a list of models, each {model: BASE+LORA, parameters: {weight: 0.5}}")
    found = []
    for index, item in enumerate(listed):
        where = f"models[{index}]"
        base, adapter = _reference(where, item["model"], paths)
        parameters = {**(data.get("parameters") or {}), **(item.get("parameters") or {})}
        for key in parameters:
            if key not in (*_OF_A_SUM, *_NO_MATTER):
                raise RecipeError(f"{where}.parameters.{key}: no recipe says such a thing")
        weight = (
            1.0
            if data["merge_method"] == "passthrough"
            else _number(f"{where}.parameters.weight", parameters.get("weight"))
        )
        found.append(_Model(base=base, adapter=adapter, weight=weight))
    return found


def _reference(where: str, written: object, paths: Paths) -> tuple[Reference, Reference | None]:
    """Return the base and the adapter of `base@revision+lora@revision`, or of the mapping that says the same."""
    if isinstance(written, str):
        base, plus, lora = written.partition("+")
        parts = [_part(text) for text in ((base, lora) if plus else (base,))]
    elif isinstance(written, Mapping):
        parts = [_part(written[key]) for key in ("model", "lora") if written.get(key)]
    else:
        raise RecipeError(f"{where}.model: expected BASE+LORA, found {written!r:.80}")
    references = [paths.source(f"{where}.model", path, revision) for path, revision in parts]
    if not references:
        raise RecipeError(f"{where}.model: names no model")
    return references[0], references[1] if len(references) > 1 else None


def _part(written: object) -> tuple[object, object]:
    if isinstance(written, Mapping):
        return written.get("path"), written.get("revision")
    path, at, revision = str(written).partition("@")
    return path, revision if at else None


def _base(data: Mapping[str, Any], models: list[_Model], paths: Paths) -> Reference:
    """Return the one base of all models."""
    bases = {model.base.text: model.base for model in models}
    if data.get("base_model") is not None:
        base, adapter = _reference("base_model", data["base_model"], paths)
        if adapter is not None:
            raise RecipeError("base_model: is base+lora; a recipe has a base without an adapter")
        bases.setdefault(base.text, base)
    elif data["merge_method"] == "task_arithmetic":
        raise RecipeError("base_model: is not there, and task_arithmetic begins with it")
    if len(bases) > 1:
        raise RecipeError(f"models: they have several bases ({', '.join(bases)}); a recipe has one, and adapters on it")
    return next(iter(bases.values()))


def _weights(data: Mapping[str, Any], models: list[_Model]) -> list[float]:
    """Return what each adapter's update is multiplied by in the whole."""
    parameters = data.get("parameters") or {}
    method, total = data["merge_method"], sum(model.weight for model in models)
    if method == "passthrough":
        if len(models) > 1:
            raise RecipeError("models: passthrough takes one model")
        return [1.0]
    normalised = parameters.get("normalize", method == "linear")
    if not isinstance(normalised, bool):
        raise RecipeError(f"parameters.normalize: expected true or false, found {normalised!r:.80}")
    if method == "linear":
        if normalised and total:
            return [model.weight / total for model in models]
        if abs(total - 1) > 1e-9:
            raise RecipeError(f"models: their weights add up to {total:g}, so the base would be multiplied too")
        return [model.weight for model in models]
    factor = _number("parameters.lambda", parameters.get("lambda", 1.0))
    divisor = sum(model.weight for model in models if model.adapter is not None) if normalised else 1.0
    return [model.weight * factor / (divisor or 1.0) for model in models]


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = (
            "a number of its own for some layers or tensors" if isinstance(value, list | Mapping) else f"{value!r:.80}"
        )
        raise RecipeError(
            f"{where}: expected one number, found {what}; weights by module and layer are written by hand"
        )
    return float(value)


def _tokenizer(
    data: Mapping[str, Any], base: Reference, adapters: Mapping[str, Any], paths: Paths, left: dict[str, str]
) -> dict[str, str]:
    """Return the key `tokenizer` for what the file says, or why it is left."""
    written = data.get("tokenizer_source")
    if written is None:
        return {}
    if written == "base":
        return {"tokenizer": "base"}
    if written != "union":
        of_base, adapter = _reference("tokenizer_source", written, paths)
        named = (adapter or of_base).text
        if named == base.text:
            return {"tokenizer": "base"}
        if names := [name for name, spec in adapters.items() if spec["source"].text == named]:
            return {"tokenizer": names[0]}
    left["tokenizer_source"] = "a tokenizer goes along as a whole: the base's, or an adapter's (tokenizer: NAME)"
    return {}


def _all_parameters(data: Mapping[str, Any]) -> set[str]:
    every = [data.get("parameters"), *(item.get("parameters") for item in data["models"])]
    return {str(key) for parameters in every if isinstance(parameters, Mapping) for key in parameters}


def _notes(data: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = data.get("parameters") or {}
    if data["merge_method"] == "linear" and parameters.get("normalize", True):
        return ("weights are divided by their sum, as merge_method: linear does",)
    return ()
