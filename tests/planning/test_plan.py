"""The closed world: whatever does not fit is refused by name, all of it at once, before a byte is written."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.configuration_utils import get_configuration_file

import lora_build
from lora_build.files.identity import FileRecord
from lora_build.pipeline import prepare
from lora_build.planning.operations import Merge
from lora_build.planning.plan import make_plan
from lora_build.planning.resolve import resolve
from lora_build.proof.plan_record import record_plan
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.zoo import Adapter, Base, Zoo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def refusal(folder: Path, *adapters: str, **more: object) -> str:
    with pytest.raises(lora_build.LoraBuildError) as caught:
        lora_build.build(small.recipe(folder, *adapters, **more))
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists()
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
    return str(caught.value)


def test_a_plan_says_of_every_tensor_what_happens_to_it(folder: Path) -> None:
    plan = prepare(from_mapping(small.recipe(folder))).merge_plan

    kinds = {op.name: op.verb for op in plan.operations}
    assert kinds == {"model.norm.weight": "copy"} | {f"{m}.weight": "merge" for m in small.MODULES}
    assert plan.side_files == {"tokenizer.json": "base"}


def test_planning_a_llama_imports_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys, json; from lora_build import pipeline; from lora_build.recipe.validate import from_mapping;"
        "pipeline.prepare(from_mapping(json.loads(sys.argv[1])));"
        "print([m for m in ('torch', 'transformers', 'hydra', 'peft', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(small.recipe(folder))], capture_output=True, text=True
    )

    assert done.stdout.strip() == "[]", done.stderr


def test_an_adapter_for_another_base_is_refused_with_both_shapes(folder: Path) -> None:
    small.edit(folder / "math", q_proj__lora_A__weight=torch.ones(2, 16))

    message = refusal(folder)
    assert "lora_B @ lora_A is [8, 16], the base's weight is [8, 6]; was it trained on another base?" in message


def test_an_adapter_tensor_that_nothing_consumes_is_refused_by_name(folder: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    small.edit(folder / "math", **{key: torch.ones(2)})

    assert f"nothing here consumes tensor '{key}'" in refusal(folder)


def test_a_module_that_the_base_lacks_is_refused_with_the_nearest_name(folder: Path) -> None:
    for leaf, shape in (("A", (2, 6)), ("B", (8, 2))):
        small.edit(
            folder / "math", **{f"base_model.model.model.layers.0.attn.q_proj.lora_{leaf}.weight": torch.ones(shape)}
        )

    message = refusal(folder)
    assert "adapts 'model.layers.0.attn.q_proj.weight', which the base does not have" in message
    assert "nearest in the base: model.layers.0.self_attn.q_proj.weight" in message


@pytest.mark.parametrize(("leaf", "missing"), [("lora_A.weight", "lora_A.weight"), ("lora_B.weight", "lora_B.weight")])
def test_half_a_pair_is_refused(folder: Path, leaf: str, missing: str) -> None:
    small.edit(folder / "math", **{leaf: None})

    assert f"no {missing}; the adapter's file is incomplete" in refusal(folder)


def test_keys_without_pefts_prefix_are_refused(folder: Path) -> None:
    small.edit(folder / "math", **{"model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(2, 6)})

    assert "does not start with 'base_model.model.'" in refusal(folder)


def test_a_rank_that_the_config_denies_is_refused(folder: Path) -> None:
    small.make_adapter(folder / "other", r=3)

    assert "lora_A is [2, 6], but adapter_config.json says rank 3 for it" in refusal(folder, "other")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type PREFIX_TUNING cannot be merged: it adds keys and values"),
        ({"peft_type": "LORRA"}, "peft_type LORRA cannot be merged; known: "),
        ({"use_dora": True}, "use_dora is set, but the module has no lora_magnitude_vector"),
        ({"use_dora": True, "lora_bias": True}, "use_dora: cannot be combined with lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "a randomised SVD, drawn anew at each load, changed the base"),
        ({"init_lora_weights": "lora_ga"}, "changed by gradients that the adapter does not hold"),
        ({"init_lora_weights": "corda"}, "changed by statistics of data"),
        ({"init_lora_weights": "loftq"}, "corrects a quantised base"),
        ({"init_lora_weights": "something"}, "'something' is not known and may have changed the base"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA acts only after its invocation tokens"),
        ({"arrow_config": {"top_k": 2}}, "Arrow routes between adapters by the input"),
        ({"use_qalora": True}, "QALoRA adapts a quantised base"),
        ({"layer_replication": [[0, 10**7]]}, "layer_replication: expected pairs [start, end) of layers, at most 1000"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication: expected pairs [start, end) of layers"),
        ({"layer_replication": [["0", "1"]]}, "layer_replication: expected pairs [start, end) of layers"),
        ({"swift_type": "LONGLORA"}, "swift_type: 'LONGLORA' is another method than peft_type says"),
        ({"layer_replication": [[0, 3]]}, "layer_replication needs one stack of numbered layers and their count"),
        ({"new_invention": {"a": 1}}, "new_invention: is not a key that this version knows"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_with_its_reason(folder: Path, config: dict[str, object], said: str) -> None:
    small.make_adapter(folder / "other", **config)

    assert said in refusal(folder, "other")


def test_all_issues_come_at_once(folder: Path) -> None:
    small.make_adapter(folder / "dora", use_dora=True)
    small.edit(folder / "math", lora_A__weight=None)
    small.make_adapter(folder / "third", r=3)

    message = refusal(folder, "math", "dora", "third")
    assert "(5 issues)" in message
    assert all(f"adapters.{name}" in message for name in ("math", "dora", "third"))


def test_what_is_wrong_with_an_adapter_is_said_beside_one_that_cannot_be_merged_at_all(folder: Path) -> None:
    small.make_adapter(folder / "prefix", peft_type="PREFIX_TUNING")
    small.make_adapter(folder / "dora", use_dora=True)

    message = refusal(folder, "prefix", "dora")
    assert "peft_type PREFIX_TUNING cannot be merged" in message
    assert "has no lora_magnitude_vector" in message


def test_all_inputs_that_cannot_be_opened_come_at_once(folder: Path) -> None:
    message = refusal(folder, "nowhere", "neither", base=str(folder / "absent"))

    assert message.count("does not exist") == 3
    assert message.startswith("3 inputs cannot be read:")


def test_a_build_that_would_equal_the_base_is_refused(folder: Path) -> None:
    adapters = {"math": {"source": str(folder / "math"), "weight": 0}}

    assert "the output would equal the base" in refusal(folder, adapters=adapters)


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_a_build_of_tensors_that_only_training_needed_is_refused(folder: Path, dtype: str) -> None:
    small.edit(
        folder / "math", **dict.fromkeys(("0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"))
    )
    small.edit(
        folder / "math", **dict.fromkeys(("1.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight"))
    )
    small.edit(folder / "math", **{f"base_model.model.{small.MODULES[0]}.lora_velora_embed": torch.ones(2)})

    assert "the adapters change nothing: the output would equal the base" in refusal(folder, dtype=dtype)


def test_two_adapters_that_replace_one_parameter_are_refused(folder: Path) -> None:
    for name in ("one", "two"):
        small.make_adapter(folder / name, modules_to_save=["norm"])
        small.edit(folder / name, **{"base_model.model.model.norm.weight": small.values(len(name), 6)})

    assert "adapters one and two both replace model.norm.weight" in refusal(folder, "one", "two")


def test_replacing_and_updating_one_parameter_is_refused(folder: Path) -> None:
    small.make_adapter(folder / "one", modules_to_save=["layers.0.self_attn.q_proj"])
    small.edit(folder / "one", lora_A__weight=None, lora_B__weight=None)
    small.edit(folder / "one", **{f"base_model.model.{small.MODULES[0]}.weight": small.values(3, 8, 6)})

    assert f"adapter one replaces {small.MODULES[0]}.weight and adapter math updates it" in refusal(
        folder, "one", "math"
    )


def test_a_weight_on_a_whole_parameter_is_refused(folder: Path) -> None:
    small.edit(folder / "math", **{"base_model.model.model.norm.weight": small.values(3, 6)})
    adapters = {"math": {"source": str(folder / "math"), "weight": 0.5}}

    assert "it replaces model.norm.weight whole" in refusal(folder, adapters=adapters)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: (b / "config.json").unlink(), "base: has no config.json"),
        (lambda b: (b / "config.json").write_text("{"), "base/config.json: is not JSON"),
        (lambda b: (b / "model.safetensors").unlink(), "base: expected model.safetensors"),
        (lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin"), "pickled weights are never opened"),
        (lambda b: (b / "model.safetensors").write_bytes(b"\x07"), "not a safetensors file: 1 bytes"),
        (lambda b: (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-2]), "cut short"),
        (lambda b: (b / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "quantised base"),
    ],
)  # fmt: skip
def test_a_broken_base_is_refused(folder: Path, damage: object, said: str) -> None:
    damage(folder / "base")  # type: ignore[operator]

    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json, so it is no PEFT adapter"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "is not a JSON object"),
        (lambda a: (a / "adapter_config.json").write_text("{}"), "has no peft_type"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "pickled weights are never"),
    ],
)  # fmt: skip
def test_a_broken_adapter_is_refused(folder: Path, damage: object, said: str) -> None:
    damage(folder / "math")  # type: ignore[operator]

    assert said in refusal(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    (tmp_path / "base/model-00002-of-00002.safetensors").unlink()

    assert "names model-00002-of-00002.safetensors, which is missing" in refusal(tmp_path)


@pytest.mark.parametrize("out", ["base", "base/inside", "."])
def test_an_output_that_overlaps_an_input_is_refused(folder: Path, out: str) -> None:
    with pytest.raises(lora_build.RecipeError, match="overlaps"):
        lora_build.build(small.recipe(folder, output={"dir": str(folder / out)}))


def test_foreign_weights_are_left_out_and_said(folder: Path) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md", "code.py"):
        (folder / "base" / name).write_bytes(b"x")

    assert set(prepare(from_mapping(small.recipe(folder))).merge_plan.left_out["base"]) == {
        "consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md", "code.py",
    }  # fmt: skip
    lora_build.build(small.recipe(folder))
    assert not any((folder / "out" / name).exists() for name in ("consolidated.safetensors", "README.md", "code.py"))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))

    assert "index and shards disagree, first about 'model.norm.weight'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors", ".hidden.safetensors"])
def test_a_shard_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    assert "is not a file name that a shard may have" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    first, second = sorted((tmp_path / "base").glob("*.safetensors"))
    second.write_bytes(first.read_bytes())

    assert "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in refusal(tmp_path)


def test_an_embedding_of_an_unknown_architecture_is_refused_among_the_other_issues(tmp_path: Path) -> None:
    small.make_base(
        tmp_path / "base", architectures=["Unheard"], model_type="unheard", tie_word_embeddings=True, vocab_size=8
    )
    small.make_adapter(tmp_path / "math")
    small.edit(tmp_path / "math", **{"base_model.model.lm_head.weight": torch.ones(8, 6)})
    small.make_adapter(tmp_path / "dora", use_dora=True)

    message = refusal(tmp_path, "math", "dora")
    assert "whether it is tied cannot be told: transformers has no architecture ['Unheard']" in message
    assert "has no lora_magnitude_vector" in message


def test_a_missing_layer_is_refused_with_the_nearest_names(folder: Path) -> None:
    key = "base_model.model.model.layers.7.self_attn.q_proj"
    small.edit(folder / "math", **{f"{key}.lora_A.weight": torch.ones(2, 6), f"{key}.lora_B.weight": torch.ones(8, 2)})

    message = refusal(folder)
    assert "adapts 'model.layers.7.self_attn.q_proj.weight', which the base does not have" in message
    assert "nearest in the base: model.layers.1.self_attn.q_proj.weight" in message


def test_two_adapters_that_saved_different_bases_along_are_refused(folder: Path) -> None:
    small.make_adapter(folder / "other", seed=80)
    for name, seed in (("math", 1), ("other", 2)):
        small.edit(
            folder / name, **{f"base_model.model.{small.MODULES[0]}.base_layer.weight": small.values(seed, 8, 6)}
        )

    assert "differ: they were trained on different bases" in refusal(folder, "math", "other")


def test_two_adapters_that_saved_the_same_base_along_are_merged_into_it(folder: Path) -> None:
    small.make_adapter(folder / "other", seed=80)
    for name in ("math", "other"):
        small.edit(folder / name, **{f"base_model.model.{small.MODULES[0]}.base_layer.weight": small.values(1, 8, 6)})

    (op, *_) = [
        op
        for op in prepare(from_mapping(small.recipe(folder, "math", "other"))).merge_plan.operations
        if "q_proj" in op.name
    ]
    assert op.source.source.startswith("adapters.")
    assert op.verb == "merge"


def test_another_plan_for_the_same_inputs_is_another_build(folder: Path) -> None:
    plan = prepare(from_mapping(small.recipe(folder))).merge_plan
    inputs = {
        (role, name): FileRecord(path=name, size_bytes=1, sha256="sha256:0")
        for role, names in plan.input_files.items()
        for name in names
    }
    (shard,) = plan.shards
    merge = next(op for op in shard.operations if isinstance(op, Merge))
    (segment,) = merge.segments
    (placed,) = segment.updates
    stronger = replace(placed, update=replace(placed.update, scale=3.0))
    other = replace(merge, segments=(replace(segment, updates=(stronger,)),))
    operations = tuple(other if op is merge else op for op in shard.operations)

    def key(plan):
        return record_plan(plan, inputs).build_key

    assert key(plan) != key(replace(plan, shards=(replace(shard, operations=operations),)))


def test_a_combination_that_nobody_knows_is_refused_with_the_nearest_name(folder: Path) -> None:
    said = refusal(folder, combine={"method": "linaer"})

    assert "svd, ties, found 'linaer'; did you mean 'linear'?" in said


def test_an_update_that_fits_only_when_transposed_is_refused_where_the_model_has_no_conv1d(folder: Path) -> None:
    small.edit(folder / "math", lora_A__weight=torch.ones(2, 8))
    small.edit(folder / "math", lora_B__weight=torch.ones(6, 2))

    assert "is [6, 8], the base's weight is [8, 6]: transposed; is it of another model?" in refusal(folder)


def test_an_update_stored_either_way_round_is_accepted_for_a_model_that_nobody_knows(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", auto_map={"AutoModel": "modeling.Own"})
    small.make_adapter(tmp_path / "math")
    small.edit(tmp_path / "math", lora_A__weight=torch.ones(2, 8))
    small.edit(tmp_path / "math", lora_B__weight=torch.ones(6, 2))

    first = prepare(from_mapping(small.recipe(tmp_path))).merge_plan.operations[0]
    assert isinstance(first, Merge)
    assert first.updates[0].transposed


def test_code_of_a_base_may_share_weights_which_is_a_note(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", auto_map={"AutoModel": "modeling.Own"})
    small.make_adapter(tmp_path / "math")

    (note,) = prepare(from_mapping(small.recipe(tmp_path))).merge_plan.notes

    assert note.endswith("which is never run: whether it shares weights between modules, as ties do, cannot be told")


@pytest.mark.parametrize("names", [["config.4.0.0.json"], ["config.json", "config.999.json"], ["x.json"], [], None])
def test_a_config_that_some_versions_read_in_place_of_config_json_is_refused(
    names: list[str] | None, tmp_path: Path
) -> None:
    small.make_base(tmp_path / "base", configuration_files=names)
    small.make_adapter(tmp_path / "math")

    if not (names and names[-1].startswith("config.")):
        assert get_configuration_file(names or []) == "config.json"
        assert prepare(from_mapping(small.recipe(tmp_path))).merge_plan.operations
        return
    assert f"configuration_files names {names[-1]}, which some versions of transformers read" in refusal(tmp_path)


def test_many_issues_of_one_adapter_are_shown_in_part_and_kept_in_full(folder: Path) -> None:
    for i in range(9):
        small.edit(folder / "math", **{f"base_model.model.model.layers.9.mlp.p{i}.lora_X.weight": torch.ones(2)})
    with pytest.raises(lora_build.PlanError) as caught:
        lora_build.build(small.recipe(folder))

    assert len(caught.value.issues) == 9
    assert "(9 issues)" in str(caught.value)
    assert str(caught.value).endswith("adapters.math: and 5 more like these")


def test_an_index_is_written_where_there_are_several_weight_files(folder: Path) -> None:
    whole = lora_build.plan(small.recipe(folder)).merge_plan
    small.edit(folder / "base", **{"model.large": torch.ones(1000)})
    cut = lora_build.plan(small.recipe(folder, output={"dir": str(folder / "out"), "max_shard_size": "1KB"})).merge_plan

    assert (whole.index, [*whole.texts]) == (None, ["config.json"])
    weight_map = json.loads(cut.texts["model.safetensors.index.json"])["weight_map"]
    assert weight_map == {op.name: shard.file for shard in cut.shards for op in shard.operations}
    assert len(set(weight_map.values())) == 2


def test_a_plan_records_each_option_under_the_name_that_manifests_have(folder: Path) -> None:
    def recorded(**more: object) -> dict[str, object]:
        return dict(lora_build.plan(small.recipe(folder, **more)).merge_plan.options.recorded)

    assert recorded() == {
        "combine": "linear", "dtype": "keep", "max_shard_size": "keep", "numerics": "exact-1", "safe_merge": True, "tied": "untie",
    }  # fmt: skip
    assert recorded(numerics="peft")["numerics"] == "peft-0.21"
    assert recorded(output={"dir": str(folder / "out"), "max_shard_size": "1KB"})["max_shard_size"] == 1000
    assert "kept_dtypes" in recorded(dtype="float16")


def test_a_head_that_the_base_lacks_is_added_and_takes_the_place_of_the_old_one(zoo: Zoo, tmp_path: Path) -> None:
    base = Base(arch="llama")
    adapter = zoo.adapter(base, Adapter(model="classifier", options=(("task_type", "SEQ_CLS"),)))
    recipe = small.recipe(tmp_path) | {"base": str(zoo.base(base)), "adapters": {"x": str(adapter)}}

    plan = lora_build.plan(recipe).merge_plan

    verbs = {op.name: op.verb for op in plan.operations}
    assert verbs["score.weight"] == "replace"
    assert "lm_head.weight" not in verbs
    assert plan.config.data["architectures"] == ["LlamaForSequenceClassification"]
    assert [note for note in plan.notes if "the adapter makes a" in note] == [
        "the adapter makes a LlamaForSequenceClassification of the base's LlamaForCausalLM: score.weight added, "
        "lm_head.weight left out"
    ]


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / "base/model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )

    assert "is a pointer of Git LFS, not the file itself; run `git lfs pull`" in refusal(folder)


def test_shards_without_their_index_are_said_so(folder: Path) -> None:
    (folder / "base/model.safetensors").rename(folder / "base/model-00001-of-00001.safetensors")

    assert "found model-00001-of-00001.safetensors; shards need their index" in refusal(folder)


def test_a_target_that_may_not_be_written_is_refused_when_planning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_build.proof.output_dir.os.access", lambda *_: False)

    with pytest.raises(lora_build.StorageError, match="no permission to write in"):
        prepare(from_mapping(small.recipe(folder)))


def test_a_tie_that_is_cut_stays_cut_where_the_vocabulary_grows_too(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.base(Base(arch="gemma3"))  # its text model's config is nested, and both say that it is tied
    (tmp_path / "more").mkdir()
    save_file(
        {
            "base_model.model.model.language_model.embed_tokens.weight": torch.ones(84, 32),
            "base_model.model.lm_head.weight": torch.zeros(84, 32),
        },
        tmp_path / "more/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    (tmp_path / "more/adapter_config.json").write_text(json.dumps(config))

    plan = prepare(from_mapping(small.recipe(tmp_path, "more") | {"base": str(base)})).merge_plan

    text = plan.config.nested["text_config"]
    assert (text["vocab_size"], text["tie_word_embeddings"]) == (84, False)
    assert plan.config.data["tie_word_embeddings"] is False


def test_a_folder_written_without_its_dot_is_pointed_out(folder: Path) -> None:
    (folder / "models").mkdir()
    (folder / "base").rename(folder / "models/base")

    assert "there is a folder models/base here: for it write ./models/base" in refusal(
        folder, base="models/base", root=str(folder)
    )


def test_an_adapter_in_the_bases_folder_is_merged_once_it_has_a_folder_of_its_own(tmp_path: Path) -> None:
    base, own = small.make_base(tmp_path / "base"), small.make_adapter(tmp_path / "own")
    small.make_adapter(tmp_path / "math")
    for file in own.iterdir():
        file.rename(base / file.name)
    with pytest.raises(lora_build.LoraBuildError, match="move them to a folder of their own and add that to the"):
        prepare(from_mapping(small.recipe(tmp_path, "math")))

    for file in base.glob("adapter_*"):
        file.rename(own / file.name)
    merged = prepare(from_mapping(small.recipe(tmp_path, "math", "own"))).merge_plan
    assert set(merged.weights) == {"math", "own"}


@pytest.mark.parametrize(
    ("base", "trained", "differ"),
    [
        ("acme/one", "acme/two", True),
        ("acme/one", "Acme/One", False),
        ("./one", "acme/two", False),
        ("acme/one", "/models/one", False),
        ("acme/one", "./out/one", False),
        ("acme/one", "one", False),
        ("acme/one", None, False),
    ],
)
def test_an_adapter_that_names_another_model_of_the_hub_is_said(
    tmp_path: Path, base: str, trained: str | None, differ: bool
) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math", base_model_name_or_path=trained)
    found = resolve(from_mapping(small.recipe(tmp_path))).inputs
    other = from_mapping({"base": base, "adapters": {"math": "./math"}})

    said = "adapters.math was trained on acme/two, as its base_model_name_or_path says, and the base is acme/one: "
    assert [remark.startswith(said) for remark in make_plan(other, found).remarks if "trained on" in remark] == (
        [True] if differ else []
    )
