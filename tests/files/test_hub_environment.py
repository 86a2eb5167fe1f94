"""Odd values of the environment: named with what was found and expected, before the Hub's client falls over them."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from lora_build.errors import LoraBuildError, RecipeError, StorageError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.identity import SourceName
from lora_build.files.sources import hub_environment
from lora_build.files.sources.hub import open_hub
from lora_build.files.sources.hub_cache import snapshot_path
from lora_build.files.sources.hub_environment import proxy_of
from lora_build.models.architecture import class_and_config
from makers import hub_server, small


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in {"HF_ENDPOINT", "SSL_CERT_FILE", "HF_TOKEN"}:
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


def refusal(kind: type[LoraBuildError] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        open_hub(SourceName("base"), "acme/base", None)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("HF_HUB_DOWNLOAD_TIMEOUT", text, "whole seconds from 1 to 86,400") for text in ("x", "", "-3", "0", "9" * 30)),
        ("HF_HUB_ETAG_TIMEOUT", "1.5", "whole seconds"),
        ("HF_ENDPOINT", "http://[::1", "Invalid IPv6 URL"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999", "Port out of range"),
        *(("HF_ENDPOINT", text, "no URL of http or https with a host") for text in ("localhost:1", "ftp://x", "http://", "")),
        ("HF_ENDPOINT", "http://h\u00fcb\u2020", "characters that no URL has"),
        ("HF_HUB_USER_AGENT_ORIGIN", "a\nb", "printable ASCII"),
        ("http_proxy", "http://[x", "such as http://proxy.example:3128"),
        ("HTTPS_PROXY", "ftp://proxy", "no URL of http or https"),
        ("all_proxy", "socks5://proxy:1", "pip install socksio"),
        ("SSL_CERT_FILE", "/there/is/none", "no such file"),
        ("SSL_CERT_FILE", __file__, "no certificate"),
    ],
)  # fmt: skip
def test_a_variable_that_cannot_be_used_is_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_environment, "find_spec", lambda _: None)
    monkeypatch.setenv(name, value)

    found = refusal()

    assert found.startswith(f"{name} is ")
    assert said in found
    assert "unset it" in found


def test_all_of_them_are_named_at_once_and_no_password_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "ftp://me:word@hub")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "x")

    found = refusal()

    assert found.startswith("2 variables of the environment cannot be used:\n  HF_HUB_DOWNLOAD_TIMEOUT is 'x'")
    assert "HF_ENDPOINT is 'hub'" in found


@pytest.mark.parametrize("token", ["hf_\u2020secret", "hf_ secret", "hf_\x7fsecret"])
def test_a_token_that_no_header_takes_is_told_but_not_shown(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    found = refusal()
    assert found.startswith("HF_TOKEN: 1 of its 10 characters are in no token")
    assert "secret" not in found

    (tmp_path / "token").write_text(token, encoding="utf-8")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refusal().startswith(f"{tmp_path}/token: 1 of its 10 characters")


def test_a_token_that_cannot_be_read_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))

    assert refusal().startswith(f"{tmp_path}: the Hub's token cannot be read: Is a directory; HF_HOME or HF_TOKEN_PATH")


def test_a_cache_that_cannot_be_written_is_told_with_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small.make_base(tmp_path / "base")
    (tmp_path / "file").touch()
    with hub_server.serve({"acme/base": base}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
        source = open_hub(SourceName("base"), "acme/base", None)
        with pytest.raises(StorageError) as caught:
            source.path("config.json")

    assert f"Not a directory ({snapshot_path('acme/base', source.commit, '').parents[1]}" in str(caught.value)
    assert str(caught.value).endswith("HF_HOME says where the cache is: set it to a folder that can be written")


def test_a_proxy_is_named_without_its_password_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of("https://hub") == ""
    monkeypatch.setenv("all_proxy", "http://me:word@proxy:1")
    monkeypatch.setenv("no_proxy", "inside")

    assert proxy_of("https://hub") == " by the proxy proxy:1 of all_proxy"
    assert proxy_of("https://inside") == ""


def test_transformers_is_not_imported_into_such_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "x")

    with pytest.raises(RecipeError, match="HF_HUB_DOWNLOAD_TIMEOUT is 'x'"):
        class_and_config(ModelConfig.of({"architectures": ["LlamaForCausalLM"]}), "config.json")
