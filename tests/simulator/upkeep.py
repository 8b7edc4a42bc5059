"""What happens to all at once: seconds and days go by, keys come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .actions import DAY

if TYPE_CHECKING:
    from .scenario import Run


def act(run: Run, what: str, amount: int) -> None:
    """One of these, between requests where it takes time."""
    if what in ("announce", "rotate", "drop"):
        getattr(run.rollout, what)()
        return
    run._hold()
    if what == "pass":
        run.world.spend(amount)
    elif what == "days":
        _days(run, amount)
    else:
        assert what == "renew", what
        _renew(run)
    run.held = False


def _days(run: Run, days: int) -> None:
    """Days without requests: a reaper runs on each."""
    world = run.world
    world.deliver_all()
    world.alone = True
    for _ in range(days):
        world.wall_ms += DAY
        run.reap(world.rng.choice(run.workers))
    world.alone = False


def _renew(run: Run) -> None:
    """Every session is used once more after all are due for a sync."""
    world, timing = run.world, run.plan.timing
    world.deliver_all()
    world.wall_ms += timing.slack_ms
    world.wall_ms += 2 * run.history.skew_ms + 120_000
    run._probe_all()
    world.alone = True
    for session in list(run.history.sessions):
        run._read_for_good(session)
    world.alone = False
    world.deliver_all()
