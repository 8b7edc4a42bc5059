"""``flask reap-sessions``: its options, what it prints, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import Result
from flask import session
from flask.json.tag import TaggedJSONSerializer

from apps import Site, Sites, TimeMachine, add_rows, key_of
from servers import Memcached

LIFETIME = 3600
PAST = 2 * LIFETIME
COMMANDS = ["reap-sessions", "session_cleanup"]
#: What ``--json`` has at least.
FIELDS = {"examined", "renewed", "reaped", "unchecked", "batches", "seconds"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TimeMachine:
    """Time that a test moves."""
    return TimeMachine(monkeypatch)


@pytest.fixture
def sites(nodes: list[Memcached], tmp_path: Path) -> Iterator[Sites]:
    """Applications on two nodes."""
    with Sites(nodes, tmp_path) as made:
        yield made


@pytest.fixture
def site(sites: Sites, clock: TimeMachine) -> Site:
    """One application whose sessions live an hour; one visitor is logged in."""
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    return site


def run(site: Site, *options: str, command: str = "reap-sessions") -> Result:
    """Run the command in this process."""
    return site.app.test_cli_runner().invoke(args=[command, *options])


def run_json(site: Site, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the object that ``--json`` prints."""
    result = run(site, "--json", *options)
    return result.exit_code, json.loads(result.stdout)


def synced_later(site: Site, seconds: float) -> None:
    """Let the row seem to be synced that far in this host's future."""
    synced_at = site.state.clock.now_ms() + round(seconds * 1000)
    with site.state.sql.engine.connect() as connection:
        connection.execute(sa.update(site.state.sql.table).values(synced_at=synced_at))


# --- 0 ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_with_nothing_to_do_it_is_0(site: Site, command: str) -> None:
    """Also under the name that Flask-Session users have in their cron."""
    result = run(site, command=command)
    assert result.exit_code == 0
    assert "Examined 0" in result.stdout
    assert len(site.rows()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_dead_are_reaped_and_it_is_0(
    site: Site, clock: TimeMachine, command: str
) -> None:
    """One line tells what was done."""
    clock.forward(PAST)
    result = run(site, command=command)
    assert result.exit_code == 0
    assert "1 reaped" in result.stdout
    assert site.rows() == {}


def test_json_is_one_object(site: Site, clock: TimeMachine) -> None:
    """And nothing else on the standard output."""
    clock.forward(PAST)
    code, report = run_json(site)
    assert code == 0
    assert report.keys() >= FIELDS
    assert [report[name] for name in ("examined", "renewed", "reaped")] == [1, 0, 1]
    assert (report["unchecked"], report["batches"]) == (0, 1)
    assert isinstance(report["seconds"], float)


def test_quiet_prints_nothing(site: Site, clock: TimeMachine) -> None:
    """For cron."""
    clock.forward(PAST)
    result = run(site, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert site.rows() == {}


def test_a_dry_run_changes_nothing(
    site: Site, clock: TimeMachine, tmp_path: Path
) -> None:
    """Neither rows nor archive; it says "would"."""
    clock.forward(PAST)
    before = site.rows()
    archive = tmp_path / "archive"
    result = run(site, "--dry-run", "--archive", str(archive))
    assert result.exit_code == 0
    assert "would be reaped" in result.stdout
    assert site.rows() == before
    assert not archive.exists() or archive.read_text() == ""


# --- 1, 3, 4, 5, and which of them is first --------------------------------------


def test_sql_failing_is_1(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SQL said is on the standard error, also when quiet."""
    site.break_sql(monkeypatch)
    result = run(site, "--quiet")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "the database is away" in result.stderr
    code, report = run_json(site)
    assert code == 1
    assert "the database is away" in report["failed"]


def test_unchecked_rows_are_3_and_kept(site: Site, clock: TimeMachine) -> None:
    """A home is down."""
    clock.forward(PAST)
    site.nodes[0].kill()
    result = run(site, "--quiet")
    assert result.exit_code == 3
    assert site.nodes[0].address in result.stderr
    assert len(site.rows()) == 1


def test_clocks_apart_is_4(site: Site, clock: TimeMachine) -> None:
    """A row from the future: then nothing that this clock says can be trusted."""
    clock.forward(PAST)
    add_rows(site, 1)
    synced_later(site, 240)
    assert run(site, "--dry-run").exit_code == 0
    synced_later(site, 400)
    for options in ([], ["--without-nodes"]):
        result = run(site, *options)
        assert result.exit_code == 4
        assert "clock" in result.stderr
    assert len(site.rows()) == 2


def test_a_host_without_the_nodes_is_4(
    site: Site, sites: Sites, clock: TimeMachine
) -> None:
    """None of the homes that the rows name is configured; --without-nodes overrides."""
    clock.forward(PAST)
    nodes, sites.nodes = sites.nodes, []
    elsewhere = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    result = run(elsewhere)
    assert result.exit_code == 4
    assert "RESILIENT_SESSION_NODES" in result.stderr
    assert len(site.rows()) == 1
    assert run_json(elsewhere)[1]["refused"]
    assert run(elsewhere, "--without-nodes").exit_code == 0
    assert site.rows() == {}
    sites.nodes = nodes


def test_stopped_by_the_limit_is_5(site: Site, clock: TimeMachine) -> None:
    """--limit counts examined rows; 0 once nothing is left."""
    add_rows(site, 4)
    clock.forward(PAST)
    for left in (3, 1):
        result = run(site, "--limit", "2")
        assert result.exit_code == 5
        assert "again" in result.stdout
        assert len(site.rows()) == left
    assert run(site, "--limit", "2").exit_code == 0
    assert site.rows() == {}


def test_a_limit_that_is_just_enough_is_0(site: Site, clock: TimeMachine) -> None:
    """Nothing is left to do then."""
    clock.forward(PAST)
    assert run(site, "--limit", "1").exit_code == 0


def test_stopped_by_the_time_is_5(site: Site, clock: TimeMachine) -> None:
    """--max-seconds."""
    add_rows(site, 4)
    clock.forward(PAST)
    assert run(site, "--max-seconds", "0").exit_code == 5
    assert len(site.rows()) == 5
    assert run(site, "--max-seconds", "60").exit_code == 0


def test_the_batch_size_bounds_a_page(site: Site, clock: TimeMachine) -> None:
    """--batch-size rows at once."""
    add_rows(site, 6)
    clock.forward(PAST)
    code, report = run_json(site, "--batch-size", "3")
    assert (code, report["batches"], report["reaped"]) == (0, 3, 7)


def test_unchecked_is_before_stopped(site: Site, clock: TimeMachine) -> None:
    """3 before 5."""
    add_rows(site, 4)
    clock.forward(PAST)
    site.nodes[0].kill()
    code, report = run_json(site, "--limit", "2")
    assert (code, report["stopped"], report["unchecked"]) == (3, True, 2)


def test_refused_is_before_the_rest(site: Site, clock: TimeMachine) -> None:
    """4 before 3 and 5."""
    clock.forward(PAST)
    synced_later(site, 10_000)
    site.nodes[0].kill()
    assert run(site, "--max-seconds", "0").exit_code == 4


def test_failed_is_before_the_rest(
    site: Site, clock: TimeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 before all: SQL goes away after a row that could not be checked."""
    add_rows(site, 4)
    clock.forward(PAST)
    site.nodes[0].kill()
    page_expired = site.state.sql.page_expired

    def once(*args: Any) -> Any:
        rows = page_expired(*args)
        site.break_sql(monkeypatch)
        return rows

    monkeypatch.setattr(site.state.sql, "page_expired", once)
    code, report = run_json(site, "--batch-size", "2")
    assert (code, report["unchecked"]) == (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "0"],
        ["--limit", "0"],
        ["--limit", "x"],
        ["--max-seconds", "-1"],
        ["--unknown"],
        ["--archive", "/nowhere/at/all"],
    ],
)
def test_a_wrong_option_is_2_and_does_nothing(
    site: Site, clock: TimeMachine, options: list[str]
) -> None:
    """click's code for a mistake on the command line."""
    clock.forward(PAST)
    assert run(site, *options).exit_code == 2
    assert len(site.rows()) == 1


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
