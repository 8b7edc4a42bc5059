"""What the documentation says is so: its examples run, and its names exist."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from flask import Flask, session

import flask_resilient_session
from example_app.nodes import main as nodes_command
from flask_resilient_session import ResilientSession, Session
from flask_resilient_session.common.events import COUNTERS
from flask_resilient_session.maintenance import cli
from flask_resilient_session.settings import CONFIG_KEYS, load_settings
from servers import Memcached

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text()
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob("*.rst"), *ROOT.glob("docs/*.rst"))
)
BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
#: One row of a list table with three columns.
ROW = re.compile(
    r"^   \* - ``(\w+)``\n     - ``(.+?)``\n     - (.+(?:\n       .+)*)", re.MULTILINE
)


def read(page: str) -> str:
    """A page of the documentation."""
    return (ROOT / page).read_text()


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language, without their indentation."""
    return [
        textwrap.dedent(body)
        for found, body in BLOCK.findall(text)
        if found == language
    ]


def run(code: str, tmp_path: Path, **names: Any) -> dict[str, Any]:
    """Run code as a module that knows these names already; all of its names."""
    path = tmp_path / "example.py"
    path.write_text(code)
    return runpy.run_path(str(path), init_globals=names, run_name="example")


def section(title: str) -> str:
    """One section of the README."""
    _, found, rest = README.partition(f"\n{title}\n{'-' * len(title)}\n")
    assert found, f"no section {title}"
    return re.split(r"\n[^\n]+\n-{4,}\n", rest)[0]


@pytest.fixture
def example(nodes: list[Memcached], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """All names of the README's Python, run in order, on two real nodes."""
    code = "\n".join(blocks(README, "python"))
    for written, real in {
        "127.0.0.1:11211": nodes[0].address,
        "127.0.0.1:11212": nodes[1].address,
        "sqlite:///shop.db": f"sqlite:///{tmp_path / 'shop.db'}",
    }.items():
        assert code.count(written) == 1
        code = code.replace(written, real)
    names = run(code, tmp_path)
    names["app"].testing = True
    yield names
    app = names["app"]
    with app.app_context():
        names["db"].engine.dispose()
    app.extensions["resilient_session"].close()


# --- examples --------------------------------------------------------------------


def test_the_examples_do_what_they_say(
    example: dict[str, Any], nodes: list[Memcached]
) -> None:
    """The README's application counts, logs in, lists, changes ids and logs out."""
    client = example["app"].test_client()
    assert client.get("/count").json == {"visits": 1}
    before = client.get_cookie("session")
    assert client.post("/login").text == "welcome"
    assert client.get_cookie("session") != before
    nodes[0].kill()
    assert client.get("/count").json == {"visits": 2}
    assert client.post("/checkout").text == "thank you"
    elsewhere = example["app"].test_client()
    elsewhere.post("/login")
    assert len(client.get("/devices").json) == 2
    before = client.get_cookie("session")
    assert client.post("/password").text == "changed"
    assert client.get_cookie("session") != before
    assert elsewhere.get("/count").json == {"visits": 1}
    assert client.get("/count").json == {"visits": 3}
    assert client.post("/logout").text == "bye"
    assert client.get("/count").json == {"visits": 1}


def test_the_example_shows_where_a_session_is(
    example: dict[str, Any], nodes: list[Memcached]
) -> None:
    """The README's page tells a copy from a node that does not answer."""
    client = example["app"].test_client()
    client.post("/login")
    addresses = [node.address for node in nodes]
    assert client.get("/copies").json == {
        "standing": "agreed",
        "nodes": dict.fromkeys(addresses, "current"),
        "row": "live",
    }
    nodes[0].kill()
    shown = client.get("/copies").json
    assert shown["standing"] == "confirmed"
    assert shown["nodes"] == dict(
        zip(addresses, ("unreachable", "current"), strict=True)
    )


def test_signals_reach_the_examples_listener(
    example: dict[str, Any],
    nodes: list[Memcached],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The README's listener hears that a node is skipped."""
    client = example["app"].test_client()
    client.get("/count")
    nodes[0].kill()
    client.get("/count")
    assert (
        f"{nodes[0].address} is skipped: connection refused" in capsys.readouterr().out
    )


def test_the_nodes_by_name_are_accepted(example: dict[str, Any]) -> None:
    """The README's second list of nodes is one that the extension takes."""
    settings = load_settings(example["app"].config)
    assert [node.name for node in settings.nodes] == ["cache-a", "cache-b", "cache-c"]
    assert [node.zone for node in settings.nodes] == ["rack-1", "rack-2", "rack-2"]


def test_the_examples_of_the_security_page_run(
    example: dict[str, Any], tmp_path: Path
) -> None:
    """Its settings are accepted and its calls exist."""
    settings, calls = blocks(read("docs/security.rst"), "python")
    app = Flask(__name__)
    run(settings, tmp_path, app=app)
    assert load_settings(app.config).encrypt
    client = example["app"].test_client()
    client.post("/login")
    with example["app"].test_request_context():
        run(
            calls,
            tmp_path,
            session=session,
            sessions=example["sessions"],
            user=SimpleNamespace(id="7"),
            info=example["sessions"].sessions_of("7")[0],
        )
        assert example["sessions"].sessions_of("7") == []


def test_the_examples_of_the_operations_page_run(tmp_path: Path) -> None:
    """Its configuration is accepted."""
    (code,) = blocks(read("docs/operations.rst"), "python")
    assert len(load_settings(run(code, tmp_path)).nodes) == 3


@pytest.mark.parametrize("page", PAGES)
def test_no_example_is_left_out(page: str) -> None:
    """Python is only where a test here runs it."""
    run_here = {"README.rst", "docs/security.rst", "docs/operations.rst"}
    assert page in run_here or not blocks(read(page), "python")


# --- tables ----------------------------------------------------------------------


def test_the_table_has_every_key_and_default() -> None:
    """Keys and defaults in the README are those in the code, in its order."""
    rows = ROW.findall(section("Configuration"))
    assert [(key, default) for key, default, _ in rows] == [
        (key, repr(default)) for key, default in CONFIG_KEYS.items()
    ]


@pytest.mark.parametrize("page", ["README.rst", "docs/operations.rst"])
def test_exit_codes_are_the_commands_own(page: str) -> None:
    """The exit codes of the reaper in a table are those that the command has."""
    found = re.findall(r"^(\d) {3,}\S", read(page), re.MULTILINE)
    codes = [value for name, value in vars(cli).items() if name.startswith("EXIT_")]
    assert sorted(map(int, found)) == sorted(codes)


# --- names -----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    """Every RESILIENT_SESSION_ key in the documentation is one."""
    named = set(re.findall(r"\bRESILIENT_SESSION_[A-Z_]*[A-Z]\b", read(page)))
    assert named <= set(CONFIG_KEYS)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Every page, test and tool that the documentation sends its reader to is there."""
    pattern = r"``((?:[\w.]+/)*[\w.*]+\.(?:rst|py|sh|cfg)|(?:tests|docs|tools)/\w+)``"
    for name in re.findall(pattern, read(page)):
        assert any(list(folder.glob(name)) for folder in (ROOT, ROOT / "tests")), name


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_are_named_exist(page: str) -> None:
    """Every make command in the documentation is a target."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pattern = r"(?:``|^    )make(?: \w+=\S+)* ([a-z]+)(?:``| {2}| \w+=|$)"
    named = re.findall(pattern, read(page), re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_flask_commands_that_are_named_exist(page: str) -> None:
    """Every flask command with its options is one that an application has."""
    app = Flask(__name__)
    ResilientSession(app)
    commands = app.cli.commands
    pattern = r"\bflask(?: --app [\w.]+)?\s+([a-z]\w*[-_][\w-]+)([^`\n]*)"
    for name, rest in re.findall(pattern, read(page)):
        assert name in commands, name
        assert set(re.findall(r"--[\w-]+", rest)) <= options_of(commands[name]), name
    app.extensions["resilient_session"].close()


def test_options_that_the_readme_names_exist() -> None:
    """Every option in the section on the commands belongs to one of them."""
    app = Flask(__name__)
    ResilientSession(app)
    known = set[str]().union(*map(options_of, app.cli.commands.values()))
    named = set(re.findall(r"``(--[\w-]+)", section("Reaping")))
    assert "--archive" in named
    assert named <= known
    app.extensions["resilient_session"].close()


def options_of(command: click.Command) -> set[str]:
    """All spellings of a command's options."""
    return {spelling for param in command.params for spelling in param.opts}


def test_the_demos_commands_exist() -> None:
    """What the README does to the demo's nodes are actions of its command."""
    action = next(param for param in nodes_command.params if param.name == "action")
    assert isinstance(action.type, click.Choice)
    named = re.findall(r"-m example_app\.nodes (\w+)", README)
    assert named
    assert set(named) <= set(action.type.choices)


def test_attributes_that_the_readme_names_exist() -> None:
    """What is said of the session and of the extension, they have."""
    for text in (README, read("docs/security.rst")):
        for name in re.findall(r"\bsession\.(\w+)", text):
            assert hasattr(Session, name), name
        for name in re.findall(r"\bsessions\.(\w+)", text):
            assert hasattr(ResilientSession, name), name


def test_counters_and_signals_that_are_named_exist() -> None:
    """Counters and signals of the README exist, and it names every signal."""
    text = section("Watching it")
    signals = {
        name
        for name in flask_resilient_session.__all__
        if name.startswith(("session_", "node_"))
    }
    named = set(re.findall(r"``([a-z]+_[a-z_]+)``", text))
    assert signals <= named
    assert named <= signals | set(COUNTERS) | {"flask_resilient_session"}


def test_the_operations_page_knows_its_counters() -> None:
    """Counters to watch are counters."""
    rows = re.findall(
        r"^   \* - (``\w+``.*)$", read("docs/operations.rst"), re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"``(\w+)``", row)}
    assert named
    assert named <= set(COUNTERS)


def test_importing_needs_no_optional_package() -> None:
    """The README's plain installation is enough to import the package."""
    code = (
        "import sys; sys.modules['cryptography'] = None; import flask_resilient_session"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
