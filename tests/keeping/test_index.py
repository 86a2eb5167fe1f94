"""The index of builds: whatever is wrong with it, what is listed is the same."""

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_build
from lora_build.keeping import listing, today

INDEX = Path("builds/.lora-build/index.sqlite")


@pytest.fixture
def project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(today, "_SETTLED_NS", 0)
    return project


def make(text: str) -> Callable[[], object]:
    def change() -> None:
        with sqlite3.connect(INDEX) as database:
            database.executescript(text)
        database.close()

    return change


def replace_by_a_link() -> None:
    INDEX.rename("elsewhere.sqlite")
    INDEX.symlink_to(Path("elsewhere.sqlite").absolute())


WRONG: dict[str, Callable[[], object]] = {
    "missing": INDEX.unlink,
    "empty": lambda: INDEX.write_bytes(b""),
    "no database": lambda: INDEX.write_bytes(b"not a database" * 1000),
    "cut": lambda: INDEX.write_bytes(INDEX.read_bytes()[:5000]),
    "newer": make("PRAGMA user_version = 2; DROP TABLE verdicts"),
    "older": make("PRAGMA user_version = 0; DROP TABLE verdicts"),
    "other tables": make("DROP TABLE manifests; CREATE TABLE manifests (x)"),
    "a view": make("CREATE VIEW v AS SELECT 1"),
    "nonsense": make("UPDATE manifests SET record = '[1]'; UPDATE verdicts SET verdict = 'null'"),
    "numbers": make("UPDATE manifests SET record = 1; UPDATE verdicts SET verdict = x'00'"),
    "a link": replace_by_a_link,
    "anybody's": lambda: INDEX.chmod(0o666),
    "a folder": lambda: (INDEX.unlink(), INDEX.mkdir()),
    "its folder a file": lambda: (INDEX.unlink(), INDEX.parent.rmdir(), INDEX.parent.write_text("")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_list_is_the_same_whatever_the_index_is(project: Path, what: str) -> None:
    expected = lora_build.builds()
    WRONG[what]()
    assert lora_build.builds() == expected
    assert lora_build.builds() == expected


def test_what_is_no_index_of_ours_is_left_alone(project: Path) -> None:
    lora_build.builds()
    WRONG["a link"]()
    before = Path("elsewhere.sqlite").read_bytes()
    (project / "builds/prod").rename("builds/moved")
    lora_build.builds()
    assert Path("elsewhere.sqlite").read_bytes() == before
    assert INDEX.is_symlink()


def test_a_list_that_is_warm_reads_no_manifest_and_plans_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lora_build.builds()

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(listing, "read_record", refuse)
    monkeypatch.setattr("lora_build.keeping.today.survey", refuse)
    assert lora_build.builds() == expected


def test_what_changed_within_two_seconds_is_not_remembered(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(today, "_SETTLED_NS", 2_000_000_000)
    Path("math/adapter_config.json").touch()
    assert {build.state.value for build in lora_build.builds()} == {"current"}
    with sqlite3.connect(INDEX) as database:
        assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (0,)
    database.close()


def test_a_locked_index_is_done_without(project: Path) -> None:
    expected = lora_build.builds()
    with sqlite3.connect(INDEX) as database:
        database.execute("BEGIN EXCLUSIVE")
        (project / "builds/prod").rename("builds/moved")
        assert [build.manifest_hash for build in lora_build.builds()] == [build.manifest_hash for build in expected]
        database.rollback()
    database.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_has_no_index(project: Path) -> None:
    Path("builds").chmod(0o555)
    assert lora_build.builds() == lora_build.builds()
    assert not INDEX.parent.exists()
    Path("builds").chmod(0o755)


def test_runs_beside_each_other_list_the_same(project: Path) -> None:
    expected = [build.state for build in lora_build.builds()]
    INDEX.unlink()
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append([build.state for build in lora_build.builds()])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_nothing_is_made_where_there_are_no_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lora_build.builds() == []
    assert list(tmp_path.iterdir()) == []
