"""The command line: options, progress, printing, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, Final, TypeVar

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from flask.json.tag import TaggedJSONSerializer

from ..common.errors import SetupError, SqlUnavailable
from .reaper import DEFAULT_BATCH_SIZE, Reaper, ReapOptions, ReapReport
from .revocation import Revoker, RevokeReport

EXIT_DONE: Final = 0
EXIT_SQL_FAILED: Final = 1
EXIT_UNCHECKED: Final = 3
EXIT_ABORTED: Final = 4
EXIT_STOPPED: Final = 5

#: Make the reaper and the revoker of an application.
NewReaper = Callable[[Flask], Reaper]
NewRevoker = Callable[[Flask], Revoker]

_Made = TypeVar("_Made")


def _made(make: Callable[[Flask], _Made]) -> _Made:
    """What the current application's command works with."""
    with _explained():
        return make(current_app._get_current_object())  # type: ignore[attr-defined]


def exit_code(report: ReapReport) -> int:
    """The exit code of a pass: the first that holds."""
    if report.failed is not None:
        return EXIT_SQL_FAILED
    if report.aborted is not None:
        return EXIT_ABORTED
    if report.unchecked:
        return EXIT_UNCHECKED
    if report.stopped:
        return EXIT_STOPPED
    return EXIT_DONE


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A mistake in the set-up ends the command with its text, not a traceback."""
    try:
        yield
    except SetupError as error:
        raise click.UsageError(str(error)) from error


_REAP_OPTIONS: Final = (
    click.option(
        "--batch-size",
        type=click.IntRange(1, 10_000),
        default=DEFAULT_BATCH_SIZE,
        show_default=True,
        help="Rows read at once.",
    ),
    click.option("--limit", type=click.IntRange(1), help="Examine at most this many."),
    click.option(
        "--max-seconds", type=click.FloatRange(0), help="Take at most this long."
    ),
    click.option("--dry-run", is_flag=True, help="Change nothing; count only."),
    click.option(
        "--archive",
        type=click.File("a", encoding="utf-8", lazy=False),
        help="Append one JSON line per dead session, before it is deleted; a session"
        " that is not deleted then is written again by the next run.",
    ),
    click.option(
        "--forget-node",
        "forgotten",
        multiple=True,
        metavar="NAME",
        help="A node that was removed for good and need not be asked. Repeatable.",
    ),
    click.option(
        "--without-nodes",
        is_flag=True,
        help="Go by SQL where rows name nodes that are not configured here.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)


def reap_command(name: str, new_reaper: NewReaper) -> click.Command:
    """The command that removes expired sessions.

    :param name: ``reap-sessions`` or its alias.
    """

    @with_appcontext
    def command(
        archive: IO[str] | None,
        forgotten: tuple[str, ...],
        as_json: bool,
        quiet: bool,
        **bounds: Any,
    ) -> None:
        reaper = _made(new_reaper)
        shown = not (as_json or quiet)
        with (
            _explained(),
            _stop_on_signal() as should_stop,
            _progress(reaper, shown) as progress,
        ):
            report = reaper.run(
                ReapOptions(
                    **bounds,
                    forgotten=frozenset(forgotten),
                    archive=None if archive is None else _archiver(archive),
                    progress=progress,
                    should_stop=should_stop,
                )
            )
        if as_json:
            click.echo(json.dumps(_as_json(report)))
        else:
            _print(report, quiet=quiet)
        sys.exit(exit_code(report))

    for option in reversed(_REAP_OPTIONS):
        command = option(command)
    return click.command(name, help=_HELP)(command)


_HELP: Final = """Remove expired sessions from SQL.

Asks the memcached nodes for the latest of each expired session first: one that is
alive there is renewed, one that is dead is deleted, and one that cannot be checked is
kept. Safe to kill, to rerun and to run twice at once.

Exit codes: 0 nothing left to do; 1 SQL failed; 3 some rows could not be checked and
are kept; 4 aborted, nothing more deleted; 5 stopped early by a limit or a signal.
"""


def revoke_command(new_revoker: NewRevoker) -> click.Command:
    """The command that ends the sessions of a user, or of everybody."""

    @click.command("revoke-sessions", help=_REVOKE_HELP)
    @click.option("--user", metavar="ID", help="The user whose sessions end.")
    @click.option("--all", "everybody", is_flag=True, help="End everybody's sessions.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @with_appcontext
    def command(user: str | None, everybody: bool, yes: bool) -> None:
        if (user is None) != everybody:
            raise click.UsageError("Give either --user ID or --all.")
        revoker = _made(new_revoker)
        if not yes:
            whose = "everybody" if user is None else f"user {user}"
            try:
                with _explained():
                    found = revoker.count(user)
            except SqlUnavailable as error:
                click.echo(f"SQL failed: {error}", err=True)
                sys.exit(EXIT_SQL_FAILED)
            click.confirm(f"End {found} sessions of {whose}?", abort=True)
        with _explained():
            report = revoker.revoke(user)
        click.echo(f"Ended {report.ended} sessions.")
        sys.exit(_revoke_exit_code(report))

    return command


_REVOKE_HELP: Final = """End the sessions of a user, or of everybody, as by logout.

Exit codes: 0 final everywhere; 1 SQL failed, the rest was not ended; 3 a node could
not be told, SQL has it and it is effective at the session's next sync; 4 rows name
nodes that are not configured on this host.
"""


def _revoke_exit_code(report: RevokeReport) -> int:
    if report.failed is not None:
        click.echo(f"SQL failed: {report.failed}", err=True)
        return EXIT_SQL_FAILED
    if report.foreign:
        click.echo(
            f"{report.foreign} of them name nodes that are not configured on this host"
            " (RESILIENT_SESSION_NODES): their copies were not told.",
            err=True,
        )
        return EXIT_ABORTED
    if report.untold:
        click.echo(
            f"Of {report.untold} of them a node could not be told. SQL has it: they"
            " end at their next sync, or within two sync intervals after a rest.",
            err=True,
        )
        return EXIT_UNCHECKED
    return EXIT_DONE


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ask to stop after the row at hand on SIGINT or SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        # A scheduler's thread: signals are the main thread's.
        yield lambda: False
        return
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield lambda: stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _progress(reaper: Reaper, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not (shown and sys.stderr.isatty()):
        yield lambda rows: None
        return
    try:
        total = reaper.count()
    except SqlUnavailable:
        total = 0  # the pass itself will say what is wrong
    with click.progressbar(
        length=total, label="Reaping sessions", file=sys.stderr
    ) as bar:
        yield bar.update


def _archiver(file: IO[str]) -> Callable[[dict[str, Any]], None]:
    # Flask's own notation for types that JSON lacks, so that it can be read back.
    serializer = TaggedJSONSerializer()

    def archive(dead: dict[str, Any]) -> None:
        try:
            line = serializer.dumps(dead)
        except TypeError:
            line = serializer.dumps(dead | {"data": repr(dead["data"])})
        try:
            file.write(line + "\n")
            # The row is deleted next: the line has to be with the operating system.
            file.flush()
        except OSError as error:
            raise click.ClickException(
                f"The archive cannot be written, and nothing that is not in it was"
                f" deleted: {error}"
            ) from error

    return archive


def _as_json(report: ReapReport) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    fields["aborted"] = None if report.aborted is None else report.aborted.value
    fields["seconds"] = round(report.seconds, 3)
    return fields


def _print(report: ReapReport, *, quiet: bool) -> None:
    if report.failed is not None:
        click.echo(f"SQL failed: {report.failed}", err=True)
    if report.aborted is not None:
        click.echo(f"Aborted: {report.abort_reason}.", err=True)
    for reason, rows in sorted(report.reasons.items()):
        click.echo(f"Kept {rows}: {reason}.", err=True)
    if quiet:
        return
    would = "would be " if report.dry_run else ""
    click.echo(
        f"Examined {report.examined}: {report.reaped} {would}reaped,"
        f" {report.renewed} {would}renewed, {report.unchecked} kept unchecked,"
        f" in {report.seconds:.1f} s."
    )
    if report.stopped:
        click.echo("Stopped early; run it again for the rest.")
