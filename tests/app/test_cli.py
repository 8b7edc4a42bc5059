"""``flask reap-sessions``: its options, what it prints, and its exit codes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from apps import Site, Sites, TimeMachine, add_rows, key_of
from reaping import LIFETIME, PAST, change_row, run, run_json, synced_later

COMMANDS = ["reap-sessions", "session_cleanup"]
#: What ``--json`` has at least.
FIELDS = {"examined", "renewed", "reaped", "unchecked", "batches", "seconds"}


@pytest.fixture
def site(sites: Sites, clock: TimeMachine) -> Site:
    """One application whose sessions live an hour; one visitor is logged in."""
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    return site


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
    synced_later(site, 240)
    assert run(site, "--dry-run").exit_code == 0
    synced_later(site, 400)
    for options in ([], ["--without-nodes"]):
        result = run(site, *options)
        assert result.exit_code == 4
        assert "Aborted: clocks are apart" in result.stderr
        assert key_of(site.sid())[:12] in result.stderr
        assert key_of(site.sid()) not in result.stderr
    assert len(site.rows()) == 1


def test_clocks_that_are_apart_on_a_later_page(site: Site, clock: TimeMachine) -> None:
    """What was deleted before stays so; from there on nothing is."""
    then_ms = clock.now_ms() + PAST * 1000
    change_row(site, expires_at=then_ms - 100_000, synced_at=then_ms + 400_000)
    add_rows(site, 1)
    clock.forward(PAST)
    code, report = run_json(site, "--batch-size", "1")
    assert (code, report["examined"], report["reaped"]) == (4, 1, 1)
    assert report["aborted"].startswith("clocks are apart")
    assert "in this host's future" in report["detail"]
    assert list(site.rows()) == [key_of(site.sid())]


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
    assert run_json(elsewhere)[1]["aborted"]
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


def test_without_a_secret_key_it_says_so(sites: Sites) -> None:
    """No traceback: rows cannot be read without the key that sealed them."""
    site = sites(SECRET_KEY=None)
    result = run(site)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert "SECRET_KEY" in result.stderr


def test_it_can_be_run_from_a_thread(site: Site, clock: TimeMachine) -> None:
    """A scheduler in the application has no say over signals, and needs none."""
    clock.forward(PAST)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run(site)))
    thread.start()
    thread.join()
    assert results[0].exit_code == 0
    assert site.rows() == {}
