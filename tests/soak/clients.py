"""Clients that use the sessions of a few accounts, several at once in the same one."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from werkzeug.http import parse_cookie

from .history import Before, History, Life

#: Seconds for one answer; a worker's budget is a part of that.
ANSWER: Final = 20.0

#: A session that has this many elements is ended, so that pages stay short.
FULL: Final = 80


class Wire:
    """A kept-alive connection to each worker."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._connections: dict[int, http.client.HTTPConnection] = {}

    def ask(
        self, worker: int, method: str, path: str, cookie: str | None
    ) -> tuple[int, Any, str | None]:
        """Status, page and new cookie; status 0: no answer."""
        connection = self._connections.get(worker)
        if connection is None:
            port = self._ports[worker]
            connection = http.client.HTTPConnection("127.0.0.1", port, ANSWER)
            self._connections[worker] = connection
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return 0, None, cookie
        for header in response.headers.get_all("Set-Cookie") or ():
            cookie = parse_cookie(header).get("session") or None
        page = json.loads(body) if response.status == 200 else None
        return response.status, page, cookie

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()


class Account:
    """One user's account; its session, and who may end it at the moment."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lives = 0
        self.life: Life | None = None
        #: Held by whoever logs in, logs out or changes the id.
        self.door = threading.Lock()


class Client:
    """One of several that do what chance says, to accounts that chance picks.

    :param number: names the keys that only this client writes.
    """

    def __init__(
        self, number: int, ports: Sequence[int], history: History, seed: int
    ) -> None:
        self._name = f"c{number}"
        self._workers = range(len(ports))
        self._wire = Wire(ports)
        self._history = history
        self._random = random.Random(f"{seed}/{number}")
        self._numbers = itertools.count(1)

    def run(self, accounts: Sequence[Account], over: threading.Event) -> None:
        """Go on until it is over."""
        while not over.is_set():
            self.act(self._random.choice(accounts))
        self._wire.close()

    def act(self, account: Account) -> None:
        """Do one thing."""
        life = account.life
        if life is None:
            self.log_in(account)
            return
        chance = self._random.random()
        if chance < 0.01 or len(life.acknowledged) >= FULL:
            self.log_out(account, life)
        elif chance < 0.03:
            self.change_id(account, life)
        elif chance < 0.35:
            self.look(life, self._random.choice(self._workers))
        elif chance < 0.40:
            self.haunt()
        elif chance < 0.70:
            self.append(life)
        else:
            self.put(life)

    def log_in(self, account: Account) -> None:
        """Open a session for an account that has none."""
        if not account.door.acquire(blocking=False):
            return
        try:
            if account.life is not None:
                return
            account.lives += 1
            tag = f"a{account.number}x{account.lives}"
            status, page, cookie = self._ask("login", "POST", f"/login/{tag}", None)
            if status == 200:
                if page != {"_user_id": tag}:
                    self._history.violate(f"{tag} began with {page}")
                account.life = Life(tag, cookie)
        finally:
            account.door.release()

    def log_out(self, account: Account, life: Life) -> None:
        """End a session; try until it is acknowledged."""
        if not account.door.acquire(blocking=False):
            return
        try:
            if account.life is not life:
                return
            life.ending = True
            while True:
                status, *_ = self._ask("logout", "POST", "/logout", life.cookie)
                if status == 200:
                    break
            self._history.logged_out(life)
            account.life = None
        finally:
            account.door.release()

    def change_id(self, account: Account, life: Life) -> None:
        """Give a session a new id."""
        if not account.door.acquire(blocking=False):
            return
        try:
            if account.life is not life:
                return
            life.moving += 1
            before = self._history.before(life)
            status, page, cookie = self._ask(
                "regenerate", "POST", "/regenerate", life.cookie
            )
            if status == 200 and cookie != life.cookie:
                self._history.moved(life, cookie)
                self._history.check(life, before, page, "regenerate")
                life.moving -= 1
            else:
                if status in (200, 401):
                    self._history.violate(f"{life.tag} could not be moved: {status}")
                # Whether the old id is dead, and which is the new, is not known.
                life.ending = True
                account.life = None
        finally:
            account.door.release()

    def append(self, life: Life) -> None:
        """Append an element to the list that only this client writes."""
        element = f"{life.tag}-{self._name}-{next(self._numbers)}"
        path = f"/append/list{self._name}/{element}"
        if self._change("append", life, path):
            self._history.appended(life, element)

    def put(self, life: Life) -> None:
        """Put a larger number under a key that only this client writes."""
        number = next(self._numbers)
        if self._change("put", life, f"/set/{self._name}/{number}"):
            self._history.put(life, self._name, number)

    def look(self, life: Life, worker: int) -> bool:
        """Read a session at one worker; whether it answered."""
        before = self._history.before(life)
        status, page, _ = self._ask("look", "GET", "/", before.cookie, worker)
        if status == 200 and page:
            self._history.check(life, before, page, "look")
        elif status == 200:
            self._history.refused(life, before, "look")
        return status == 200

    def haunt(self) -> None:
        """Ask with a cookie whose session has ended: nobody is at home."""
        if self._history.ended:
            cookie = self._random.choice(self._history.ended[-200:])
            self.look_for_ghost(cookie, self._random.choice(self._workers))

    def look_for_ghost(self, cookie: str, worker: int) -> bool:
        """Whether a worker answered; it must know no such session."""
        status, page, _ = self._ask("haunt", "GET", "/", cookie, worker)
        if status == 200 and page:
            self._history.came_back(cookie, page, f"worker {worker}")
        return status == 200

    def _change(self, name: str, life: Life, path: str) -> bool:
        before = self._history.before(life)
        status, page, _ = self._ask(name, "POST", path, before.cookie)
        if status == 200:
            self._history.check(life, before, page, name)
        elif status == 401:
            self._history.refused(life, before, name)
        return status == 200 and not self._overtaken(life, before)

    def _overtaken(self, life: Life, before: Before) -> bool:
        # The id changed meanwhile: the change may have gone to the old one's grave.
        return life.ending or bool(life.moving) or life.cookie != before.cookie

    def _ask(
        self,
        name: str,
        method: str,
        path: str,
        cookie: str | None,
        worker: int | None = None,
    ) -> tuple[int, Any, str | None]:
        if worker is None:
            worker = self._random.choice(self._workers)
        answer = self._wire.ask(worker, method, path, cookie)
        self._history.count(name)
        if answer[0] not in (200, 401):
            self._history.count(f"{answer[0] or 'no answer'}")
        return answer

    def close(self) -> None:
        """Close its connections."""
        with suppress(OSError):
            self._wire.close()
