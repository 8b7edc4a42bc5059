"""Short soaks; ``make soak`` runs long ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from database_servers import DatabaseServer
from lab_databases import NAMES
from soak.databases import SqliteFile, server_database
from soak.run import LONGEST_WAIT, soak

pytestmark = [pytest.mark.servers, pytest.mark.heavy]

#: The servers share the work: ``make soak`` breaks each of them in every way.
WAYS = {
    "postgresql": ("sql kill", "sql freeze", "sql lock", "sql hang up"),
    "mariadb": ("sql kill", "sql stop", "sql rows", "sql cut"),
}


# A slow machine takes its time; what is wrong shows in the report.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_soak(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whatever breaks, nothing acknowledged is lost and nobody comes back."""
    if name == "sqlite":
        database = SqliteFile(tmp_path)
    else:
        server: DatabaseServer = request.getfixturevalue(name)
        database = server_database(server, seed=1)
        database.restrict(*WAYS[name])
    with closing(database):
        report = soak(3, 1, tmp_path, database, name=name, accounts=9)
    print(report)
    assert report.violations == []
    # It was broken in every way, and requests were answered all the same.
    for kind in database.breakages:
        assert report.answered[kind] > 0, kind
    # While it was silent nobody could log in, so that it was indeed.
    for kind in database.silent:
        assert report.refused[kind] > 0, kind
    # A logout needs no more than both homes, if they answer in time.
    assert report.logouts > 0 or report.strains > 0
    assert any(len(fault.kinds) > 1 for fault in report.faults)
    # Generous: what is late is a request that waits for nobody knows what.
    assert report.longest.seconds < 5 * LONGEST_WAIT
