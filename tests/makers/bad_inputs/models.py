"""Bad bases and adapters: configs that no build can follow, tensors that do not fit, values that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from makers.bad_inputs import (
    ADAPTER_CONFIG,
    BASE_CONFIG,
    FIRST,
    MODULES,
    RECIPE,
    Bad,
    Change,
    adapter_config,
    adapter_tensors,
    adapter_weights,
    added,
    bad,
    base_config,
    base_tensors,
    base_weights,
    both,
    recipe,
    remove,
    safetensors,
    values,
    write,
)

LORA_B = f"{FIRST}.lora_B.weight"
LORA_A = f"{FIRST}.lora_A.weight"


def plain(**keys: Any) -> str:
    """Return the adapter's config without some keys, given as None."""
    return json.dumps({key: value for key, value in ADAPTER_CONFIG.items() if key not in keys})


def spoilt(place: tuple[int, int], value: float, tensor: str = LORA_B, shape: tuple[int, int] = (8, 2)) -> Change:
    """Return the placing of a value in a factor of the adapter."""
    numbers = np.full(shape, 0.1, np.float32)
    numbers[place] = value
    return adapter_weights(lambda t: t.update({tensor: ("F32", [*shape], numbers.tobytes())}))


def embedding(**config: Any) -> Change:
    """Return an adapter on the embedding of a base whose head is tied to it, with a config that may be odd."""

    def change(project: Path) -> None:
        tensors = base_tensors() | {"model.embed_tokens.weight": ("BF16", [16, 6], values(3, 16, 6, dtype="BF16"))}
        (project / "base/model.safetensors").write_bytes(safetensors(tensors))
        name = "base_model.model.model.embed_tokens.lora_embedding"
        factors = {f"{name}_A": ("F32", [2, 16], values(1, 2, 16)), f"{name}_B": ("F32", [6, 2], values(2, 6, 2))}
        (project / "math/adapter_model.safetensors").write_bytes(safetensors(adapter_tensors() | factors))
        targets = {"target_modules": ["q_proj", "embed_tokens"]}
        (project / "math/adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | targets))
        sizes = {"hidden_size": 6, "vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        more = {"num_key_value_heads": 2, "intermediate_size": 8, "head_dim": 4, "tie_word_embeddings": True}
        (project / "base/config.json").write_text(json.dumps(BASE_CONFIG | sizes | more | config))

    return change


def magnitudes(tensors: Any) -> None:
    """Add the magnitudes of DoRA."""
    for module in MODULES:
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = ("F32", [8], values(1, 8))


TWICE = '{"peft_type":"LORA","r":2,"lora_alpha":400,"r":2,"lora_alpha":4,"target_modules":["q_proj"],"bias":"none"}'
FOREIGN = {LORA_A: ("F32", [2, 16], values(0, 2, 16))}
EVIL = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
CODE = "open('pwned', 'w')\nclass C: pass\n"

ROWS: dict[str, Bad] = {
    "no adapter config": bad(remove("math/adapter_config.json"), "adapters.math", "adapter_config.json"),
    "an adapter config that is not JSON": bad(adapter_config("{nope"), "adapters.math", "adapter_config.json"),
    "an adapter config that is a list": bad(adapter_config("[]"), "adapters.math", "adapter_config.json"),
    "an adapter config nested 100,000 deep": bad(adapter_config('{"a":' * 100_000), "adapters.math", "adapter_config.json"),
    "an adapter config in Latin-1": bad(write("math/adapter_config.json", b'{"x":"\xe9"}'), "adapters.math", "adapter_config.json"),
    "an adapter config with a key twice": bad(adapter_config(TWICE), "adapters.math", "adapter_config.json"),
    **{
        f"peft_type {kind!r}": bad(adapter_config(peft_type=kind), "adapters.math", "peft_type")
        for kind in ("PROMPT_TUNING", "NOPE", "lora", "\x1b[31mX", 5, None, "")
    },
    **{f"r: {r!r}": bad(adapter_config(r=r), "adapters.math", "r") for r in (0, -1, 2**31, "16", 16.5, None, True)},
    "no r": bad(adapter_config(plain(r=None)), "adapters.math", "r"),
    **{
        f"lora_alpha: {alpha!r}": bad(adapter_config(lora_alpha=alpha), "adapters.math", "lora_alpha")
        for alpha in (None, "4", [], True)
    },
    "lora_alpha: NaN": bad(adapter_config(lora_alpha=float("nan")), "adapters.math", "lora_alpha"),
    "lora_alpha: 0": bad(adapter_config(lora_alpha=0), "lora_alpha"),
    "no lora_alpha": bad(adapter_config(plain(lora_alpha=None)), "adapters.math", "lora_alpha"),
    "use_rslora in text": bad(adapter_config(use_rslora="false"), "adapters.math", "use_rslora"),
    "a rank pattern that is no pattern": bad(adapter_config(rank_pattern={"(": 2}), "adapters.math", "rank_pattern"),
    "rank patterns that are a list": bad(adapter_config(rank_pattern=[1]), "adapters.math", "rank_pattern"),
    "a rank pattern that takes for ever": bad(adapter_config(rank_pattern={"(?=(([a-z.0-9_]+)+!))x": 2}), "adapters.math", "rank_pattern"),
    "an alpha pattern that takes for ever": bad(adapter_config(alpha_pattern={"(?=(([a-z.0-9_]+)+!))x": 2}), "adapters.math", "alpha_pattern"),
    "no base config": bad(remove("base/config.json"), "base", "config.json"),
    "a base config that is not JSON": bad(base_config("{nope"), "base", "config.json"),
    "a base config with a byte order mark": bad(base_config("\ufeff" + json.dumps(BASE_CONFIG)), "base", "config.json"),
    "a model_type that is a list": bad(base_config(model_type=["llama"]), "base", "model_type"),
    "10 million layers": bad(embedding(num_hidden_layers=10**7), "config.json"),
    "a negative vocabulary": bad(embedding(num_hidden_layers=-1, vocab_size=-5), "config.json"),
    "a hidden size of 2^62": bad(embedding(hidden_size=2**62), "config.json", asks=True),
    "a hidden size in text": bad(embedding(hidden_size="six"), "config.json", asks=True),
    "an architecture that names a function of Python's": bad(embedding(architectures=["os.system"]), "config.json", asks=True),
    "code in the base and an adapter on the embedding": bad(both(embedding(**EVIL, architectures=["EvilForCausalLM"]), write("base/evil.py", CODE)), "config.json", asks=True),
    "a rank that is not the factors'": bad(adapter_config(r=4), "adapters.math", "r"),
    "lora_A without lora_B": bad(adapter_weights(lambda t: t.pop(LORA_B)), "adapters.math", "incomplete"),
    "lora_B without lora_A": bad(adapter_weights(lambda t: t.pop(LORA_A)), "adapters.math", "incomplete"),
    "a module that the base lacks": bad(
        adapter_weights(lambda t: [t.update({n.replace("layers.0", "layers.9"): t.pop(n)}) for n in (LORA_A, LORA_B)]),
        "adapters.math", "layers.9", asks=True),
    "an adapter of another base": bad(both(adapter_config(base_model_name_or_path="acme/other"), adapter_weights(lambda t: t.update(FOREIGN))), "adapters.math", "was it trained on another base?"),
    "an adapter of a base with an evil name": bad(both(adapter_config(base_model_name_or_path="\x1b]0;pwned\x07\x1b[2J\nlora-build: ok"), adapter_weights(lambda t: t.update(FOREIGN))), "adapters.math"),
    "a tensor that nothing uses": bad(adapter_weights(lambda t: t.update({f"{FIRST}.lora_Z.weight": ("F32", [1], b"\0" * 4)})), "adapters.math", "lora_Z"),
    "a tensor without a prefix": bad(adapter_weights(lambda t: t.update({"foo": ("F32", [1], b"\0" * 4)})), "adapters.math", "foo"),
    "a saved module that the base lacks": bad(adapter_weights(lambda t: t.update({"base_model.model.score.weight": ("F32", [2, 6], values(1, 2, 6))})), "adapters.math", "score", asks=True),
    "tied embeddings, error": bad(both(embedding(), added("tied_embeddings: error\n")), "tied", asks=True),
    "NaN in lora_B": bad(spoilt((2, 0), float("nan")), f"{MODULES[0]}.weight[2, 0]", "not finite", "math", code=1),
    "infinity in lora_B": bad(spoilt((2, 0), float("inf")), f"{MODULES[0]}.weight[2, 0]", "not finite", "math", code=1),
    "NaN in lora_A": bad(spoilt((0, 0), float("nan"), LORA_A, (2, 6)), MODULES[0], "not finite", code=1),
    "NaN in a weight of the base": bad(base_weights(lambda t: t.update({f"{MODULES[0]}.weight": ("BF16", [8, 6], b"\xc0\x7f" * 48)})), MODULES[0], "not finite", code=1),
    "NaN in a copied tensor of the base": bad(base_weights(lambda t: t.update({"model.norm.weight": ("BF16", [6], b"\xc0\x7f" * 6)})), "model.norm.weight", "not finite", code=1),
    "a sum too large for float16": bad(both(spoilt((0, 0), 1e8), added("dtype: float16\n")), MODULES[0], "F16", code=1),
    "a base value too large for float16": bad(both(base_weights(lambda t: t.update({"model.norm.weight": ("BF16", [6], b"\x80\x7e" * 6)})), added("dtype: float16\n")), "model.norm.weight", code=1),
    "a bias by lora_bias where the base has none": bad(both(adapter_config(lora_bias=True), adapter_weights(lambda t: t.update({f"{FIRST}.lora_B.bias": ("F32", [8], values(1, 8))}))), "adapters.math", "bias", asks=True),
    "DoRA without magnitudes": bad(adapter_config(use_dora=True), "adapters.math", "magnitude"),
    "magnitudes without DoRA": bad(adapter_weights(magnitudes), "adapters.math", "magnitude"),
    "a base quantised by bitsandbytes": bad(base_config(quantization_config={"quant_method": "bitsandbytes"}), "base", "quant"),
    "a base of GPTQ's tensors": bad(base_weights(lambda t: (t.pop(f"{MODULES[0]}.weight"), t.update({f"{MODULES[0]}.qweight": ("I32", [1, 8], b"\0" * 32), f"{MODULES[0]}.scales": ("F16", [1, 8], b"\0" * 16)}))), MODULES[0], asks=True),
    "a target in int8": bad(base_weights(lambda t: t.update({f"{MODULES[0]}.weight": ("I8", [8, 6], b"\0" * 48)})), MODULES[0], "I8"),
    "a target in float8": bad(base_weights(lambda t: t.update({f"{MODULES[0]}.weight": ("F8_E4M3", [8, 6], b"\0" * 48)})), MODULES[0], "F8_E4M3"),
    "factors in int8": bad(adapter_weights(lambda t: t.update({LORA_A: ("I8", [2, 6], b"\1" * 12)})), "adapters.math", "I8"),
    "nothing to do": bad(recipe(RECIPE.replace("./math", "{source: ./math, weight: 0}")), "adapters", "weight 0"),
}  # fmt: skip
