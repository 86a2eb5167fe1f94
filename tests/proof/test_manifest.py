"""The manifest and its check: every digest follows from the content, and every change is found and named."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import lora_build
from lora_build.files import readback
from lora_build.proof import plan_record
from lora_build.proof.additions import find_additions
from lora_build.proof.canonical_json import canonical_json, without_floats
from lora_build.proof.choices import LeftOut
from lora_build.proof.manifest import MANIFEST_NAME, Manifest
from lora_build.proof.plan_record import PlanRecord
from lora_build.proof.planned_tensor import PlannedTensor
from makers import small


@pytest.fixture
def built(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    lora_build.build(small.recipe(tmp_path))
    return tmp_path / "out"


def complaint(folder: Path) -> str:
    with pytest.raises(lora_build.VerificationError) as caught:
        lora_build.verify(folder)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_the_manifest_hash_is_what_sha256sum_prints(built: Path) -> None:
    data = (built / MANIFEST_NAME).read_bytes()

    assert lora_build.verify(built).manifest_hash == "sha256:" + hashlib.sha256(data).hexdigest()
    assert Manifest.from_bytes(data).to_bytes() == data


def test_the_record_of_a_plan_is_read_back_as_it_was(built: Path) -> None:
    document = json.loads((built / MANIFEST_NAME).read_text())
    record = PlanRecord.from_json(document["plan"], map(PlannedTensor.from_json, document["tensors"]))

    assert record == PlanRecord.from_json(record.to_json(), record.tensors)
    assert record.to_json() == document["plan"]
    assert [
        {**planned.to_json(), "blake3": t["blake3"]}
        for planned, t in zip(record.tensors, document["tensors"], strict=True)
    ] == document["tensors"]
    assert [adapter.weight for adapter in record.adapters] == [1.0]


def test_a_file_that_was_left_out_is_read_back_as_it_was() -> None:
    entry = LeftOut(source="base", path="onnx/", why="a folder that no file of the model names")

    assert LeftOut.from_json(entry.to_json()) == entry
    with pytest.raises(ValueError, match="`why` is missing"):
        LeftOut.from_json({"source": "base", "path": "onnx/"})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"][0].update(path=5),
        lambda m: m["tensors"][0].update(shape=7),
        lambda m: m["plan"].update(adapters=[[]]),
        lambda m: m.update(plan=[]),
    ],
    ids=["path", "shape", "adapters", "plan"],
)
def test_a_field_of_another_type_is_no_manifest(built: Path, change: Callable[[Any], None]) -> None:
    document = json.loads((built / MANIFEST_NAME).read_text())
    change(document)
    (built / MANIFEST_NAME).write_bytes(canonical_json(document) + b"\n")

    assert "is not a manifest of lora-build" in complaint(built) or "was edited" in complaint(built)


def test_every_digest_can_be_computed_by_hand(built: Path) -> None:
    document = json.loads((built / MANIFEST_NAME).read_text())

    def text(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def digest(value: object) -> str:
        return "sha256:" + hashlib.sha256(text(value)).hexdigest()

    done = [{key: value for key, value in tensor.items() if key != "blake3"} for tensor in document["tensors"]]
    assert document["build_key"] == digest(document["plan"] | {"tensors": done})
    assert document["output_digest"] == digest([[f["path"], f["size"], f["sha256"]] for f in document["files"]])
    weights = text([[t["name"], t["dtype"], t["shape"], t["blake3"]] for t in document["tensors"]])
    assert document["weights_digest"] == f"blake3:{blake3(weights).hexdigest()}"
    for file in document["files"]:
        assert file["sha256"] == "sha256:" + hashlib.sha256((built / file["path"]).read_bytes()).hexdigest()
    for tensor in document["tensors"]:
        stored = load_file(built / tensor["file"])[tensor["name"]]
        assert tensor["blake3"] == f"blake3:{blake3(stored.view(-1).view(torch.uint8).numpy()).hexdigest()}"


def test_the_manifest_holds_no_path_time_or_float(built: Path) -> None:
    text = (built / MANIFEST_NAME).read_text()

    assert str(built.parent) not in text
    assert canonical_json(json.loads(text)).decode() + "\n" == text


def test_one_flipped_bit_is_found_and_its_tensor_named(built: Path) -> None:
    path = built / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    message = complaint(built)
    assert "model-00002-of-00002.safetensors: tensor model.layers.1.self_attn.q_proj.weight" in message
    assert "model-00001" not in message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), "tokenizer.json: its bytes have sha256:"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json: has 2 bytes"),
        (lambda d: (d / "model.bin").write_text("x"), "model.bin: is not in the manifest"),
        (lambda d: (d / "link").symlink_to("/nowhere"), "link: is not in the manifest"),
        (lambda d: (d / MANIFEST_NAME).write_text("{}"), "is not a manifest"),
        (lambda d: (d / MANIFEST_NAME).write_text((d / MANIFEST_NAME).read_text().replace("BF16", "F16")), "was edited"),
    ],
)  # fmt: skip
def test_every_other_change_is_found(built: Path, damage: object, said: str) -> None:
    damage(built)  # type: ignore[operator]

    assert said in complaint(built)


LIVED_IN = ["README.md", ".gitattributes", "model.sig", "model.sigstore.json", "eval_results.json", "scores/sums.json"]


@pytest.mark.parametrize("name", [*LIVED_IN, "onnx/model.onnx", "notes"])
def test_what_people_add_to_a_build_is_named_and_refused_only_if_strict(built: Path, name: str) -> None:
    (built / name).parent.mkdir(exist_ok=True)
    (built / name).write_text("x")

    assert lora_build.verify(built).additions == (name,)
    with pytest.raises(lora_build.VerificationError, match=rf"{name}: is not in the manifest"):
        lora_build.verify(built, strict=True)


READ_BY_LOADERS = [
    "model.bin", "more.safetensors", "tf_model.h5", "adapter_config.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/rag.jinja", "preprocessor_config.json", "spm.model", "modeling_x.py", "modules.json",
    "1_Pooling/config.json", "pytorch_model.bin.index.json", "config_sentence_transformers.json", "vocab.txt",
    "custom_generate/generate.py", "custom_generate/requirements.txt", "custom_generate/inner/more.py", "emoji.json",
    "word_shape.json", "alphabet.json", "language_model/attrs.json", "qformer_tokenizer/tokenizer.json",
    "speaker_embeddings_path.json", "decision.json", "router_config.json", "modelcard.jinja",
]  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_LOADERS)
def test_an_addition_that_changes_what_is_loaded_is_a_difference(built: Path, name: str) -> None:
    (built / name).parent.mkdir(exist_ok=True, parents=True)
    (built / name).write_text("x")

    assert f"{name}: is not in the manifest" in complaint(built)


def test_every_file_that_transformers_has_a_constant_for_is_one_that_loaders_read(tmp_path: Path) -> None:
    (root,) = importlib.util.find_spec("transformers").submodule_search_locations  # type: ignore[union-attr]
    texts = [
        (Path(root) / file).read_text()
        for file in ("utils/__init__.py", "utils/hub.py", "decision/configuration_utils.py")
    ]
    lines = re.findall(r"^[A-Z_, ]+(?:_NAME|_FILE|_DIR) = (.*)$", "\n".join(texts), re.MULTILINE)
    names = {name for line in lines for name in re.findall(r'"([\w.]+)"', line)} - {
        "modelcard.json",
        "transformers_modules",
    }
    for name in names:
        (tmp_path / name).touch()

    assert {"processor_config.json", "chat_template.jinja", "decision.json", "additional_chat_templates"} <= names
    assert set(find_additions(tmp_path, frozenset()).read_by_loaders) == names


@pytest.mark.parametrize("name", ["custom_generate", "language_model", "text_tokenizer"])
def test_a_folder_that_loaders_look_for_may_be_no_link(built: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "evil").mkdir()
    (built / name).symlink_to(tmp_path / "evil")

    assert f"{name}: is not in the manifest" in complaint(built)


def test_what_is_put_into_a_folder_of_the_build_is_read_as_its_own_files_are(tmp_path: Path) -> None:
    for name in ("own/config.json", "own/deep/more.txt", "scores/sums.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    found = find_additions(tmp_path, frozenset({"own/config.json"}))
    assert (found.read_by_loaders, found.harmless) == (("own/deep/more.txt",), ("scores/sums.json",))


def test_a_folder_of_templates_that_is_a_link_is_a_difference(built: Path, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (built / "additional_chat_templates").symlink_to(tmp_path / "evil")

    assert "additional_chat_templates: is not in the manifest" in complaint(built)


@pytest.mark.parametrize("file", ["nowhere.safetensors", "../base/model.safetensors"])
def test_a_manifest_made_up_to_check_nothing_is_refused(built: Path, file: str) -> None:
    manifest = Manifest.from_bytes((built / MANIFEST_NAME).read_bytes())
    tensors = tuple(dataclasses.replace(t, file=file) for t in manifest.plan.tensors)
    plan, files = dataclasses.replace(manifest.plan, tensors=tensors), manifest.files
    if file.startswith(".."):
        files = (*files, dataclasses.replace(files[0], path=file))
    (built / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, plan=plan, files=files).to_bytes())

    assert "files outside of the build, or tensors of files that it does not list" in complaint(built)


def test_all_differences_come_at_once(built: Path) -> None:
    (built / "tokenizer.json").unlink()
    (built / "extra.bin").write_text("x")

    assert complaint(built).count("\n") == 2


def test_a_directory_that_was_never_built_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(lora_build.SourceError, match=r"not a build of lora-build, or not a finished one$"):
        lora_build.verify(tmp_path)
    for name, text in (("one", "{}"), ("two", None)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / MANIFEST_NAME).write_text(text)
    with pytest.raises(lora_build.SourceError, match=r"or not a finished one; builds lie below it: one$"):
        lora_build.verify(tmp_path)


def test_a_build_may_be_moved_and_touched(built: Path, tmp_path: Path) -> None:
    moved = built.rename(tmp_path / "elsewhere")
    os.utime(moved / "config.json", (0, 0))

    lora_build.verify(moved)


def test_names_and_order_of_adapters_do_not_change_the_manifest(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "one")
    small.make_adapter(tmp_path / "two", seed=90)
    first = lora_build.build(small.recipe(tmp_path, "one", "two")).manifest
    swapped = {"x": str(tmp_path / "two"), "y": str(tmp_path / "one")}
    second = lora_build.build(
        small.recipe(tmp_path, adapters=swapped, output={"dir": str(tmp_path / "swapped")})
    ).manifest

    assert first.manifest_hash == second.manifest_hash


def test_floats_go_in_as_text_however_deep_they_are() -> None:
    assert without_floats({"a": [0.5, 1, [{"b": 1e-7}]], "c": "0.5", "d": None, "e": True}) == {
        "a": ["0.5", 1, [{"b": "1e-07"}]], "c": "0.5", "d": None, "e": True,
    }  # fmt: skip


def test_floats_do_not_get_into_canonical_json() -> None:
    with pytest.raises(AssertionError):
        canonical_json({"a": [1.0]})


@given(
    st.recursive(
        st.integers(-(2**53), 2**53) | st.booleans() | st.none() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_canonical_json_is_read_back_as_it_was(value: object) -> None:
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:  # lone surrogates have no UTF-8
        return
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_VALUES"])
def test_a_manifest_that_would_be_too_large_to_be_read_back_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    manifest = lora_build.build(small.recipe(tmp_path)).manifest
    recipe = small.recipe(tmp_path, output={"dir": str(tmp_path / "other")})
    text = canonical_json([tensor.to_json() for tensor in manifest.tensors])
    needed = len(text) - 1 if limit == "MOST_BYTES" else readback.num_values(text)
    monkeypatch.setattr(plan_record, "_CERTAINLY_FEW", 0)

    monkeypatch.setattr(readback, limit, needed * 1.07)
    lora_build.plan(recipe)
    monkeypatch.setattr(readback, limit, needed * 1.03)
    with pytest.raises(lora_build.PlanError, match="merge fewer adapters at once"):
        lora_build.plan(recipe)
