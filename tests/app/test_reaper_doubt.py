"""What the reaper cannot be sure of stays; and many rows, many reapers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from apps import Site, Sites, TimeMachine, add_rows, key_of
from flask_resilient_session import ReapReport
from reaping import LIFETIME, PAST, change_row, counts, reap


@pytest.fixture
def site(sites: Sites, clock: TimeMachine) -> Site:
    """One application whose sessions live an hour; one visitor is logged in."""
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    return site


# --- what is in doubt ------------------------------------------------------------


@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_row_is_kept_while_a_home_is_silent(
    sites: Sites, clock: TimeMachine, home: int, how: str
) -> None:
    """The silent home may hold a newer copy."""
    site = sites(
        PERMANENT_SESSION_LIFETIME=LIFETIME, RESILIENT_SESSION_NODE_TIMEOUT=0.1
    )
    site.set(_user_id="1")
    clock.forward(PAST)
    before = site.rows()
    getattr(site.nodes[home], how)()
    report = reap(site)
    assert counts(report) == (1, 0, 0, 1)
    assert list(report.reasons.values()) == [1]
    assert site.nodes[home].address in next(iter(report.reasons))
    assert site.rows() == before


def test_a_row_of_an_unknown_key_is_kept(site: Site, clock: TimeMachine) -> None:
    """This host may be behind in a rotation of SECRET_KEY."""
    clock.forward(PAST)
    before = site.rows()
    site.app.secret_key = "another key " * 4
    assert counts(reap(site)) == (1, 0, 0, 1)
    assert site.rows() == before


def test_a_corrupt_row_without_a_copy_goes(site: Site, clock: TimeMachine) -> None:
    """There is nothing to be saved in it."""
    change_row(site, record=b"frs garbage")
    for node in site.nodes:
        node.flush()
    clock.forward(PAST)
    assert counts(reap(site)) == (1, 0, 1, 0)


def test_a_corrupt_row_of_a_living_session_is_replaced(
    site: Site, clock: TimeMachine
) -> None:
    """Its copies are good."""
    change_row(site, record=b"garbage", expires_at=1)
    assert counts(reap(site)) == (1, 1, 0, 0)
    for node in site.nodes:
        node.flush()
    assert site.data() == {"_user_id": "1"}


def test_a_row_that_changed_meanwhile_is_left_alone(
    site: Site, clock: TimeMachine
) -> None:
    """Somebody renewed it after it was read."""
    clock.forward(PAST)

    def archive(dead: dict[str, Any]) -> None:
        row = site.rows()[key_of(site.sid())]
        change_row(site, version=row.version + 1)

    assert counts(reap(site, archive=archive)) == (1, 0, 0, 0)
    assert len(site.rows()) == 1


# --- many ------------------------------------------------------------------------


def test_two_thousand_rows_go_in_bounded_batches(
    site: Site, clock: TimeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the table: a page at a time."""
    add_rows(site, 2000)
    pages: list[int] = []
    page_expired = site.state.sql.page_expired

    def spy(*args: Any) -> Any:
        rows = page_expired(*args)
        pages.append(len(rows))
        return rows

    monkeypatch.setattr(site.state.sql, "page_expired", spy)
    clock.forward(PAST)
    report = reap(site)
    assert counts(report) == (2001, 0, 2001, 0)
    assert (max(pages), report.batches) == (500, 5)
    assert site.rows() == {}


def test_two_reapers_at_once(site: Site, clock: TimeMachine) -> None:
    """Each row is deleted once, by either; both come to an end."""
    add_rows(site, 200)
    clock.forward(PAST)
    reports: list[ReapReport] = []
    ready = threading.Barrier(2)

    def run() -> None:
        ready.wait(10)
        reports.append(reap(site, batch_size=20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 2
    assert sum(report.reaped for report in reports) == 201
    assert site.rows() == {}


def test_one_that_failed_in_the_middle_can_be_run_again(
    site: Site, clock: TimeMachine
) -> None:
    """Nothing is deleted before it is archived; nothing is left in the end."""
    add_rows(site, 30)
    clock.forward(PAST)
    archived: list[str] = []

    def archive(dead: dict[str, Any]) -> None:
        if len(archived) == 10:
            raise OSError("the disk is full")
        archived.append(dead["session"])

    with pytest.raises(OSError, match="disk"):
        reap(site, archive=archive)
    assert len(site.rows()) == 31
    assert counts(reap(site)) == (31, 0, 31, 0)


def test_rows_without_homes_need_no_answer(sites: Sites, clock: TimeMachine) -> None:
    """Sessions in SQL alone."""
    sites.nodes = []
    site = sites(PERMANENT_SESSION_LIFETIME=LIFETIME)
    site.set(_user_id="1")
    clock.forward(PAST)
    assert counts(reap(site)) == (1, 0, 1, 0)
