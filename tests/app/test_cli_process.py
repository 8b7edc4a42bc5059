"""``flask reap-sessions`` as a process: signals, sudden death, a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from apps import Site, Sites, TimeMachine, add_rows
from servers import Memcached, wait_until

ROOT = Path(__file__).parents[2]
LIFETIME = 3600
#: Enough lines of archive that a pipe cannot hold them.
ROWS = 800
#: Lines of it that are read; so many rows, but for a batch, are deleted by then.
READ = 20

PROGRAM = """
import json
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_resilient_session import ResilientSession
import apps

app = Flask(__name__)
app.config.from_file({config!r}, load=json.load)
ResilientSession(app, SQLAlchemy(app))
"""


@pytest.fixture
def site(
    nodes: list[Memcached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """An application with many sessions that died two hours ago."""
    clock = TimeMachine(monkeypatch)
    clock.forward(-2 * LIFETIME - 600)
    with Sites(nodes, tmp_path) as sites:
        site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
        add_rows(site, ROWS)
        config = tmp_path / "config.json"
        keys = ("SECRET_KEY", "SQLALCHEMY_DATABASE_URI", "PERMANENT_SESSION_LIFETIME")
        values = {key: site.app.config[key] for key in keys}
        values["RESILIENT_SESSION_NODES"] = [node.address for node in nodes]
        values["PERMANENT_SESSION_LIFETIME"] = LIFETIME
        config.write_text(json.dumps(values))
        (tmp_path / "program.py").write_text(PROGRAM.format(config=str(config)))
        yield site


def start(tmp_path: Path, *options: str, **streams: Any) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-W", "error", "-m", "flask"]
    command += ["--app", str(tmp_path / "program.py"), "reap-sessions", *options]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    return subprocess.Popen(
        command,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
    )


def stalled(tmp_path: Path, *options: str) -> tuple[subprocess.Popen[str], IO[str]]:
    """The command in the middle of its work: nobody reads its archive on."""
    fifo = tmp_path / "archive"
    os.mkfifo(fifo)
    process = start(tmp_path, "--archive", str(fifo), *options)
    archive = fifo.open(encoding="utf-8")
    for _ in range(READ):
        assert archive.readline().startswith("{")
    return process, archive


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def in_a_terminal(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Exit code, and what a terminal shows."""
    master, slave = pty.openpty()
    process = start(tmp_path, *options, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 4096):
            shown += data
    except OSError:  # Linux's end of a terminal
        pass
    finally:
        os.close(master)
    return process.wait(60), shown.decode()


def all_gone(site: Site) -> bool:
    """Whether no row is left."""
    return not site.rows()


def test_it_runs_as_a_process(site: Site, tmp_path: Path) -> None:
    """All rows go, and nothing but the JSON is printed: no warning, no bar."""
    code, out, err = finish(start(tmp_path, "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["reaped"] == ROWS
    assert all_gone(site)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_between_rows(
    site: Site, tmp_path: Path, number: signal.Signals
) -> None:
    """Exit 5 with a report; what was archived was deleted, the rest is there."""
    process, archive = stalled(tmp_path, "--json")
    with archive:
        process.send_signal(number)
        archived = READ + len(archive.readlines())
    code, out, err = finish(process)
    assert (code, err) == (5, "")
    report = json.loads(out)
    assert report["stopped"] is True
    assert report["reaped"] == archived < ROWS
    assert len(site.rows()) == ROWS - archived


def test_killed_in_the_middle_it_can_be_run_again(site: Site, tmp_path: Path) -> None:
    """Nothing is lost: each session is in the archive of the first or the second."""
    process, archive = stalled(tmp_path, "--batch-size", "5")
    with archive:
        process.kill()
        first = {json.loads(line)["session"] for line in archive if line.endswith("\n")}
    finish(process)
    left = len(site.rows())
    assert 0 < left < ROWS
    rest = tmp_path / "rest"
    code, _, _ = finish(start(tmp_path, "--archive", str(rest)))
    assert code == 0
    assert all_gone(site)
    second = {json.loads(line)["session"] for line in rest.read_text().splitlines()}
    assert len(second) == left
    assert len(first | second) >= ROWS - READ


def test_two_processes_at_once(site: Site, tmp_path: Path) -> None:
    """Both end with 0, and each row was deleted by one of them."""
    both: Sequence[subprocess.Popen[str]] = [
        start(tmp_path, "--json", "--batch-size", "50") for _ in range(2)
    ]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sum(json.loads(out)["reaped"] for _, out, _ in results) == ROWS
    assert all_gone(site)


def test_a_terminal_shows_a_progress_bar(site: Site, tmp_path: Path) -> None:
    """It goes up to all of the rows."""
    code, shown = in_a_terminal(tmp_path, "--batch-size", "100")
    assert code == 0
    assert "Reaping sessions" in shown
    assert "100%" in shown
    assert f"{ROWS} reaped" in shown


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_no_bar_where_it_is_not_wanted(site: Site, tmp_path: Path, option: str) -> None:
    """Also on a terminal."""
    code, shown = in_a_terminal(tmp_path, option)
    assert code == 0
    assert "Reaping" not in shown
    assert (shown == "") == (option == "--quiet")


def test_no_bar_where_there_is_no_terminal(site: Site, tmp_path: Path) -> None:
    """In a pipe there is only the summary."""
    code, out, err = finish(start(tmp_path))
    assert (code, err) == (0, "")
    assert out.startswith("Examined")
    assert wait_until(lambda: all_gone(site))
