"""What fuzzing has found so far, replayed."""

from pathlib import Path

import pytest

from fuzz.parsers import PARSERS, accepts

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("parser", PARSERS)
def test_no_input_that_fuzzing_found_breaks_a_parser(parser: str) -> None:
    inputs = sorted((CORPUS / parser).iterdir())
    accepted = [path.name for path in inputs if accepts(parser, path.read_bytes())]
    assert len(inputs) >= 7
    assert accepted, "at least one is right"
