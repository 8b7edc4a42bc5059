"""What befalls nodes, SQL and workers in a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from random import Random

from flask_resilient_session.maintenance.reaper import Reaper, ReapOptions

from . import upkeep
from .actions import NODES, WORKERS, Action
from .fakes import Database, Server
from .hearing import Hearing
from .history import NEVER, History, Session
from .plan import Plan
from .rollout import Rollout
from .worker import LONGEST_PAUSE, Worker, ring_of
from .world import Died, World


class Site(ABC):
    """Nodes, SQL and workers, and all that befalls them.

    :ivar counts: how requests ended.
    """

    def __init__(self, plan: Plan, *, traced: bool = False) -> None:
        self.plan = plan
        self.world = World(Random(plan.order), traced=traced)
        self.servers = {name: Server(name, self.world) for name in (*NODES, "d")}
        self.database = Database(self.world)
        self.world.holds_back = plan.holds_back
        self.skews = list(plan.skews)
        self.history = History(
            self.world, plan.timing, plan.longest_slack_ms, plan.skews
        )
        self.database.on_insert = lambda key, live: self.history.row_appears(
            key, live=live
        )
        self.database.on_reap = self.history.row_is_reaped
        self.database.on_fault = self._sql_fails
        self.names = frozenset(plan.nodes)
        self.rollout = Rollout(
            self.names, lambda names, key: ring_of(names, plan.layout).homes(key)
        )
        self.hearing = Hearing(self.world, NEVER)
        #: Sessions that some request had only SQL for.
        self.blindly: set[str] = set()
        self._processes = 0
        lists = plan.lists or (plan.nodes,) * WORKERS
        self.workers = [
            Worker(self, index, frozenset(names), self.rollout.secrets)
            for index, names in enumerate(lists)
        ]
        for worker in self.workers:
            self.rollout.spreads(worker.names)

        self.counts: Counter[str] = Counter()
        self.active = 0
        self.held = False
        #: Clients that have still something to ask.
        self.clients = 0

    @abstractmethod
    def read_for_good(self, session: Session) -> None:
        """Load and save a session until it worked."""

    def new_process(self) -> int:
        """A number for each process that ever was."""
        self._processes += 1
        return self._processes

    def act(self, action: Action) -> None:
        world = self.world
        what = action.what
        if what == "sleep":
            until = world.step + action.amount
            world.wait(lambda: world.step >= until or not self.clients)
        elif what == "jump":
            self._jump(action.amount)
        elif what in ("rest", "due"):
            timing = self.plan.timing
            far_ms = timing.lifetime_ms if what == "rest" else timing.sync_ms
            self._jump(max(far_ms + action.amount, 0))
        elif what == "time passes":
            world.passed.append((world.step, action.amount))
            world.pass_time(action.amount / 1000)
        elif what == "die":
            self._die(action.worker)
        elif what == "step":
            self._step_clock(action.worker, action.amount)
        elif what == "lose memory":
            for server in self.servers.values():
                server.restart()
            self.history.memory_lost()
            # A worker that skips both homes writes what others need not see.
            self.hold()
            self.probe_all()
            self.held = False
        elif what.startswith("sql "):
            self._act_on_sql(what)
        elif what == "add or remove":
            changed = self.names ^ {action.node}
            if len(changed) >= 2:
                self.names = changed
        elif what == "roll":
            self.roll(action.worker)
        elif what == "reap":
            self.spawn_reaper(action.worker)
        elif what == "settle":
            self.settle()
        elif what == "split":
            self._split()
        elif what == "heal quietly":
            self.hold()
            self.servers[action.node].heal()
            self.held = False
        elif what in ("pass", "days", "renew", "announce", "rotate", "drop"):
            upkeep.act(self, what, action.amount)
        else:
            names = self.servers if action.node == "all" else [action.node]
            for name in names:
                self._act_on_node(what, self.servers[name], action.worker)
                if what not in ("heal", "start", "snapshot", "uncut"):
                    self.rollout.fails(name)
            self.tell_risks()

    def _act_on_sql(self, what: str) -> None:
        database = self.database
        if what in ("sql forget", "sql remember"):
            self.hold()
            self.world.deliver_all()
            if what == "sql forget":
                keys = [key for key in database.rows if self.world.rng.random() < 0.8]
                database.forget(keys)
                for key in keys:
                    self.history.row_is_forgotten(key)
                for session in self.history.sessions:
                    session.row_away |= session.key in keys
            else:
                database.remember()
                for session in self.history.sessions:
                    session.row_away = False
            self.held = False
            return
        database.heal()
        if what == "sql down":
            database.down = True
        elif what == "sql lossy":
            database.lossy = 0.4
        elif what == "sql busy":
            database.busy = 0.5
        elif what == "sql behind":
            database.lag()

    def _jump(self, amount_ms: int) -> None:
        """Time goes by between requests."""
        self.hold()
        self.world.deliver_all(held=False)
        self.world.wall_ms += amount_ms
        self.held = False

    def _die(self, index: int) -> None:
        """A worker process dies in the middle of what it does; another one begins."""
        old = self.workers[index]
        self.world.kill(old.process)
        self.workers[index] = Worker(self, index, old.names, old.secrets)

    def _step_clock(self, index: int, amount_ms: int) -> None:
        self.skews[index] += amount_ms
        self.workers[index].clock.skew_ms = self.skews[index]
        self.history.clock_steps(self.skews[index])

    def _act_on_node(self, what: str, server: Server, worker: int) -> None:
        if what in ("evict", "corrupt"):
            for key in sorted(server.items):
                if self.world.rng.random() < 0.6:
                    getattr(server, what)(key)
        elif what in ("crash", "restart", "zombie", "snapshot", "heal"):
            getattr(server, what)()
        elif what == "start":
            server.up = True
        elif what == "cut":
            server.cut ^= {worker}
        elif what == "cut all":
            server.cut = set(range(WORKERS))
        elif what == "uncut":
            server.cut.clear()
        elif what == "hang":
            server.hung = not server.hung
        elif what == "lossy":
            server.lossy = 0.5
        else:
            assert what == "full", what
            server.full = True

    def roll(self, index: int) -> None:
        worker = self.workers[index]
        now = (self.names, self.rollout.secrets)
        if (worker.names, worker.secrets) != now:
            self.workers[index] = Worker(self, index, *now)
            self.rollout.spreads(self.names)
            self.tell_risks()

    def tell_risks(self) -> None:
        for session in self.history.sessions:
            if self.rollout.at_risk(session.key):
                self.history.row_is_left(session)

    def hold(self) -> None:
        """Wait until no request is under way, and let none begin."""
        self.held = True
        self.world.wait(lambda: not self.active)

    def settle(self) -> None:
        """All is well again, every worker knows it, and every session is read."""
        world = self.world
        self.hold()
        # A delete that lands later would be one more fault of that node.
        world.deliver_all("delete")
        for server in self.servers.values():
            server.heal()
        self.database.heal()
        self.probe_all()
        self.held = False
        for session in list(self.history.sessions):
            self.read_for_good(session)
        if {worker.names for worker in self.workers} == {self.names}:
            self.rollout.is_over(self.names)

    def _sql_fails(self, worker: int) -> None:
        self.database.failed[worker] = self.world.step
        self.history.sql_in_doubt = True

    def _split(self) -> None:
        """Cut every worker off from another node, or none."""
        self.hold()
        for server in self.servers.values():
            server.cut.clear()
        self.probe_all()
        for index in range(WORKERS):
            name = self.world.rng.choice((*NODES, "none"))
            if name != "none":
                self.servers[name].cut.add(index)
        if self.world.rng.random() < 0.5:
            # Else they have to find out.
            self._probe()
        self.held = False

    def probe_all(self) -> None:
        """Let every worker notice that all answer again."""
        self._probe()
        for worker in self.workers:
            suspects = worker.store.homes.cluster.suspects()
            assert not suspects, suspects

    def _probe(self) -> None:
        """Let every worker notice what answers, and what does not."""
        self.world.spend(LONGEST_PAUSE)
        self.world.alone = True
        for worker in self.workers:
            # The first may only find that its connections were closed.
            for _ in range(3):
                context = worker.context("0" * 64)
                worker.store.read_copies(context, sorted(worker.names))
            worker.store.rows.read(worker.context("0" * 64))
        self.history.sql_in_doubt = self.database.state() != "ok"
        self.world.alone = False

    def in_process(self, worker: Worker, do: Callable[[Worker], None]) -> None:
        """What a worker process does, as long as it lives."""
        self.active += 1
        self.world.begin(worker.process)
        start_ms = self.world.now_ms
        try:
            do(worker)
        except Died:
            self.world.log("  w{} dies", worker.index)
            self.counts["died"] += 1
        self.history.took(start_ms)
        self.world.end()
        self.active -= 1

    def spawn_reaper(self, index: int) -> None:
        def run() -> None:
            self.world.wait(lambda: not self.held)
            self.in_process(self.workers[index], self.reap)

        self.world.spawn(f"reaper of w{index}", run)

    def reap(self, worker: Worker) -> None:
        """One pass of a worker's reaper."""
        reaper = Reaper(
            worker.sql,
            worker.store,
            keyring=worker.keyring,
            timing=worker.timing,
            clock=worker.clock,
            observer=worker.observer,
        )
        report = reaper.run(ReapOptions(batch_size=2))
        self.world.log("  reaper of w{}: {}", worker.index, report)
        self.counts["reaped"] += report.reaped
        self.counts["renewed"] += report.renewed
