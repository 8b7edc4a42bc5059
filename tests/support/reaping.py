"""Reaping in tests: passes by method and by command, and rows made older."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from click.testing import Result

from apps import Site, command_runner
from flask_resilient_session import ReapReport

LIFETIME = 3600
#: Longer than a row outlives its session, grace included.
PAST = 2 * LIFETIME


def reap(site: Site, **options: Any) -> ReapReport:
    """One pass."""
    with site.app.app_context():
        report = site.sessions.reap(**options)
    assert report.failed is None
    return report


def succeeded(site: Site) -> ReapReport | None:
    """The report of a pass, if SQL did not fail."""
    with site.app.app_context():
        report = site.sessions.reap()
    return report if report.failed is None else None


def change_row(site: Site, **values: Any) -> None:
    """Change every row behind the extension's back."""
    with site.state.sql.engine.connect() as connection:
        connection.execute(sa.update(site.state.sql.table).values(values))


def counts(report: ReapReport) -> tuple[int, int, int, int]:
    """Examined, renewed, reaped, unchecked."""
    return report.examined, report.renewed, report.reaped, report.unchecked


def run(site: Site, *options: str, command: str = "reap-sessions") -> Result:
    """Run the command in this process."""
    return command_runner(site.app).invoke(args=[command, *options])


def run_json(site: Site, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the object that ``--json`` prints."""
    result = run(site, "--json", *options)
    return result.exit_code, json.loads(result.stdout)


def synced_later(site: Site, seconds: float) -> None:
    """Let the row seem to be synced that far in this host's future."""
    synced_at = site.state.clock.now_ms() + round(seconds * 1000)
    with site.state.sql.engine.connect() as connection:
        connection.execute(sa.update(site.state.sql.table).values(synced_at=synced_at))
