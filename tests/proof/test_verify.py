"""Verifying what somebody may have made up: every edit is found or said not to be findable, no file makes it hang or fall."""

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError, SourceError
from lora_build.proof import checks
from lora_build.proof.build_files import FolderFiles
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME, read_manifest
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.counts import Count
from makers.forgery import vouch

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    small.make_base(folder / "base")
    small.make_adapter(folder / "math")
    lora_build.build(small.recipe(folder))
    return folder / "out"


@pytest.fixture
def built(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def forge(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest, and make every digest in it and the provenance's follow."""
    m = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(m)
    try:
        done = [{key: value for key, value in tensor.items() if key != "blake3"} for tensor in m["tensors"]]
        m["build_key"] = digest(m["plan"] | {"tensors": done})
        m["output_digest"] = digest([[f["path"], f["size"], f["sha256"]] for f in m["files"]])
        weights = canonical_json([[t["name"], t["dtype"], t["shape"], t["blake3"]] for t in m["tensors"]])
        m["weights_digest"] = f"blake3:{blake3(weights).hexdigest()}"
    except (TypeError, KeyError, AttributeError):
        pass
    data = json.dumps(m, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    (folder / MANIFEST_NAME).write_bytes(data)
    vouch(folder)


def refusal(folder: Path, **asked: Any) -> str:
    with pytest.raises(LoraBuildError) as caught:
        lora_build.verify(folder, **asked)
    assert caught.value.exit_code == 3, caught.value
    assert len(str(caught.value)) < 3000
    return str(caught.value)


def test_a_file_that_goes_while_it_is_verified_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"^{tmp_path}/model.safetensors: cannot be opened "):
        FolderFiles(tmp_path).open("model.safetensors", None)


# --- the manifest's fields ------------------------------------------------------------------------------------


def test_an_edit_of_any_field_of_the_manifest_is_found(built: Path, count: Count) -> None:
    data = json.loads((built / MANIFEST_NAME).read_bytes())
    leaves = list(paths(data))
    assert len(leaves) >= 50
    for path in leaves:
        document = json.loads((built / MANIFEST_NAME).read_bytes())
        *way, last = path
        place = document
        for step in way:
            place = place[step]
        old = place[last]
        place[last] = {"exact": "environment", True: False}.get(old, old + 1 if isinstance(old, int) else f"{old}0")
        before = (built / MANIFEST_NAME).read_bytes()
        (built / MANIFEST_NAME).write_bytes(canonical_json(document) + b"\n")
        assert refusal(built), path
        (built / MANIFEST_NAME).write_bytes(before)
    lora_build.verify(built)
    count("builds that were edited or made up", len(leaves) + len(FORGERIES) + len(CRAFTED) + len(FOUND))


def paths(value: Any, *way: Any) -> Any:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, *way, key)
    else:
        yield way


def merged(document: Any) -> Any:
    return next(tensor for tensor in document["tensors"] if tensor["operation"] == "merge")


def copied(document: Any) -> Any:
    return next(tensor for tensor in document["tensors"] if tensor["operation"] == "copy")


def factors(document: Any) -> Any:
    return merged(document)["segments"][0]["updates"][0]["factors"]


FORGERIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a reproducibility that does not follow": (lambda m: m.update(reproducibility="environment"), "was edited"),
    "a reproducibility that is none": (lambda m: (m.update(reproducibility="x\x1b[31m"), m["plan"]["options"].update(reproducibility="x\x1b[31m")), "a reproducibility that is none"),
    "a merge without adapters": (lambda m: copied(m).update(operation="merge"), "no build is like that"),
    "a copy by an adapter": (lambda m: merged(m).update(operation="copy"), "no build is like that"),
    "a copy of an adapter's tensor": (lambda m: copied(m).update(source={"adapter": 0, "file": "x", "name": "y"}), "no build is like that"),
    "rows that end before they begin": (lambda m: merged(m)["segments"][0].update(rows=[5, 5]), "no build is like that"),
    "rows that are there twice": (lambda m: merged(m)["segments"].append(merged(m)["segments"][0]), "no build is like that"),
    "a factor of an adapter that is not there": (lambda m: factors(m).update(A={"adapter": 7, "file": "x", "name": "y"}), "no build is like that"),
    "a factor that is a number": (lambda m: factors(m).update(A=5), "5 is not an object"),
    "a scale that is NaN": (lambda m: merged(m)["segments"][0]["updates"][0].update(scale="nan"), "is not finite"),
    "an update with a field too many": (lambda m: merged(m)["segments"][0]["updates"][0].update(x=1), "'x' is no field"),
    "an operation that is none": (lambda m: m["tensors"][0].update(operation="paint"), "no build is like that"),
    "an adapter that is not there": (lambda m: merged(m)["segments"][0]["updates"][0].update(adapter=7), "no build is like that"),
    "a tensor in another file": (lambda m: m["tensors"][0].update(file="config.json"), "config.json"),
    "no tensors": (lambda m: m.update(tensors=[]), "a weight file without its tensors"),
    "a file left out": (lambda m: m["files"].pop(), "is not in the manifest"),
    "a file twice": (lambda m: m["files"].append(m["files"][0]), "twice or out of order"),
    "a tensor twice": (lambda m: m["tensors"].append(m["tensors"][0]), "twice or out of order"),
    "a path with ./": (lambda m: m["files"].append({**m["files"][0], "path": "./z"}), "outside of the build"),
    "a path with ..": (lambda m: m["files"].append({**m["files"][0], "path": "z/../../x"}), "outside of the build"),
    "an absolute path": (lambda m: m["files"].insert(0, {**m["files"][0], "path": "/etc/passwd"}), "outside of the build"),
    "an empty path": (lambda m: m["files"].insert(0, {**m["files"][0], "path": ""}), "outside of the build"),
    "a path with NUL": (lambda m: m["files"].append({**m["files"][0], "path": "z\0"}), "outside of the build"),
    "its own name": (lambda m: m["files"].insert(1, {**m["files"][0], "path": PROVENANCE_NAME}), "a file of lora-build itself"),
    "a name that is a number": (lambda m: m["tensors"][0].update(name=5), "5 is not text"),
    "a name that is a list": (lambda m: m["tensors"][0].update(name=["x"]), "is not text"),
    "a size in text": (lambda m: m["files"][0].update(size="5"), "'5' is not a whole number"),
    "a size below zero": (lambda m: m["files"][0].update(size=-1), "-1 is not a whole number"),
    "a size that is true": (lambda m: m["files"][0].update(size=True), "True is not a whole number"),
    "no size": (lambda m: m["files"][0].update(size=None), "None is not a whole number"),
    "another size": (lambda m: m["files"][0].update(size=1 << 40), "bytes, expected 1099511627776"),
    "a path that is a number": (lambda m: m["files"][0].update(path=5), "5 is not text"),
    "a plan that is a number": (lambda m: m.update(plan=5), "5 is not an object"),
    "a shape in text": (lambda m: m["tensors"][0].update(shape="86"), "'86' is not a list"),
    "another shape": (lambda m: m["tensors"][0].update(shape=[1 << 40]), "not as built"),
    "another dtype": (lambda m: m["tensors"][0].update(dtype="F16"), "not as built"),
    "another name": (lambda m: m["tensors"][0].update(name="a"), "tensor a is missing"),
    "no digest": (lambda m: m["files"][0].update(sha256=None), "is not sha256: and 64 hex digits"),
    "a weight that is NaN": (lambda m: m["plan"]["adapters"][0].update(weight="nan"), "is not finite"),
    "a float": (lambda m: m["plan"]["options"].update(x=1.5), "holds the number 1.5"),
    "a field too many": (lambda m: m.update(x=1), "'x' is no field that lora-build"),
    "a field missing": (lambda m: m.pop("tensors"), "`tensors` is missing"),
    "files that are a number": (lambda m: m.update(files=7), "7 is not a list"),
    "inputs of another build": (lambda m: m["plan"]["base"]["files"].pop(), "names other inputs than the manifest"),
    "20,000 files that are not there": (lambda m: m["files"].extend({**m["files"][0], "path": f"z{n:06}"} for n in range(20_000)), "more like these"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_says_what_no_build_can_be_is_refused_even_where_its_digests_follow(
    forgery: str, built: Path
) -> None:
    change, said = FORGERIES[forgery]
    forge(built, change)
    assert said in refusal(built)


def text_of(old: str, new: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(file.read_text().replace(old, new))


CRAFTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep": (lambda f: f.write_text('{"a":' * 100_000), "is not a manifest"),
    "empty": (lambda f: f.write_text(""), "is not a manifest"),
    "a list": (lambda f: f.write_text("[]"), "is not a manifest"),
    "a surrogate": (text_of('"untie"', '"\\ud800"'), "is not a manifest"),
    "NaN": (text_of('"untie"', "NaN"), "holds the number NaN"),
    "not UTF-8": (lambda f: f.write_bytes(f.read_bytes().replace(b'"untie"', b'"\xff"')), "is not a manifest"),
    "5000 digits": (text_of('"untie"', "9" * 5000), "is not a manifest"),
    "a key twice": (text_of('{"build_key"', '{"build_key":"x","build_key"'), "holds a key twice"),
    "spaces": (text_of('{"build_key"', '{ "build_key"'), "was edited"),
    "30 million lists": (lambda f: f.write_bytes(b"[" + b"[]," * 15_000_000 + b"[]]"), "more than 4000000 values"),
    "a newer format": (text_of("manifest/v2", "manifest/v3"), "was made by a newer lora-build"),
    "another format": (text_of("lora-build/manifest/v2", "croissant"), "its format is 'croissant', expected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_no_text_in_place_of_a_manifest_takes_long_or_much_memory(kind: str, built: Path) -> None:
    change, said = CRAFTED[kind]
    change(built / MANIFEST_NAME)
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert said in refusal(built)
    assert time.process_time() - clock < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3


def test_a_manifest_of_more_than_64_mb_is_not_read(built: Path) -> None:
    os.truncate(built / MANIFEST_NAME, 65 << 20)
    with pytest.raises(LoraBuildError, match="expected 67108864 at most"):
        lora_build.verify(built)


# --- files and links ------------------------------------------------------------------------------------------


def link_away(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def as_pipe(name: str) -> Callable[[Path], object]:
    return lambda d: ((d / name).unlink(missing_ok=True), os.mkfifo(d / name))


FOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a folder": (lambda d: (d / "chat_templates").symlink_to("/etc"), "chat_templates: is not in the manifest"),
    "a link to nothing": (lambda d: (d / "x").symlink_to("nowhere"), "x: is not in the manifest"),
    "a pipe that a loader would open": (as_pipe("x.bin"), "x.bin: is not in the manifest"),
    "a pipe in place of weights": (as_pipe(WEIGHTS), f"{WEIGHTS}: is not a file"),
    "a folder in place of weights": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), f"{WEIGHTS}: is not a file"),
    "a pipe in place of provenance": (as_pipe(PROVENANCE_NAME), f"{PROVENANCE_NAME}: is not a file"),
    "an empty provenance": (lambda d: (d / PROVENANCE_NAME).write_text(""), "is not a provenance file"),
    "a deep provenance": (lambda d: (d / PROVENANCE_NAME).write_text("[" * 100_000), "is not a provenance file"),
    "the provenance of another build": (lambda d: text_of("sha256:", "sha256:0")(d / PROVENANCE_NAME), "is of another manifest"),
    "a provenance of other files": (lambda d: text_of('"name": "config.json"', '"name": "x"')(d / PROVENANCE_NAME), "names other files"),
    "a survival report that is none": (lambda d: (d / SURVIVAL_NAME).write_text("x"), "is not a survival report"),
    "a survival report of other tensors": (lambda d: text_of("model.layers.0", "model.layers.9")(d / SURVIVAL_NAME), "names tensors that the manifest"),
}  # fmt: skip


@pytest.mark.parametrize("change", FOUND)
def test_what_else_is_in_the_folder_is_found(change: str, built: Path) -> None:
    make, said = FOUND[change]
    make(built)
    assert said in refusal(built)


def test_a_manifest_that_is_a_pipe_or_a_device_is_none_and_is_not_waited_for(built: Path) -> None:
    (built / MANIFEST_NAME).unlink()
    os.mkfifo(built / MANIFEST_NAME)
    with pytest.raises(LoraBuildError, match="not a build of lora-build"):
        lora_build.verify(built)
    (built / MANIFEST_NAME).unlink()
    (built / MANIFEST_NAME).symlink_to("/dev/zero")
    with pytest.raises(LoraBuildError, match="not a build of lora-build"):
        lora_build.verify(built)


def test_files_may_be_links_as_in_the_hub_s_cache_and_that_is_said(built: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, MANIFEST_NAME, PROVENANCE_NAME):
        link_away(name)(built)
    (tmp_path / "current").symlink_to(built)

    found = lora_build.verify(tmp_path / "current")
    assert found.notes == (f"links, whose targets have the right bytes today: {WEIGHTS}",)


def test_a_build_without_its_provenance_and_report_is_whole_and_that_is_said(built: Path) -> None:
    (built / PROVENANCE_NAME).unlink()
    (built / SURVIVAL_NAME).unlink()

    notes = lora_build.verify(built).notes
    assert [note.split(":")[0] for note in notes] == [f"no {PROVENANCE_NAME}", f"no {SURVIVAL_NAME}"]


# --- what is proven -------------------------------------------------------------------------------------------


def forge_everything(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def change(m: Any) -> None:
        for file in m["files"]:
            file["sha256"] = "sha256:" + hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest()
        for tensor in m["tensors"]:
            first, end = header[tensor["name"]]["data_offsets"]
            tensor["blake3"] = f"blake3:{blake3(bytes(data[start + first : start + end])).hexdigest()}"

    forge(folder, change)


def test_a_build_that_was_made_up_as_a_whole_is_told_by_the_hash_that_was_expected(built: Path) -> None:
    honest = lora_build.verify(built).manifest_hash
    assert lora_build.verify(built, expect=honest).expected
    assert lora_build.verify(built, expect=honest.hex).expected
    forge_everything(built)

    assert lora_build.verify(built).expected is None
    assert f"expected {honest}: it is another build, or was edited" in refusal(built, expect=honest)


def test_the_beginning_of_a_hash_tells_a_build_from_others_and_proves_nothing(built: Path) -> None:
    honest = lora_build.verify(built).manifest_hash
    for digits in (honest[: len("sha256:") + 12], honest.hex[:12], honest.hex[:63]):
        found = lora_build.verify(built, expect=digits)
        assert found.expected is None
        assert "only the whole hash proves" in found.notes[0]
    other = ("1" if honest.hex[11] == "0" else "0").join((honest.hex[:11], honest.hex[12:20]))
    assert f"expected sha256:{other}: it is another build" in refusal(built, expect=other)


@pytest.mark.parametrize("text", ["", "sha256:0123456789a", "0" * 65, "sha1:" + "0" * 64, "A" * 64])
def test_what_is_no_beginning_of_a_hash_is_refused(text: str, built: Path) -> None:
    with pytest.raises(lora_build.RecipeError, match="the first 12 of them at least"):
        lora_build.verify(built, expect=text)


def test_the_command_says_what_it_proves(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    honest = lora_build.verify(built).manifest_hash
    assert main(["verify", str(built)]) == 0
    assert "that it is yours, --expect HASH proves" in capsys.readouterr().out
    assert main(["verify", "--expect", honest, str(built)]) == 0
    assert "the manifest is the expected one" in capsys.readouterr().out
    assert main(["verify", f"--expect={'0' * 64}", str(built)]) == 3
    assert main(["verify", "--expect", honest, str(built), str(built)]) == 2
    assert "--expect is the hash of one build, found 2 folders" in capsys.readouterr().err


def test_a_check_that_only_provenance_says_was_passed_is_made(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(built)
    recipe = from_mapping(small.recipe(built.parent, checks={"forward": {}}))
    facts = {"seed": 0, "file_sha256": None, "prompts": []}
    path = built / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    statement["predicate"]["runDetails"]["byproducts"] = [{"name": "checks.forward", "annotations": facts}]
    path.write_text(json.dumps(statement))

    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parent / "cache"))
    assert not checks.have_passed(recipe, manifest, built)
    checks.remember_passed(recipe, manifest, built)
    assert checks.have_passed(recipe, manifest, built)
    (built.parent / "cache/lora-build/checks").chmod(0o777)
    assert not checks.have_passed(recipe, manifest, built)


def test_a_build_is_not_up_to_date_because_a_made_up_manifest_says_so(built: Path) -> None:
    recipe = small.recipe(built.parent)
    small.make_base(built.parent / "base")
    small.make_adapter(built.parent / "math")
    forge(built, lambda m: m["files"][0].update(path=5))

    with pytest.raises(LoraBuildError, match="5 is not text"):
        lora_build.build(recipe)
