"""``sessions.inspect()``: what nodes and SQL hold, told without touching any of it."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import session
from flask.sessions import SecureCookieSession

from answers import COPIES, DEAD, ROWS, SAME, TOKENS, replies
from apps import NOTHING, Cost, Site, Sites, item_of, key_of
from builders import FIRST_HOME, HOUR, NOW, PAIR, SECOND_HOME
from flask_resilient_session import SessionInspection
from flask_resilient_session.common.events import short
from flask_resilient_session.core.answers import RowLive
from flask_resilient_session.core.reading import Gone, Live, Standing, Unknown
from flask_resilient_session.web.inspect import judge_inspection
from servers import Memcached

AGREED = Live(SAME, Standing.AGREED, dict(TOKENS))


def shown(first: str, second: str, row: str, loaded: Any = None) -> SessionInspection:
    """What is shown where homes and SQL answer this."""
    return judge_inspection("abc", PAIR, loaded, replies(first, second), ROWS[row])


# --- from answers to what is shown -----------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "row", "expected", "writes"),
    [
        ("same", "same", "live", ("current", "current", "live"), 0),
        ("same", "expired", "live", ("current", "current", "live"), 0),
        ("other", "same", "live", ("current", "outdated", "live"), 1),
        ("same", "miss", "live", ("current", "nothing", "live"), 0),
        ("same", "corrupt", "live", ("current", "corrupt", "live"), 0),
        ("same", "unreachable", "live", ("current", "unreachable", "live"), 0),
        # SQL alone knows the newest state.
        ("same", "same", "ahead", ("outdated", "outdated", "live"), 0),
        ("same", "same", "missing", ("current", "current", "nothing"), 1),
        ("same", "same", "corrupt", ("current", "current", "corrupt"), 1),
        ("same", "same", "silent", ("current", "current", "unreachable"), 0),
        ("miss", "miss", "missing", ("nothing", "nothing", "nothing"), 0),
        ("miss", "miss", "corrupt", ("nothing", "nothing", "corrupt"), 0),
        # Nothing is newer than an end.
        ("dead", "same", "silent", ("tombstone", "outdated", "unreachable"), 0),
        ("dead", "same", "live", ("tombstone", "outdated", "live"), 1),
        ("same", "miss", "dead", ("outdated", "nothing", "tombstone"), 0),
    ],
)
def test_each_place_is_shown_as_it_is(
    first: str, second: str, row: str, expected: tuple[str, str, str], writes: int
) -> None:
    """A copy is current where nothing newer is known, by whomever."""
    seen = shown(first, second, row)
    copies = seen.nodes[FIRST_HOME].holds, seen.nodes[SECOND_HOME].holds
    assert (*copies, seen.row.holds) == expected
    assert seen.row.writes == writes


def test_what_the_request_loaded_counts_as_known() -> None:
    """A copy that is older than what the request was served is outdated."""
    loaded = Live(COPIES["other"], Standing.CONFIRMED)  # type: ignore[arg-type]
    assert shown("same", "same", "silent", loaded).nodes[FIRST_HOME].holds == "outdated"


@pytest.mark.parametrize(
    ("loaded", "standing"),
    [
        (None, "new"),
        (AGREED, "agreed"),
        (Live(SAME, Standing.CONFIRMED), "confirmed"),
        (Live(SAME, Standing.UNVERIFIED), "unverified"),
        (Unknown(), "unavailable"),
        (Gone("ended"), "gone"),
        (Gone("missing"), "gone"),
    ],
)
def test_how_the_request_came_by_it_is_shown(loaded: Any, standing: str) -> None:
    """Each way to load a session has its word."""
    assert shown("same", "same", "live", loaded).standing == standing


def test_what_loading_found_is_shown_beside_what_is_there_now() -> None:
    """A home that was silent or behind a moment ago may have recovered."""
    writable = {FIRST_HOME: TOKENS[FIRST_HOME]}
    loaded = Live(SAME, Standing.CONFIRMED, writable, (FIRST_HOME,))
    seen = shown("same", "same", "live", loaded)
    assert seen.repairs == (FIRST_HOME,)
    assert seen.nodes[FIRST_HOME].found == "outdated"
    assert seen.nodes[SECOND_HOME].found == "unreachable"
    loaded = Live(SAME, Standing.CONFIRMED, {**TOKENS, SECOND_HOME: None})
    nodes = shown("same", "same", "live", loaded).nodes
    assert [nodes[name].found for name in PAIR] == ["current", "nothing"]


def test_what_was_found_under_another_id_is_not_shown() -> None:
    """After a session moved, its former homes say nothing of where it is now."""
    answers = replies("same", "same")
    seen = judge_inspection(
        "abc", PAIR, AGREED, answers, ROWS["live"], loaded_elsewhere=True
    )
    assert seen.standing == "agreed"
    assert [copy.found for copy in seen.nodes.values()] == [None, None]
    assert seen.repairs == ()


def test_silence_and_ends_have_reasons() -> None:
    """Who does not answer says why, and a tombstone whether the session moved."""
    seen = shown("dead", "unreachable", "silent")
    assert seen.nodes[FIRST_HOME].reason == DEAD.reason
    assert seen.nodes[SECOND_HOME].reason == "down"
    assert seen.row.reason == "down"
    assert shown("miss", "miss", "dead").row.reason == "moved"


def test_the_rows_bookkeeping_is_shown() -> None:
    """Version and time of the last sync; of the last known one where SQL is silent."""
    row = shown("same", "same", "ahead").row
    assert (row.version, row.synced_ms) == (2, NOW)
    row = shown("same", "same", "silent").row
    assert (row.version, row.synced_ms) == (0, NOW)
    restored = RowLive(replace(SAME, synced_ms=NOW - HOUR))
    seen = judge_inspection("abc", PAIR, None, replies("same", "same"), restored)
    assert seen.row.synced_ms == NOW - HOUR


# --- in an application -----------------------------------------------------------


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application whose visitor has a session, in SQL as well."""
    site = sites()
    site.set(_user_id="ada")
    return site


def inspected(site: Site, **kwargs: Any) -> SessionInspection:
    """What one request sees of its session."""
    seen: list[SessionInspection] = []
    response = site.visit(lambda: seen.append(site.sessions.inspect(session)), **kwargs)
    assert response.status_code == 200, response.text
    return seen[0]


def test_a_session_is_shown_with_all_that_keep_it(
    three_nodes: list[Memcached], tmp_path: Path
) -> None:
    """Every node is named, the homes hold a copy, and SQL has a row."""
    with Sites(three_nodes, tmp_path) as sites:
        site = sites()
        site.set(_user_id="ada")
        site.set(a=1)
        seen = inspected(site)
        key = item_of(site.sid())
        homes = {node.address for node in three_nodes if node.raw_get(key)}
        assert seen.public_id == short(key_of(site.sid()))
        assert seen.standing == "agreed"
        assert set(seen.homes) == homes
        assert set(seen.nodes) == {node.address for node in three_nodes}
        assert {name for name, c in seen.nodes.items() if c.holds == "current"} == homes
        assert {name for name, c in seen.nodes.items() if c.found == "current"} == homes
        row = site.rows()[key_of(site.sid())]
        assert (seen.row.holds, seen.row.version) == ("live", row.version)
        assert (seen.row.synced_ms, seen.row.writes) == (row.synced_at, 1)


def test_a_visitor_without_a_session_is_shown_nothing(site: Site) -> None:
    """Nothing is stored, so that nobody is asked."""
    visitor = site.browser_with(None)
    seen = inspected(site, browser=visitor)
    assert (seen.public_id, seen.standing) == (None, "new")
    assert {copy.holds for copy in seen.nodes.values()} == {"nothing"}
    assert seen.row.holds == "nothing"
    assert site.cost(lambda: inspected(site, browser=visitor)) == NOTHING
    assert visitor.get_cookie("session") is None


def test_looking_asks_each_place_once(site: Site) -> None:
    """One round trip to all nodes and one SELECT, beside what loading took."""
    site.data()
    assert site.cost(site.data) == Cost(1, 0)
    assert site.cost(lambda: inspected(site)) == Cost(2, 1)


@pytest.mark.parametrize("holds", ["nothing", "corrupt", "outdated", "tombstone"])
def test_looking_changes_nothing(site: Site, holds: str) -> None:
    """A copy that is missing, damaged, old or dead is shown, and stays so."""
    item, key, node = item_of(site.sid()), key_of(site.sid()), site.nodes[1]
    keyring = site.state.keys.of(site.app).keyring
    data = {
        "nothing": None,
        "corrupt": b"no record of any session",
        "outdated": node.raw_get(item),
        "tombstone": keyring.seal(key, DEAD),
    }[holds]
    site.set(a=1)

    def action() -> None:
        dict(session)
        node.raw_delete(item)
        if data is not None:
            node.raw_set(item, data)
        other, rows = site.nodes[0].raw_get(item), site.rows()
        assert site.sessions.inspect(session).nodes[node.address].holds == holds
        assert (node.raw_get(item), site.nodes[0].raw_get(item)) == (data, other)
        assert site.rows() == rows

    assert site.visit(action).status_code == 200


def test_a_home_that_lost_its_copy_is_shown_with_its_repair(site: Site) -> None:
    """Loading found it empty, it is still empty, and saving will change that."""
    first, second = (node.address for node in site.nodes)
    site.nodes[0].restart()
    seen = inspected(site)
    assert seen.standing == "confirmed"
    assert (seen.nodes[first].found, seen.nodes[first].holds) == ("nothing", "nothing")
    assert (seen.nodes[second].found, seen.nodes[second].holds) == ("current",) * 2
    assert seen.repairs == (first,)
    seen = inspected(site)
    assert (seen.standing, seen.nodes[first].holds) == ("agreed", "current")


def test_an_ended_session_is_shown_as_gone(site: Site) -> None:
    """A cookie of before the logout leads to tombstones."""
    cookie = site.cookie()
    site.visit(lambda: session.clear())
    site.browser = site.browser_with(cookie)
    seen = inspected(site)
    assert seen.standing == "gone"
    assert {copy.holds for copy in seen.nodes.values()} == {"tombstone"}
    assert (seen.row.holds, seen.row.reason) == ("tombstone", "ended")


def test_after_the_response_the_new_id_is_shown(site: Site) -> None:
    """What a login has stored is found under the id that it has given."""
    before = short(key_of(site.sid()))
    with site.browser:
        site.visit(lambda: session.update(_user_id="bob"))
        seen = site.sessions.inspect(session)
    assert seen.public_id == short(key_of(site.sid())) != before
    assert {copy.holds for copy in seen.nodes.values()} == {"current"}
    assert (seen.row.holds, seen.row.version) == ("live", 1)
    visitor = site.browser_with(None)
    with visitor:
        site.visit(lambda: session.update(a=1), browser=visitor)
        seen = site.sessions.inspect(session)
    assert seen.public_id == short(key_of(site.sid(visitor)))
    assert (seen.row.holds, seen.row.writes) == ("nothing", 1)


def test_an_unavailable_session_is_shown_without_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a page would be a 503, looking says who does not answer."""
    name = short(key_of(site.sid()))
    for node in site.nodes:
        node.kill()
    site.break_sql(monkeypatch)
    seen = inspected(site)
    assert (seen.public_id, seen.standing) == (name, "unavailable")
    assert {copy.holds for copy in seen.nodes.values()} == {"unreachable"}
    assert all(copy.reason for copy in seen.nodes.values())
    assert seen.row.holds == "unreachable"
    assert seen.row.reason is not None
    assert "the database is away" in seen.row.reason


def test_looking_waits_for_nobody_longer_than_its_timeout(
    sites: Sites, tmp_path: Path
) -> None:
    """Frozen nodes take one timeout together, and a locked database its own."""
    site = sites(RESILIENT_SESSION_NODE_TIMEOUT=1.0, RESILIENT_SESSION_SQL_TIMEOUT=0.5)
    site.set(_user_id="ada")
    site.data()
    took: list[float] = []

    def look() -> str:
        dict(session)
        for node in site.nodes:
            node.freeze()
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        seen = site.sessions.inspect(session)
        took.append(time.monotonic() - began)
        other.rollback()
        for node in site.nodes:
            node.thaw()
        holds = {copy.holds for copy in seen.nodes.values()}
        return f"{seen.standing} {holds} {seen.row.holds}"

    other = sqlite3.connect(tmp_path / "app.db")
    response = site.visit(look)
    other.close()
    assert response.text == "agreed {'unreachable'} unreachable"
    # One node after the other would take 2.5 s.
    assert took[0] < 2.3


@pytest.mark.parametrize("foreign", [SecureCookieSession(), {}])
def test_what_is_no_session_of_ours_is_refused(site: Site, foreign: Any) -> None:
    """Another extension's session, or any dict, is an error that says what to pass."""
    error = pytest.raises(TypeError, match=r"pass flask\.session")
    with site.app.app_context(), error:
        site.sessions.inspect(foreign)
