"""Pages that name the tests which prove them name tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = next(up for up in Path(__file__).parents if (up / "setup.cfg").is_file())
NAMED = re.compile(r"``(test_\w+\.py)::(test_\w+)``")
#: One row of a guarantee's table: its number, the promise, the tests.
PROMISE = re.compile(
    r"^   \* - (\d+\.\d+)\n     - (.+(?:\n       .+)*)\n     - (.+(?:\n       .+)*)",
    re.MULTILINE,
)
GUARANTEES = re.compile(r"^G(\d+)\. .+\n~+\n", re.MULTILINE)

#: Page -> how many tests it names at least.
PAGES = {
    "docs/security.rst": 50,
    "docs/guarantees.rst": 100,
    "docs/design.rst": 1,
}


def read(page: str) -> str:
    """A page of the documentation."""
    return (ROOT / page).read_text()


@cache
def known_tests(file: str) -> frozenset[str]:
    """The tests in a file of this name, in whichever folder under tests/ it is."""
    return frozenset(
        node.name
        for path in (ROOT / "tests").rglob(file)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    """A promise without its test is not proven."""
    named = NAMED.findall(read(page))
    assert len(named) >= PAGES[page]
    missing = [
        f"{file}::{test}" for file, test in named if test not in known_tests(file)
    ]
    assert missing == []


def test_every_promise_names_its_tests() -> None:
    """G1 to G16 each have their promises, and no promise stands without a test."""
    text = read("docs/guarantees.rst")
    text = text[: text.index("What it does not promise\n---")]
    parts = GUARANTEES.split(text)[1:]
    guarantees = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(guarantees) == [str(number) for number in range(1, 17)]
    for number, table in guarantees.items():
        rows = PROMISE.findall(table)
        # A row whose cell of tests is empty is no row of the pattern.
        assert len(rows) == len(re.findall(r"^   \* - \d", table, re.MULTILINE)), number
        assert [row[0] for row in rows] == [
            f"{number}.{row}" for row in range(1, len(rows) + 1)
        ]
        for row, _, tests in rows:
            assert NAMED.search(tests), row


def test_every_promise_is_one_sentence() -> None:
    """What is promised together would be proven together, or only half."""
    for row, promise, _ in PROMISE.findall(read("docs/guarantees.rst")):
        assert re.fullmatch(r"[^.]+(?:\.[\d\w][^.]*)*\.", promise), row


def test_every_requirement_has_its_line() -> None:
    """All of V3 and V7 of the ASVS 5.0 are in the table, alone or in a range."""
    text = read("docs/security.rst")
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
