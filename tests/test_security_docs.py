"""The table in docs/security.rst names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"``(test_\w+\.py)::(test_\w+)``")


def test_every_test_that_the_table_names_exists() -> None:
    """A requirement without its test is not proven."""
    text = (ROOT / "docs" / "security.rst").read_text()
    named = NAMED.findall(text)
    assert len(named) > 50
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_every_requirement_has_its_line() -> None:
    """All of V3 and V7 of the ASVS 5.0 are in the table, alone or in a range."""
    text = (ROOT / "docs" / "security.rst").read_text()
    found = set()
    for chapter, first, last in re.findall(
        r"\* - (\d\.\d)\.(\d)(?: to \d\.\d\.(\d))?$", text, re.MULTILINE
    ):
        numbers = range(int(first), int(last or first) + 1)
        found |= {f"{chapter}.{number}" for number in numbers}
    sections = {"3.1": 1, "3.2": 3, "3.3": 5, "3.4": 8, "3.5": 8, "3.6": 1, "3.7": 5}
    sections |= {"7.1": 3, "7.2": 4, "7.3": 2, "7.4": 5, "7.5": 3, "7.6": 2}
    expected = {
        f"{s}.{n}" for s, count in sections.items() for n in range(1, count + 1)
    }
    assert found == expected
