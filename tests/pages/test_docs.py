"""The documents: every key and field is in them, what they show runs, and what they say is so.

A block that names its file in a first comment (`# recipes/prod.yaml`) is that file; one that begins with `# refused:` is a
recipe with the message that refuses it. Commands are planned, not built.
"""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import lora_build
import lora_build.methods.interface
from judges.oracle import long, ulps_off
from lora_build.cli import main as app
from lora_build.errors import LoraBuildError
from lora_build.methods.interface import PlacedUpdate, Update
from lora_build.pipeline import prepare
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME, read_manifest
from lora_build.recipe import files as recipe_files
from lora_build.recipe.declared import every_key
from lora_build.recipe.schema import AdapterSpec, Recipe
from lora_build.recipe.shorthand import expand
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import flatten
from makers import layers, small
from makers import zoo as zoos
from makers.families import FAMILIES
from test_house import FLOORS

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Return a page's section of any level, without the sections after it."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text(page), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def rows(part: str) -> list[list[str]]:
    """Return the cells of a part's table, without its head."""
    lines = [line.strip().strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def fields(value: Any, path: str = "", leaves: tuple[str, ...] = ()) -> set[str]:
    """Return the paths of a JSON value, `[]` for any object of a list; what is at `leaves` is not looked into."""
    if path in leaves:
        return {path}
    if isinstance(value, dict):
        return {p for key, item in value.items() for p in fields(item, f"{path}.{key}".strip("."), leaves)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {p for item in value for p in fields(item, f"{path}[]", leaves)}
    return {path}


# --- all pages ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_these_pages() -> None:
    names = [
        "adding-a-method.md",
        "ci.md",
        "combining.md",
        "comparing.md",
        "contributing.md",
        "how-it-works.md",
        "keeping.md",
        "locking.md",
        "manifest.md",
        "performance.md",
        "planning.md",
        "proving.md",
        "recipe.md",
        "reliability.md",
        "reporting.md",
        "scoring.md",
        "supported.md",
        "sweeping.md",
    ]
    assert [page.name for page in PAGES] == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


# --- how-it-works.md ------------------------------------------------------------------------------------------


def test_the_rooms_are_those_of_the_package_and_stand_as_the_tests_hold_them() -> None:
    documented = [spans(row[0])[0] for row in rows(section("how-it-works.md", "The rooms"))]
    package = Path(lora_build.__file__).parent
    there = {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    there |= {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    assert {name.rstrip("/") for name in documented} == there
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    stands = [floor[name.rstrip("/").removesuffix(".py")] for name in documented]
    assert stands == sorted(stands, reverse=True)


# --- contributing.md ------------------------------------------------------------------------------------------


def test_a_change_touches_files_that_are_there_and_makes_ones_that_are_not() -> None:
    table = rows(section("contributing.md", "Where a change goes"))
    assert len(table) == 12
    for _, files in table:
        new = re.findall(r"\*`([^`]+\.py)`\*", files)
        old = [name for name in re.findall(r"`((?:lora_build|tests|docs)/[^`]+)`", files) if name not in new]
        assert [name for name in old if not (DOCS.parent / name).is_file()] == []
        assert [name for name in new if (DOCS.parent / name).exists()] == []


# --- recipe.md ------------------------------------------------------------------------------------------------


def schema(kind: Any = Recipe, path: str = "") -> dict[str, Any]:
    """Return the type of each key of the recipe, by dotted path; an adapter is called NAME."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind).items():
        if key == "composed":  # no key
            continue
        found[f"{path}{key}"] = hint
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind_of = next((one for one in kinds if dataclasses.is_dataclass(one)), hint)
        if dataclasses.is_dataclass(kind_of):
            found |= schema(kind_of, f"{path}{key}.")
    if kind is Recipe:
        found |= {"adapters.NAME": AdapterSpec} | schema(AdapterSpec, "adapters.NAME.")
    return found


def test_every_key_of_the_recipe_is_documented_and_every_documented_key_exists() -> None:
    documented = [spans(row[0])[0] for row in rows(section("recipe.md", "Keys"))]
    assert len(documented) == len(set(documented))
    assert set(documented) == set(schema())


def test_the_documented_choices_and_defaults_are_those_of_the_schema() -> None:
    defaults: dict[str, Any] = flatten(dataclasses.asdict(Recipe()))
    defaults |= {f"adapters.NAME.{key}": value for key, value in dataclasses.asdict(AdapterSpec()).items()}
    words = {"???": "must be set", "None": "null", "True": "true", "": "empty", "()": "[]"}
    for key, kind, default, _ in rows(section("recipe.md", "Keys")):
        hint = schema()[name := spans(key)[0]]
        if isinstance(hint, type) and issubclass(hint, Enum):
            assert spans(kind) == [member.value for member in hint], name
        if name in defaults and name not in ("name", "root"):  # those follow from the file
            value = defaults[name].value if isinstance(defaults[name], Enum) else defaults[name]
            assert default.strip("`") == words.get(str(value), str(value)), name


def test_what_the_page_says_of_a_key_is_what_the_schema_says_of_it(update_goldens: bool) -> None:
    says = {path: key.metadata["each" if path == "adapters.NAME" else "says"] for path, key, _ in every_key()}
    if update_goldens:
        fresh = [re.sub(r"^(\| `([\w.]+)` \|.*\|.*\|).*\|$", lambda m: f"{m[1]} {says[m[2]]} |", line) if line in table else line
                 for table in [section("recipe.md", "Keys").splitlines()] for line in text("recipe.md").splitlines()]  # fmt: skip
        (DOCS / "recipe.md").write_text("\n".join(fresh) + "\n", encoding="utf-8")
    assert {spans(row[0])[0]: row[3] for row in rows(section("recipe.md", "Keys"))} == says


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the files of recipe.md, and the models that they name."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    small.make_base(tmp_path / "models/base")
    small.make_adapter(tmp_path / "loras/math")
    small.make_adapter(tmp_path / "loras/code", seed=90)
    for block in blocks("recipe.md", "yaml"):
        first, _, body = block.partition("\n")
        if not first.startswith("# refused: "):
            file = tmp_path / first.removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body)
    return tmp_path


def test_every_yaml_block_names_a_file_or_its_refusal() -> None:
    firsts = [block.partition("\n")[0] for block in blocks("recipe.md", "yaml")]
    assert len(firsts) == 18
    assert all(re.fullmatch(r"# (recipes/[\w/]+\.yaml|refused: .+)", first) for first in firsts), firsts


def test_every_recipe_in_the_document_loads(project: Path) -> None:
    folder = recipe_files.folders()[0]
    assert folder.path == project / "recipes"
    names = folder.names()
    assert names == ["chat", "full", "picked", "preferred", "prod", "short", "team/chat"]
    loaded = {name: lora_build.load_recipe(name) for name in names}
    assert loaded["full"] == dataclasses.replace(
        Recipe(),
        **{f: getattr(loaded["full"], f) for f in ("name", "base", "adapters", "root")},
        output=dataclasses.replace(Recipe().output, dir="builds/full"),
    )
    assert loaded["full"].root == loaded["prod"].root
    assert {name: spec.weight for name, spec in loaded["team/chat"].adapters.items()} == {"math": 0.5}
    assert {name: spec.weight for name, spec in loaded["picked"].adapters.items()} == {"math": 1.0, "code": 0.5}
    for name in set(names) - {"full"}:  # full reads the Hub
        prepare(loaded[name])


def test_every_short_form_means_what_the_page_says() -> None:
    table = rows(section("recipe.md", "What is short for what"))
    assert len(table) == 10
    for short, meant in table:
        assert expand(yaml.safe_load(spans(short)[0])) == expand(yaml.safe_load(spans(meant)[0]))


def test_every_refused_recipe_is_refused_with_the_message_in_the_document(project: Path) -> None:
    refused = [block for block in blocks("recipe.md", "yaml") if block.startswith("# refused: ")]
    assert len(refused) == 7
    for block in refused:
        (project / "recipes/refused.yaml").write_text(block)
        with pytest.raises(LoraBuildError) as caught:
            lora_build.load_recipe("refused")
        assert block.partition("\n")[0].removeprefix("# refused: ") in str(caught.value)


def commands() -> list[str]:
    lines = [line for block in blocks("recipe.md", "sh") for line in block.splitlines()]
    assert all(line.startswith("lora-build ") for line in lines)
    return lines


def test_every_command_in_the_document_can_be_planned(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()) == 21
    folders = []
    for command in commands():
        words = shlex.split(command, comments=True)[1:]
        assert app.main(["plan", "--json", *(word for word in words if word != "plan")]) == 0, command
        result = json.loads(capsys.readouterr().out)
        folders += [str(Path(point["dir"]).relative_to(project)) for point in result.get("points", [])]
    (shown,) = re.findall(r"^builds/prod-.*$", text("recipe.md"), re.MULTILINE)
    assert shown in folders


def test_every_command_of_the_way_in_prints_what_is_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [block.removeprefix("$ ").partition("\n") for block in blocks("recipe.md", "console")]
    assert len(shown) == 2
    for command, _, lines in shown:
        assert app.main(shlex.split(command)[1:]) == 0
        pattern = re.escape(lines).replace(re.escape("..."), ".*")
        assert re.fullmatch(pattern, capsys.readouterr().out, re.DOTALL), command
    lora_build.plan(lora_build.load_recipe("first"))


def test_the_python_of_the_recipe_s_page_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("recipe.md", "python")
    exec(compile(code, "recipe.md", "exec"), {})
    (prod,) = (project / "builds").glob("prod-*-dtype_float32-*")
    assert capsys.readouterr().out == read_manifest(prod).manifest_hash + "\n"
    assert (project / "builds/math" / MANIFEST_NAME).is_file()


# --- manifest.md ----------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """The build that manifest.md shows."""
    small.make_base(tmp_path / "base")
    (tmp_path / "base/onnx").mkdir()
    (tmp_path / "base/onnx/model.onnx").touch()
    small.make_adapter(tmp_path / "math")
    (tmp_path / "math/chat_template.jinja").touch()
    small.make_adapter(tmp_path / "code", seed=90)
    code = {"source": str(tmp_path / "code"), "weight": 0.3}
    lora_build.build(small.recipe(tmp_path, adapters={"math": str(tmp_path / "math"), "code": code}))
    return tmp_path / "out"


def test_the_example_is_the_manifest_that_a_build_writes_today(built: Path, update_goldens: bool) -> None:
    data = (built / MANIFEST_NAME).read_bytes()
    (shown,) = blocks("manifest.md", "json")
    if update_goldens:
        fresh = json.dumps(json.loads(data), indent=1, ensure_ascii=False) + "\n"
        fresh = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", fresh)  # shapes in one line
        (DOCS / "manifest.md").write_text(text("manifest.md").replace(shown, fresh), encoding="utf-8")
        shown = fresh
    assert canonical_json(json.loads(shown)) + b"\n" == data


OPTIONAL = {
    "plan.options.reproducibility",
    "plan.adapters[].weights",
    "plan.adapters[].density",
    "plan.adapters[].order",
    "plan.changes",
    "tensors[].source",
} | {
    f"tensors[].segments[].updates[].{key}" for key in ("transposed", "expert", "rows", "ordered", "options", "density")
}
OPAQUE = (
    "tensors[].segments[].updates[].factors",
    "predicate.buildDefinition.externalParameters.recipe",
    "predicate.runDetails.builder.version",
)


@pytest.mark.parametrize("file", [MANIFEST_NAME, SURVIVAL_NAME, PROVENANCE_NAME])
def test_every_field_is_documented_and_every_documented_field_is_there(built: Path, file: str) -> None:
    title = f"Fields of {file}" if file == MANIFEST_NAME else file
    documented = [spans(row[0])[0] for row in rows(section("manifest.md", title))]
    assert len(documented) == len(set(documented))
    assert set(documented) - OPTIONAL == fields(json.loads((built / file).read_text()), leaves=OPAQUE)


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (code,) = blocks("manifest.md", "python")
    assert len(code.splitlines()) == 8
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "manifest.md", "exec"), names)
    return names


def test_the_python_of_the_manifest_s_page_recomputes_the_digests(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_snippet(built, monkeypatch)
    manifest = read_manifest(built)
    assert names["digest"](names["m"]["plan"] | {"tensors": names["done"]}) == manifest.build_key
    assert names["m"]["output_digest"] == manifest.output_digest
    assert names["m"]["weights_digest"] == manifest.weights_digest


@pytest.mark.parametrize("field", ["plan", "files", "tensors"])
def test_the_python_of_the_manifest_s_page_finds_an_edit(
    built: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    document = json.loads((built / MANIFEST_NAME).read_bytes())
    edited = document[field] if field == "plan" else document[field][0]
    edited[{"plan": "base", "files": "sha256", "tensors": "blake3"}[field]] = "other"
    (built / MANIFEST_NAME).write_bytes(canonical_json(document))
    with pytest.raises(AssertionError):
        run_snippet(built, monkeypatch)


def test_a_manifest_and_provenance_made_anew_are_told_by_the_hash_alone(built: Path) -> None:
    before = lora_build.verify(built).manifest_hash
    manifest = read_manifest(built)
    tensors = tuple(
        dataclasses.replace(t, operation="convert") if t.operation == "copy" else t for t in manifest.plan.tensors
    )
    made_up = dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, tensors=tensors))
    (built / MANIFEST_NAME).write_bytes(made_up.to_bytes())
    (built / PROVENANCE_NAME).unlink()
    assert lora_build.verify(built).manifest_hash != before
    with pytest.raises(lora_build.VerificationError, match="expected " + before):
        lora_build.verify(built, expect=before)


def test_verify_exits_as_documented(built: Path) -> None:
    assert app.main(["verify", str(built)]) == 0
    assert app.main(["verify", str(built.parent / "nowhere")]) == 2
    assert app.main(["verify", str(built.parent)]) == 2
    (built / "extra.bin").write_text("x")
    assert app.main(["verify", str(built), str(built.parent)]) == 3


# --- adding-a-method.md ---------------------------------------------------------------------------------------


@pytest.fixture
def hira(tmp_path: Path) -> Iterator[None]:
    """The method of adding-a-method.md, in the package until the test is over."""
    (code,) = blocks("adding-a-method.md", "python")
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "hira.py").write_text(code, encoding="utf-8")
    lora_build.methods.__path__.append(str(folder))
    importlib.invalidate_caches()
    lora_build.methods.interface.methods.cache_clear()
    yield
    lora_build.methods.__path__.remove(str(folder))
    sys.modules.pop("lora_build.methods.hira", None)
    vars(lora_build.methods).pop("hira", None)
    lora_build.methods.interface.methods.cache_clear()


TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],  # Conv1D
    "opt": ["k_proj", "v_proj", "fc2"],
}


def make_hira(zoo: zoos.Zoo, arch: str, folder: Path, seed: int = 0) -> Path:
    """Return an adapter that peft saved, with factors that training might have left."""
    config = HiraConfig(r=4, target_modules=TARGETS[arch], fan_in_fan_out=FAMILIES[arch].conv1d)
    generator = torch.Generator().manual_seed(seed)
    with zoos.quiet():
        model = get_peft_model(zoos.load_model(arch, zoo.base(zoos.Base(arch=arch))), config)
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.usefixtures("hira")
def test_the_method_of_the_document_merges_as_peft_does(arch: str, zoo: zoos.Zoo, tmp_path: Path) -> None:
    base = zoo.base(zoos.Base(arch=arch))
    adapter = make_hira(zoo, arch, tmp_path / "hira")
    manifest = lora_build.build(
        {"base": base, "adapters": {"hira": adapter}, "output": {"dir": tmp_path / "out"}}
    ).manifest
    with zoos.quiet():
        model = zoos.load_model(arch, base).double()
        peft = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()

    merged, before = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, before[name])]
    assert sorted(changed) == sorted(t.name for t in manifest.tensors if t.operation == "merge")
    assert len(changed) == {"llama": 6, "gpt2": 4, "opt": 6}[arch]
    for name, tensor in merged.items():
        assert np.max(ulps_off(tensor, long(peft[name]), before[name], tensor.dtype)) <= 0.51, name


@pytest.mark.usefixtures("hira")
def test_the_method_of_the_document_gives_the_same_bits_in_any_order_of_adapters(zoo: zoos.Zoo, tmp_path: Path) -> None:
    adapters = {name: make_hira(zoo, "opt", tmp_path / name, seed) for seed, name in enumerate("abc")}
    base = zoo.base(zoos.Base(arch="opt"))
    hashes = {
        lora_build.build(
            {"base": base, "adapters": {n: adapters[n] for n in order}, "output": {"dir": tmp_path / order}}
        ).manifest.manifest_hash
        for order in ("abc", "cab", "bca")
    }
    assert len(hashes) == 1


@pytest.mark.usefixtures("hira")
def test_the_method_of_the_document_honours_rows_and_storage() -> None:
    update = Update(adapter="a", method="HIRA", scale=0.5, factors={})
    placed = PlacedUpdate(update=update, start=0, stop=6)
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))

    def merge(stored: torch.Tensor, **changes: Any) -> torch.Tensor:
        return layers.merge(
            [(dataclasses.replace(placed, **changes), {"A": A, "B": B})], stored, torch.float32, step=2
        )[0]

    whole = merge(W)
    assert torch.allclose(whole, W + 0.5 * W * (B @ A), atol=1e-6)
    assert torch.equal(merge(W.T.contiguous(), transposed=True), whole.T)
    assert torch.equal(merge(W[[4, 0, 2]], rows=(4, 0, 2)), whole[[4, 0, 2]])
    assert torch.equal(merge(W.T[[3, 1]], transposed=True, rows=(3, 1)), whole.T[[3, 1]])


@pytest.mark.usefixtures("hira")
def test_the_method_of_the_document_gives_beside_the_weight_what_it_merges() -> None:
    update = Update(adapter="a", method="HIRA", scale=0.5, factors={})
    placed = PlacedUpdate(update=update, start=0, stop=6)
    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*shape, generator=generator) for shape in ((2, 5), (6, 2), (3, 5)))
    module, crossed = torch.nn.Linear(5, 6).requires_grad_(False), Conv1D(6, 5).requires_grad_(False)
    crossed.weight.data, crossed.bias.data = module.weight.T.clone(), module.bias.clone()
    after = module.weight * (1 + 0.5 * B @ A) - module.weight * (B @ A)

    for layer, transposed in ((module, False), (crossed, True)):
        updates = [
            dataclasses.replace(placed, transposed=transposed, update=dataclasses.replace(update, scale=scale))
            for scale in (0.5, -1.0)
        ]
        call = lora_build.methods.interface.Call(module=layer, input=x, base=layer.forward)
        y = lora_build.methods.interface.methods()["HIRA"].forward([(u, {"A": A, "B": B}) for u in updates], call)
        assert torch.allclose(y, x @ after.T + module.bias, atol=1e-5)


@pytest.mark.usefixtures("hira")
def test_the_method_of_the_document_refuses_what_it_does_not_know(zoo: zoos.Zoo, tmp_path: Path) -> None:
    base = zoo.base(zoos.Base(arch="llama"))
    adapter = make_hira(zoo, "llama", tmp_path / "hira")

    def refusal(**spec: Any) -> str:
        recipe = {"base": base, "adapters": {"hira": {"source": adapter, **spec}}, "output": {"dir": tmp_path / "out"}}
        with pytest.raises(lora_build.PlanError) as caught:
            prepare(from_mapping(recipe))
        return str(caught.value)

    small.edit(adapter, k_proj__hira_B=torch.ones(3, 4))
    assert "k_proj: hira_B @ hira_A is [3, 32], the base's weight is [16, 32]; was it trained" in refusal()
    small.edit(adapter, k_proj__hira_B=torch.ones(16, 3))
    assert "hira_A is [4, 32] and hira_B is [16, 3], but adapter_config.json says rank 4 for them" in refusal()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_new_thing": True}))
    assert "use_new_thing: is not a key that this version knows" in refusal()


def test_the_tables_of_goals_and_sizes_are_what_the_results_say() -> None:
    script = DOCS.parent / "benchmarks/goals.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
