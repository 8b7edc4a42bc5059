"""What the documentation says is so: its examples run, and its names exist."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from configparser import ConfigParser
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

ROOT = next(up for up in Path(__file__).parents if (up / "setup.cfg").is_file())
PACKAGE = Path(flask_resilient_session.__file__).parent
README = (ROOT / "README.rst").read_text()
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob("*.rst"), *ROOT.glob("docs/*.rst"))
)
#: Pages whose Python is one application, in this order.
APPLICATION = ("README.rst", "docs/usage.rst", "docs/configuration.rst")
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


def python_of(page: str) -> list[str]:
    """The Python of a page; there is some."""
    found = blocks(read(page), "python")
    assert found, page
    return found


def run(code: str, tmp_path: Path, **names: Any) -> dict[str, Any]:
    """Run code as a module that knows these names already; all of its names."""
    path = tmp_path / "example.py"
    path.write_text(code)
    return runpy.run_path(str(path), init_globals=names, run_name="example")


def section(page: str, title: str) -> str:
    """One section of a page, those below it included."""
    _, found, rest = read(page).partition(f"\n{title}\n{'-' * len(title)}\n")
    assert found, f"no section {title} in {page}"
    return re.split(r"\n[^\n]+\n-{4,}\n", rest)[0]


@pytest.fixture
def example(nodes: list[Memcached], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """All names of the pages' application, run in order, on two real nodes."""
    code = "\n".join(block for page in APPLICATION for block in python_of(page))
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
    """The application counts, logs in, lists, changes ids and logs out."""
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
    """The page of copies tells a copy from a node that does not answer."""
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
    """The listener hears that a node is skipped."""
    client = example["app"].test_client()
    client.get("/count")
    nodes[0].kill()
    client.get("/count")
    assert (
        f"{nodes[0].address} is skipped: connection refused" in capsys.readouterr().out
    )


def test_the_nodes_by_name_are_accepted(example: dict[str, Any]) -> None:
    """The list of nodes with names is one that the extension takes."""
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


def test_the_readmes_application_has_fifteen_lines() -> None:
    """What a newcomer has to read and type stays short."""
    (code,) = python_of("README.rst")
    assert len(code.strip().splitlines()) == 15


@pytest.mark.parametrize("page", PAGES)
def test_no_example_is_left_out(page: str) -> None:
    """Python is only where a test here runs it."""
    run_here = {*APPLICATION, "docs/security.rst", "docs/operations.rst"}
    assert page in run_here or not blocks(read(page), "python")


# --- tables ----------------------------------------------------------------------


def test_the_table_has_every_key_and_default() -> None:
    """Keys and defaults on their page are those in the code, in its order."""
    rows = ROW.findall(section("docs/configuration.rst", "All keys"))
    assert [(key, default) for key, default, _ in rows] == [
        (key, repr(default)) for key, default in CONFIG_KEYS.items()
    ]


def test_the_newcomers_settings_are_five_and_true() -> None:
    """The README names five keys, each with the default that it has."""
    rows = ROW.findall(section("README.rst", "Five settings"))
    assert len(rows) == 5
    for key, default, _ in rows:
        assert default == repr(CONFIG_KEYS[key]), key


def test_exit_codes_are_the_commands_own() -> None:
    """The exit codes of both commands are those that they have, and what they say."""
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    for title, command, expected in (
        ("The reaper", "reap-sessions", codes),
        ("Ending sessions", "revoke-sessions", codes - {cli.EXIT_STOPPED}),
    ):
        text = section("docs/operations.rst", title)
        found = [int(code) for code in re.findall(r"^(\d) {3,}\S", text, re.MULTILINE)]
        assert sorted(found) == sorted(expected), title
        help_text = command_named(command).help or ""
        _, _, said = help_text.partition("Exit codes: ")
        assert sorted(map(int, re.findall(r"\b(\d) ", said))) == sorted(found), title


def command_named(name: str) -> click.Command:
    """A command that the extension gives to an application."""
    app = Flask(__name__)
    ResilientSession(app)
    app.extensions["resilient_session"].close()
    return app.cli.commands[name]


def test_the_required_versions_are_those_of_the_distribution() -> None:
    """What the README asks for is what the installation asks for."""
    options = ConfigParser()
    options.read(ROOT / "setup.cfg")
    required = dict(
        line.split(">=") for line in options["options"]["install_requires"].split()
    )
    required["Python"] = options["options"]["python_requires"].removeprefix(">=")
    text = " ".join(section("README.rst", "What it costs to adopt").split())
    named = dict(re.findall(r"([\w-]+) (\d[\d.]*\d) or newer", text))
    assert named.pop("memcached")
    assert {"Python", "Flask", "SQLAlchemy", "python-memcached"} <= set(named)
    assert named == {name: required[name] for name in named}


def test_the_licence_is_the_distributions() -> None:
    """The README names the licence that the package has."""
    options = ConfigParser()
    options.read(ROOT / "setup.cfg")
    assert f"\n    {options['metadata']['license']}, see ``LICENSE``" in README


# --- names -----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    """Every RESILIENT_SESSION_ key in the documentation is one."""
    named = set(re.findall(r"\bRESILIENT_SESSION_[A-Z_]*[A-Z]\b", read(page)))
    assert named <= set(CONFIG_KEYS)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Every page, module, test and tool that a reader is sent to is there."""
    pattern = r"``((?:[\w.]+/)*[\w.*]+\.(?:rst|py|sh|cfg)|(?:tests|docs|tools)/\w+)"
    for name in re.findall(pattern + "(?:``|::)", read(page)):
        assert is_there(name), name


def is_there(name: str) -> bool:
    """Whether a file has this path in the project or the package.

    A test may be named by its file alone, whatever folder it is in.
    """
    if name.startswith("test_"):
        return any((ROOT / "tests").rglob(name))
    return any(any(folder.glob(name)) for folder in (ROOT, PACKAGE))


@pytest.mark.parametrize("page", PAGES)
def test_folders_of_the_package_that_are_named_exist(page: str) -> None:
    """A path that ends in a slash is a folder of the package, or of the project."""
    for name in re.findall(r"``((?:\w+/)+)``", read(page)):
        assert any((folder / name).is_dir() for folder in (ROOT, PACKAGE)), name


def test_the_map_has_every_module() -> None:
    """A newcomer finds each module by a question."""
    text = section("docs/design.rst", "Where is it?")
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    asked = {name for name in modules if f"``{name}``" in text}
    # What a folder is for stands in its own docstring.
    faces = {name for name in modules if name.endswith("/__init__.py")}
    assert modules - asked == faces


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


def test_options_that_are_named_exist() -> None:
    """Every option in a command's section is its own, and none is left out."""
    for title, command in (
        ("The reaper", "reap-sessions"),
        ("Ending sessions", "revoke-sessions"),
    ):
        text = section("docs/operations.rst", title)
        named = set(re.findall(r"(?<=[\s`])(--[a-z][\w-]+)", text))
        flasks_own = {"--app"}
        assert named - flasks_own == options_of(command_named(command)), title


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


def test_attributes_that_are_named_exist() -> None:
    """What is said of the session and of the extension, they have."""
    for page in PAGES:
        text = read(page)
        for name in re.findall(r"(?<!/)\bsession\.(?!py\b)(\w+)", text):
            assert hasattr(Session, name), name
        for name in re.findall(r"\bsessions\.(\w+)", text):
            assert hasattr(ResilientSession, name), name


def test_counters_and_signals_that_are_named_exist() -> None:
    """What there is to watch exists, and every counter and signal is there to see."""
    text = section("docs/operations.rst", "What to watch")
    counters, signals_and_more = text.split("\nSignals\n~~~~~~~\n")
    signals, log = signals_and_more.split("\nLog lines\n~~~~~~~~~\n")
    named = set(re.findall(r"``([a-z]+(?:_[a-z]+)*)``", counters))
    assert named - {"stats", "evictions"} == set(COUNTERS)
    every_signal = {
        name
        for name in flask_resilient_session.__all__
        if name.startswith(("session_", "node_"))
    }
    named = set(re.findall(r"\* - ``([a-z_]+)``", signals))
    assert named == every_signal
    named = set(re.findall(r"``([a-z]+_[a-z_]+)``", log))
    assert named <= every_signal | set(COUNTERS) | {"flask_resilient_session"}


def test_names_with_underscores_on_the_pages_of_the_application_exist() -> None:
    """Signals, keys of a session and commands are spelled as they are."""
    known = {*flask_resilient_session.__all__, *COUNTERS, "init_app", "_user_id"}
    for page in APPLICATION:
        named = set(re.findall(r"``([a-z_]+_[a-z_]+)``", read(page)))
        assert named <= known, page


def test_importing_needs_no_optional_package() -> None:
    """The README's plain installation is enough to import the package."""
    code = (
        "import sys; sys.modules['cryptography'] = None; import flask_resilient_session"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
