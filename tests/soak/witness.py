"""Who looks at every session between two faults, and has some of its own in each."""

from __future__ import annotations

from collections.abc import Sequence

from .clients import Client
from .faults import Fault
from .history import History, Life


class Witness(Client):
    """Looks at sessions between two faults, and has some of its own in each.

    Nobody else reads those, and so mends them, before the next thing breaks.

    :ivar kept: a session that the last fault did not end.
    """

    def __init__(
        self, number: int, ports: Sequence[int], history: History, seed: int
    ) -> None:
        super().__init__(number, ports, history, seed)
        self.kept: Life | None = None
        self._doomed: Life | None = None

    def log_in_ahead(self) -> None:
        """Begin two sessions for :meth:`meet`, while nothing is broken."""
        self.kept, self._doomed = self._begin(), self._begin()

    def meet(self, fault: Fault, *, silent: bool) -> None:
        """Log in, log out and write at the first worker while the database is broken.

        A login is not acknowledged without SQL. The others are, if both homes took
        them; from then on they count.

        :param silent: SQL answers nothing at all to that worker.
        """
        status, *_ = self._ask("login", "POST", f"/login/{self._name}", None, 0)
        if silent and status == 200:
            self._history.violate(f"a login was acknowledged without SQL: {fault}")
        fault.refused += silent and status != 200
        if self._doomed is not None:
            cookie = self._doomed.cookie
            if self._ask("logout", "POST", "/logout", cookie, 0)[0] == 200:
                self._history.logged_out(self._doomed)
        if self.kept is not None:
            self.append(self.kept, 0)

    def _begin(self) -> Life | None:
        tag = f"{self._name}x{next(self._numbers)}"
        status, _, cookie = self._ask("login", "POST", f"/login/{tag}", None)
        return Life(tag, cookie) if status == 200 else None
