"""Counters and signals: what happened, for those who listen."""

from __future__ import annotations

import threading

import pytest
from blinker import Namespace

from apps import Site, Sites
from flask_resilient_session import node_down, session_created
from flask_resilient_session.common.events import COUNTERS, Observer, Stats
from servers import Memcached


def test_every_counter_starts_at_nothing() -> None:
    """All of them are there to be exported, also before anything happened."""
    stats = Stats()
    assert dict(stats) == dict.fromkeys(COUNTERS, 0)
    assert len(stats) == len(COUNTERS)


def test_an_unknown_counter_is_a_mistake() -> None:
    """A typing error does not count into the void."""
    with pytest.raises(KeyError):
        Stats().count("round_trip")


def test_threads_do_not_lose_counts() -> None:
    """Eight threads at once."""
    stats = Stats()

    def count() -> None:
        for _ in range(1000):
            stats.count("round_trips")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats["round_trips"] == 8000


def test_a_listener_that_fails_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Its error is in the log, and the session is kept."""
    signal = Namespace().signal("test")

    @signal.connect
    def fail(sender: object, **_: object) -> None:
        raise RuntimeError("a listener's bug")

    Observer("app").send(signal, session="abc")
    assert "A listener of test failed" in caplog.text


def test_the_application_is_the_sender(sites: Sites) -> None:
    """Listeners of one application do not hear of another's sessions."""
    first, second = sites(), sites(SESSION_COOKIE_NAME="other")
    heard: list[str] = []

    def listen(sender: object, session: str) -> None:
        heard.append(session)

    with session_created.connected_to(listen, sender=first.app):
        first.set(a=1)
        second.set(a=1)
    assert len(heard) == 1
    assert len(heard[0]) == 12


def test_a_node_that_goes_down_is_told(site: Site, nodes: list[Memcached]) -> None:
    """Once, with its name and the reason."""
    heard: list[tuple[str, str]] = []

    def listen(sender: object, node: str, reason: str) -> None:
        heard.append((node, reason))

    site.set(a=1)
    with node_down.connected_to(listen, sender=site.app):
        nodes[0].kill()
        site.data()
    assert heard == [(nodes[0].address, "connection refused")]


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application that leaves a dead node alone for the rest of the test."""
    return sites(RESILIENT_SESSION_NODE_RETRY=20, RESILIENT_SESSION_NODE_RETRY_MAX=30)
