"""Several updates of one tensor: rows, order, stacks, and which of two adapters wins."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.errors import LoraBuildError
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.interface import AdaptedModule, PlacedUpdate, Update, methods
from lora_build.planning.placement import cut
from lora_build.planning.resolve import resolve
from lora_build.recipe.validate import from_mapping
from makers import layers, small
from makers.zoo import Adapter, Base, Zoo

LAYER_0 = "base_model.model.model.layers.0"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a base and a plain adapter `math`."""
    small.make_base(tmp_path / "base", dtype=torch.float32)
    small.make_adapter(tmp_path / "math")
    return tmp_path


def build(folder: Path, *adapters: str, **more: Any) -> dict[str, torch.Tensor]:
    lora_build.build(small.recipe(folder, *adapters, **more))
    return load_file(folder / "out" / "model.safetensors")


def refusal(folder: Path, *adapters: str, **more: Any) -> str:
    with pytest.raises(LoraBuildError) as caught:
        build(folder, *adapters, **more)
    assert not (folder / "out").exists()
    return str(caught.value)


def make_dora(folder: Path, *, seed: int) -> None:
    small.make_adapter(folder, seed=seed, use_dora=True)
    for i, module in enumerate(small.MODULES):
        key = f"base_model.model.{module}.lora_magnitude_vector"
        small.edit(folder, **{key: small.values(seed + 20 + i, 8, dtype=torch.float32).abs() + 0.5})


def factors(folder: Path, adapter: str, module: str = small.MODULES[0]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lora_B, lora_A and the magnitudes of a module in float64."""
    tensors = load_file(folder / adapter / "adapter_model.safetensors")
    names = ("lora_B.weight", "lora_A.weight", "lora_magnitude_vector")
    found = [tensors.get(f"base_model.model.{module}.{name}", torch.zeros(0)) for name in names]
    B, A, m = (tensor.double().numpy() for tensor in found)
    return B, A, m


# --- segments -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=6))
def test_every_row_gets_every_update_that_covers_it_once_and_in_order(spans: list[tuple[int, int]]) -> None:
    placed = [_placed(i, start, start + n) for i, (start, n) in enumerate(spans)]

    found: dict[int, list[tuple[str, int]]] = {}
    last = 0
    for segment in cut(placed):
        assert last <= segment.start < segment.stop
        last = segment.stop
        for update in segment.updates:
            rows = range(segment.stop - segment.start) if update.rows is None else update.rows
            assert len(rows) == segment.stop - segment.start
            for stored, row in zip(range(segment.start, segment.stop), rows, strict=True):
                found.setdefault(stored, []).append((update.adapter, row))

    expected: dict[int, list[tuple[str, int]]] = {}
    for update in placed:
        for stored in range(update.start, update.stop):
            expected.setdefault(stored, []).append((update.adapter, stored - update.start))
    assert found == expected


def _placed(number: int, start: int, stop: int) -> PlacedUpdate:
    update = Update(adapter=f"a{number}", method="LORA", scale=1.0, factors={})
    return PlacedUpdate(update=update, start=start, stop=stop)


# --- order ----------------------------------------------------------------------------------------------------


def test_dora_adapters_compose_in_the_recipes_order_with_norms_of_the_base(folder: Path) -> None:
    make_dora(folder / "one", seed=60)
    make_dora(folder / "two", seed=90)
    W = load_file(folder / "base" / "model.safetensors")[Q0].double().numpy()
    expected = W
    for name in ("two", "math", "one"):
        B, A, m = factors(folder, name)
        delta = 2.0 * B @ A
        expected = expected + delta
        if m.size:
            expected = (m / np.linalg.norm(W + delta, axis=1))[:, None] * expected

    merged = build(folder, "two", "math", "one")[Q0]

    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6)


def test_magnitudes_of_another_number_of_outputs_are_refused(folder: Path) -> None:
    make_dora(folder / "one", seed=60)
    small.edit(folder / "one", q_proj__lora_magnitude_vector=torch.ones(7))

    assert "lora_magnitude_vector is [7], expected 8 magnitudes, one an output" in refusal(folder, "one")


@pytest.mark.parametrize("rows", [range(3, 7), (6, 0, 0, 2)])
def test_some_rows_of_a_dora_parameter_are_those_of_the_whole(rows: Sequence[int]) -> None:
    W, A, B = small.values(1, 8, 6), small.values(2, 2, 6).float(), small.values(3, 8, 2).float()
    loaded = {"A": A, "B": B, "m": small.values(4, 8).float().abs() + 0.5}
    update = Update(adapter="math", method="LORA", scale=0.5, factors={}, ordered=True)
    whole = PlacedUpdate(update=update, start=0, stop=8)

    def merged(update: PlacedUpdate, stored: torch.Tensor) -> torch.Tensor:
        return layers.merge([(update, loaded)], stored, torch.bfloat16)[0]

    some = torch.tensor(rows)
    assert torch.equal(merged(replace(whole, rows=rows), W[some]), merged(whole, W)[some])


def test_another_order_is_another_build_for_dora_and_the_same_for_lora(folder: Path) -> None:
    make_dora(folder / "one", seed=60)
    small.make_adapter(folder / "two", seed=90)

    def key(*adapters: str) -> str:
        return lora_build.build(
            small.recipe(folder, *adapters, output={"dir": str(folder / "out"), "if_exists": "overwrite"})
        ).manifest.build_key

    assert key("one", "math") != key("math", "one")
    assert key("two", "math") == key("math", "two")


def test_dora_is_not_composed_with_an_adapter_that_began_by_changing_the_base(folder: Path) -> None:
    make_dora(folder / "one", seed=60)
    small.make_adapter(folder / "two", seed=90, init_lora_weights="olora")

    assert "DoRA cannot be composed with an adapter that began by changing the base" in refusal(folder, "one", "two")


@pytest.mark.parametrize(("init", "expected"), [("olora", "exact"), ("pissa", "environment"), (True, "exact")])
def test_a_manifest_says_when_a_librarys_linear_algebra_has_a_part_in_the_bytes(
    folder: Path, init: object, expected: str
) -> None:
    small.make_adapter(folder / "other", init_lora_weights=init)

    manifest = lora_build.build(small.recipe(folder, "math", "other")).manifest

    assert manifest.reproducibility == expected
    assert json.loads((folder / "out" / "lora-build.manifest.json").read_text())["reproducibility"] == expected


# --- expert stacks ----------------------------------------------------------------------------------------------

EXPERTS, RANK, WIDTH, INNER = 4, 2, 6, 5


def make_stack(folder: Path) -> None:
    """Write a base with a stack [E, 2·inner, width] on disk, as gpt_oss has, of a model that nobody knows."""
    small.make_base(folder / "base", dtype=torch.float32, architectures=["Unheard"], model_type="unheard")
    stack = small.values(7, EXPERTS, 2 * INNER, WIDTH, dtype=torch.float32)
    small.edit(folder / "base", **{"model.layers.0.mlp.experts.gate_up_proj": stack})


def make_stack_adapter(folder: Path, B: torch.Tensor, A: torch.Tensor) -> None:
    folder.mkdir()
    path = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    config = small.ADAPTER_CONFIG | {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_unsloths_packing_gives_the_same_bytes_as_pefts_once_the_recipe_names_it(tmp_path: Path) -> None:
    make_stack(tmp_path)
    A = small.values(1, EXPERTS * RANK, WIDTH, dtype=torch.float32)
    by_expert = small.values(2, 2 * INNER, EXPERTS, RANK, dtype=torch.float32)
    make_stack_adapter(tmp_path / "peft", by_expert.transpose(1, 2).reshape(2 * INNER, -1).contiguous(), A)
    make_stack_adapter(tmp_path / "sloth", by_expert.reshape(2 * INNER, -1), A)
    outputs = []
    for name, packing in (("peft", "peft"), ("sloth", "unsloth"), ("sloth", "peft")):
        adapters = {name: {"source": str(tmp_path / name), "expert_packing": packing}}
        outputs.append(
            build(tmp_path, adapters=adapters, output={"dir": str(tmp_path / "out"), "if_exists": "overwrite"})
        )
    stack = "model.layers.0.mlp.experts.gate_up_proj"

    assert torch.equal(outputs[0][stack], outputs[1][stack])
    assert not torch.equal(outputs[0][stack], outputs[2][stack])
    before = load_file(tmp_path / "base" / "model.safetensors")[stack].double()
    update = torch.einsum("oer,eri->eoi", by_expert.double(), A.double().reshape(EXPERTS, RANK, WIDTH))
    torch.testing.assert_close(outputs[0][stack].double(), before + 2 * update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nesting", ["peft", "axolotl", "square"])
def test_the_first_stack_of_a_module_is_the_innermost_unless_only_the_reverse_fits(
    tmp_path: Path, nesting: str
) -> None:
    inner = WIDTH if nesting == "square" else 2 * INNER
    stacks = {"gate_up_proj": (inner, WIDTH), "down_proj": (WIDTH, WIDTH if nesting == "square" else INNER)}
    small.make_base(tmp_path / "base", dtype=torch.float32, architectures=["Unheard"], model_type="unheard")
    prefix = "model.layers.0.mlp.experts"
    for i, (name, shape) in enumerate(stacks.items()):
        stack = small.values(7 + i, EXPERTS, *shape, dtype=torch.float32)
        small.edit(tmp_path / "base", **{f"{prefix}.{name}": stack})
    factors = {
        name: (
            small.values(20 + i, rows, EXPERTS * RANK, dtype=torch.float32),
            small.values(30 + i, EXPERTS * RANK, columns, dtype=torch.float32),
        )
        for i, (name, (rows, columns)) in enumerate(stacks.items())
    }
    order = reversed(stacks) if nesting == "axolotl" else stacks
    tensors = {}
    for infix, name in zip((".base_layer", ""), order, strict=True):
        tensors[f"base_model.model.{prefix}{infix}.lora_B.weight"] = factors[name][0]
        tensors[f"base_model.model.{prefix}{infix}.lora_A.weight"] = factors[name][1]
    (tmp_path / "math").mkdir()
    save_file(tensors, tmp_path / "math" / "adapter_model.safetensors")
    targets = [f"mlp.experts.{name}" for name in stacks]
    config = small.ADAPTER_CONFIG | {"target_modules": [], "target_parameters": targets, "peft_version": "0.21.2"}
    (tmp_path / "math" / "adapter_config.json").write_text(json.dumps(config))

    if nesting == "square":  # nobody knows whether this model's square experts are transposed
        assert "nobody knows how this model stores them" in refusal(tmp_path)
        return
    merged = build(tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    for name, (B, A) in factors.items():
        stack = f"{prefix}.{name}"
        by_expert = B.double().reshape(B.shape[0], RANK, EXPERTS)
        update = torch.einsum("ore,eri->eoi", by_expert, A.double().reshape(EXPERTS, RANK, -1))
        torch.testing.assert_close(merged[stack].double(), before[stack].double() + 2 * update, rtol=1e-6, atol=1e-6)


@dataclass
class Kernel:
    """A convolution of the base (`BaseModule`)."""

    dilation: tuple[int, ...]
    layer_type: str = "Linear"

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return (8, 4, 3, 3) if parameter == "weight" else None

    @property
    def settings(self) -> dict[str, Any]:
        return {"dilation": self.dilation}


@pytest.mark.parametrize("dilation", [(1, 1), (2, 2)])
def test_a_dilated_convolution_is_refused_since_its_update_was_trained_undilated(dilation: tuple[int, ...]) -> None:
    def info(*shape: int) -> TensorInfo:
        return TensorInfo(
            source=SourceName.of_adapter("math"), file="f", name="t", dtype="F32", shape=shape, start=0, end=0
        )

    module = AdaptedModule(
        adapter="math",
        path="stem.conv",
        config=small.ADAPTER_CONFIG,
        adapter_weight=1.0,
        factors={"lora_A.weight": info(2, 4, 3, 3), "lora_B.weight": info(8, 2, 1, 1)},
        base=Kernel(dilation),
    )

    updates, problems = methods()["LORA"].updates(module)

    if dilation == (1, 1):
        assert (list(updates), problems) == (["weight"], [])
    else:
        assert updates == {}
        assert problems[0].startswith("adapters.math: stem.conv: the base's convolution is dilated")


def test_factors_for_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    make_stack(tmp_path)
    A, B = torch.ones(3 * RANK, WIDTH), torch.ones(2 * INNER, 3 * RANK)
    make_stack_adapter(tmp_path / "math", B, A)

    assert "expected 4 experts x rank 2 = 8 rows and columns" in refusal(tmp_path)


def test_patterns_of_a_target_parameter_match_its_path_not_its_modules(folder: Path) -> None:
    pattern = {"q_proj": 3, "q_proj.weight": 12}
    parameters = {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}
    small.make_adapter(folder / "pattern", alpha_pattern=pattern, **parameters)
    small.make_adapter(folder / "plain", lora_alpha=12, **parameters)

    merged = build(folder, "pattern")[Q0]

    assert torch.equal(
        merged, build(folder, "plain", output={"dir": str(folder / "out"), "if_exists": "overwrite"})[Q0]
    )


# --- which one wins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("winner", ["one", "two"])
def test_the_recipe_says_whose_saved_module_wins(folder: Path, winner: str) -> None:
    norms = {"one": small.values(1, 6, dtype=torch.float32), "two": small.values(2, 6, dtype=torch.float32)}
    for name, norm in norms.items():
        small.make_adapter(folder / name)
        small.edit(folder / name, **{"base_model.model.model.norm.weight": norm})

    assert torch.equal(build(folder, "one", "two", saved_modules_from=winner)["model.norm.weight"], norms[winner])


def test_without_a_winner_two_saved_modules_are_refused_with_what_to_write(folder: Path) -> None:
    for name in ("one", "two"):
        small.make_adapter(folder / name)
        small.edit(folder / name, **{"base_model.model.model.norm.weight": small.values(len(name), 6)})

    assert "say which one's to take: saved_modules_from: two, or merge only one" in refusal(folder, "one", "two")
    message = refusal(folder, "one", "two", saved_modules_from="tow")
    assert "saved_modules_from: no adapter 'tow'; did you mean 'two'?" in message


def test_two_adapters_that_train_one_token_are_refused(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", vocab_size=9)
    small.edit(tmp_path / "base", **{"model.embed_tokens.weight": small.values(3, 9, 6)})
    for name, tokens in (("one", [2, 5]), ("two", [7, 5]), ("three", [1, 8])):
        small.make_adapter(tmp_path / name, trainable_token_indices=tokens)
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        small.edit(tmp_path / name, **{key: small.values(len(name), 2, 6, dtype=torch.float32)})

    assert "adapters one and two both train token 5 of model.embed_tokens.weight" in refusal(tmp_path, "one", "two")
    merged = build(tmp_path, "one", "three")["model.embed_tokens.weight"]
    base = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert (merged != base).any(dim=1).nonzero().flatten().tolist() == [1, 2, 5, 8]


def make_tokens(folder: Path, tokens: list[int]) -> None:
    small.make_adapter(folder, trainable_token_indices=tokens)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    small.edit(folder, **{key: small.values(4, len(tokens), 6, dtype=torch.float32)})


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([2, 9], "trains token 9, the base's weight is [9, 6]; was its vocabulary grown?"),
        ([2, -1], "trains token -1"),
        ([2, 2], "adapter_config.json names a token twice"),
        ([2], "trained rows are [2, 6] for 1 tokens"),
    ],
)
def test_trained_tokens_that_the_base_has_not_or_has_twice_are_refused(
    tmp_path: Path, tokens: list[int], said: str
) -> None:
    small.make_base(tmp_path / "base", vocab_size=9)
    small.edit(tmp_path / "base", **{"model.embed_tokens.weight": small.values(3, 9, 6)})
    make_tokens(tmp_path / "math", [2, 5])
    config = tmp_path / "math" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": tokens}))

    assert said in refusal(tmp_path)


def test_trained_tokens_of_some_rows_are_found_by_the_rows_of_the_parameter() -> None:
    W, trained = small.values(1, 5, 6), small.values(2, 2, 6)
    update = Update(adapter="math", method="TRAINABLE_TOKENS", scale=1.0, factors={}, additive=False, tokens=(7, 3))
    placed = PlacedUpdate(update=update, start=0, stop=5, rows=range(2, 7))

    merged, _ = layers.merge([(placed, {"rows": trained})], W, torch.bfloat16)

    expected = W.clone()
    expected[1] = trained[1]  # token 3 is row 1 of rows 2 to 6
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("alike", [True, False])
def test_copies_of_a_tied_pair_keep_the_tie_only_if_they_are_alike(tmp_path: Path, alike: bool) -> None:
    small.make_base(tmp_path / "base", dtype=torch.float32, tie_word_embeddings=True, vocab_size=9)
    small.edit(tmp_path / "base", **{"model.embed_tokens.weight": small.values(3, 9, 6, dtype=torch.float32)})
    small.make_adapter(tmp_path / "math", ensure_weight_tying=True, target_modules=["embed_tokens", "q_proj"])
    A, B = small.values(5, 2, 9, dtype=torch.float32), small.values(6, 6, 2, dtype=torch.float32)
    copies = {
        "model.embed_tokens.lora_embedding_A": A,
        "model.embed_tokens.lora_embedding_B": B,
        "lm_head.lora_A.weight": B.T.contiguous() if alike else B.T.contiguous() + 1,
        "lm_head.lora_B.weight": A.T.contiguous(),
    }
    small.edit(tmp_path / "math", **{f"base_model.model.{name}": tensor for name, tensor in copies.items()})

    merged = build(tmp_path)

    base = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"].double()
    expected = base + 2 * (B.double() @ A.double()).T
    torch.testing.assert_close(merged["model.embed_tokens.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert ("lm_head.weight" in merged) != alike
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == alike


def test_only_matrices_that_may_share_a_weight_are_digested_as_their_transposes_too(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", tie_word_embeddings=True)
    small.make_adapter(tmp_path / "math", ensure_weight_tying=True, modules_to_save=["norm"], use_dora=True)
    added = {"lm_head.lora_A.weight": (2, 6), "lm_head.lora_magnitude_vector": (9,), "model.norm.weight": (2, 3)}
    small.edit(tmp_path / "math", **{f"base_model.model.{name}": torch.ones(shape) for name, shape in added.items()})

    digests = resolve(from_mapping(small.recipe(tmp_path)), for_planning=False).inputs.digests

    names = ("lm_head.lora_A.weight", "lm_head.lora_A.weight.T", "lm_head.lora_magnitude_vector", "model.norm.weight")
    assert digests.keys() == {("math", f"base_model.model.{name}") for name in names}


def test_with_tied_embeddings_peft_an_update_goes_to_all_that_share_its_tensor_and_is_noted(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", tie_word_embeddings=True, vocab_size=9)
    small.edit(tmp_path / "base", **{"model.embed_tokens.weight": small.values(3, 9, 6)})
    small.make_adapter(tmp_path / "math", target_modules=["lm_head", "q_proj"])
    factors = {"A": torch.ones(2, 6), "B": torch.ones(9, 2)}
    small.edit(tmp_path / "math", **{f"base_model.model.lm_head.lora_{n}.weight": t for n, t in factors.items()})

    plan = lora_build.plan(small.recipe(tmp_path, tied_embeddings="peft")).merge_plan

    assert {op.name: op.verb for op in plan.operations if "q_proj" not in op.name} == {
        "model.embed_tokens.weight": "merge", "model.norm.weight": "copy",
    }  # fmt: skip
    assert plan.notes == (
        "lm_head.weight is tied: its update goes into model.embed_tokens.weight and so into all that share it "
        "(tied_embeddings: peft)",
    )


def test_a_whole_stack_of_experts_goes_into_the_tensors_that_each_of_them_has_on_disk(zoo: Zoo, tmp_path: Path) -> None:
    base = Base(arch="mixtral")
    adapter = zoo.adapter(base, Adapter(targets=("q_proj",), options=(("modules_to_save", ["experts"]),)))
    recipe = {"base": str(zoo.base(base)), "adapters": {"x": str(adapter)}, "output": {"dir": str(tmp_path / "out")}}

    built = lora_build.build(recipe)

    down = load_file(adapter / "adapter_model.safetensors")[f"{LAYER_0}.mlp.experts.down_proj"]
    merged = load_file(built.dir / "model.safetensors")
    (prefix,) = {name.partition("experts.")[0] for name in merged if "layers.0." in name and ".experts." in name}
    assert torch.equal(torch.stack([merged[f"{prefix}experts.{i}.w2.weight"] for i in range(len(down))]), down)
    assert {t.operation for t in built.manifest.tensors if ".experts." in t.name} <= {"replace", "merge"}


@pytest.mark.parametrize(
    ("says", "labels"),
    [
        ({"id2label": {str(i): f"L{i}" for i in range(4)}}, 4),
        ({"num_labels": 4}, 4),
        ({}, 2),
    ],
)
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_classifier_of_other_labels_is_refused_until_the_base_has_as_many(
    tmp_path: Path, says: dict[str, Any], labels: int, task: str | None
) -> None:
    base = small.make_base(tmp_path / "base", architectures=["LlamaForSequenceClassification"], **says)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"score.weight": torch.zeros(labels, 6)}, base / "model.safetensors", {"format": "pt"})
    folder = small.make_adapter(tmp_path / "math", modules_to_save=["score"], task_type=task)
    small.edit(folder, **{"base_model.model.score.weight": torch.ones(3, 6)})
    with pytest.raises(lora_build.LoraBuildError) as caught:
        lora_build.build(small.recipe(tmp_path))
    assert (
        f"is [3, 6], the base's score.weight is [{labels}, 6]; it was trained with 3 labels, and the base has {labels}: "
        "load the base by from_pretrained(..., num_labels=3, ignore_mismatched_sizes=True), save it by save_pretrained"
    ) in str(caught.value)

    save_file(weights | {"score.weight": torch.zeros(3, 6)}, base / "model.safetensors", {"format": "pt"})
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(text | {"id2label": {str(i): f"L{i}" for i in range(3)}}))
    built = lora_build.build(small.recipe(tmp_path))
    assert torch.equal(load_file(built.dir / "model.safetensors")["score.weight"], torch.ones(3, 6))
