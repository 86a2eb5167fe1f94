"""Whether an adapter's file holds factors of modules that its config does not target, held to peft's own rule."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

import lora_build
from lora_build.errors import PlanError
from lora_build.files.formats.adapter import Adapter, AdapterParts
from lora_build.files.formats.adapter_config import AdapterConfig
from lora_build.methods.interface import methods
from lora_build.planning.targets import config_problems
from makers import default_targets, small

MODULES = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.10.mlp.up_proj", "h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "lm_head", "up_proj",
    "vision_tower.blocks.1.layers.0.q_proj",
)  # fmt: skip
NAMES = (
    "q_proj",
    "up_proj",
    "attn.c_attn",
    "lm_head",
    "proj",
    "layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
)
PATTERNS = (
    r".*\.(q|up)_proj", r"model\.layers\.\d+\..*", "q_proj", "all-linear", r"^(?!vision).*q_proj$", r".*(lm_head|c_attn)",
)  # fmt: skip


def problems(*modules: str, model_type: str | None = None, **config: Any) -> list[str]:
    data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config
    parsed = AdapterConfig.parse(json.dumps(data))
    parts = AdapterParts(factors={module: {} for module in modules})
    adapter = Adapter(name="math", weight=1.0, config=parsed, tensors={}, parts=parts)
    return config_problems(adapter, methods()["LORA"], model_type)


@settings(max_examples=60, deadline=None)
@given(
    target_modules=st.none() | st.lists(st.sampled_from(NAMES), max_size=3, unique=True) | st.sampled_from(PATTERNS),
    exclude_modules=st.none() | st.lists(st.sampled_from(NAMES), max_size=1) | st.sampled_from(PATTERNS[:2]),
    modules_to_save=st.none() | st.just(["lm_head"]),
    layers_to_transform=st.none()
    | st.just([])
    | st.lists(st.integers(0, 10), min_size=1, max_size=2)
    | st.integers(0, 1),
    layers_pattern=st.none() | st.sampled_from(["layers", "h", ["blocks", "h"], "model.layers"]),
)
def test_a_module_is_targeted_if_peft_targets_it(**config: Any) -> None:
    if not isinstance(config["target_modules"], list):  # peft refuses these together
        config |= {"layers_to_transform": None, "layers_pattern": None}
    elif config["layers_to_transform"] is None:
        config["layers_pattern"] = None
    asked = LoraConfig(**config)
    for module in MODULES:
        if asked.target_modules in (None, "all-linear"):
            by_peft = not isinstance(
                check_target_module_exists(LoraConfig(**config | {"target_modules": ".*"}), module), _ExcludedModule
            )
        else:
            found = check_target_module_exists(asked, module)
            by_peft = bool(found) and not isinstance(found, _ExcludedModule)

        assert (problems(module, **config) == []) == by_peft, (module, config)


def test_parameters_are_targeted_by_their_modules() -> None:
    config = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}

    assert problems("model.layers.0.mlp.experts", **config) == []
    assert "target_modules does not name them" in problems("model.layers.0.self_attn.q_proj", **config)[0]


def test_without_names_a_config_targets_what_peft_does_for_the_type_of_the_base() -> None:
    config = {"target_modules": None, "model_type": "llama"}

    assert problems("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", **config) == []
    (problem,) = problems("model.layers.0.mlp.up_proj", **config)
    assert "holds factors of model.layers.0.mlp.up_proj, but target_modules is null, which for a llama means" in problem
    assert problems("model.layers.0.mlp.up_proj", target_modules=None, model_type="unheard") == []


def test_the_targets_of_model_types_are_those_of_the_installed_peft() -> None:
    assert default_targets.TABLE.read_text() == default_targets.text()


def test_the_message_names_modules_reason_and_remedy() -> None:
    (problem,) = problems(
        *(f"model.layers.{i}.q_proj" for i in range(9)), target_modules=["q_proj"], layers_to_transform=[0, 1]
    )

    assert problem == (
        "adapters.math: holds factors of model.layers.2.q_proj, model.layers.3.q_proj, model.layers.4.q_proj and 4 more, "
        "but layers_to_transform leaves their layers out in its adapter_config.json, so peft would ignore them; correct "
        "the config, or take these tensors out of the file"
    )


def test_a_pattern_that_takes_too_long_is_an_issue_of_its_adapter() -> None:
    (problem,) = problems(MODULES[0], target_modules="(?!x)([a-z.0-9_]+)+!")

    assert problem.startswith(
        "adapters.math/adapter_config.json: target_modules, exclude_modules or layers_pattern: '(?!x)"
    )


def test_a_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math", target_modules=["k_proj"])
    with pytest.raises(PlanError, match=re.escape("holds factors of model.layers.0.self_attn.q_proj")):
        lora_build.build(small.recipe(tmp_path))
    assert not (tmp_path / "out").exists()
