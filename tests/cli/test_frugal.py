"""What commands do without: libraries that they do not need, and work that has been done. No clock is looked at."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_build
from lora_build.cli import main as app
from lora_build.files.formats.safetensors import format_index
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.models import asking
from lora_build.models.ask import answer_question
from lora_build.pipeline import prepare
from lora_build.recipe.validate import from_mapping
from makers import small

HEAVY = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "rich", "hydra"}
MAIN = "import sys; from lora_build.cli.main import main; code = main(); "


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its inputs and its build."""
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    lora_build.build(small.recipe(tmp_path))
    return tmp_path


@pytest.fixture
def experts(project: Path) -> Path:
    """The same folder, with a base of three experts that each have matrices of their own, and LoRA on their stack."""
    base = small.make_base(project / "moe", architectures=["OlmoeForCausalLM"], model_type="olmoe", num_experts=3)
    stack = "model.layers.0.mlp.experts"
    tensors = {f"{stack}.{e}.down_proj.weight": small.values(e, 4, 6) for e in range(3)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = small.make_adapter(project / "stacks", target_modules=[], target_parameters=["experts.down_proj"])
    factors = {"A": small.values(7, 6, 6, dtype=torch.float32), "B": small.values(8, 4, 6, dtype=torch.float32)}
    named = {f"base_model.model.{stack}.lora_{factor}.weight": values for factor, values in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    (project / "recipes" / "stacks.yaml").write_text("base: ./moe\nadapters: {a: ./stacks}\n")
    return project


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--help"], set()),
        (["verify", "out"], set()),
        (["plan", "recipe=prod"], {"hydra"}),
        (["plan", "--json", "recipe=prod"], {"hydra"}),
        (["recipe=prod"], {"hydra"}),
    ],
)
def test_a_command_that_merges_nothing_imports_no_heavy_library(
    project: Path, words: list[str], needed: set[str]
) -> None:
    assert heavy(words) == f"{sorted(needed)} 0\n"


def test_a_build_of_expert_stacks_that_are_known_asks_neither_torch_nor_transformers(experts: Path) -> None:
    assert heavy(["plan", "recipe=stacks"]) == "['hydra'] 0\n"
    assert heavy(["recipe=stacks"]) == "['hydra', 'numpy'] 0\n"
    assert len(json.loads((experts / "builds/stacks/lora-build.survival.json").read_text())["tensors"]) == 3


def test_a_plan_of_replicated_layers_and_a_new_head_reads_what_was_asked_before(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "vocab_size": 12,
        "hidden_size": 6,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    small.make_base(project / "wide", **sizes, head_dim=8, num_key_value_heads=1, pad_token_id=0)
    shapes = LlamaForCausalLM(LlamaConfig(**json.loads((project / "wide/config.json").read_text()))).state_dict()
    tensors = {name: small.values(1, *tensor.shape) for name, tensor in shapes.items()}
    save_file(tensors, project / "wide/model.safetensors", {"format": "pt"})
    deeper = {"layer_replication": [[0, 2], [1, 2]], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    small.edit(small.make_adapter(project / "judge", **deeper), **{"base_model.model.score.weight": torch.ones(3, 6)})
    (project / "recipes/judge.yaml").write_text("base: ./wide\nadapters: {judge: ./judge}\n")
    with monkeypatch.context() as patch:  # asked of another process, which is this one
        patch.setattr(asking, "sys", SimpleNamespace(modules={}))
        patch.setattr(asking, "_ask_child", answer_question)
        (plan,) = [lora_build.plan(lora_build.load_recipe("judge")).merge_plan]

    assert plan.config.changes["architectures"] == ["LlamaForSequenceClassification"]
    assert (plan.config.changes["num_hidden_layers"], len(plan.config.changes["id2label"])) == (3, 3)
    assert heavy(["plan", "recipe=judge"]) == "['hydra'] 0\n"


@pytest.mark.parametrize(("more", "needs_torch"), [([], False), (["numerics=peft"], True)])
def test_a_plan_counts_torch_into_the_memory_where_the_build_will_import_it(
    project: Path, more: list[str], needs_torch: bool
) -> None:
    words = ["recipe=prod", "output.dir=./new", *more]
    planned = subprocess.run(
        [sys.executable, "-c", f"{MAIN} sys.exit(code)", "plan", "--json", *words],
        capture_output=True,
        check=True,
    )

    assert (json.loads(planned.stdout)["memory_bytes"] > 300e6) is needs_torch
    assert ("torch" in heavy(words)) is needs_torch


def heavy(words: list[str]) -> str:
    """Return which heavy libraries a command has imported, and its exit code."""
    code = f"{MAIN} print(sorted({HEAVY} & {{*sys.modules}}), code, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(Path(lora_build.__file__).parent.parent)}
    command = [sys.executable, "-c", code, *words]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return child.stderr


def test_a_build_that_is_up_to_date_was_the_case_above(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["recipe=prod"]) == 0
    assert "\nup to date" in capsys.readouterr().out


def test_a_command_line_is_composed_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = _count(monkeypatch, "hydra._internal.config_loader_impl.ConfigLoaderImpl.load_configuration")

    assert app.main(["plan", "recipe=prod"]) == 0
    assert len(composed) == 1


def test_a_plan_reads_each_header_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _count(
        monkeypatch,
        "lora_build.files.formats.checkpoint.read_tensors",
        also="lora_build.files.formats.adapter.read_tensors",
    )

    prepare(from_mapping(small.recipe(project)))

    assert sorted(arguments[2] for arguments in read) == [
        "adapter_model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_a_plan_writes_each_header_and_its_index_once_however_often_they_are_asked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = _count(monkeypatch, "lora_build.planning.shards.format_header")
    indices = _count(monkeypatch, "lora_build.planning.plan.format_index")

    prepared = prepare(from_mapping(small.recipe(project)))
    sizes = {prepared.num_bytes_written for _ in range(3)}

    assert len(sizes) == 1
    assert all(shard.header is shard.header for shard in prepared.merge_plan.shards)
    assert (len(headers), len(indices)) == (2, 1)


def test_verify_reads_a_file_in_chunks_however_small_its_tensors(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _count(monkeypatch, "lora_build.files.hashing.hashed_file.HashedFile._pread")

    assert lora_build.verify(project / "out").num_tensors == 3

    name = "model-00001-of-00002.safetensors"
    assert [arguments[1:3] for arguments in read if arguments[0].where.endswith(name)][:2] == _header_of(
        project / "out" / name
    )
    assert sum(arguments[0].where.endswith(name) for arguments in read) == 3  # length, header, all of the data


@pytest.mark.parametrize("chunk", [1, 7, 64, 97])
def test_a_chunk_may_end_anywhere_in_a_tensor(project: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = HashedFile.chunks
    monkeypatch.setattr(HashedFile, "chunks", lambda self, start, end: whole(self, start, end, chunk))

    lora_build.verify(project / "out")


@given(st.dictionaries(st.text(), st.sampled_from(["a.safetensors", "b ü.safetensors"])))
def test_an_index_is_what_json_with_an_indent_writes(weight_map: dict[str, str]) -> None:
    metadata = {"total_parameters": 5, "total_size": 10}
    expected = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"

    assert format_index(weight_map, total_parameters=5, total_size_bytes=10).decode() == expected


def _header_of(path: Path) -> list[tuple[int, int]]:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return [(0, 8), (8, 8 + length)]


def _count(monkeypatch: pytest.MonkeyPatch, name: str, *, also: str = "") -> list[tuple[Any, ...]]:
    """Return a list that gets the arguments of each call of a function, by either name."""
    calls: list[tuple[Any, ...]] = []
    original = pkgutil.resolve_name(name)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **keywords)

    for place in filter(None, (name, also)):
        monkeypatch.setattr(place, counted)
    return calls
