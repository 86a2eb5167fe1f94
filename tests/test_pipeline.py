"""Builds end to end: all or nothing, at most once, and what is written is what the manifest says."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora_build
from lora_build.cli import text
from lora_build.cli.json import built_json
from lora_build.cli.lines import plain
from lora_build.files import executor
from lora_build.files.targets import file_writer
from lora_build.files.targets.lock import lock
from lora_build.numerics import exact_compiled as kernel
from lora_build.numerics import survival
from lora_build.pipeline import prepare, run
from lora_build.proof.manifest import MANIFEST_NAME, SURVIVAL_NAME
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.counts import Count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_build_leaves_the_checkpoint_and_its_proof_and_nothing_else(folder: Path) -> None:
    before = listing(folder)
    manifest = lora_build.build(small.recipe(folder)).manifest

    assert listing(folder) == sorted([*before, "out"])
    assert listing(folder / "out") == [
        "config.json", "lora-build.manifest.json", "lora-build.provenance.json", "lora-build.survival.json",
        "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert lora_build.verify(folder / "out").manifest_hash == manifest.manifest_hash


def test_a_second_build_is_up_to_date_and_touches_nothing(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    before = (folder / "out/model.safetensors").stat()
    again = run(prepare(from_mapping(small.recipe(folder))))

    assert again.reused
    assert (folder / "out/model.safetensors").stat() == before


def test_a_changed_adapter_at_the_same_path_is_built_anew(folder: Path) -> None:
    first = lora_build.build(small.recipe(folder)).manifest
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))
    second = run(prepare(from_mapping(small.recipe(folder))))

    assert not second.reused
    assert second.manifest.weights_digest != first.weights_digest
    assert lora_build.verify(folder / "out").manifest_hash == second.manifest.manifest_hash


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"safe_merge": False}, {"output": {"max_shard_size": "1KB"}}])
def test_every_option_that_may_change_the_output_changes_the_build_key(folder: Path, option: dict[str, object]) -> None:
    first = lora_build.build(small.recipe(folder)).manifest
    changed = small.recipe(folder) | option
    changed["output"] = {"dir": str(folder / "other")} | dict(option.get("output", {}))  # type: ignore[call-overload]

    assert lora_build.build(changed).manifest.build_key != first.build_key


def test_shards_change_the_output_digest_but_not_the_weights_digest(folder: Path) -> None:
    first = lora_build.build(small.recipe(folder)).manifest
    second = lora_build.build(
        small.recipe(folder, output={"dir": str(folder / "two"), "max_shard_size": "0.1KB"})
    ).manifest

    assert len(list((folder / "two").glob("model-*-of-00003.safetensors"))) == 3
    assert first.weights_digest == second.weights_digest
    assert first.output_digest != second.output_digest


def test_a_damaged_output_is_built_anew(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    (folder / "out/model.safetensors").write_bytes(b"short")
    lora_build.build(small.recipe(folder))

    assert lora_build.verify(folder / "out").num_tensors == 3


def test_an_output_with_one_flipped_bit_is_not_called_up_to_date(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    path = folder / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert not run(prepare(from_mapping(small.recipe(folder)))).reused
    lora_build.verify(folder / "out")


def test_the_survival_of_an_update_to_zeros_is_valid_json(folder: Path) -> None:
    for module in small.MODULES:
        small.edit(folder / "base", **{f"{module}.weight": torch.zeros(8, 6, dtype=torch.bfloat16)})
    built = run(prepare(from_mapping(small.recipe(folder))))

    text = (folder / "out" / SURVIVAL_NAME).read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["adapters"][0]["relative_norm"] is None
    assert built.survival[0].base_norm == 0


def test_one_size_written_in_two_ways_is_one_build(folder: Path) -> None:
    first, second = (
        lora_build.build(small.recipe(folder, output={"dir": str(folder / f"out{i}"), "max_shard_size": size}))
        for i, size in enumerate(("1KB", "0.001MB"))
    )
    assert first.manifest.manifest_hash == second.manifest.manifest_hash


def test_somebody_elses_directory_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")

    for exist in ("reuse", "overwrite"):
        with pytest.raises(lora_build.RecipeError, match="is no build of lora-build"):
            lora_build.build(small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": exist}))
    assert (folder / "out/thesis.txt").read_text() == "mine"


def test_exist_fail_refuses_a_build_that_is_there(folder: Path) -> None:
    lora_build.build(small.recipe(folder))

    with pytest.raises(lora_build.RecipeError, match="if_exists: fail"):
        lora_build.build(small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": "fail"}))


def test_exist_overwrite_builds_again(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    recipe = small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": "overwrite"})

    assert not run(prepare(from_mapping(recipe))).reused


def test_an_empty_directory_may_be_built_into(folder: Path) -> None:
    (folder / "out").mkdir()
    lora_build.build(small.recipe(folder))

    assert (folder / "out" / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_safe_merge_names_the_adapter_the_tensor_and_the_index_of_a_bad_value(folder: Path, poison: float) -> None:
    bad = small.values(1, 8, 2, dtype=torch.float32)
    bad[3, 1] = poison
    small.edit(folder / "math", lora_B__weight=bad)

    with pytest.raises(lora_build.MergeError) as caught:
        lora_build.build(small.recipe(folder))
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.weight[3, 0] is not finite" in message
    assert "adapter math has a NaN or infinity in B" in message
    assert "lora_B.weight[3, 1]" in message
    assert listing(folder) == ["base", "math"]


def test_safe_merge_finds_an_overflow_of_the_output_dtype(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", dtype=torch.float16)
    small.make_adapter(tmp_path / "math", scale=1e6)

    with pytest.raises(lora_build.MergeError, match="exceeds F16"):
        lora_build.build(small.recipe(tmp_path))
    assert listing(tmp_path) == ["base", "math"]


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", ["keep", "float32", "float16"])
def test_safe_merge_finds_a_bad_value_that_no_adapter_touches(folder: Path, poison: float, dtype: str) -> None:
    bad = small.values(9, 6)
    bad[4] = poison
    small.edit(folder / "base", **{"model.norm.weight": bad})

    with pytest.raises(lora_build.MergeError) as caught:
        lora_build.build(small.recipe(folder, dtype=dtype))
    assert str(caught.value) == (
        "safe_merge: model.norm.weight[4] is not finite: the base has a NaN or infinity there; if it belongs there, as "
        "in a mask, set safe_merge: false"
    )
    assert listing(folder) == ["base", "math"]
    lora_build.build(small.recipe(folder, dtype=dtype, safe_merge=False))


def test_safe_merge_finds_a_bad_value_of_a_module_that_an_adapter_saved(folder: Path) -> None:
    saved = torch.full((6,), float("nan"), dtype=torch.bfloat16)
    small.edit(folder / "math", **{"base_model.model.model.norm.weight": saved})

    with pytest.raises(lora_build.MergeError, match=r"norm.weight\[0\] is not finite: adapter math has a NaN or inf"):
        lora_build.build(small.recipe(folder))


def test_safe_merge_finds_a_conversion_that_overflows(folder: Path) -> None:
    small.edit(folder / "base", **{"model.norm.weight": torch.full((6,), 1e30, dtype=torch.bfloat16)})

    with pytest.raises(lora_build.MergeError, match=r"model.norm.weight\[0\] does not fit F16"):
        lora_build.build(small.recipe(folder, dtype="float16"))


def test_without_safe_merge_the_bits_are_the_same_and_bad_values_pass(folder: Path) -> None:
    checked = lora_build.build(small.recipe(folder)).manifest
    unchecked = lora_build.build(small.recipe(folder, safe_merge=False, output={"dir": str(folder / "two")})).manifest
    assert checked.weights_digest == unchecked.weights_digest

    small.edit(folder / "math", lora_B__weight=torch.full((8, 2), float("nan")))
    lora_build.build(small.recipe(folder, safe_merge=False))
    merged = load_file(folder / "out/model.safetensors")
    assert torch.isnan(merged[f"{small.MODULES[0]}.weight"]).all()


KILLED = """
import json, os, signal, sys
from lora_build import pipeline
from lora_build.files.targets import directory, file_writer, moves, staging
from lora_build.recipe.validate import from_mapping
stop, steps = int(sys.argv[2]), 0
def step():
    global steps
    steps += 1
    if steps == stop:
        os.kill(os.getpid(), signal.SIGKILL)
def watch(owner, name):
    def wrapped(*a, _real=getattr(owner, name), **k):
        step()
        result = _real(*a, **k)
        step()
        return result
    setattr(owner, name, wrapped)
for owner, name in [(file_writer.FileWriter, "write"), (file_writer.FileWriter, "close"), (directory, "_sync_folder"),
                    (moves, "_renameat2")]:
    watch(owner, name)
for name in ("mkdir", "rename", "unlink", "rmdir", "link"):
    watch(os, name)
if sys.argv[3] == "two renames":
    moves._renameat2 = lambda *_: False
pipeline.build(from_mapping(json.loads(sys.argv[1])))
print(steps)
"""


def killed_at(folder: Path, step: int, how: str = "swap") -> subprocess.CompletedProcess[str]:
    recipe = json.dumps(small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": "overwrite"}))
    return subprocess.run([sys.executable, "-c", KILLED, recipe, str(step), how], capture_output=True, text=True)


def test_a_build_killed_at_any_step_leaves_the_target_absent_or_whole(folder: Path, count: Count) -> None:
    steps = int(killed_at(folder, -1).stdout)
    whole = lora_build.verify(folder / "out").manifest_hash
    assert steps > 20
    places = (1, 4, steps // 2, steps * 3 // 4)  # later runs have fewer steps: they remember digests
    for step in places:
        shutil.rmtree(folder / "out", ignore_errors=True)
        assert killed_at(folder, step).returncode == -signal.SIGKILL
        if (folder / "out").exists():
            assert lora_build.verify(folder / "out").manifest_hash == whole
        else:
            assert lora_build.build(small.recipe(folder)).manifest.manifest_hash == whole
    lora_build.build(small.recipe(folder))
    assert lora_build.verify(folder / "out").manifest_hash == whole
    count("kills while a build is made where none was", len(places))


def kill_replacing_at(folder: Path, steps: Sequence[int], how: str) -> int:
    """Kill the replacement of a build that people live in; nothing of theirs is lost, and the next build mends all."""
    old = lora_build.build(small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": "overwrite"})).manifest
    small.edit(folder / "math", lora_B__weight=small.values(5, 8, 2, dtype=torch.float32))
    (folder / "out/README.md").write_text("mine")
    (folder / "out/scores").mkdir()
    (folder / "out/scores/sums.json").write_text("[1]")
    new = lora_build.build(small.recipe(folder, output={"dir": str(folder / "new")})).manifest
    for step in steps:
        died = killed_at(folder, step, how)
        assert died.returncode == -signal.SIGKILL, died
        if how == "swap" or (folder / "out").exists():
            there = lora_build.verify(folder / "out")
            assert there.manifest_hash in (old.manifest_hash, new.manifest_hash)
            assert there.additions == ("README.md", "scores/sums.json")
        assert lora_build.build(small.recipe(folder)).manifest.manifest_hash == new.manifest_hash
        assert lora_build.verify(folder / "out").additions == ("README.md", "scores/sums.json")
        assert (folder / "out/README.md").read_text() == "mine"
        assert [name for name in listing(folder) if "lora-build" in name] == [], step
    return len(steps)


@pytest.mark.parametrize("how", ["swap", "two renames"])
def test_a_kill_while_a_build_is_replaced_loses_nothing(folder: Path, how: str, count: Count) -> None:
    kills = kill_replacing_at(folder, (1, 12, 40), how)
    count(f"kills while a build is replaced by {'an exchange' if how == 'swap' else how}", kills)


@pytest.mark.long
@pytest.mark.parametrize("how", ["swap", "two renames"])
def test_a_kill_at_each_step_of_a_replacement_loses_nothing(folder: Path, how: str) -> None:
    lora_build.build(small.recipe(folder))
    (folder / "out/README.md").write_text("mine")
    (folder / "out/scores").mkdir()
    (folder / "out/scores/sums.json").write_text("[1]")
    steps = int(killed_at(folder, -1, how).stdout)
    assert steps > 50
    shutil.rmtree(folder / "out")
    kill_replacing_at(folder, range(1, steps + 1), how)


@pytest.mark.long
def test_builds_of_one_target_at_once_come_one_after_the_other(folder: Path) -> None:
    code = (
        "import json, sys, lora_build\n"
        "try: lora_build.build(json.loads(sys.argv[1]))\n"
        "except lora_build.LoraBuildError as error: sys.exit(error.exit_code)"
    )
    output = {"dir": str(folder / "builds/out"), "if_exists": "overwrite"}
    recipes = [small.recipe(folder, output=output, name=name) for name in "aabb"]
    others = [subprocess.Popen([sys.executable, "-c", code, json.dumps(recipe)]) for recipe in recipes]
    codes = [other.wait(timeout=120) for other in others]

    assert sorted(codes) == [0, 0, 2, 2]  # nobody replaces another recipe's build
    lora_build.verify(folder / "builds/out")
    assert listing(folder / "builds") == ["out"]


def test_ctrl_c_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(file_writer.FileWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lora_build.build(small.recipe(folder))
    assert listing(folder) == ["base", "math"]


def test_an_error_leaves_files_open_for_as_long_as_another_thread_syncs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number closed twice may by then be that of somebody else's file."""
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    syncing, failed = threading.Event(), []

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(fd: int) -> None:
            try:
                if name == "fsync" and Path(f"/proc/self/fd/{fd}").readlink().suffix == ".safetensors":
                    syncing.set()
                    time.sleep(0.2)
                real(fd)
            except OSError as error:
                failed.append(error)

        monkeypatch.setattr(os, name, call)

    prepared = prepare(from_mapping(small.recipe(tmp_path)))
    num_bytes = 0

    def interrupt(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count
        if num_bytes == prepared.num_bytes_written:
            assert syncing.wait(10)
            raise KeyboardInterrupt

    for name in ("close", "fsync"):
        watched(name)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, progress=interrupt)
    assert failed == []
    assert listing(tmp_path) == ["base", "math"]


@pytest.mark.parametrize("stage", ["hash input", "hash output", "hash tensors", "write", "sync"])
def test_an_error_in_any_queue_ends_the_build_and_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(self: executor.SerialQueue, call: object, real: Callable[..., None] = executor.SerialQueue._run) -> None:
        if self._stage == stage:
            raise MemoryError(stage)
        real(self, call)

    monkeypatch.setattr(executor.SerialQueue, "_run", fail)
    with pytest.raises(MemoryError, match=stage):
        lora_build.build(small.recipe(folder))
    assert listing(folder) == ["base", "math"]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lora-build")]


def test_a_machine_that_fails_the_self_test_builds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.KNOWN_ANSWERS, "BF16", "0" * 16)

    with pytest.raises(lora_build.MergeError, match="fails the self-test of exact-1 for BF16"):
        lora_build.build(small.recipe(folder))
    assert listing(folder) == ["base", "math"]


def test_a_full_disk_is_found_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_build.proof.output_dir.free_bytes", lambda _: 10)

    with pytest.raises(lora_build.StorageError, match=r"needs .* free some space") as caught:
        lora_build.build(small.recipe(folder))
    assert caught.value.exit_code == 4
    assert listing(folder) == ["base", "math"]


def test_a_disk_that_fills_up_is_reported_and_cleaned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: bytes, start: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().suffix == ".lock":
            return real(fd, data, start)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(lora_build.StorageError, match="No space left on device; free some space"):
        lora_build.build(small.recipe(folder))
    assert [n for n in listing(folder) if n not in ("base", "math")] == []


def test_a_second_build_of_one_target_waits_for_the_first(folder: Path) -> None:
    with lock(folder / "out"):
        code = "import json, sys, lora_build; lora_build.build(json.loads(sys.argv[1])); print('built')"
        recipe = json.dumps(small.recipe(folder))
        other = subprocess.Popen(
            [sys.executable, "-c", code, recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None
        assert f"waiting for another build of {folder / 'out'} (process {os.getpid()})" in other.stderr.readline()
        assert not (folder / "out").exists()
    assert other.communicate(timeout=60)[0] == "built\n"


def test_an_input_that_changes_during_the_build_is_refused(folder: Path) -> None:
    def touch(_: int) -> None:
        os.utime(folder / "base/model.safetensors", ns=(time.time_ns(), 12345))

    with pytest.raises(lora_build.VerificationError, match="changed while it was read"):
        run(prepare(from_mapping(small.recipe(folder))), progress=touch)
    assert listing(folder) == ["base", "math"]


def test_progress_adds_up_to_the_bytes_that_the_plan_announces(folder: Path) -> None:
    prepared = prepare(from_mapping(small.recipe(folder)))
    told: list[int] = []
    built = run(prepared, progress=told.append)

    assert sum(told) == prepared.num_bytes_written == sum(f.size_bytes for f in built.manifest.files)


def test_survival_is_measured_for_each_merged_tensor(folder: Path) -> None:
    built = run(prepare(from_mapping(small.recipe(folder))))
    base = load_file(folder / "base/model.safetensors")
    merged = load_file(folder / "out/model.safetensors")

    assert [t.name for t in built.survival] == [f"{m}.weight" for m in small.MODULES]
    for tensor in built.survival:
        W = base[tensor.name].double()
        adapter = load_file(folder / "math/adapter_model.safetensors")
        key = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        delta = 2 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
        assert tensor.base_norm == pytest.approx(float(W.norm()), rel=1e-5)
        assert tensor.update_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert tensor.num_changed == int((merged[tensor.name] != base[tensor.name]).sum())
        assert tensor.num_updated == int((delta != 0).sum())
    report = json.loads((folder / "out" / SURVIVAL_NAME).read_text())
    assert report["adapters"][0]["adapter"] == "math"
    assert len(report["tensors"]) == 2


def test_an_adapter_that_rounding_swallows_is_warned_about(folder: Path) -> None:
    small.make_adapter(folder / "faint", scale=2e-4)
    built = run(prepare(from_mapping(small.recipe(folder, "faint"))))

    (warning,) = built.warnings
    assert "adapter faint barely survives rounding" in warning
    assert survival.by_adapter(built.survival)[0].changed < 0.1


def test_a_build_that_is_up_to_date_still_says_what_rounding_left(folder: Path) -> None:
    small.make_adapter(folder / "faint", scale=2e-4)
    first = lora_build.build(small.recipe(folder, "faint"))
    again = lora_build.build(small.recipe(folder, "faint"))

    assert (first.reused, again.reused) == (False, True)
    assert len(again.warnings) == 1
    assert again.warnings == first.warnings
    assert again.survival == first.survival
    lines = text.built_lines(again)
    assert [line.word for line in lines] == ["survival", "up to date", "note", "warning", "manifest"]
    assert lines[0] == text.built_lines(first)[0]


def test_python_is_told_of_an_adapter_that_barely_survives(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    small.make_adapter(folder / "faint", scale=2e-4)
    built = lora_build.build(small.recipe(folder, "faint"))

    assert [record.getMessage() for record in caplog.records if record.name.startswith("lora_build")] == [
        *built.warnings
    ]


def test_a_plan_from_python_says_what_a_build_would_do_and_writes_nothing(folder: Path) -> None:
    before = listing(folder)
    plan = lora_build.plan(small.recipe(folder))

    assert listing(folder) == before
    assert {op.name for op in plan.merge_plan.operations} == set(load_file(folder / "base/model.safetensors"))
    with pytest.raises(lora_build.RecipeError, match=r"plan takes a Recipe or a mapping.*load_recipe\('NAME'\)"):
        lora_build.plan("prod")  # type: ignore[arg-type]


def test_an_adapter_that_vanishes_beside_another_is_warned_about_by_name(folder: Path) -> None:
    small.make_adapter(folder / "faint", seed=70, scale=1e-7)
    built = run(prepare(from_mapping(small.recipe(folder, "math", "faint"))))

    (warning,) = built.warnings
    assert "adapter faint barely survives rounding" in warning
    faint, math = survival.by_adapter(built.survival)
    assert faint.relative_norm is not None
    assert math.relative_norm is not None
    assert faint.relative_norm < 1e-5 * math.relative_norm
    assert math.changed > 0.5


def test_the_share_of_an_adapter_beside_others_is_what_leaving_it_out_changes(folder: Path) -> None:
    small.make_adapter(folder / "other", seed=70)
    both = run(prepare(from_mapping(small.recipe(folder, "math", "other"))))
    merged = load_file(folder / "out/model.safetensors")
    lora_build.build(small.recipe(folder, "other", output={"dir": str(folder / "rest")}))
    rest = load_file(folder / "rest/model.safetensors")

    for tensor in both.survival:
        share = next(share for share in tensor.shares if share.adapter == "math")
        assert share.num_changed == int((merged[tensor.name] != rest[tensor.name]).sum())


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_build_that_turns_out_equal_to_its_base_is_refused(folder: Path, scale: float) -> None:
    small.make_adapter(folder / "nothing", scale=scale)

    with pytest.raises(lora_build.MergeError, match="the output would equal the base: no stored value changed"):
        lora_build.build(small.recipe(folder, "nothing"))
    assert listing(folder) == ["base", "math", "nothing"]


def test_files_that_a_loader_reads_keep_a_build_from_being_replaced(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    (folder / "out/chat_template.jinja").write_text("mine")

    for exist in ("reuse", "overwrite"):
        with pytest.raises(lora_build.RecipeError, match=r"did not write \(chat_template.jinja\), and that a loader"):
            lora_build.build(
                small.recipe(folder, dtype="float32", output={"dir": str(folder / "out"), "if_exists": exist})
            )
    assert (folder / "out/chat_template.jinja").read_text() == "mine"


def test_a_write_protected_build_is_replaced_and_leaves_nothing(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    (folder / "out").chmod(0o555)
    lora_build.build(small.recipe(folder, dtype="float32"))

    assert listing(folder) == ["base", "math", "out"]


def test_a_target_below_a_file_is_refused_when_planning(folder: Path) -> None:
    (folder / "afile").write_text("x")

    with pytest.raises(lora_build.RecipeError, match="afile is a file"):
        prepare(from_mapping(small.recipe(folder, output={"dir": str(folder / "afile/out")})))


def test_a_recipe_changed_in_python_is_checked_again(folder: Path) -> None:
    recipe = dataclasses.replace(from_mapping(small.recipe(folder)), adapter_names=("mth",))

    with pytest.raises(lora_build.RecipeError, match="no adapter 'mth'; did you mean 'math'"):
        lora_build.build(recipe)
    with pytest.raises(lora_build.RecipeError, match=r"load_recipe\('NAME'\)"):
        lora_build.build("prod")  # type: ignore[arg-type]


def test_provenance_names_sources_and_no_path_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = {"base": "./base", "adapters": {"math": "./math"}, "output": {"dir": "./out"}}
    manifest = lora_build.build(recipe).manifest
    text = (folder / "out/lora-build.provenance.json").read_text()
    statement = json.loads(text)

    assert str(folder) not in text
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {s["name"] for s in statement["subject"]} == {f.path for f in manifest.files}
    uris = {d["uri"] for d in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"./base/model.safetensors", "./math/adapter_config.json"} <= uris


def test_the_library_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lora_build.build(small.recipe(folder))
    lora_build.verify(folder / "out")

    assert capfd.readouterr() == ("", "")


def test_timings_say_where_the_time_of_a_build_went(folder: Path) -> None:
    prepared = prepare(from_mapping(small.recipe(folder)))

    first, second = (
        [shown for line in text.timing_lines(run(prepared)) for shown in plain(line)] for _ in range(2)
    )  # fmt: skip

    assert re.fullmatch(r"timings   \d+\.\d\d s once planned; below, the seconds of all threads together", first[0])
    assert [line.split()[0] for line in first[1:]] == ["cores", "disk", "idle"]
    for stage in (
        "read",
        "gather",
        "write",
        "wait for merge",
        "load",
        "merge",
        "hash input",
        "hash output",
        "hash tensors",
        "sync",
    ):
        assert re.search(rf"\b{stage} \d+\.\d\d", "\n".join(first)), stage
    assert second == ["timings   nothing was read or written"]


def base_file(tensors: dict[str, tuple[str, list[int], int]], *, pad: int) -> bytes:
    """Return the header of a safetensors file: of each tensor the dtype, shape and size; so many spaces follow."""
    header, at = {}, 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("pad", range(3))
def test_scalars_tensors_of_no_size_and_data_at_odd_places_are_what_they_were(folder: Path, pad: int) -> None:
    before = {name: tensor.clone() for name, tensor in load_file(folder / "base/model.safetensors").items()}
    tensors = {name: ("BF16", list(tensor.shape), 2 * tensor.numel()) for name, tensor in before.items()}
    odd = {"scalar": ("F32", [], 4), "none": ("F16", [0, 7], 0), "byte": ("U8", [1], 1), "nothing": ("BF16", [0], 0)}
    data = b"\x07" + torch.tensor(2.5).numpy().tobytes() + b"".join(
        before[name].view(torch.uint8).numpy().tobytes() for name in tensors
    )  # fmt: skip
    header = base_file({name: odd[name] for name in ("byte", "none", "scalar", "nothing")} | tensors, pad=pad)
    (folder / "base/model.safetensors").write_bytes(header + data)
    whole = lora_build.build(small.recipe(folder))

    after = load_file(folder / "out/model.safetensors")
    assert after["scalar"].shape == ()
    assert after["scalar"] == 2.5
    assert (after["none"].shape, after["nothing"].shape, after["byte"].tolist()) == ((0, 7), (0,), [7])
    assert after["model.norm.weight"].equal(before["model.norm.weight"])
    assert lora_build.verify(folder / "out").manifest_hash == whole.manifest.manifest_hash


@pytest.mark.long
def test_a_tensor_that_lies_behind_four_gigabytes_is_merged_where_it_is(folder: Path) -> None:
    """The file has holes; what is built of it has none."""
    lora_build.build(small.recipe(folder))
    expected = load_file(folder / "out/model.safetensors")
    before = {name: tensor.clone() for name, tensor in load_file(folder / "base/model.safetensors").items()}
    large = 1 << 32
    tensors = {"0": ("U8", [large + 3], large + 3)}
    tensors |= {name: ("BF16", list(tensor.shape), 2 * tensor.numel()) for name, tensor in before.items()}
    header = base_file(tensors, pad=1)
    with (folder / "base/model.safetensors").open("wb") as file:
        file.write(header)
        file.seek(large + 3, os.SEEK_CUR)
        for tensor in before.values():
            file.write(tensor.view(torch.uint8).numpy().tobytes())
    lora_build.build(small.recipe(folder, output={"dir": str(folder / "large")}))

    with safe_open(folder / "large/model.safetensors", "pt") as found:
        assert {name: found.get_slice(name).get_shape() for name in ("0",)} == {"0": [large + 3]}
        assert all(found.get_tensor(name).equal(tensor) for name, tensor in expected.items())
    lora_build.verify(folder / "large")


def test_a_build_says_which_checks_it_has_passed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("lora_build.proof.finish.run_checks", lambda *_: asked.append(1) or {})
    assert lora_build.build(small.recipe(folder)).passed == ()
    asked.clear()
    for _ in range(2):  # the second time nothing is asked, and it has passed all the same
        built = lora_build.build(small.recipe(folder, checks={"forward": {}}))
        assert "passed    checks.forward" in [line for said in text.built_lines(built) for line in plain(said)]
        assert built_json(built)["passed"] == ["forward"]
    assert len(asked) == 1


def test_a_plan_and_a_build_are_shown_in_a_line(folder: Path) -> None:
    plan = lora_build.plan(small.recipe(folder))
    assert repr(plan) == f"<Plan of 'build': {len(plan.merge_plan.operations)} tensors, '{folder / 'out'}': create>"
    built = lora_build.build(small.recipe(folder))
    assert repr(built) == f"<Build '{folder / 'out'}': built, {built.manifest.manifest_hash}>"
