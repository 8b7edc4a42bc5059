"""Who is there in a lab: workers, which are applications, and users with a cookie."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from flask import Flask, jsonify, session
from flask_sqlalchemy import SQLAlchemy
from werkzeug.http import parse_cookie

from flask_resilient_session import ResilientSession
from flask_resilient_session.common.patience import Patience
from flask_resilient_session.core.answers import SqlSilent, Unreachable
from servers import wait_until

#: The sync interval, in seconds of the lab's clock.
N: Final = 120

LIFETIME: Final = 24 * 3600

#: Patient, so that a slow machine is not taken for a fault; quick to try again.
CONFIG: Final[Mapping[str, Any]] = {
    "SECRET_KEY": "a secret of the lab " * 2,
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "PERMANENT_SESSION_LIFETIME": LIFETIME,
    "RESILIENT_SESSION_SYNC_INTERVAL": N,
    "RESILIENT_SESSION_NODE_TIMEOUT": 1.0,
    "RESILIENT_SESSION_NODE_RETRY": 0.05,
    "RESILIENT_SESSION_NODE_RETRY_MAX": 0.05,
    "RESILIENT_SESSION_SQL_TIMEOUT": 3.0,
}

#: For tests in which a node hangs.
HASTY: Final[Mapping[str, Any]] = {
    "RESILIENT_SESSION_NODE_TIMEOUT": 0.2,
    "RESILIENT_SESSION_SQL_TIMEOUT": 1.0,
}

#: For tests in which SQL hangs.
HASTY_WITH_SQL: Final[Mapping[str, Any]] = {
    "RESILIENT_SESSION_NODE_TIMEOUT": 0.5,
    "RESILIENT_SESSION_SQL_TIMEOUT": 0.2,
}

#: Seconds that a request of theirs may wait where something hangs: all there is for
#: loading and for saving, and one exchange more.
HASTY_SECONDS: Final = 3.0

#: Seconds for everything that is waited for.
PATIENCE: Final = 20.0

Action = Callable[[Any], Any]


@dataclass(frozen=True)
class Answer:
    """A response, as far as these tests look at it."""

    status: int
    data: Any
    set_cookie: str | None
    retry_after: str | None
    seconds: float


class Worker:
    """One application process, as far as one process can be several.

    :param addresses: of the nodes: name -> address.
    :param config: what the lab has and a test wants, the database included.
    :param now_ms: the Unix clock.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        config: Mapping[str, Any],
        now_ms: Callable[[], int],
    ) -> None:
        self._actions: dict[str, Action] = {}
        self._numbers = itertools.count()
        self.app = app = Flask(__name__)
        app.config.update(CONFIG)
        app.config["RESILIENT_SESSION_NODES"] = [
            {"name": name, "address": address} for name, address in addresses.items()
        ]
        app.config.update(config)
        db = SQLAlchemy(app)
        self.sessions = ResilientSession(app, db)
        self.state = app.extensions["resilient_session"]
        self.state.clock.now_ms = now_ms
        app.add_url_rule("/<number>", "act", self._act, methods=["POST"])

    @property
    def stats(self) -> Mapping[str, int]:
        """Its counters."""
        return self.state.observer.stats

    def _act(self, number: str) -> Any:
        return jsonify(self._actions.pop(number)(session))

    def request(self, cookie: str | None, action: Action) -> Answer:
        """One request with this cookie that does this with its session."""
        number = str(next(self._numbers))
        self._actions[number] = action
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        client = self.app.test_client(use_cookies=False)
        started = time.monotonic()
        response = client.post(f"/{number}", headers=headers)
        return Answer(
            response.status_code,
            response.get_json(silent=True),
            response.headers.get("Set-Cookie"),
            response.headers.get("Retry-After"),
            time.monotonic() - started,
        )

    def reap(self, **options: Any) -> Any:
        """One pass of the reaper."""
        with self.app.app_context():
            return self.sessions.reap(**options)

    def connect(self) -> None:
        """Have a connection to SQL, which a request in a hurry might not get."""
        deadline = self.state.clock.monotonic() + PATIENCE
        self.state.sql.count_expired(0, deadline)

    def settle(self) -> None:
        """Return when this worker uses every node and SQL again."""
        wait_until(self._is_well, PATIENCE, "every node and SQL to be used again")

    def _is_well(self) -> bool:
        state = self.state
        patience = Patience(state.clock, 2)
        context = state.keys.context(self.app, "nobody", patience)
        homes = state.store.homes
        replies = homes.read(context, sorted(homes.cluster.names))
        row = state.store.rows.read(context)
        return not isinstance(row, SqlSilent) and not any(
            isinstance(reply, Unreachable) for reply in replies.values()
        )

    def close(self) -> None:
        """Close its connections."""
        self.state.close()


class User:
    """A browser: one cookie, sent to whichever worker is asked."""

    def __init__(self, worker: Worker, cookie: str | None = None) -> None:
        self.worker = worker
        self.cookie = cookie

    @property
    def session_key(self) -> str:
        """What the stores know the session by."""
        assert self.cookie is not None, "this user has no cookie"
        sid = self.cookie.rsplit(".", 1)[0]
        return hashlib.sha256(sid.encode()).hexdigest()

    def does(self, action: Action) -> Answer:
        """One request; the cookie is kept, replaced or deleted as it says."""
        answer = self.worker.request(self.cookie, action)
        if answer.set_cookie is not None:
            self.cookie = parse_cookie(answer.set_cookie).get("session") or None
        return answer

    def sees(self) -> Any:
        """The session as a page sees it; the status where there is no page."""
        answer = self.does(dict)
        return answer.data if answer.status == 200 else answer.status

    def changes(self, **values: Any) -> Answer:
        """One request that sets these keys."""
        return self.does(lambda session: session.update(values))

    def counts(self, key: str = "count") -> Answer:
        """One request that reads a number, adds 1 and writes it."""

        def action(session: Any) -> int:
            session[key] = session.get(key, 0) + 1
            return int(session[key])

        return self.does(action)

    def logs_in(self, user: str) -> Answer:
        """One request that sets the user."""
        return self.changes(_user_id=user)

    def logs_out(self) -> Answer:
        """One request that ends the session."""
        return self.does(lambda session: session.clear())

    def regenerates(self) -> Answer:
        """One request that asks for a new id."""
        return self.does(lambda session: session.regenerate())

    def at(self, worker: Worker) -> User:
        """The same cookie, sent to another worker; from here on its own."""
        return User(worker, self.cookie)

    def twin(self) -> User:
        """A copy of the cookie, which this user's later answers do not change."""
        return User(self.worker, self.cookie)


class InFlight:
    """A request that stops after loading its session until it is told to go on.

    :param start: does something in another thread.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], Any]], Future[Any]],
        user: User,
        action: Action,
    ) -> None:
        self._loaded = threading.Event()
        self._go_on = threading.Event()

        def slowly(session: Any) -> Any:
            dict(session)
            self._loaded.set()
            assert self._go_on.wait(PATIENCE)
            return action(session)

        self._answer = start(lambda: user.does(slowly))
        assert self._loaded.wait(PATIENCE)

    def finish(self) -> Answer:
        """Let it go on, and return its answer."""
        self._go_on.set()
        answer = self._answer.result(PATIENCE)
        assert isinstance(answer, Answer)
        return answer
