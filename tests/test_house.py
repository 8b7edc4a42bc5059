"""The style of the house: who may know whom, and that everything says what it is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_resilient_session

HOUSE = Path(flask_resilient_session.__file__).parent
NAME = flask_resilient_session.__name__

#: A room imports rooms of lower levels only. One that is not here has no place yet:
#: give it the level above the highest that it imports.
LEVELS = {
    # what anybody may know
    "errors": 0,
    "clock": 0,
    "events": 0,
    "ring": 0,
    "health": 0,
    # values, bytes and text
    "record": 1,
    "envelope": 2,
    "codec": 1,
    "wire": 1,
    "addresses": 1,
    "config": 2,
    # decisions
    "access": 3,
    "times": 3,
    "replication": 4,
    "reaping": 5,
    # one server each
    "node": 2,
    "rows": 1,
    "sql_errors": 1,
    "patience": 1,
    "gate": 2,
    "deadline": 2,
    "connections": 3,
    "calls": 4,
    "sql": 5,
    # who waits for whom
    "turns": 1,
    # all copies, the row
    "cluster": 3,
    "homes": 6,
    "durable": 5,
    # the order of steps
    "loading": 7,
    "steps": 7,
    "saving": 8,
    "ending": 8,
    "moving": 9,
    "store": 10,
    # a request and its cookie
    "session": 2,
    "cookie": 2,
    "keys": 4,
    "visit": 11,
    "inspection": 12,
    "interface": 13,
    # upkeep
    "reaper": 11,
    "revocation": 11,
    "cli": 12,
    # all of it, put together
    "engines": 4,
    "extension": 14,
    "__init__": 15,
}

#: Rooms that get everything as arguments: their functions only compute.
PURE = {
    *("ring", "health", "record", "codec", "config", "addresses", "wire"),
    *("times", "replication", "reaping", "envelope"),
}
IMPURE_MODULES = {
    *("socket", "select", "selectors", "ssl", "time", "random", "os", "io", "pathlib"),
    *("subprocess", "logging", "flask", "sqlalchemy", "memcache", "asyncio"),
}

#: Module -> the only rooms that may import it.
ONLY_IN = {
    "memcache": {"node"},
    "socket": {"node"},
    "sqlalchemy": {
        *("rows", "sql_errors", "connections", "calls", "sql", "engines"),
        "extension",
    },
    "flask_sqlalchemy": {"engines", "extension"},
    "click": {"cli", "extension"},
    "time": {"clock"},
    "flask": {
        *("session", "cookie", "keys", "visit", "interface"),
        *("cli", "engines", "extension"),
    },
    **{name: set() for name in ("pickle", "marshal", "shelve", "dill")},
}

LONGEST_FUNCTION = 60

ROOMS = {path.stem: ast.parse(path.read_text()) for path in sorted(HOUSE.glob("*.py"))}
every_room = pytest.mark.parametrize("room", ROOMS)


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is imported, wherever it stands, and its line; a room as ``.name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield inner(alias.name), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                yield f".{node.module or alias.name}", node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield inner(node.module or ""), node.lineno


def inner(module: str) -> str:
    """The module's first name; ``.name`` for one of this package."""
    first, _, rest = module.partition(".")
    return f".{rest or '__init__'}" if first == NAME else first


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, methods and inner ones included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def public(node: ast.AST) -> bool:
    """Whether this defines something with a public name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return isinstance(node, kinds) and not node.name.startswith("_")


@every_room
def test_every_room_has_a_level(room: str) -> None:
    """A new room is given its place in the house."""
    highest = max(
        (
            LEVELS.get(name[1:], -1)
            for name, _ in imports(ROOMS[room])
            if name[0] == "."
        ),
        default=-1,
    )
    assert room in LEVELS, (
        f"flask_resilient_session/{room}.py has no level: add it to LEVELS in"
        f" tests/test_house.py. What it imports goes up to level {highest}."
    )


def test_every_level_has_its_room() -> None:
    """A room that was removed leaves nothing behind in these tables."""
    named = set(LEVELS) | PURE | set().union(*ONLY_IN.values())
    assert named - set(ROOMS) == set()


@every_room
def test_imports_run_downward(room: str) -> None:
    """A room knows those below it, never its neighbours or those above."""
    for name, line in imports(ROOMS[room]):
        if not name.startswith("."):
            continue
        assert LEVELS.get(name[1:], 99) < LEVELS.get(room, -1), (
            f"{room}.py, line {line}: {room} (level {LEVELS.get(room)}) imports"
            f" {name[1:]} (level {LEVELS.get(name[1:])})"
        )


@pytest.mark.parametrize("room", sorted(PURE))
def test_pure_rooms_import_no_io(room: str) -> None:
    """They read no clock, roll no dice, log nothing and know no network."""
    found = dict(imports(ROOMS[room]))
    assert not IMPURE_MODULES & found.keys(), f"{room}.py imports what does I/O"
    impure = {name for name in found if name[0] == "." and name[1:] not in PURE}
    assert impure <= {".errors"}, f"{room}.py imports rooms that are not pure"


@every_room
def test_some_modules_are_known_in_one_place(room: str) -> None:
    """The client libraries have one importer each, and nothing is unpickled."""
    for name, line in imports(ROOMS[room]):
        allowed = ONLY_IN.get(name)
        assert allowed is None or room in allowed, (
            f"{room}.py, line {line}: {name} is for {sorted(allowed or ())} only"
        )


@every_room
def test_nothing_is_imported_but_what_is_declared(room: str) -> None:
    """The standard library and the distribution's own requirements."""
    declared = {
        *("flask", "flask_sqlalchemy", "sqlalchemy", "werkzeug", "blinker", "click"),
        *("itsdangerous", "msgpack", "memcache", "markupsafe"),
        "cryptography",
    }
    known = declared | sys.stdlib_module_names
    outside = {name for name, _ in imports(ROOMS[room]) if not name.startswith(".")}
    assert outside <= known


@every_room
def test_every_room_says_what_it_is_for(room: str) -> None:
    """A module opens with what it knows; each public thing has a sentence."""
    tree = ROOMS[room]
    assert ast.get_docstring(tree), f"{room}.py has no docstring"
    documented = {
        node.name for node in functions(tree) if ast.get_docstring(node) is not None
    }
    silent = []
    for node in tree.body:
        if not public(node):
            continue
        if not ast.get_docstring(node):  # type: ignore[arg-type]
            silent.append(node.name)  # type: ignore[union-attr]
        if isinstance(node, ast.ClassDef):
            # What several classes have alike is described once.
            silent += [
                f"{node.name}.{method.name}"
                for method in node.body
                if public(method) and method.name not in documented  # type: ignore[union-attr]
            ]
    assert silent == [], f"without a docstring in {room}.py"


@every_room
def test_no_function_is_longer_than_a_screen(room: str) -> None:
    """What does not fit on one screen, its docstring apart, is two functions."""
    long = {
        node.name: lines
        for node in functions(ROOMS[room])
        if (lines := length(node)) > LONGEST_FUNCTION
    }
    assert long == {}


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring apart."""
    lines = (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        lines -= (text.end_lineno or 0) - text.lineno + 1
    return lines
