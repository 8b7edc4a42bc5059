"""Nodes and SQL away: how tests make it so, and what the answer must be."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session

from apps import Site


class Outage:
    """Nodes, with what they hold, and SQL of a site, taken away and given back."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._patch = pytest.MonkeyPatch()

    def begin(self, *, nodes: int = 2, sql: bool = True) -> None:
        """Take away that many nodes, and SQL."""
        for node in self._site.nodes[:nodes]:
            node.kill()
        if sql:
            self._site.break_sql(self._patch)

    def end(self) -> None:
        """Give everything back, and let nothing be skipped any more."""
        self._patch.undo()
        for node in self._site.nodes:
            if not node.alive:
                node.start()
        self._site.state.store.renew()


def with_session(site: Site) -> Site:
    """The site with ``{"a": 1}`` in its visitor's session."""
    site.set(a=1)
    assert site.data() == {"a": 1}
    site.app._got_first_request = False  # tests go on with setting it up
    return site


def raw() -> Any:
    """The session object itself."""
    return session._get_current_object()  # type: ignore[attr-defined]


def assert_refused(response: Any) -> None:
    """A 503 that asks to come back, and leaves the cookie alone."""
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "Set-Cookie" not in response.headers
    assert response.headers["Vary"] == "Cookie"
