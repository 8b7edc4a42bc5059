"""The architecture: who may import whom, and that everything says what it is."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_resilient_session

PACKAGE = Path(flask_resilient_session.__file__).parent
NAME = flask_resilient_session.__name__

#: Folder -> the folders that it may import from. The modules at the root may import
#: all of them, and ``settings`` and ``node_list`` are for two of them only.
MAY_IMPORT = {
    "common": set(),
    "core": {"common"},
    "sql": {"common"},
    "memcached": {"common", "core"},
    "store": {"common", "core", "sql", "memcached"},
    "web": {"common", "core", "store", "settings"},
    "maintenance": {"common", "core", "store", "sql", "memcached", "settings"},
}
ROOT = {"extension", "wiring", "settings", "node_list", "__init__"}

IMPURE_MODULES = {
    *("socket", "select", "selectors", "ssl", "time", "random", "os", "io", "pathlib"),
    *("subprocess", "logging", "flask", "sqlalchemy", "memcache", "asyncio"),
    "threading",
}

#: Module -> the only folders, or modules, that may import it.
ONLY_IN = {
    "memcache": {"memcached/node"},
    "socket": {"memcached/node"},
    "sqlalchemy": {"sql", "extension", "wiring"},
    "flask_sqlalchemy": {"sql/database", "extension", "wiring"},
    "click": {"maintenance/cli", "extension"},
    "time": {"common/clock"},
    "flask": {"web", "maintenance/cli", "sql/database", "extension", "wiring"},
    **{name: set() for name in ("pickle", "marshal", "shelve", "dill")},
}

LONGEST_FUNCTION = 60

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", MODULES)


def folder_of(module: str) -> str:
    """The folder that a module is in; the module itself at the root."""
    return module.split("/")[0]


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is imported, wherever it stands, and its line; a module as ``.name``."""
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


def known_to(module: str) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, as paths, and in which line."""
    here = module.split("/")[:-1]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - (node.level - 1)]
            yield "/".join([*above, *(node.module or "").split(".")]), node.lineno


def test_every_folder_has_its_rules() -> None:
    """A new folder, or a new module at the root, is given its place."""
    folders = {folder_of(module) for module in MODULES}
    assert folders == MAY_IMPORT.keys() | ROOT


@every_module
def test_folders_know_only_those_below(module: str) -> None:
    """No folder imports from one that builds on it, nor from the root."""
    folder = folder_of(module)
    for name, line in known_to(module):
        allowed = MAY_IMPORT.get(folder, MAY_IMPORT.keys() | ROOT) | {folder}
        assert folder_of(name) in allowed, (
            f"{module}.py, line {line}: {folder}/ must not import {name};"
            " see MAY_IMPORT in tests/test_architecture.py"
        )


def test_modules_do_not_import_in_a_circle() -> None:
    """Each module can be read with those that it imports, and without the others."""
    names = {module: {name for name, _ in known_to(module)} for module in MODULES}
    read: set[str] = set()
    while left := names.keys() - read:
        ready = {module for module in left if names[module] & names.keys() <= read}
        assert ready, f"these import each other: {sorted(left)}"
        read |= ready


@pytest.mark.parametrize("module", [m for m in MODULES if folder_of(m) == "core"])
def test_decisions_do_no_io(module: str) -> None:
    """What is in core reads no clock, rolls no dice, logs nothing, knows no network."""
    found = {name for name, _ in imports(MODULES[module])}
    assert not IMPURE_MODULES & found, f"{module}.py imports what does I/O"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_folder_tells_where_to_look(folder: str) -> None:
    """Its docstring has a question for each of its files, and no other file."""
    text = ast.get_docstring(MODULES[f"{folder}/__init__"]) or ""
    files = {
        module.split("/")[1] for module in MODULES if module.startswith(f"{folder}/")
    }
    named = re.findall(r"``(\w+)``$", text, re.MULTILINE)
    assert sorted(named) == sorted(files - {"__init__"})
    assert len(MODULES[f"{folder}/__init__"].body) == 1, "no re-exports"


@every_module
def test_some_modules_are_known_in_one_place(module: str) -> None:
    """The client libraries have one importer each, and nothing is unpickled."""
    for name, line in imports(MODULES[module]):
        allowed = ONLY_IN.get(name)
        assert allowed is None or {module, folder_of(module)} & allowed, (
            f"{module}.py, line {line}: {name} is for {sorted(allowed or ())} only"
        )


@every_module
def test_nothing_is_imported_but_what_is_declared(module: str) -> None:
    """The standard library and the distribution's own requirements."""
    declared = {
        *("flask", "flask_sqlalchemy", "sqlalchemy", "werkzeug", "blinker", "click"),
        *("itsdangerous", "msgpack", "memcache", "markupsafe"),
        "cryptography",
    }
    known = declared | sys.stdlib_module_names
    outside = {name for name, _ in imports(MODULES[module]) if not name.startswith(".")}
    assert outside <= known


@every_module
def test_every_module_says_what_it_is_for(module: str) -> None:
    """A module opens with what it knows; each public thing has a sentence."""
    tree = MODULES[module]
    assert ast.get_docstring(tree), f"{module}.py has no docstring"
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
    assert silent == [], f"without a docstring in {module}.py"


@every_module
def test_no_function_is_longer_than_a_screen(module: str) -> None:
    """What does not fit on one screen, its docstring apart, is two functions."""
    long = {
        node.name: lines
        for node in functions(MODULES[module])
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
