"""Inputs from a Hub on loopback, through the real client, in processes of their own (it reads its settings once)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_build
from makers import hub_server, small

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[hub_server.Hub]:
    base, math = small.make_base(tmp_path / "base", shards=True), small.make_adapter(tmp_path / "math")
    repos = {"acme/base": base, "acme/math": math, "acme/base-private": base, "acme/math-gated": math}
    with hub_server.serve(repos) as server:
        yield server


class Client:
    """Runs lora-build in another process, with a Hub cache of its own."""

    def __init__(self, hub: hub_server.Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder

    def __call__(
        self, command: str = "build", *, env: dict[str, str] | None = None, **recipe: Any
    ) -> tuple[int, str, str]:
        values = {
            "base": "acme/base",
            "adapters": {"math": "acme/math"},
            "output": {"dir": str(self.folder / "out")},
        } | recipe
        code = (
            "import json, sys, lora_build\n"
            "from lora_build import pipeline\n"
            "from lora_build.files.sources import hub_requests\n"
            "from lora_build.recipe.validate import from_mapping\n"
            "hub_requests.FIRST_WAIT_SECONDS = 0.01\n"
            "try:\n"
            "    prepared = pipeline.prepare(from_mapping(json.loads(sys.argv[1])))\n"
            "    print(pipeline.run(prepared).manifest.manifest_hash if sys.argv[2] == 'build' else prepared.merge_plan.num_bytes)\n"
            "except lora_build.LoraBuildError as error:\n"
            "    print(error, file=sys.stderr)\n"
            "    sys.exit(error.exit_code)\n"
        )
        settings = {**os.environ, "HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                    "HF_HOME": str(self.folder / "hf"), "XDG_CACHE_HOME": str(self.folder / "cache")}  # fmt: skip
        settings.pop("HF_TOKEN", None)
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(values), command],
            env=settings | (env or {}), capture_output=True, text=True, cwd=self.folder,
        )  # fmt: skip
        return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.fixture
def client(hub: hub_server.Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def test_a_build_by_revision_equals_the_local_one_and_is_repeated_offline_from_the_cache(
    client: Client, tmp_path: Path
) -> None:
    commit = client.hub.commit("acme/base")
    local = lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "local")})).manifest
    code, manifest_hash, error = client(base={"source": "acme/base", "revision": commit})
    assert (code, error) == (0, "")
    assert manifest_hash == local.manifest_hash

    client.hub.down = True
    requests = len(client.hub.requests)
    offline = client(
        base={"source": "acme/base", "revision": commit},
        output={"dir": str(tmp_path / "again")},
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert offline == (0, manifest_hash, "")
    assert len(client.hub.requests) == requests


def test_provenance_records_the_commits(client: Client, tmp_path: Path) -> None:
    assert client()[0] == 0
    text = (tmp_path / "out/lora-build.provenance.json").read_text()

    assert f"hf://acme/base@{client.hub.commit('acme/base')}/config.json" in text
    assert f"hf://acme/math@{client.hub.commit('acme/math')}/adapter_model.safetensors" in text


def test_trained_weights_beside_an_adapter_are_seen_and_never_fetched(client: Client) -> None:
    client.hub.repos["acme/math"]["value_head.bin"] = b"no pickle"
    code, _, error = client("plan")
    assert code == 2
    assert "adapters.math: value_head.bin may hold weights that were trained with it" in error

    adapters = {"math": {"source": "acme/math", "ignore_files": ["value_head.*"]}}
    assert client("plan", adapters=adapters)[0] == 0
    assert not [request for request in client.hub.requests if "value_head" in request[1]]


def test_planning_fetches_no_weights_of_the_base(client: Client) -> None:
    code, _, error = client("plan")

    assert (code, error) == (0, "")
    shards = [r for r in client.hub.requests if "model-0000" in r[1] and r[0] == "GET"]
    assert shards
    assert all(wanted and wanted.startswith("bytes=") for _, _, wanted in shards)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "adapter_model.safetensors"])
def test_one_corrupted_byte_is_refused_and_not_kept(client: Client, tmp_path: Path, name: str) -> None:
    client.hub.corrupt = name
    code, _, error = client()

    assert code == 3, error
    assert f"{name}: damaged" in error
    assert "run again to fetch it anew" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"base": "acme/absent"}, "base: acme/absent is not on http://127.0.0.1"),
        ({"base": "acme/base-private"}, "if it is private, set HF_TOKEN or run `hf auth login`"),
        ({"adapters": {"math": "acme/math-gated"}}, "adapters.math: acme/math-gated is gated: accept its terms at"),
        ({"base": {"source": "acme/base", "revision": "v9"}}, "base: acme/base has no revision 'v9'; branches: main"),
        ({"base": {"source": "acme/base", "revision": "0" * 40}}, "base: acme/base has no revision '000"),
    ],
)
def test_what_may_not_be_read_is_answered_with_one_message_and_a_remedy(
    client: Client, tmp_path: Path, recipe: dict[str, Any], said: str
) -> None:
    code, _, error = client(**recipe)

    assert code == 2, error
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_private_repository_opens_with_the_token_and_the_token_is_written_nowhere(
    client: Client, tmp_path: Path
) -> None:
    code, _, error = client(base="acme/base-private", env={"HF_TOKEN": hub_server.TOKEN})

    assert (code, error) == (0, "")
    assert not [p for p in (tmp_path / "out").iterdir() if hub_server.TOKEN.encode() in p.read_bytes()]


def test_offline_without_a_cache_says_so(client: Client) -> None:
    code, _, error = client(env={"HF_HUB_OFFLINE": "1"})

    assert code == 2
    assert "HF_HUB_OFFLINE is set" in error


def test_a_hub_that_is_down_is_a_network_failure(client: Client) -> None:
    client.hub.down = True
    code, _, error = client()

    assert code == 4, error
    assert "503" in error or "failed" in error
