"""Names of inputs and digests are text that knows what it says."""

import hashlib
import json

from blake3 import blake3

from lora_build.files.identity import BASE, Digest, FileKey, SourceName


def test_a_source_is_the_base_or_an_adapter() -> None:
    assert BASE.is_base
    math = SourceName.of_adapter("math")
    assert not math.is_base
    assert (math, math.adapter_name) == ("adapters.math", "math")


def test_a_digest_says_its_algorithm() -> None:
    found = Digest.sha256(b"abc")
    assert found == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert (found.algorithm, found.hex) == ("sha256", hashlib.sha256(b"abc").hexdigest())
    assert Digest.of_git("0" * 40) == "git-sha1:" + "0" * 40
    assert Digest.of_git("0" * 40).is_git
    assert not found.is_git


def test_every_hash_gives_the_same_digest() -> None:
    assert Digest.of_hash(hashlib.sha256(b"abc")) == Digest.sha256(b"abc")
    assert Digest.of("blake3", blake3(b"abc")) == Digest.blake3(b"abc")
    # of the test vectors that the paper's authors publish
    assert Digest.blake3(b"") == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_names_and_digests_are_written_as_text() -> None:
    assert json.dumps({BASE: [Digest.of_hex("00"), *FileKey(BASE, "config.json")]}) == (
        '{"base": ["sha256:00", "base", "config.json"]}'
    )
