"""Flask-Login's own tests pass on an application with these sessions.

They come from Flask-Login's source distribution, of the version that is installed,
and run in a process of their own. There this file is a plugin of pytest: it makes
every ``flask.Flask`` one whose sessions are ours.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flask
import pytest
import sqlalchemy as sa

from flask_resilient_session import ResilientSession, ResilientSessionInterface
from servers import Memcached

#: Seconds for the download, and for the tests.
DOWNLOAD_SECONDS = 100
SUITE_SECONDS = 100
#: Once downloaded it stays in the virtual environment.
CACHE = Path(sys.prefix) / "cache" / f"flask-login-{version('flask-login')}"
#: What the plugin is told by: addresses of the nodes, URI of the database.
NODES, DATABASE = "SUITE_NODES", "SUITE_DATABASE"

_made: list[flask.Flask] = []


# --- as a plugin -----------------------------------------------------------------


class _ResilientFlask(flask.Flask):
    """Flask's class, with sessions on the test's nodes and database."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.update(
            SQLALCHEMY_DATABASE_URI=os.environ[DATABASE],
            RESILIENT_SESSION_NODES=os.environ[NODES],
            RESILIENT_SESSION_NODE_TIMEOUT=2.0,
            RESILIENT_SESSION_SQL_TIMEOUT=2.0,
        )
        ResilientSession(self)
        assert isinstance(self.session_interface, ResilientSessionInterface)
        _made.append(self)


def pytest_configure() -> None:
    """Every application of the suite is one of ours."""
    flask.Flask = _ResilientFlask  # type: ignore[misc]


def pytest_runtest_teardown() -> None:
    """Close what the applications of one test had open."""
    while _made:
        _made.pop().extensions["resilient_session"].close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much of the suite went through these sessions."""
    terminalreporter.write_line(f"stored sessions: {_stored()}")


def _stored() -> int:
    engine = sa.create_engine(os.environ[DATABASE])
    with engine.connect() as connection:
        query = sa.text("select count(*) from resilient_sessions")
        return int(connection.execute(query).scalar_one())


# --- as a test -------------------------------------------------------------------


def _source() -> Path:
    """Flask-Login's source distribution, downloaded once."""
    found = next(CACHE.glob("[!.]*/tests/test_login.py"), None)
    if found is not None:
        return found.parent.parent
    CACHE.mkdir(parents=True, exist_ok=True)
    if next(CACHE.glob("*.tar.gz"), None) is None and (why := _download()):
        pytest.fail(
            "Flask-Login's source distribution cannot be had from the package index."
            f" Its tests need it once; it may be put into {CACHE} by hand.\n{why}",
            pytrace=False,
        )
    with (
        tempfile.TemporaryDirectory(dir=CACHE, prefix=".") as folder,
        tarfile.open(next(CACHE.glob("*.tar.gz"))) as archive,
    ):
        # The filter by which later Pythons are safe by default, where it exists.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)  # type: ignore[arg-type]
        (unpacked,) = Path(folder).iterdir()
        # In one step, so that what is found is whole.
        return unpacked.rename(CACHE / unpacked.name)


def _download() -> str:
    """Get the source distribution; what went wrong, or nothing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "Flask-Login", "--disable-pip-version-check"]
    command += ["--dest", str(CACHE), f"Flask-Login=={version('flask-login')}"]
    try:
        subprocess.run(
            command,
            check=True,
            timeout=DOWNLOAD_SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        return str(getattr(error, "output", None) or error)
    return ""


@pytest.fixture(scope="module")
def source() -> Path:
    """Where Flask-Login's tests are."""
    return _source()


@pytest.mark.timeout(DOWNLOAD_SECONDS + SUITE_SECONDS + 20)
def test_flask_logins_own_tests_pass(
    source: Path, nodes: list[Memcached], tmp_path: Path
) -> None:
    """Logins, remember cookies, fresh logins, protection, clients: no difference."""
    here = Path(__file__).parent
    environment = os.environ | {
        NODES: ",".join(node.address for node in nodes),
        DATABASE: f"sqlite:///{tmp_path}/suite.db",
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent / "support"))),
    }
    plugin = Path(__file__).stem
    command = [sys.executable, "-W", "error", "-m", "pytest", "-p", plugin]
    command += ["-p", "no:cacheprovider", "-q", "-rA", "--tb=short", "tests"]
    result = subprocess.run(
        command,
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SUITE_SECONDS,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said[-6000:]
    passed = re.search(r"^(\d+) passed", said, re.MULTILINE)
    stored = re.search(r"stored sessions: (\d+)", said)
    assert passed, said[-2000:]
    assert int(passed[1]) > 100
    assert stored, said[-2000:]
    # Most of its tests log in, and each login is a row.
    assert int(stored[1]) > 30
