"""``flask reap-sessions``: the archive of the dead, and nodes that are gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import session
from flask.json.tag import TaggedJSONSerializer

from apps import Site, Sites, TimeMachine, add_rows, key_of
from reaping import LIFETIME, PAST, run, run_json

COMMANDS = ["reap-sessions", "session_cleanup"]
#: What ``--json`` has at least.
FIELDS = {"examined", "renewed", "reaped", "unchecked", "batches", "seconds"}


@pytest.fixture
def site(sites: Sites, clock: TimeMachine) -> Site:
    """One application whose sessions live an hour; one visitor is logged in."""
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    return site


# --- archive ---------------------------------------------------------------------


def test_the_archive_has_one_line_per_dead_session(
    site: Site, clock: TimeMachine, tmp_path: Path
) -> None:
    """Appended, readable with Flask's own serializer, and without the id."""
    site.data()
    site.set(cart=[("book", 1)])
    other = site.app.test_client()
    site.set(other, _user_id="2")
    logged_out = site.app.test_client()
    site.set(logged_out, _user_id="3")
    site.visit(lambda: session.clear(), browser=logged_out)
    archive = tmp_path / "archive.jsonl"
    archive.write_text('"was here"\n')
    clock.forward(PAST)
    assert run(site, "--archive", str(archive)).exit_code == 0
    lines = archive.read_text().splitlines()
    assert lines.pop(0) == '"was here"'
    dead = {line["user_id"]: line for line in map(json.loads, lines)}
    assert dead.keys() == {"1", "2"}
    one = TaggedJSONSerializer().loads(lines[[*dead].index("1")])
    assert one["data"] == {"_user_id": "1", "cart": [("book", 1)]}
    assert one["session"] == key_of(site.sid())[:12]
    assert {"created_at", "expires_at", "synced_at"} <= one.keys()
    assert site.sid() not in archive.read_text()


def test_the_archive_takes_what_json_lacks(
    site: Site, clock: TimeMachine, tmp_path: Path
) -> None:
    """Data that Flask's serializer does not know either is still written."""
    site.set(numbers={1, 2})
    archive = tmp_path / "archive.jsonl"
    clock.forward(PAST)
    assert run(site, "--archive", str(archive)).exit_code == 0
    assert "numbers" in json.loads(archive.read_text())["data"]


def test_the_archive_leaves_out_the_living(
    site: Site, clock: TimeMachine, tmp_path: Path
) -> None:
    """A renewed session is not dead."""
    archive = tmp_path / "archive.jsonl"
    clock.forward(PAST)
    site.app.config["PERMANENT_SESSION_LIFETIME"] = 10 * LIFETIME
    code, report = run_json(site, "--archive", str(archive))
    assert (code, report["renewed"]) == (0, 1)
    assert archive.read_text() == ""


def test_what_cannot_be_archived_is_kept(site: Site, clock: TimeMachine) -> None:
    """The disk is full: it says so, without a traceback, and deletes nothing."""
    clock.forward(PAST)
    result = run(site, "--archive", "/dev/full")
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert "No space left" in result.stderr
    assert len(site.rows()) == 1


# --- removed nodes ---------------------------------------------------------------


def test_a_removed_node_can_be_forgotten(
    site: Site, sites: Sites, clock: TimeMachine
) -> None:
    """Rows that name it are kept until it is declared gone."""
    clock.forward(PAST)
    nodes = sites.nodes
    gone = nodes[1].address
    sites.nodes = nodes[:1]
    smaller = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    result = run(smaller)
    assert result.exit_code == 3
    assert gone in result.stderr
    assert run(smaller, "--forget-node", "another").exit_code == 3
    assert run(smaller, "--forget-node", gone).exit_code == 0
    assert site.rows() == {}
    sites.nodes = nodes


def test_a_configured_node_is_not_forgotten(site: Site, clock: TimeMachine) -> None:
    """One that is merely down has to be asked, whatever the option says."""
    clock.forward(PAST)
    site.nodes[0].kill()
    options = ["--forget-node", site.nodes[0].address]
    assert run(site, *options).exit_code == 3
    assert run(site, *options, "--without-nodes").exit_code == 3
    assert len(site.rows()) == 1


def test_forgetting_all_the_rows_nodes_is_no_refusal(
    site: Site, sites: Sites, clock: TimeMachine
) -> None:
    """Both old nodes were replaced and are declared gone."""
    clock.forward(PAST)
    nodes, sites.nodes = sites.nodes, []
    elsewhere = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    options = [o for node in nodes for o in ("--forget-node", node.address)]
    assert run(elsewhere, *options).exit_code == 0
    assert site.rows() == {}
    sites.nodes = nodes


def test_a_page_of_tombstones_first_is_no_way_around_the_refusal(
    site: Site, sites: Sites, clock: TimeMachine
) -> None:
    """Whatever the order of the rows: a host without their nodes deletes none."""
    add_rows(site, 2)
    with site.state.sql.engine.connect() as connection:
        table = site.state.sql.table
        first = sa.select(sa.func.min(table.c.session_key)).scalar_subquery()
        connection.execute(
            sa.update(table)
            .where(table.c.session_key == first)
            .values(homes="", expires_at=1)
        )
    clock.forward(PAST)
    nodes, sites.nodes = sites.nodes, []
    elsewhere = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    code = run(elsewhere, "--batch-size", "1").exit_code
    assert code in (3, 4)
    assert len(site.rows()) >= 2
    sites.nodes = nodes
