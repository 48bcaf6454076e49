"""docs/correctness.md and docs/security.md name tests: they must be there, and every property must have a line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "correctness.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
PROPERTIES, SECURITY_PROPERTIES = 26, 12


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_docs_name_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT + SECURITY)
    assert len(named) > PROPERTIES
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert not name or name in names_in(ROOT / file), f"{file} has no {name}"


def test_every_property_has_a_line_with_a_test_or_a_reason():
    section = TEXT.split("## The properties")[1].split("\n## ")[0]
    lines = dict(re.findall(r"^\| (\d+) \| (.+)$", section, re.MULTILINE))
    assert list(lines) == [str(number) for number in range(1, PROPERTIES + 1)]
    for line in lines.values():
        carried = re.search(r"there (?:is|are) n.*Carried by: `(test_\w+)`.* in `(tests/[\w/]+\.py)`", line)
        assert carried or re.search(r"`tests/[\w/]+\.py::test_\w+`", line), line
        assert not carried or carried[1] not in names_in(ROOT / carried[2]), f"{carried[1]} is there now"


def test_every_security_property_has_a_line_with_a_test():
    lines = dict(re.findall(r"^\| (\d+) \| (.+)$", SECURITY, re.MULTILINE))
    assert list(lines) == [str(number) for number in range(1, SECURITY_PROPERTIES + 1)]
    assert all(re.search(r"`tests/[\w/]+\.py::test_\w+`", line) for line in lines.values())
