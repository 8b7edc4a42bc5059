"""Clients that use the sessions of a few accounts, several at once in the same one."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from served_app import PATIENCE
from servers import wait_until

from .history import Before, History, Life
from .wire import Wire

#: A session that has this many elements is ended, so that pages stay short.
FULL: Final = 80


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
    :ivar acts: how much it has done to the end.
    """

    def __init__(
        self, number: int, ports: Sequence[int], history: History, seed: int
    ) -> None:
        self.acts = 0
        self._name = f"c{number}"
        self._workers = range(len(ports))
        self._wire = Wire(ports)
        self._history = history
        self._random = random.Random(f"{seed}/{number}")
        self._numbers = itertools.count(1)

    def run(self, accounts: Sequence[Account], over: threading.Event) -> None:
        """Go on until it is over."""
        try:
            while not over.is_set():
                self.act(self._random.choice(accounts))
                self.acts += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not pass
            self._history.violate(f"{self._name} gave up: {error!r}")
        finally:
            self.close()

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
            # Refused while SQL and one of its nodes are away, and for no longer.
            wait_until(
                lambda: self._ask("logout", "POST", "/logout", life.cookie)[0] == 200,
                2 * PATIENCE,
                f"the logout of {life.tag}",
            )
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

    def append(self, life: Life, worker: int | None = None) -> None:
        """Append an element to the list that only this client writes."""
        element = f"{life.tag}-{self._name}-{next(self._numbers)}"
        path = f"/append/list{self._name}/{element}"
        if self._change("append", life, path, worker):
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

    def _change(
        self, name: str, life: Life, path: str, worker: int | None = None
    ) -> bool:
        before = self._history.before(life)
        status, page, _ = self._ask(name, "POST", path, before.cookie, worker)
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
        began_in = self._history.fault
        answer = self._wire.ask(worker, method, path, cookie)
        self._history.answered(
            name, answer[0], self._wire.seconds, self._wire.silent, began_in
        )
        return answer

    def close(self) -> None:
        """Close its connections."""
        with suppress(OSError):
            self._wire.close()


class Crowd:
    """All clients, each in a thread of its own, until it is over."""

    def __init__(
        self,
        clients: Sequence[Client],
        accounts: Sequence[Account],
        over: threading.Event,
    ) -> None:
        self._clients = clients
        self._threads = [
            threading.Thread(target=client.run, args=(accounts, over))
            for client in clients
        ]
        for thread in self._threads:
            thread.start()

    def finish_what_began(self) -> None:
        """Return when nobody waits any more for what was asked before this call.

        A request that meets two faults may see what one that meets a single one
        must not.
        """
        for client, thread in zip(self._clients, self._threads, strict=True):
            begun = client.acts
            wait_until(
                lambda c=client, t=thread, n=begun: c.acts > n or not t.is_alive(),
                2 * PATIENCE,
                "a client's requests to be answered",
            )

    def join(self) -> None:
        """Wait for them, once it is over."""
        for thread in self._threads:
            thread.join(2 * PATIENCE)
