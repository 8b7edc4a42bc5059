"""What a request costs: round trips to the nodes, parallel ones once, and SQL.

``Cost(round_trips, statements)``; BEGIN and COMMIT are not counted.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest
from flask import session

from apps import NOTHING, Cost, Site, Sites, TimeMachine
from servers import Memcached

SYNC = 120

HOMES = [0, 1]


@pytest.fixture
def site(sites: Sites) -> Site:
    """A site whose table is there and whose nodes are connected."""
    site = sites()
    site.set(warm=1)
    site.data()
    return site


def member(site: Site) -> None:
    """A visitor who is logged in and has been back since."""
    site.browser = site.browser_with(None)
    site.set(_user_id="7", cart=[1])
    site.data()


def visitor(site: Site) -> None:
    """A visitor who stored something and has been back since."""
    site.browser = site.browser_with(None)
    site.set(cart=[1])
    site.data()


def stranger(site: Site) -> None:
    """Somebody who has never been here."""
    site.browser = site.browser_with(None)


def forger(site: Site) -> None:
    """Somebody with a cookie that nobody signed."""
    site.browser = site.browser_with("x" * 43 + "." + "y" * 43)


def returning(site: Site) -> None:
    """Somebody with a genuine cookie of a session of which nothing is left."""
    sid = secrets.token_urlsafe(32)
    site.browser = site.browser_with(site.signer.sign(sid))


def newcomer(site: Site) -> None:
    """A visitor who stored something a moment ago."""
    site.browser = site.browser_with(None)
    site.set(cart=[1])


def untouched(site: Site) -> None:
    """A page that does not look at the session."""
    site.browser.get("/plain")


def read(site: Site) -> None:
    """A page that only looks."""
    site.data()


def change(site: Site) -> None:
    """A page that stores something."""
    site.set(cart=[1, 2])


def log_in(site: Site) -> None:
    """A page that sets the user."""
    site.set(_user_id="8")


def log_out(site: Site) -> None:
    """A page that clears the session."""
    site.visit(lambda: session.clear())


@pytest.mark.parametrize(
    ("who", "wait", "does", "at_most"),
    [
        (stranger, 0, read, NOTHING),
        (stranger, 0, change, Cost(1, 0)),
        (stranger, 0, log_in, Cost(1, 1)),
        (visitor, 0, log_in, Cost(3, 2)),
        (member, 0, untouched, NOTHING),
        (member, 0, read, Cost(1, 0)),
        (member, 0, change, Cost(2, 0)),
        (member, SYNC, read, Cost(2, 1)),
        (member, SYNC, change, Cost(2, 1)),
        (member, 0, log_out, Cost(2, 2)),
        (visitor, 0, log_out, Cost(2, 2)),
        (forger, 0, read, NOTHING),
        (newcomer, 0, read, Cost(2, 1)),
        (returning, 0, read, Cost(1, 1)),
        (returning, 0, untouched, NOTHING),
    ],
)
def test_with_all_nodes_up(
    site: Site,
    clock: TimeMachine,
    who: Callable[[Site], None],
    wait: int,
    does: Callable[[Site], None],
    at_most: Cost,
) -> None:
    """Nothing costs more than it has to."""
    who(site)
    clock.forward(wait)
    cost = site.cost(lambda: does(site))
    print(f"{who.__name__}, {does.__name__} after {wait} s: {cost}")
    assert cost.round_trips <= at_most.round_trips
    assert cost.statements <= at_most.statements


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("does", "healthy", "more"),
    [(read, Cost(1, 0), 1), (change, Cost(2, 0), 2), (untouched, NOTHING, 0)],
)
def test_with_one_home_down(
    site: Site,
    nodes: list[Memcached],
    home: int,
    does: Callable[[Site], None],
    healthy: Cost,
    more: int,
) -> None:
    """One SELECT more for a read and one write more for a change, no round trips."""
    member(site)
    nodes[home].kill()
    site.data()  # this process learns of it
    cost = site.cost(lambda: does(site))
    print(f"home {home} down, {does.__name__}: {cost}")
    assert cost.statements <= healthy.statements + more
    assert cost.round_trips <= healthy.round_trips


def test_a_member_costs_no_sql_between_two_syncs(
    site: Site, clock: TimeMachine
) -> None:
    """A hundred pages in less than the sync interval: not one statement."""
    member(site)

    def browse() -> None:
        for number in range(100):
            site.set(cart=[number])
            clock.forward(1)

    assert site.cost(browse) == Cost(200, 0)


def test_a_member_is_synced_once_an_interval(site: Site, clock: TimeMachine) -> None:
    """An hour of pages every ten seconds: one statement, one trip in two minutes."""
    member(site)

    def browse() -> None:
        for _ in range(360):
            clock.forward(10)
            site.data()

    assert site.cost(browse) == Cost(390, 30)
