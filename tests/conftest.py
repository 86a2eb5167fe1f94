"""Shared fixtures. The environment is set before anything imports transformers or huggingface_hub."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

_CACHE = tempfile.mkdtemp(prefix="lora-build-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    XDG_CACHE_HOME=_CACHE,
)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from makers.counts import Count  # noqa: E402
from makers.zoo import Zoo  # noqa: E402

_OF_PYTEST = re.compile(r"(\d|current|\.lock)$")  # of a test or a fixture, and what keeps count of them

# a busy machine is no reason to fail, and a run that fails can be repeated
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the golden files")
    parser.addoption("--update-counts", action="store_true", help="rewrite the counts of docs/reliability.md")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(autouse=True)
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every build be made, also where the file system could clone an equal one: two of them are compared."""
    from lora_build.files.targets import cloning

    def reflink(source: int, target: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(cloning, "reflink", reflink)


@pytest.fixture(scope="session", autouse=True)
def nothing_beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail if tests left something beside their own folders: two that do would meet there, by the order that they run in."""
    yield
    beside = [path.name for path in tmp_path_factory.getbasetemp().iterdir() if not _OF_PYTEST.search(path.name)]
    assert not beside, f"some test left beside the folders of all tests: {beside}"


@pytest.fixture(scope="session")
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Return whether golden files shall be rewritten instead of compared."""
    return bool(request.config.getoption("--update-goldens"))


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """Return what keeps count of what this test has tried."""
    test = request.node.nodeid.partition("[")[0]
    return Count(test=test, update=bool(request.config.getoption("--update-counts")))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Return the tiny bases and adapters of this session, each made once."""
    return Zoo(tmp_path_factory.mktemp("zoo"))
