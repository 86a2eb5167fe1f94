"""Of a base's folders goes along what a file names; what should go along and cannot is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_build.errors import SourceError
from lora_build.files.formats.beside_base import Beside, look_beside_base
from lora_build.files.identity import BASE
from lora_build.files.sources.local import open_local

Files = dict[str, Any]


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def look(root: Path, files: Files) -> Beside:
    return look_beside_base(open_local(BASE, "./base", write(root, files)), {"config.json", "model.safetensors"})


def modules(*paths: str, kind: str = "sentence_transformers.models.Pooling") -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, path in enumerate(paths)]


def test_the_modules_of_an_embedding_model_go_along_with_their_own_weights(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        {
            "config.json": {}, "modules.json": modules("", "1_Pooling", "2_Dense", "3_Router/a"),
            "1_Pooling/config.json": {}, "2_Dense/config.json": {}, "2_Dense/model.safetensors": "x",
            "2_Dense/pytorch_model.bin": "x", "2_Dense/model.onnx": "x", "3_Router/a/deep/er/config.json": {},
            "3_Router/b/config.json": {}, "onnx/model.json": {}, "onnx/model.onnx": "x",
        },
    )  # fmt: skip

    assert found.kept == (
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Router/a/deep/er/config.json",
        "modules.json",
    )  # fmt: skip
    assert found.left_out == {
        "2_Dense/model.onnx": "weights of another framework",
        "2_Dense/pytorch_model.bin": "weights in another format",
        "3_Router/b/config.json": "in a folder, and no file of the model names it",
        "onnx/": "a folder that no file of the model names",
    }
    assert found.notes == ()


def test_a_shard_that_no_index_names_stays_behind_for_that_reason(tmp_path: Path) -> None:
    found = look(
        tmp_path, {"model-00003-of-00003.safetensors": "x", "consolidated.safetensors": "x", "model.gguf": "x"}
    )

    assert found.left_out == {
        "consolidated.safetensors": "safetensors that no index names",
        "model-00003-of-00003.safetensors": "safetensors that no index names",
        "model.gguf": "weights in another format",
    }


def test_pickled_weights_of_a_module_go_along_where_it_has_no_others_and_a_note_says_so(tmp_path: Path) -> None:
    found = look(tmp_path, {"modules.json": modules("", "2_Dense"), "2_Dense/pytorch_model.bin": "x"})

    assert "2_Dense/pytorch_model.bin" in found.kept
    assert found.notes == ("base: 2_Dense/pytorch_model.bin: pickled weights of a module go along unopened",)


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b", "a\\b", "a\0b"])
def test_a_module_outside_of_the_base_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(SourceError, match=r"modules\.json: names the folder .*, expected one below the base"):
        look(tmp_path, {"modules.json": modules(path), "x/y.json": {}})


@pytest.mark.parametrize("text", ["{}", "[1, {}]", "not JSON", "[" * 100_000, '[{"path": 3}]'])
def test_a_modules_json_that_is_another_thing_names_nothing(tmp_path: Path, text: str) -> None:
    assert look(tmp_path, {"modules.json": text, "1_Pooling/config.json": {}}).kept == ("modules.json",)


CODE = {
    "modeling_a.py": "from .helpers import x\nfrom .parts.one import y\nimport torch",
    "helpers.py": "from . import more\ntry:\n    import beside\nexcept ImportError: pass",
    "more.py": "", "beside.py": "", "loose.py": "", "parts/__init__.py": "from .two import z", "parts/one.py": "from ..up import u",
    "parts/two.py": "", "parts/unused.py": "", "up.py": "def f():\n    from .late import g", "late.py": "", "other/x.py": "",
}  # fmt: skip
IMPORTED = {
    "modeling_a.py", "helpers.py", "more.py", "beside.py", "parts/__init__.py", "parts/one.py", "parts/two.py", "up.py", "late.py",
}  # fmt: skip


@pytest.mark.parametrize(
    "config", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("reference", ["modeling_a.A", [None, "modeling_a.A"], {"pil": "modeling_a.A"}])
def test_code_that_any_config_names_goes_along_with_what_it_imports(
    tmp_path: Path, config: str, reference: Any
) -> None:
    found = look(tmp_path, {config: {"auto_map": {"AutoModel": reference}}, **CODE})

    assert {name for name in found.kept if name.endswith(".py")} == IMPORTED
    assert found.left_out["loose.py"] == "code that no file of the model names"
    assert found.left_out["other/"] == "a folder that no file of the model names"


def test_code_is_never_run_and_what_cannot_be_parsed_brings_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {
        "config.json": {"auto_map": {"AutoModel": "a.A"}},
        "a.py": f"open({str(run)!r}, 'w')\nprint 'two'",
        "b.py": "",
        "c/d.py": "",
    }
    found = look(tmp_path / "base", files)

    assert {"a.py", "b.py"} <= set(found.kept)
    assert "c/" in found.left_out
    assert not run.exists()


@pytest.mark.parametrize("text", ["(" * 50_000, "x = 1\0", "-" * 100_000 + "1", "\xff"])
def test_code_that_breaks_a_parser_breaks_nothing_here(tmp_path: Path, text: str) -> None:
    assert "a.py" in look(tmp_path, {"config.json": {"auto_map": {"AutoModel": "a.A"}}, "a.py": text}).kept


def test_code_with_a_name_of_transformers_goes_along_and_code_of_other_repositories_is_theirs(tmp_path: Path) -> None:
    files = {"config.json": {"auto_map": {"AutoModel": "org/repo--train.A"}}, "tokenization_x.py": "", "train.py": ""}
    found = look(tmp_path, files)

    assert (found.kept, list(found.left_out)) == (("tokenization_x.py",), ["train.py"])


def test_the_class_of_a_module_may_be_code_of_the_model(tmp_path: Path) -> None:
    files = {"modules.json": modules("", kind="custom_st.Own"), "custom_st.py": "from .inner import x", "inner.py": ""}

    assert look(tmp_path, files).kept == ("custom_st.py", "inner.py", "modules.json")


def test_a_file_in_a_folder_goes_along_where_another_names_its_path(tmp_path: Path) -> None:
    voices = {"v2/a": {"semantic": "voices/v2/a.npy"}, "repo_or_path": "org/bark"}
    found = look(tmp_path, {"speaker_embeddings_path.json": voices, "voices/v2/a.npy": "x", "voices/v2/b.npy": "x"})

    assert found.kept == ("speaker_embeddings_path.json", "voices/v2/a.npy")
    assert list(found.left_out) == ["voices/v2/b.npy"]


@pytest.mark.parametrize(
    "name",
    [
        "qformer_tokenizer/tokenizer.json",
        "additional_chat_templates/rag.jinja",
        "chat_templates/rag.jinja",
        "custom_generate/generate.py",
    ],
)
def test_folders_that_transformers_looks_for_by_name_go_along(tmp_path: Path, name: str) -> None:
    assert look(tmp_path, {name: "", "checkpoint-5/tokenizer.json": "{}"}).kept == (name,)


def test_hidden_files_and_caches_are_no_part_of_a_model(tmp_path: Path) -> None:
    for name in (".git/config", ".cache/x", "__pycache__/a.pyc", ".gitattributes", ".msc"):
        write(tmp_path, {name: ""})
    source = open_local(BASE, "./base", write(tmp_path, {"a.txt": ""}))

    assert dict(source.skipped) == {
        ".cache/": "a cache", ".git/": "version control", ".gitattributes": "version control", ".msc": "hidden",
        "__pycache__/": "a cache",
    }  # fmt: skip
    assert look_beside_base(source, set()) == Beside(kept=("a.txt",), left_out={})


def test_a_link_to_nothing_is_refused_where_the_file_would_go_along(tmp_path: Path) -> None:
    for name in ("1_Pooling/config.json", "runs/latest"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to("absent")

    with pytest.raises(
        SourceError, match=r"base: '1_Pooling/config\.json' is a link to nothing, or no ordinary file; exp"
    ):
        look(tmp_path, {"modules.json": modules("", "1_Pooling"), "x/y.txt": ""})


def test_a_module_that_is_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/1_Pooling").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(SourceError, match="'1_Pooling/' is a link to another folder"):
        look(tmp_path / "base", {"modules.json": modules("", "1_Pooling"), "a/b.txt": ""})


def test_a_pointer_of_git_lfs_is_refused(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"

    with pytest.raises(
        SourceError, match=r"'tokenizer\.json' is a pointer of Git LFS, not the file itself: run `git lfs pull`"
    ):
        look(tmp_path, {"tokenizer.json": pointer})


def test_a_name_that_no_terminal_shows_is_left_out_and_said_escaped(tmp_path: Path) -> None:
    assert look(tmp_path, {"a\x1b[31m\nb": ""}).left_out == {"a\\x1b[31m\\nb": "a name that no terminal shows"}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_makes_a_base_two_models_and_is_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(SourceError, match=rf"an adapter beside its weights \(adapter_config.json, {weights}\)"):
        look(tmp_path, {"adapter_config.json": {}, weights: "x"})


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "own/adapter_config.json"])
def test_a_part_of_an_adapter_that_nobody_loads_stays_behind(tmp_path: Path, name: str) -> None:
    found = look(tmp_path, {name: "x"})

    assert found.kept == ()
    assert found.left_out in (
        {name: "a part of an adapter, and none of the model"}, {"own/": "a folder that no file of the model names"},
    )  # fmt: skip
