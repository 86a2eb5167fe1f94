"""Gates as JUnit XML, which CI systems show: a test suite for each build, a test case for each gate.

<testsuites name="lora-build"><testsuite name="prod" tests="1" failures="1" errors="0">
  <testcase classname="prod" name="sums.exact_match >= 0.9">
    <failure message="sums.exact_match is 0.85, expected &gt;= 0.9" /></testcase></testsuite></testsuites>
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import RecipeError, StorageError
from lora_build.proof.scored import HeldGate
from lora_build.terminal import escaped


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One build: its name, the gates that it was held to, and the error that ended it, if any did."""

    name: str
    gates: Sequence[HeldGate] = ()
    error: str | None = None


def junit_bytes(suites: Iterable[Suite]) -> bytes:
    """Return the file."""
    top = ET.Element("testsuites", name="lora-build")
    for suite in suites:
        failures = sum(not gate.passed for gate in suite.gates)
        has_error = suite.error is not None and not failures  # of gates all is said one by one, where they are known
        of = ET.SubElement(
            top, "testsuite", name=escaped(suite.name), tests=str(len(suite.gates) + has_error), failures=str(failures),
            errors=str(int(has_error)),
        )  # fmt: skip
        for held in suite.gates:
            name = f"{held.gate.score}.{held.gate.metric} {held.gate.limit.strip()}"
            case = ET.SubElement(of, "testcase", classname=escaped(suite.name), name=escaped(name))
            if not held.passed:
                ET.SubElement(case, "failure", message=escaped(held.said))
        if has_error:
            case = ET.SubElement(of, "testcase", classname=escaped(suite.name), name="build")
            ET.SubElement(case, "error", message=escaped(suite.error or ""))
    ET.indent(top)
    text: bytes = ET.tostring(top, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def refuse_place(file: str | None) -> None:
    """Raise RecipeError where no such file could be written, before anything is built for it."""
    if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
        raise RecipeError(f"--junit: {file} cannot be written: its folder is not there, or it is one")


def write_junit(file: str, suites: Iterable[Suite]) -> None:
    """Write the file.

    Raises:
        StorageError: that failed.
    """
    try:
        Path(file).write_bytes(junit_bytes(suites))
    except OSError as error:
        raise StorageError(f"--junit: {file}: {error.strerror or error}") from error
