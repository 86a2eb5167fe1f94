"""What two builds differ in: the right reason, every byte that is read, and never `equal` where nobody knows."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.files.formats.safetensors import read_tensors
from lora_build.files.identity import Digest, SourceName
from lora_build.proof.comparing.result import BuildDiff
from lora_build.proof.diff import compare_builds
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, read_manifest
from makers import hub_server, small

RELEASES = Path(__file__).parents[1] / "golden/releases"
Q_PROJ = "model.layers.*.self_attn.q_proj.weight"
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}},
    "added_tokens": [{"id": 3, "content": "</s>", "special": True}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters, and builds that nobody may change: a of math, b of math and code, c in float32."""
    root = tmp_path_factory.mktemp("diff")
    small.make_base(root / "base")
    (root / "base/tokenizer.json").write_text(json.dumps(TOKENIZER))
    (root / "base/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "one\ntwo\n"}))
    small.make_adapter(root / "math")
    small.make_adapter(root / "code", seed=90)
    build(root, "a", "math")
    build(root, "b", "math", "code")
    build(root, "c", "math", dtype="float32")
    return root


def build(root: Path, out: str, *adapters: str, **more: Any) -> Path:
    recipe = small.recipe(root, *adapters, output={"dir": str(root / out)}, **more)
    return lora_build.build(recipe).dir


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of what is there, to be spoilt."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def kinds(found: BuildDiff) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in found.tensors}


# --- what they were made of ----------------------------------------------------------------------------------------


def test_a_build_is_equal_to_itself_and_to_its_copy_elsewhere(
    made: Path, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = copied("a")
    monkeypatch.chdir(tmp_path)
    for found in (
        lora_build.diff(made / "a", made / "a"),
        lora_build.diff(made / "a", "a"),
        lora_build.diff(there, there, weights=True),
    ):
        assert found.is_equal
        assert not found.is_different
        assert (found.files, found.tensors, found.keys, found.manifests) == ((), (), (), ())


def test_a_comment_another_place_and_another_working_directory_are_no_difference(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "math"):
        shutil.copytree(made / name, tmp_path / "moved" / name)
    recipes = tmp_path / "moved/recipes"
    recipes.mkdir()
    (recipes / "x.yaml").write_text("# a comment\nbase: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    monkeypatch.chdir(tmp_path / "moved")
    recipe = lora_build.load_recipe("x")
    lora_build.build(recipe)

    assert lora_build.diff(made / "a", "out", weights=True).is_equal
    assert lora_build.diff(lora_build.plan(recipe)).is_equal


def test_another_name_for_an_adapter_is_no_difference(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "math", tmp_path / "sums")
    assert lora_build.diff(made / "a", build(tmp_path, "out", "sums")).is_equal


def test_one_byte_of_an_adapter_is_named_with_the_tensors_that_it_changed(made: Path, tmp_path: Path) -> None:
    for name in ("base", "math"):
        shutil.copytree(made / name, tmp_path / name)
    path = tmp_path / "math/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40  # of a value of the last tensor in the file: lora_B of layer 1
    path.write_bytes(data)
    found = lora_build.diff(made / "a", build(tmp_path, "out", "math"))

    assert found.plans is not None
    (reason,) = found.plans.reasons
    assert reason.startswith("adapters.math changed (")
    assert reason.endswith("), 2 of 3 tensors")  # of which the bytes say which
    assert kinds(found) == {"model.layers.1.self_attn.q_proj.weight": "changed"}
    assert [(g.pattern, len(g.names), g.num_alike, g.layers) for g in found.groups] == [(Q_PROJ, 1, 2, "1")]


def test_an_option_and_what_came_of_it_are_named(made: Path) -> None:
    found = lora_build.diff(made / "a", made / "c")

    assert found.plans is not None
    assert found.plans.reasons == ("option dtype: keep to float32",)
    assert [(key.file, key.key, key.before, key.after) for key in found.keys] == [
        ("config.json", "dtype", "bfloat16", "float32")
    ]
    assert [group.what for group in found.groups] == ["merge math, BF16 to F32", "copy to convert, BF16 to F32"]


def test_an_adapter_that_came_and_one_that_went_are_named(made: Path) -> None:
    there, back = lora_build.diff(made / "a", made / "b"), lora_build.diff(made / "b", made / "a")

    assert there.plans is not None
    assert back.plans is not None
    assert there.plans.reasons == ("adapters.code added, 2 of 3 tensors",)
    assert back.plans.reasons == ("adapters.code removed, 2 of 3 tensors",)
    assert [group.what for group in there.groups] == ["merge math to merge code, math"]


def test_the_commits_of_an_input_that_differs_are_said(
    made: Path, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    small.make_adapter(tmp_path / "math", seed=70)
    one, other = copied("a"), build(tmp_path, "out", "math")
    for folder, digit in ((one, "1"), (other, "2")):
        path = folder / PROVENANCE_NAME
        statement = json.loads(path.read_text())
        for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
            entry["uri"] = f"hf://acme/{entry['name']}@{digit * 40}/{entry['uri'].rpartition('/')[2]}"
        path.write_text(json.dumps(statement))
    found = lora_build.diff(one, other)

    assert found.plans is not None
    (reason,) = found.plans.reasons  # of the base, which is the same, nothing
    assert reason.startswith("adapters.math changed (")
    assert reason.endswith(") (commit 1111111 to commit 2222222), 2 of 3 tensors")


def test_what_only_the_manifests_say_differently_is_said(made: Path, tmp_path: Path) -> None:
    for name in ("base", "math"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "base/README.md").write_text("a model")
    found = lora_build.diff(made / "a", build(tmp_path, "out", "math"))

    assert found.manifests == ("left out after: base/README.md (the base's model card)",)
    assert found.is_different


def test_the_same_bytes_that_were_planned_in_another_way_are_no_equals(
    made: Path, copied: Callable[[str], Path]
) -> None:
    other = copied("a")
    manifest = read_manifest(other)
    first, *rest = manifest.plan.tensors
    (segment,) = first.segments
    updates = tuple(dataclasses.replace(update, scale=3.0) for update in segment.updates)
    first = dataclasses.replace(first, segments=(dataclasses.replace(segment, updates=updates),))
    plan = dataclasses.replace(manifest.plan, tensors=(first, *rest))
    (other / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, plan=plan).to_bytes())

    found = lora_build.diff(made / "a", other)
    assert found.manifests == (f"{first.name} planned in another way, to the same bytes",)
    assert found.is_different


# --- what came out -------------------------------------------------------------------------------------------------


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", MANIFEST_NAME)


@pytest.fixture(scope="module")
def spoilt(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """Builds of which one byte is another."""
    root = tmp_path_factory.mktemp("spoilt")

    def spoil(name: str, place: int, bits: int) -> Path:
        shutil.copytree(made / "a", root / "a", dirs_exist_ok=True)
        data = bytearray((root / "a" / name).read_bytes())
        data[place % len(data)] ^= bits
        (root / "a" / name).write_bytes(data)
        return root / "a"

    return spoil


def seen(one: Path, other: Path, *, weights: bool) -> str:
    """Return the files that a diff says differ, or its refusal of what is none: a manifest that was edited, a header."""
    try:
        found = lora_build.diff(one, other, weights=weights)
    except (VerificationError, SourceError) as error:
        return str(error)
    return ", ".join(file.path for file in found.files) if found.is_different else "nothing"


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8)
@given(place=st.integers(0, 1 << 20), bits=st.integers(1, 255))
def test_any_other_byte_in_any_file_of_a_build_is_seen_where_files_are_read(
    made: Path, spoilt: Callable[[str, int, int], Path], name: str, place: int, bits: int
) -> None:
    assert name in seen(made / "a", spoilt(name, place, bits), weights=True)


@pytest.mark.parametrize("name", FILES[:-1])
@settings(max_examples=8)
@given(place=st.integers(0, 1 << 20), bits=st.integers(1, 255))
def test_any_other_byte_of_a_checkpoint_without_a_manifest_is_seen(
    made: Path, spoilt: Callable[[str, int, int], Path], name: str, place: int, bits: int
) -> None:
    other = spoilt(name, place, bits)
    (other / MANIFEST_NAME).unlink()
    assert name in seen(made / "a", other, weights=False)


def test_where_only_manifests_speak_of_weights_that_is_said(
    made: Path, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copied("a")
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    monkeypatch.setattr("lora_build.files.sources.known.SMALL_BYTES", 0)  # as of a file that nobody remembers
    unread = lora_build.diff(made / "a", other)
    assert unread.is_equal
    assert unread.notes == (
        "weights go by what manifests say, and not by their bytes; to read every byte: "
        f"lora-build verify {made / 'a'} {other}",
    )
    read = lora_build.diff(made / "a", other, weights=True)
    assert list(kinds(read).values()) == ["changed"]
    assert (
        f"{other}: the bytes of model.safetensors are not those of its manifest; it is compared as it is" in read.notes
    )


def test_a_manifest_alone_is_compared_and_said_to_be_alone(made: Path) -> None:
    alone = made / "a" / MANIFEST_NAME
    same, other = lora_build.diff(alone, made / "a"), lora_build.diff(alone, made / "c" / MANIFEST_NAME)

    assert same.is_equal
    assert f"of {alone} the manifest was compared, and no file" in same.notes
    assert other.plans is not None
    assert other.plans.reasons == ("option dtype: keep to float32",)
    assert {file.path: file.kind for file in other.files} == {"config.json": "changed", "model.safetensors": "changed"}
    with pytest.raises(RecipeError, match=r"is a manifest alone, and weights are in files; name the build's folder"):
        lora_build.diff(alone, made / "a", weights=True)


def test_weights_of_another_size_or_none_are_refused_and_the_remedy_works(
    made: Path, copied: Callable[[str], Path]
) -> None:
    other = copied("a")
    (other / "model.safetensors").write_bytes(b"short")
    with pytest.raises(VerificationError, match=r"model\.safetensors has 5 bytes, the manifest says"):
        lora_build.diff(made / "a", other)
    (other / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"model\.safetensors is missing(.|\n)*name its lora-build\.manifest"):
        lora_build.diff(other, made / "b")
    assert lora_build.diff(other / MANIFEST_NAME, made / "b").is_different


def test_files_beside_the_weights_count_as_they_are(made: Path, copied: Callable[[str], Path]) -> None:
    other = copied("a")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"vocab_size": 9, "new": {"deep": [1]}, "tie_word_embeddings": 0})
    )
    (other / "tokenizer_config.json").unlink()
    found = lora_build.diff(made / "a", other)

    assert [(key.key, key.kind, key.before, key.after) for key in found.keys] == [
        ("new.deep", "added", None, [1]), ("tie_word_embeddings", "changed", False, 0), ("vocab_size", "added", None, 9),
    ]  # fmt: skip
    assert {file.path: file.kind for file in found.files} == {
        "config.json": "changed",
        "tokenizer_config.json": "removed",
    }
    assert found.notes[0] == (
        f"{other} is no longer as it was built: config.json changed, tokenizer_config.json is missing; it is compared "
        "as it is"
    )


def test_json_that_says_the_same_in_other_words_is_said_to(made: Path, copied: Callable[[str], Path]) -> None:
    other = copied("a")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    found = lora_build.diff(made / "a", other)

    assert [(file.path, file.why) for file in found.files] == [
        ("config.json", "its spaces or the order of its keys alone")
    ]
    assert found.keys == ()
    assert found.is_different
    (other / "config.json").write_text("[" * 50_000)
    (file,) = lora_build.diff(made / "a", other).files
    assert file.why is not None
    assert "config.json" in file.why


def test_what_people_put_into_a_build_counts_where_loaders_read_it(made: Path, copied: Callable[[str], Path]) -> None:
    other = copied("a")
    (other / "README.md").write_text("hello")
    (other / "link").symlink_to("nowhere")
    found = lora_build.diff(made / "a", other)
    assert found.is_equal
    assert found.notes[0] == f"not compared, since no build wrote it and no loader reads it: {other}/README.md, link"

    (other / "chat_template.jinja").write_text("one\n2\n")
    (other / "model-extra.safetensors").symlink_to("nowhere")
    found = lora_build.diff(made / "a", other)
    assert {file.path: file.kind for file in found.files} == {
        "chat_template.jinja": "added", "model-extra.safetensors": "added",
    }  # fmt: skip
    assert found.tokenizer is not None
    assert [template.lines for template in found.tokenizer.templates] == [
        ("@@ -1,3 +1,3 @@", " one", "-two", "+2", " ")
    ]
    both = lora_build.diff(other, other)
    assert both.is_unknown  # of a link that leads nowhere, nothing is known
    assert not both.is_equal


def test_tokens_that_came_went_and_moved_are_named(made: Path, copied: Callable[[str], Path]) -> None:
    other = copied("a")
    vocabulary = {
        "model": {"type": "BPE", "vocab": {"a": 0, "c": 1, "d": 2}},
        "added_tokens": TOKENIZER["added_tokens"],
    }
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    (other / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "pad_token": "</s>", "chat_template": "x" * 300_000})
    )
    found = lora_build.diff(made / "a", other)

    tokenizer = found.tokenizer
    assert tokenizer is not None
    assert (tokenizer.added, tokenizer.removed) == ({"d": 2, "<end>": 4}, {"b": 1})
    assert tokenizer.renumbered == {"c": (2, 1)}
    assert (tokenizer.special_added, tokenizer.special_removed) == (("<end>",), ())
    assert tokenizer.eos == ("</s>", "<end>")
    assert [(t.name, t.kind, t.lines) for t in tokenizer.templates] == [("default", "changed", None)]
    assert [(key.key, key.kind) for key in found.keys] == [("eos_token", "changed"), ("pad_token", "added")]


def test_a_long_template_s_diff_is_cut(made: Path, copied: Callable[[str], Path]) -> None:
    one, other = copied("a"), copied("b")
    for folder, word in ((one, "x"), (other, "y")):
        (folder / "chat_template.jinja").write_text("\n".join(f"{word}{n}" for n in range(900)))
    tokenizer = lora_build.diff(one, other).tokenizer
    assert tokenizer is not None
    (template,) = tokenizer.templates
    assert template.lines is not None
    assert (len(template.lines), template.num_more) == (200, 1601)


def test_tokens_of_a_format_that_is_not_read_are_said_to_be_unknown(made: Path, copied: Callable[[str], Path]) -> None:
    one, other = copied("a"), copied("b")
    for number, folder in enumerate((one, other)):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.tiktoken").write_text(f"IQ== {number}")
    tokenizer = lora_build.diff(one, other).tokenizer
    assert tokenizer is not None
    assert tokenizer.unread == tuple(f"{f}: its tokens are in a format that is not read here" for f in (one, other))


def test_a_tokenizer_that_cannot_be_read_is_said(made: Path, copied: Callable[[str], Path]) -> None:
    other = copied("a")
    (other / "tokenizer.json").write_text("{")
    found = lora_build.diff(made / "a", other)
    assert found.tokenizer is not None
    assert "tokenizer.json: is not JSON" in found.tokenizer.unread[0]
    assert found.is_different


# --- versions, shards, checkpoints ---------------------------------------------------------------------------------


def test_builds_of_two_versions_with_the_same_files_are_equal() -> None:
    one, other = RELEASES / "0.2.0/plain", RELEASES / "0.3.0/plain"
    for found in (lora_build.diff(one, other), lora_build.diff(one / MANIFEST_NAME, other / MANIFEST_NAME)):
        assert found.is_equal
        assert f"the manifest of {found.before.name} is of version 1, which does not say" in found.notes[0]


def test_digests_of_two_algorithms_are_never_taken_for_a_difference_or_for_none(tmp_path: Path) -> None:
    one, other = RELEASES / "0.2.0/plain", tmp_path / "other"
    shutil.copytree(RELEASES / "0.3.0/plain", other)
    tensors = load_file(other / "model.safetensors")
    first = min(tensors)
    # the same build but for a tensor, by a manifest of version 2: its digests are BLAKE3
    tensors[first] = tensors[first] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    remake_manifest(other)

    read = lora_build.diff(one, other)  # where files are: by their bytes
    assert kinds(read) == {first: "changed"}
    unread = lora_build.diff(one / MANIFEST_NAME, other / MANIFEST_NAME)
    assert set(kinds(unread).values()) == {"unknown"}
    assert len(unread.tensors) == len(tensors)
    assert not unread.is_equal
    half = lora_build.diff(one / MANIFEST_NAME, other)
    assert kinds(half) == {first: "changed"}


def remake_manifest(folder: Path) -> None:
    """Have the manifest of a build say what its files are now."""
    manifest = read_manifest(folder)
    data = (folder / "model.safetensors").read_bytes()
    infos = read_tensors(lambda _, a, b: data[a:b], SourceName("x"), "model.safetensors", len(data))
    digests = {info.name: Digest.blake3(data[info.start : info.end]) for info in infos}
    files = tuple(
        dataclasses.replace(
            file,
            size_bytes=(folder / file.path).stat().st_size,
            sha256=Digest.sha256((folder / file.path).read_bytes()),
        )
        for file in manifest.files
    )
    made = dataclasses.replace(manifest, files=files, digests=tuple(digests[t.name] for t in manifest.plan.tensors))
    (folder / MANIFEST_NAME).write_bytes(made.to_bytes())


def test_a_base_is_compared_with_its_build_by_bytes(made: Path) -> None:
    for weights in (False, True):
        found = lora_build.diff(made / "base", made / "a", weights=weights)
        assert set(kinds(found).values()) == {"changed"}
        assert len(found.tensors) == 2
        assert found.plans is None
        assert found.groups[0].what == "merge math"
        unknown = f"{made / 'base'} has no lora-build.manifest.json: what it was made of is not known"
        unread = "weights go by what manifests say, and not by their bytes; to read every byte: lora-build verify "
        assert found.notes == ((unknown,) if weights else (unknown, f"{unread}{made / 'a'}"))


def test_what_is_read_for_a_comparison_is_told_and_adds_up(made: Path) -> None:
    told: list[tuple[int, int]] = []
    compare_builds(made / "base", made / "a", progress=lambda count, total: told.append((count, total)))

    assert {total for _, total in told} == {sum(count for count, _ in told)}
    assert sum(count for count, _ in told) == (made / "base/model.safetensors").stat().st_size


def test_a_tensor_of_another_dtype_and_shape_is_said_to_be_so(tmp_path: Path) -> None:
    for name, tensor in (("one", torch.zeros(2, 3)), ("other", torch.zeros(4, 3, dtype=torch.bfloat16))):
        (tmp_path / name).mkdir()
        save_file({"a.weight": tensor}, tmp_path / name / "model.safetensors")
    (group,) = lora_build.diff(tmp_path / "one", tmp_path / "other").groups

    assert (group.kind, group.what) == ("changed", "F32 to BF16, [2, 3] to [4, 3]")


def test_shards_change_files_and_no_tensor(made: Path, tmp_path: Path) -> None:
    small.make_base(tmp_path / "sharded", shards=True)
    small.make_base(tmp_path / "whole")
    found = lora_build.diff(tmp_path / "whole", tmp_path / "sharded")

    assert found.tensors == ()
    assert {file.path: file.kind for file in found.files} == {
        "model.safetensors": "removed", "model-00001-of-00002.safetensors": "added",
        "model-00002-of-00002.safetensors": "added", "model.safetensors.index.json": "added",
    }  # fmt: skip


def test_another_header_alone_is_said(tmp_path: Path) -> None:
    one, other = small.make_base(tmp_path / "one"), small.make_base(tmp_path / "other")
    save_file(load_file(other / "model.safetensors"), other / "model.safetensors", {"format": "np"})
    found = lora_build.diff(one, other)

    assert found.tensors == ()
    assert [(file.path, file.why) for file in found.files] == [("model.safetensors", "its header alone")]


def test_adapters_are_compared_too_and_a_folder_without_weights_is_refused(made: Path, tmp_path: Path) -> None:
    assert len(lora_build.diff(made / "math", made / "code").tensors) == 4
    assert lora_build.diff(made / "math", made / "math").is_equal
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        SourceError, match=r"has no lora-build\.manifest\.json and no weights in safetensors; found notes"
    ):
        lora_build.diff(made / "a", tmp_path)


def test_tensors_that_two_files_have_are_refused(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    for name in ("one", "two"):
        shutil.copy(base / "model.safetensors", base / f"{name}.safetensors")
    (base / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"is in one\.safetensors and in two\.safetensors"):
        lora_build.diff(base, base)


# --- a recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "math", "code"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lora_build.build(RECIPE)
    return tmp_path


RECIPE = {"name": "prod", "base": "./base", "adapters": {"math": "./math"}, "output": {"dir": "./out"}}


def test_a_recipe_is_compared_with_its_build(project: Path) -> None:
    assert lora_build.diff(lora_build.plan(RECIPE)).is_equal
    found = lora_build.diff(lora_build.plan(RECIPE | {"dtype": {"*norm*": "float32"}}, replace=True))
    assert found.plans is not None
    assert found.plans.reasons == ("option dtype: keep to mixed",)
    assert kinds(found) == {"model.norm.weight": "changed"}

    small.edit(project / "math", **{"layers.0.self_attn.q_proj.lora_B.weight": torch.ones(8, 2)})
    found = lora_build.diff("out", lora_build.plan(RECIPE, replace=True))
    assert set(kinds(found).values()) == {"affected"}
    assert found.plans is not None
    assert found.plans.reasons[0].startswith("adapters.math changed (")
    assert (found.before.name, found.after.name) == ("out", "recipe prod")


def test_a_recipe_s_own_files_are_read_before_they_are_built(project: Path) -> None:
    (project / "base/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "one\n"}))
    found = lora_build.diff(lora_build.plan(RECIPE, replace=True))
    assert found.tokenizer is not None
    assert [template.lines for template in found.tokenizer.templates] == [("@@ -1,3 +1,2 @@", " one", "-two", " ")]
    assert {file.path: file.kind for file in found.files} == {"tokenizer_config.json": "changed"}


def test_weights_that_a_plan_knows_to_be_edited_differ_from_what_the_recipe_makes(project: Path) -> None:
    path = project / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = lora_build.diff(lora_build.plan(RECIPE))
    assert [tensor.kind for tensor in found.tensors] == ["changed"]
    assert "the bytes of model.safetensors are not those of its manifest" in " ".join(found.notes)


def test_a_recipe_that_is_not_built_or_whose_weights_are_asked_for_is_refused(project: Path) -> None:
    with pytest.raises(SourceError, match="new: there is no build of prod yet to compare it with; build it first"):
        lora_build.diff(lora_build.plan(RECIPE | {"output": {"dir": "./new"}}))
    with pytest.raises(RecipeError, match="recipe prod: is not built, and has no weights yet"):
        lora_build.diff(lora_build.plan(RECIPE), weights=True)
    with pytest.raises(RecipeError, match="name the other one"):
        lora_build.diff("out")
    with pytest.raises(RecipeError, match=r"diff takes the name of a build, or a plan, found \{'name': 'prod'"):
        lora_build.diff(RECIPE, "out")  # type: ignore[arg-type]


def test_of_a_checkpoint_and_a_recipe_only_names_dtypes_and_shapes_are_known(project: Path) -> None:
    found = lora_build.diff("base", lora_build.plan(RECIPE))
    assert set(kinds(found).values()) == {"unknown"}
    assert not found.is_equal
    assert "what a recipe makes has no bytes before it is built" in " ".join(found.notes)


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    big = small.make_base(tmp_path / "big")
    save_file({"w": torch.zeros(200)}, big / "model.safetensors")
    other = Path(shutil.copytree(big, tmp_path / "big2"))
    save_file({"w": torch.ones(200)}, other / "model.safetensors")
    folders = {"acme/a": made / "a", "acme/b": made / "b", "acme/big": big, "acme/big2": other}
    with hub_server.serve(folders) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


def fetched() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/model.safetensors"))


def test_builds_on_the_hub_are_compared_without_their_weights(made: Path, hub: hub_server.Hub) -> None:
    assert lora_build.diff("acme/a", made / "a").is_equal
    found = lora_build.diff("acme/a", "acme/b")
    assert found.plans is not None
    assert found.plans.reasons == ("adapters.code added, 2 of 3 tensors",)
    assert fetched() == []
    assert lora_build.diff("acme/a", "acme/b", weights=True).layers is not None
    assert len(fetched()) == 2


def test_weights_of_a_repository_that_are_not_those_of_its_manifest_are_refused(hub: hub_server.Hub) -> None:
    hub.repos["acme/a"]["model.safetensors"] = hub.repos["acme/a"]["model.safetensors"][:-1] + b"\0"
    with pytest.raises(VerificationError, match=r"model\.safetensors has sha256:.* by its host, the manifest says"):
        lora_build.diff("acme/a", "acme/b")


def test_tensors_of_a_checkpoint_on_the_hub_are_unknown_until_they_may_be_fetched(hub: hub_server.Hub) -> None:
    assert lora_build.diff("acme/big", "acme/big").is_equal  # one file by its digest
    found = lora_build.diff("acme/big", "acme/big2")
    assert kinds(found) == {"w": "unknown"}
    assert found.is_different  # by the digests of the file that the Hub has
    assert fetched() == []
    read = lora_build.diff("acme/big", "acme/big2", weights=True)
    assert kinds(read) == {"w": "changed"}
    assert read.weights is not None
    assert read.weights[0].num_changed == 200


def test_offline_a_build_is_compared_by_what_is_in_the_cache(
    made: Path, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("acme/a")
    assert lora_build.diff(f"acme/a@{commit}", made / "a").is_equal
    (config,) = Path(constants.HF_HUB_CACHE).glob("*--a/snapshots/*/config.json")
    config.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora_build.diff(f"acme/a@{commit}", made / "a").is_equal  # of config.json the manifest's word stands
    with pytest.raises(SourceError, match=r"model\.safetensors: is not in the cache and HF_HUB_OFFLINE is set"):
        lora_build.diff(f"acme/a@{commit}", made / "a", weights=True)


def test_offline_a_checkpoint_is_said_to_be_known_in_part(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("acme/big")
    lora_build.diff(f"acme/big@{commit}", "acme/big2", weights=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = lora_build.diff(f"acme/big@{commit}", f"acme/big2@{hub.commit('acme/big2')}")
    assert f"acme/big@{commit[:12]}: only its files in the cache are known (HF_HUB_OFFLINE is set)" in found.notes
    assert kinds(found) == {"w": "changed"}
