"""The JSON Schemas in docs/schemas: what is written and printed holds to them, and they allow nothing that nobody knows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME
from lora_build.recipe.declared import every_key
from lora_build.recipe.json_schema import described, schema_text
from lora_build.recipe.strict_yaml import read_yaml
from makers import small
from makers.bad_inputs import make_project
from makers.bad_inputs.recipes import ROWS
from makers.recipes import LONG, SHORT
from makers.schemas import FOLDER, SCHEMAS, hold

ROOT = Path(__file__).parent.parent.parent
OPEN = {"options", "config_changes", "config", "recipe", "checks", "annotations", "additionalProperties"}
"""What recipes, bases and adapters may say."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    (tmp_path / "recipes/two.yaml").write_text(
        "base: ./base\nadapters: {math: ./math, code: {source: ./code, weight: 0.5}}\ndtype: float16\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Any:
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_there_is_a_schema_for_each_format_and_each_names_its_version() -> None:
    kinds = (
        "aliases build builds check composed diff error event explanation gc init inspection lock locking manifest "
        "manifest-v1 pinned pins plan points promoted provenance recipe recipes report scored scores since survival sweep "
        "unpinned "
        "verification "
        "version"
    )
    assert sorted(SCHEMAS) == kinds.split()
    for kind, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        name, version = kind.removesuffix("-v1"), 2 if kind in ("manifest", "plan") else 1
        assert schema["$id"] == f"https://lora-build.dev/schemas/{name}-v{version}.json"
        # provenance has in-toto's, and its buildType; people write recipes
        if kind not in ("error", "provenance", "recipe"):
            assert schema["properties"]["schema"] == {"const": f"lora-build/{name}/v{version}"}


def objects(schema: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the schema of each object, by the key that it is at."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield name, schema
        for key, part in schema.items():
            yield from objects(part, name if key in ("items", "anyOf") else key)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part, name)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_allows_no_key_that_it_does_not_name(kind: str) -> None:
    found = [name for name, schema in objects(SCHEMAS[kind]) if "additionalProperties" not in schema]
    assert set(found) <= OPEN


# --- the recipe's -------------------------------------------------------------------------------------------------


def of_recipes(page: Path) -> Iterator[str]:
    yield from re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def read(text: str, folder: Path) -> Any:
    (folder / "x.yaml").write_text(text)
    return read_yaml(folder / "x.yaml")


def test_the_recipe_s_schema_is_the_one_that_the_package_makes(update_goldens: bool) -> None:
    file = FOLDER / "recipe.schema.json"
    if update_goldens:
        file.write_text(schema_text())
    assert file.read_text() == schema_text()


def test_every_recipe_of_the_repository_and_its_pages_holds_to_the_schema(tmp_path: Path) -> None:
    texts = [path.read_text() for path in (ROOT / "recipes").rglob("*.yaml")]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        texts += [text for text in of_recipes(page) if not text.startswith("# refused: ")]
    assert len(texts) >= 12
    for text in texts:
        hold(read(text, tmp_path), "recipe")


@pytest.mark.parametrize(
    "form", [*SHORT.values(), {"output": "./x"}, {"adapters": {"one": None}}, {"dtype": {"*": "float16"}}]
)
def test_short_forms_hold_to_the_recipe_s_schema(form: dict[str, Any]) -> None:
    hold(LONG | form, "recipe")


FILES = {
    "an adapter": "source: org/math@v1\nweight: 0.5\n",
    "an heir": "defaults: [_base, {adapter: [math, code]}, {override adapter@adapters.x: null}, _self_]\nadapters: {a: null}\n",
    "a sweep": "defaults: [{override /recipe: prod}, {override /hydra/launcher: joblib}]\nrecipe: {dtype: float16}\n"
    "hydra: {sweeper: {params: {recipe.dtype: 'keep,float32', recipe.adapters.m.weight: 1}, n_trials: 3}, launcher: {n_jobs: 2}}\n",
    "a sweep by its defaults": "defaults: [{override /recipe: prod}]\n",
    "references": "base: ${recipe.root}/x\nadapters: {m: {source: './${recipe.name}', weight: '${recipe.adapters.a.weight}'}}\n",
    "nothing": "",
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_holds_to_the_recipe_s_schema(kind: str, tmp_path: Path) -> None:
    hold(read(FILES[kind], tmp_path), "recipe")


BAD = [
    *(name for name in ROWS if name.startswith(("weight ", "dtype ", "a revision that reads as "))),
    "an unknown key", "a _target_", "logging of Hydra's", "adapter_names with a typing error", "a path with NUL",
]  # fmt: skip
NOT_TOLD = {
    "weight .inf", "weight -.inf", "weight 1e400", "weight .nan",  # numbers, to JSON Schema
    "adapter_names with a typing error", "a path with NUL",  # which only the whole of it tells
}  # fmt: skip


@pytest.mark.parametrize("row", BAD)
def test_a_bad_recipe_does_not_hold_to_the_schema_where_a_schema_can_tell(row: str, tmp_path: Path) -> None:
    ROWS[row].change(make_project(tmp_path))
    is_valid = Draft202012Validator(SCHEMAS["recipe"]).is_valid(read_yaml(tmp_path / "recipes/prod.yaml"))
    assert is_valid is (row in NOT_TOLD)


@pytest.mark.parametrize(
    "text",
    ["base: {source: a/b/c}", "base: https://hub/x", "adapters: {2x: ./a}", "adapters: [{name: a.b, source: ./a}]", "name: a/b",
     "output: {max_shard_size: 5 gigs}", "output: {max_shard_size: 0}", "output: {if_exist: fail}", "dtype: {}", "[1]",
     "source: ./x\nscale: 2", "source: ./x\nbase: ./y", "recipe: {dtyp: keep}", "hydra: {callbacks: {}}", "defaults: _base",
     "defaults: [{hydra/callbacks: x}]", "hydra: {sweeper: {params: {hydra.callbacks: x}}}", "checks: {forward: {sed: 1}}"],
)  # fmt: skip
def test_mistakes_do_not_hold_to_the_recipe_s_schema(text: str) -> None:
    assert not Draft202012Validator(SCHEMAS["recipe"]).is_valid(yaml.safe_load(text))


def test_every_key_says_what_it_is_to_an_editor() -> None:
    keys = {path for path, _, _ in every_key()}
    assert all(len(described(key)) > 10 and "](" not in described(key) for key in keys)
    said = {schema["description"] for _, schema in objects_with("description", SCHEMAS["recipe"])}
    assert {described(key) for key in keys} <= said


def objects_with(key: str, schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield each part of a schema that has a text at a key."""
    if isinstance(schema, dict):
        if isinstance(schema.get(key), str):
            yield key, schema
        for part in schema.values():
            yield from objects_with(key, part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects_with(key, part)


# --- what is written and printed ----------------------------------------------------------------------------------


def test_what_a_build_leaves_holds_to_its_schemas(project: Path, printed: Any) -> None:
    for recipe, folder in (("prod", "out"), ("two", "builds/two")):
        hold(printed(f"recipe={recipe}"), "build")
        hold(printed(f"recipe={recipe}"), "build")
        for kind, name in (("manifest", MANIFEST_NAME), ("survival", SURVIVAL_NAME), ("provenance", PROVENANCE_NAME)):
            hold(json.loads((project / folder / name).read_text()), kind)


def test_the_manifests_of_older_releases_hold_to_the_schemas_of_their_time() -> None:
    for manifest in (Path(__file__).parent.parent / "golden/releases").rglob(MANIFEST_NAME):
        document = json.loads(manifest.read_text())
        hold(document, "manifest" if document["schema"].endswith("v2") else "manifest-v1")


def test_what_commands_print_holds_to_their_schemas(project: Path, printed: Any) -> None:
    hold(printed("plan", "recipe=two"), "plan")
    hold(printed("plan", "recipe=two", "--tensors"), "plan")
    hold(printed("recipe=prod"), "build")
    hold(printed("plan", "recipe=prod"), "plan")
    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2) * 2)
    hold(printed("plan", "recipe=prod", "--tensors"), "plan")
    hold(printed("recipe=prod"), "build")
    (project / "out/README.md").write_text("x")
    hold(printed("verify", "out", "base"), "verification")
    hold(printed("verify", "--rebuild", "out"), "verification")
    (project / "out" / PROVENANCE_NAME).unlink()
    hold(printed("verify", "out", f"--expect={lora_build.verify('out').manifest_hash}"), "verification")
    (project / "out" / SURVIVAL_NAME).write_text("x")
    hold(printed("verify", "out"), "verification")
    hold(printed("inspect", "./math"), "inspection")
    hold(printed("inspect", "./math", "--base", "./base"), "inspection")
    hold(printed("diff", "out", "base", "--weights"), "diff")
    hold(printed("diff", "out", "recipe=two"), "diff")
    hold(printed("diff", "recipe=prod"), "diff")
    hold(printed("list"), "recipes")
    hold(printed("lock", "recipe=two"), "locking")
    hold(json.loads((project / "recipes/lora-build.lock").read_text()), "lock")
    hold(printed("init", "./math", "--base", "./base"), "init")
    hold(printed("merge", "./base", "./math", "-o", "merged"), "build")
    hold(printed("check"), "check")
    hold(printed("pin", "out"), "pinned")
    hold(json.loads((project / ".lora-build/pins.json").read_text()), "pins")
    hold(printed("builds", ".", "out"), "builds")
    hold(printed("gc", ".", "--builds"), "gc")
    hold(printed("unpin", "out"), "unpinned")
    hold(printed("--version"), "version")
    hold(printed("recipe=two", "--cfg", "job"), "composed")
    hold(printed("recipe=nope"), "error")
    for words in (["out"], ["recipe=prod", "*q_proj*"], ["recipe=two"], ["out", "model.norm.weight"]):
        hold(printed("explain", *words), "explanation")


def test_what_a_sweep_prints_holds_to_its_schema(project: Path, printed: Any) -> None:
    hold(printed("-m", "recipe=two", "dtype=float32,keep"), "sweep")
    hold(printed("plan", "-m", "recipe=two", "dtype=float32,keep"), "points")


@pytest.mark.long
def test_the_reports_of_the_checks_hold_to_their_schema(tmp_path: Path, printed: Any) -> None:
    demo = Path(__file__).parent.parent.parent / "examples/tiny"
    adapters = [str(demo / "math"), str(demo / "text")]
    lora_build.build({"base": str(demo / "base"), "adapters": adapters, "output": {"dir": str(tmp_path / "out")}})
    hold(printed("verify", "--forward", "--wrapper", str(tmp_path / "out")), "verification")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (MANIFEST_NAME, "lora-build/manifest/v2", "lora-build/manifest/v3"),
        (PROVENANCE_NAME, "lora-build.dev/merge/v1", "lora-build.dev/merge/v2"),
        (SURVIVAL_NAME, "lora-build/survival/v1", "lora-build/survival/v2"),
    ],
)
def test_a_newer_format_is_refused_by_name(project: Path, name: str, old: str, new: str) -> None:
    lora_build.build(lora_build.load_recipe("prod"))
    file = project / "out" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))

    with pytest.raises(LoraBuildError) as caught:
        lora_build.verify("out")
    assert caught.value.exit_code == 3
    assert new in str(caught.value)
    assert "was made by a newer lora-build" in str(caught.value)
    assert "upgrade" in str(caught.value)
