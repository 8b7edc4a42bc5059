"""What strangers, visitors who never return and large sessions can cost."""

from __future__ import annotations

import secrets
import time

import pytest
from flask import session

from apps import NOTHING, Cost, Site, Sites, TimeMachine, item_of, key_of

HOUR = 3600
DAY = 24 * HOUR


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults, its table made and its nodes connected."""
    site = sites()
    site.set(site.browser_with(None), warm=True)
    site.state.sql.engine.connect().close()
    return site


# --- visitors --------------------------------------------------------------------


def test_visitors_who_store_nothing_leave_nothing(site: Site) -> None:
    """200 visitors look around: no item, no row, no cookie, no operation."""
    items = [node.keys() for node in site.nodes]
    rows = site.rows()

    def visit() -> None:
        for _ in range(50):
            browser = site.browser_with(None)
            for action in (
                lambda: dict(session),
                lambda: session.get("cart", "none"),
                lambda: session.pop("cart", "none"),
                lambda: session.clear(),
            ):
                response = site.visit(action, browser=browser)
                assert "Set-Cookie" not in response.headers

    assert site.cost(visit) == NOTHING
    assert [node.keys() for node in site.nodes] == items
    assert site.rows() == rows


def test_forged_cookies_leave_nothing(site: Site) -> None:
    """1,000 made-up ids and signatures: no operation at all."""

    def visit() -> None:
        for _ in range(1000):
            cookie = f"{secrets.token_urlsafe(32)}.{secrets.token_urlsafe(32)}"
            headers = {"Cookie": f"session={cookie}"}
            with site.app.test_request_context("/", headers=headers):
                assert not session

    assert site.cost(visit) == NOTHING


def test_visitors_who_never_return_leave_no_rows(site: Site) -> None:
    """1,000 visitors store something once: two items each, and not one row."""
    rows = site.rows()

    def visit() -> None:
        for number in range(1000):
            site._action = lambda: session.update(seen=1)
            response = site.app.test_client(use_cookies=False).get("/visit")
            assert "Set-Cookie" in response.headers, number

    assert site.cost(visit).statements == 0
    assert site.rows() == rows
    assert all(len(node.keys()) > 1000 for node in site.nodes)


def test_their_items_go_by_themselves(site: Site) -> None:
    """memcached is told to forget them a day after Flask's 31 days, N and the grace."""
    site.set(a=1)
    for node in site.nodes:
        ttl = node.raw_ttl(item_of(site.sid()))
        assert ttl is not None
        assert 32 * DAY < ttl < 32 * DAY + 240


def test_one_who_returns_gets_a_row(site: Site) -> None:
    """The cookie that comes back is what makes a session worth a row."""
    site.set(a=1)
    assert key_of(site.sid()) not in site.rows()
    site.data()
    assert key_of(site.sid()) in site.rows()


# --- genuine cookies of sessions that are gone -----------------------------------


def lost(site: Site) -> None:
    """A signed cookie in the browser of whose session nothing is left."""
    name = site.app.config["SESSION_COOKIE_NAME"]
    site.browser.set_cookie(name, site.signer.sign(secrets.token_urlsafe(32)))


def test_a_session_that_is_gone_costs_one_read(site: Site) -> None:
    """One round trip and one statement a page, until the browser drops the cookie."""
    lost(site)
    cookie = site.cookie()
    for _ in range(3):
        browser = site.browser_with(cookie)
        assert site.cost(lambda b=browser: site.data(b)) == Cost(1, 1)
        assert site.cookie(browser) is None
        assert site.cost(lambda b=browser: site.data(b)) == NOTHING
    assert site.rows() == {}


@pytest.mark.parametrize("home", [0, 1])
def test_it_costs_the_same_with_a_home_down(site: Site, home: int) -> None:
    """The home may hold what SQL does not know, so that the cookie stays."""
    lost(site)
    site.nodes[home].kill()
    site.data()  # this process learns of it
    for _ in range(3):
        assert site.cost(site.data) == Cost(1, 1)
    site.nodes[home].start()
    site.state.store.renew()
    site.data()
    assert site.cookie() is None


def test_a_session_that_expired_is_not_buried_on_a_clocks_word(
    site: Site, clock: TimeMachine
) -> None:
    """A host whose clock is a year ahead sees it gone; it lives on for all others."""
    site.set(a=1)
    site.data()
    clock.forward(365 * DAY)
    assert [site.data() for _ in range(3)] == [{}] * 3
    clock.forward(-365 * DAY)
    assert site.data() == {"a": 1}
    row = site.rows()[key_of(site.sid())]
    assert row.revoked_at is None


def test_a_fresh_session_is_never_taken_for_a_lost_one(site: Site) -> None:
    """A missing row means nothing while the copies say that there is none yet."""
    for _ in range(20):
        browser = site.browser_with(None)
        site.set(browser, a=1)
        assert site.data(browser) == {"a": 1}


# --- sizes -----------------------------------------------------------------------


def test_a_session_has_a_largest_size(sites: Sites) -> None:
    """Over the limit: 413, and the session stays as it was, everywhere."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=5000)
    site.set(a="x" * 4000)
    site.data()
    before = [node.raw_get(item_of(site.sid())) for node in site.nodes]
    response = site.visit(lambda: session.update(b="x" * 2000))
    assert response.status_code == 413
    assert "Set-Cookie" not in response.headers
    assert [node.raw_get(item_of(site.sid())) for node in site.nodes] == before
    assert site.data() == {"a": "x" * 4000}


def test_many_small_steps_meet_the_same_limit(sites: Sites) -> None:
    """A cart that grows by one thing at a time ends at the limit as well."""
    site = sites(RESILIENT_SESSION_MAX_BYTES=3000)
    codes = []
    for number in range(8):
        name = f"thing {number}"
        response = site.visit(lambda name=name: session.update({name: "x" * 500}))
        codes.append(response.status_code)
    assert codes == [200] * 5 + [413] * 3
    sizes = [len(node.raw_get(item_of(site.sid())) or b"") for node in site.nodes]
    assert all(size < 3500 for size in sizes)


def test_deleted_keys_do_not_pile_up(site: Site) -> None:
    """A thousand keys come and go; what is stored stays small."""
    for number in range(1000):
        name = f"key {number}"
        site._action = lambda name=name: session.update({name: 1, "last": name})
        site.browser.get("/visit")
        site._action = lambda name=name: str(session.pop(name))
        site.browser.get("/visit")
        if number % 250 == 249:
            site.visit(lambda: session.sync())  # type: ignore[attr-defined]
    assert site.data() == {"last": "key 999"}
    for node in site.nodes:
        assert len(node.raw_get(item_of(site.sid())) or b"") < 30_000


# --- time ------------------------------------------------------------------------


def test_a_request_takes_no_longer_than_its_timeouts_allow(sites: Sites) -> None:
    """Both homes hung and nothing but SQL left: twice both timeouts, and one more."""
    site = sites(
        RESILIENT_SESSION_NODE_TIMEOUT=0.3,
        RESILIENT_SESSION_SQL_TIMEOUT=0.3,
    )
    site.set(_user_id="alice")
    site.data()
    for node in site.nodes:
        node.freeze()
    codes = []
    for _ in range(5):
        started = time.monotonic()
        codes.append(site.visit(lambda: session.update(b=1)).status_code)
        assert time.monotonic() - started < 2 * (0.3 + 0.3) + 0.3 + 0.5
    # Hung homes are waited for together, so that time is left for SQL.
    assert codes == [200] * 5


def test_the_idle_lifetime_is_in_the_record(site: Site, clock: TimeMachine) -> None:
    """It ends by the record's word, though memcached would keep it for days."""
    lifetime = site.app.permanent_session_lifetime.total_seconds()
    site.app.permanent_session_lifetime = 2 * HOUR  # type: ignore[assignment]
    assert lifetime > 2 * HOUR
    site.set(a=1)
    site.data()
    for _ in range(3):
        clock.forward(1.5 * HOUR)
        assert site.data() == {"a": 1}
    ttls = [node.raw_ttl(item_of(site.sid())) for node in site.nodes]
    assert all(ttl and ttl > 2 * HOUR for ttl in ttls)
    clock.forward(2 * HOUR + 121)
    assert site.data() == {}


def test_a_ttl_that_never_ends_does_not_prolong_a_session(
    site: Site, clock: TimeMachine
) -> None:
    """An item that somebody stored for ever is judged by its own times."""
    site.set(a=1)
    site.data()
    for node in site.nodes:
        data = node.raw_get(item_of(site.sid()))
        assert data is not None
        node.raw_set(item_of(site.sid()), data, exptime=0)
    clock.forward(site.app.permanent_session_lifetime.total_seconds() + 121)
    assert site.data() == {}


def test_the_absolute_lifetime_is_in_the_record(
    sites: Sites, clock: TimeMachine
) -> None:
    """However busy, and whatever regenerates it: it ends when its time is over."""
    site = sites(RESILIENT_SESSION_ABSOLUTE_LIFETIME=8 * HOUR)
    site.set(_user_id="alice")
    for _ in range(7):
        clock.forward(HOUR)
        site.visit(lambda: session.regenerate())  # type: ignore[attr-defined]
        assert site.data() == {"_user_id": "alice"}
    clock.forward(HOUR + 1)
    assert site.data() == {}


def test_a_login_begins_a_new_absolute_lifetime(
    sites: Sites, clock: TimeMachine
) -> None:
    """It counts from the authentication, not from the visitor's first page."""
    site = sites(RESILIENT_SESSION_ABSOLUTE_LIFETIME=8 * HOUR)
    site.set(cart=[1])
    clock.forward(7 * HOUR)
    site.set(_user_id="alice")
    clock.forward(7 * HOUR)
    assert site.data() == {"cart": [1], "_user_id": "alice"}
    clock.forward(HOUR + 1)
    assert site.data() == {}
