"""What happens to all at once: seconds and days go by, keys come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .actions import DAY

if TYPE_CHECKING:
    from .site import Site


def act(site: Site, what: str, amount: int) -> None:
    """One of these, between requests where it takes time."""
    if what in ("announce", "rotate", "drop"):
        getattr(site.rollout, what)()
        return
    site.hold()
    if what == "pass":
        site.world.spend(amount)
    elif what == "days":
        _days(site, amount)
    else:
        assert what == "renew", what
        _renew(site)
    site.held = False


def _days(site: Site, days: int) -> None:
    """Days without requests: a reaper runs on each."""
    world = site.world
    world.deliver_all()
    world.alone = True
    for _ in range(days):
        world.wall_ms += DAY
        site.reap(world.rng.choice(site.workers))
    world.alone = False


def _renew(site: Site) -> None:
    """Every session is used once more after all are due for a sync."""
    world, timing = site.world, site.plan.timing
    world.deliver_all()
    world.wall_ms += timing.slack_ms
    world.wall_ms += 2 * site.history.skew_ms + 120_000
    site.probe_all()
    world.alone = True
    for session in list(site.history.sessions):
        site.read_for_good(session)
    world.alone = False
    world.deliver_all()
