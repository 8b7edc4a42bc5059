"""One soak from beginning to end."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab import NAMES, Proxy
from served_app import PATIENCE, Gunicorn
from servers import Memcached, wait_until

from .clients import Account, Client
from .history import History
from .nemesis import Nemesis

ACCOUNTS: Final = 18
CLIENTS: Final = 6

#: A cookie that is looked at again at the end, of those whose sessions have ended.
GHOSTS: Final = 150

#: The defaults of the package where they matter, and quicker to try again.
SETTINGS: Final = {
    "RESILIENT_SESSION_NODE_TIMEOUT": "0.25",
    "RESILIENT_SESSION_NODE_RETRY": "0.1",
    "RESILIENT_SESSION_NODE_RETRY_MAX": "0.5",
    "RESILIENT_SESSION_REQUEST_BUDGET": "2",
    "RESILIENT_SESSION_SQL_TIMEOUT": "0.5",
    "RESILIENT_SESSION_SYNC_INTERVAL": "3",
}


@dataclass(frozen=True)
class Report:
    """What happened."""

    seed: int
    operations: Counter[str]
    faults: Counter[str]
    violations: list[str]

    def __str__(self) -> str:
        words = ("401", "500", "502", "503", "no answer")
        bad = {n: c for n, c in self.operations.items() if n in words}
        done = {n: c for n, c in self.operations.items() if n not in words}
        lines = [
            f"seed {self.seed}",
            f"operations: {sum(done.values())} {_listed(done)}",
            f"faults: {self.faults.total()} {_listed(self.faults)}",
            f"not answered as wished: {sum(bad.values())} {_listed(bad)}",
            f"violations: {len(self.violations)}",
            *(f"  {sentence}" for sentence in self.violations[:20]),
        ]
        return "\n".join(lines)


def soak(seconds: float, seed: int, folder: Path) -> Report:
    """Run for so long, bring everything back, and look at every session."""
    history = History()
    over = threading.Event()
    with ExitStack() as stack:
        nodes = [stack.enter_context(Memcached()) for _ in NAMES]
        wires = [Proxy(node) for node in nodes]
        for wire in wires:
            stack.callback(wire.close)
        database = folder / "soak.sqlite"
        workers = _workers(stack, nodes, wires, database)
        ports = [worker.port for worker in workers]
        accounts = [Account(number) for number in range(ACCOUNTS)]
        toucher = Client(CLIENTS, ports, history, seed)
        stack.callback(toucher.close)
        nemesis = Nemesis(nodes, wires, database, seed, over, history.faults)
        threads = [
            threading.Thread(
                target=Client(number, ports, history, seed).run, args=(accounts, over)
            )
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            deadline = time.monotonic() + seconds
            buried = 0
            while time.monotonic() < deadline:
                nemesis.strike()
                heal(workers, accounts, toucher)
                # Those that ended without SQL are read, too: that pays their debt.
                fresh = history.ended[buried:]
                buried += len(fresh)
                for cookie in fresh:
                    _insist(lambda c=cookie: toucher.look_for_ghost(c, 1))
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        heal(workers, accounts, toucher)
        for cookie in history.ended[-GHOSTS:]:
            for number in range(len(workers)):
                _insist(lambda c=cookie, n=number: toucher.look_for_ghost(c, n))
        _no_tracebacks(workers, history)
    return Report(seed, history.counts, Counter(history.faults), history.violations)


def heal(workers: list[Gunicorn], accounts: list[Account], toucher: Client) -> None:
    """Every worker uses every node again, and every session was read at each of them.

    This is what the guarantees suppose between two faults.
    """
    cookie = None
    for account in accounts:
        life = account.life
        if life is not None and not life.ending:
            cookie = life.cookie
    for worker in workers:
        worker.settle(cookie)
    for account in accounts:
        for number in range(len(workers)):
            life = account.life
            if life is not None:
                _insist(lambda life=life, n=number: toucher.look(life, n))


def _insist(call: Callable[[], bool]) -> None:
    wait_until(call, PATIENCE, "an answer, with nothing broken")


def _workers(
    stack: ExitStack, nodes: list[Memcached], wires: list[Proxy], database: Path
) -> list[Gunicorn]:
    """Three processes; the first one reaches the nodes by wires that can be cut."""
    workers = []
    for ends in (wires, nodes, nodes):
        configured = [
            {"name": name, "address": end.address}
            for name, end in zip(NAMES, ends, strict=True)
        ]
        arguments = ("--worker-class", "gthread", "--threads", "8")
        worker = Gunicorn(
            json.dumps(configured), database, *arguments, settings=SETTINGS
        )
        stack.callback(worker.kill)
        worker.launch()
        workers.append(worker)
    for worker in workers:
        worker.await_ready()
    return workers


def _no_tracebacks(workers: list[Gunicorn], history: History) -> None:
    for worker in workers:
        if "Traceback" in worker.log:
            history.violate(f"a worker's log has a traceback:\n{worker.log[-3000:]}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
