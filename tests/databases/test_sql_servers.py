"""PostgreSQL and MariaDB that lock, refuse, die, hang and come back."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pymysql
import pytest
import sqlalchemy as sa

from builders import PLACES, row, session_key, soon, tombstone_row
from database_servers import (
    PASSWORD,
    DatabaseServer,
    new_table_name,
    server_table,
)
from flask_resilient_session.common.errors import SetupError, SqlBusy, SqlUnavailable
from flask_resilient_session.sql import watchdog
from flask_resilient_session.sql.connections import own_engine
from flask_resilient_session.sql.statements import SqlTable
from misbehaving import in_child, run_together
from servers import free_port, wait_until

KEY, OTHER = session_key("alice"), session_key("bob")

#: The time that calls to hanging servers have, and what a busy machine may add to it.
#: Without a deadline such a call would last until the server is thawed.
PATIENCE, SLACK = 0.3, 2.0


@pytest.fixture
def tables() -> Iterator[Callable[..., SqlTable]]:
    """Makes tables and closes their connections."""
    with ExitStack() as at_end:

        def make(server: DatabaseServer, **changes: Any) -> SqlTable:
            table = server_table(server, **changes)
            at_end.callback(table.dispose)
            return table

        yield make


@pytest.fixture
def table(database: DatabaseServer, tables: Callable[..., SqlTable]) -> SqlTable:
    """A table with one row on each server, and an open connection to it."""
    made = tables(database)
    made.count_expired(0, soon())
    made.insert(row(KEY), soon())
    return made


def calls(table: SqlTable) -> dict[str, Callable[[float], Any]]:
    """One call of each kind that a request makes."""
    return {
        "read": lambda until: table.read(KEY, until),
        "insert": lambda until: table.insert(row(OTHER), until),
        "update": lambda until: table.update(row(KEY, version=2), 1, until),
        "bury": lambda until: table.put_tombstone(
            tombstone_row(KEY), until, has_row=True
        ),
        "move": lambda until: table.move(
            tombstone_row(KEY), row(OTHER), until, seen_version=1
        ),
    }


def fails(call: Callable[[float], Any], seconds: float = PATIENCE) -> str:
    """A call fails when it had this long, with this text."""
    started = time.monotonic()
    with pytest.raises(SqlUnavailable) as caught:
        call(started + seconds)
    assert time.monotonic() - started < min(seconds, PATIENCE) + SLACK
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


@contextmanager
def locked(server: DatabaseServer, table: SqlTable) -> Iterator[Any]:
    """Somebody else changed the row and has not committed."""
    connection = server.connect_to(server.url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(str(sa.update(table.table).values(version=sa.text("1"))))
        yield connection
        connection.rollback()
    finally:
        connection.close()


# --- watchdog -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql_timeout", "seconds"), [(PATIENCE, 30.0), (30.0, PATIENCE)]
)
def test_a_locked_row(
    database: DatabaseServer,
    tables: Callable[..., SqlTable],
    sql_timeout: float,
    seconds: float,
) -> None:
    """It is waited for no longer than both SQL_TIMEOUT and the request allow."""
    slow = tables(database)
    slow.insert(row(KEY), soon())
    table = tables(database, name=slow.table.name, sql_timeout=sql_timeout)
    with locked(database, slow):
        for name in ("update", "bury", "move"):
            fails(calls(table)[name], seconds)
        assert slow.read(KEY, soon()) == row(KEY), "readers are not kept out"
    # What was given up may have waited on in the server, and been done.
    assert slow.put_tombstone(tombstone_row(KEY), soon(), has_row=True) in (True, False)


def test_the_reaper_is_more_patient(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """What no request waits for has until its own deadline."""
    table = tables(database, sql_timeout=PATIENCE)
    wait_until(lambda: _answers(table), 20.0)
    sa.event.listen(
        table.engine, "before_cursor_execute", lambda *_: time.sleep(2 * PATIENCE)
    )
    assert table.count_expired(2**62, soon()) == 0
    fails(calls(table)["read"], 30.0)


def test_no_connection_is_free(database: DatabaseServer, table: SqlTable) -> None:
    """When all are in use the next call waits no longer than it may."""
    slow = server_table(database, name=table.table.name, sql_timeout=20.0)
    slow.read(KEY, soon())
    update = partial(slow.update, row(KEY, version=2), 1)
    results: list[Any] = []
    with locked(database, table):
        threads = [
            threading.Thread(target=lambda: results.append(update(soon())))
            for _ in range(PLACES)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: slow.engine.pool.checkedout() == PLACES, 20.0)
        text = fails(lambda until: slow.read(KEY, until))
        assert "too many requests" in text
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [False] * (PLACES - 1) + [True]
    slow.dispose()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_that_is_gone(
    database: DatabaseServer, table: SqlTable, end: str
) -> None:
    """Every call fails at once, with open connections and without; then all is well."""
    getattr(database, end)()
    for call in calls(table).values():
        fails(call, 30.0)
    table.dispose()
    for call in calls(table).values():
        fails(call, 30.0)
    database.start()
    assert table.read(KEY, soon()) == row(KEY)


@pytest.mark.parametrize("name", ["read", "insert", "update", "bury", "move"])
def test_a_frozen_server(database: DatabaseServer, table: SqlTable, name: str) -> None:
    """A call ends when its time is up, although nothing of the server moves."""
    call = calls(table)[name]
    database.freeze()
    assert fails(call) == "SQL did not answer in time"
    fails(call, 0.1)
    database.thaw()
    wait_until(lambda: _answers(table), 20.0, "the server to answer again")


def test_a_frozen_server_and_the_reaper(
    database: DatabaseServer, table: SqlTable
) -> None:
    """The deadline of what no request waits for holds as well."""
    database.freeze()
    fails(table.clock_ms)
    fails(lambda until: table.page_live(None, "", 9, until))


def test_a_frozen_server_and_many_requests(
    database: DatabaseServer, table: SqlTable
) -> None:
    """All of them end in time, more than there are connections; nobody stays behind."""
    threads_before = threading.active_count()
    database.freeze()
    started = time.monotonic()
    job = partial(table.read, KEY, soon(PATIENCE))
    failures = run_together(*[job] * (PLACES + 5))
    assert time.monotonic() - started < PATIENCE + SLACK
    # Those that got no connection know that it may not be the server's fault.
    assert {type(failure) for failure in failures} <= {SqlUnavailable, SqlBusy}
    assert SqlUnavailable in {type(failure) for failure in failures}
    assert threading.active_count() == threads_before
    database.thaw()
    wait_until(lambda: _answers(table), 20.0, "the server to answer again")
    wait_until(lambda: not watchdog._watchdog().given_up, 20.0, "late connections")


def test_a_first_call_to_a_frozen_server(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """Connecting, and waiting for another thread to connect, end in time as well.

    That takes longer than any call, and is no sign that the server is silent.
    """
    table = tables(database)
    database.freeze()
    job = partial(table.read, KEY, soon(PATIENCE))
    started = time.monotonic()
    assert {type(one) for one in run_together(*[job] * 6)} == {SqlBusy}
    assert time.monotonic() - started < PATIENCE + SLACK
    database.thaw()
    wait_until(lambda: _answers(table), 20.0, "the server to answer")
    wait_until(lambda: not watchdog._watchdog().given_up, 20.0, "late connections")


@pytest.mark.parametrize("driver", ["postgresql+psycopg2", "mysql+pymysql"])
def test_a_black_hole(driver: str) -> None:
    """An address that swallows what is sent to it: given up in time, and bounded."""
    port = free_port()
    with socket.socket() as hole, ExitStack() as at_end:
        hole.bind(("127.0.0.1", port))
        hole.listen(0)
        for _ in range(4):
            # The queue of connections is full, so that further ones get no answer.
            filler = at_end.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        url = sa.make_url(f"{driver}://user:{PASSWORD}@127.0.0.1:{port}/x")
        table = server_table(None, url=url)
        fails(calls(table)["read"])
        while watchdog._watchdog().given_up.total() < watchdog.MOST_GIVEN_UP:
            fails(calls(table)["read"], 0.05)
        text = fails(calls(table)["read"], 30.0)
        assert "still waiting" in text
        wait_until(lambda: not watchdog._watchdog().given_up, 30.0, "its threads")


# --- connections that break ------------------------------------------------------


def test_a_restart_is_not_noticed(
    database: DatabaseServer, table: SqlTable, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that the restart closed are replaced before anything is sent."""
    run_together(*[partial(table.read, KEY, soon())] * PLACES)
    sent: list[str] = []
    sa.event.listen(
        table.engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, *_: sent.append(statement),
    )
    for version in (2, 3):
        database.restart()
        assert table.update(row(KEY, version=version), version - 1, soon())
    assert table.move(tombstone_row(KEY, version=4), row(OTHER), soon(), seen_version=3)
    assert [text.split()[0] for text in sent if "sessions" in text] == [
        *("UPDATE", "UPDATE"),
        *("UPDATE", "INSERT"),
    ]
    assert not caplog.records


def test_a_connection_that_breaks_in_a_call(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """The call is made once more, on another connection."""
    table = tables(database, sql_timeout=20.0)
    table.insert(row(KEY), soon())
    results: list[Any] = []
    update = partial(table.update, row(KEY, version=2), 1, soon())
    with locked(database, table):
        thread = threading.Thread(target=lambda: results.append(update()))
        thread.start()
        _end_waiting_connection(database, table)
    thread.join(30)
    assert results == [True]
    assert table.read(KEY, soon()) == row(KEY, version=2)


@pytest.mark.parametrize("name", ["insert", "update", "bury", "move"])
def test_an_answer_that_is_lost(
    database: DatabaseServer, table: SqlTable, name: str
) -> None:
    """The connection breaks after the work was done: the second try finds it done."""
    lost = _lose_answer(database, table, "COMMIT" if name == "move" else "")
    calls(table)[name](soon())
    assert lost == [True]
    if name in ("insert", "move"):
        assert table.read(OTHER, soon()) == row(OTHER)
    if name != "insert":
        found = table.read(KEY, soon())
        assert found is not None
        assert found.version == 2


@pytest.mark.parametrize("name", ["insert", "update", "move"])
def test_an_answer_that_is_lost_is_told_as_it_was(
    database: DatabaseServer, table: SqlTable, name: str
) -> None:
    """Who wrote the row himself is not told that somebody else was quicker."""
    _lose_answer(database, table, "COMMIT" if name == "move" else "")
    assert calls(table)[name](soon())


def test_a_second_break_in_a_call_stands(table: SqlTable) -> None:
    """One retry and no more."""
    tries = []

    def fail(connection: Any, *_: Any) -> None:
        tries.append(True)
        raise _broken(connection.dialect.name)

    table.read(KEY, soon())
    sa.event.listen(table.engine, "after_cursor_execute", fail)
    with pytest.raises(SqlUnavailable):
        table.read(KEY, soon())
    assert len(tries) == 2


def test_a_call_that_is_interrupted_leaves_no_answer_behind(table: SqlTable) -> None:
    """After an exception between question and answer the connection is not used."""
    statement: dict[str, bool] = {}

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        if not statement.setdefault("done", False):
            statement["done"] = True
            raise Interrupt

    sa.event.listen(table.engine, "before_cursor_execute", interrupt)
    with pytest.raises(Interrupt):
        table.read(KEY, soon())
    assert table.read(KEY, soon()) == row(KEY)


def test_a_child_uses_connections_of_its_own(
    database: DatabaseServer, table: SqlTable
) -> None:
    """After a fork parent and child both read and write, and hang up in time."""

    def child() -> bool:
        assert table.read(KEY, soon()) == row(KEY)
        assert table.insert(row(OTHER), soon())
        with locked(database, table):
            fails(calls(table)["update"])
        return True

    with locked(database, table):
        fails(lambda until: table.move(row(KEY), row(KEY), until, seen_version=1))
    assert in_child(child)
    assert table.read(OTHER, soon()) == row(OTHER)
    assert table.read(KEY, soon()) is not None


def test_the_first_call_in_many_threads_and_processes(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """Whoever comes second finds the table and goes on."""
    for _ in range(5):
        name = new_table_name()
        pair = [tables(database, name=name, sql_timeout=10.0) for _ in range(2)]
        jobs = [
            partial(pair[n % 2].insert, row(session_key(str(n))), soon())
            for n in range(8)
        ]
        assert run_together(*jobs) == [True] * 8
        inspector = sa.inspect(pair[0].engine)
        assert len(inspector.get_indexes(name)) == 2


# --- the application's engine ----------------------------------------------------


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ"])
@pytest.mark.parametrize("by", ["engine", "server"])
def test_the_applications_isolation_is_not_ours(
    database: DatabaseServer, tables: Callable[..., SqlTable], level: str, by: str
) -> None:
    """Eight threads change one row without an error, whatever the application's is."""
    arguments: dict[str, Any] = {}
    if by == "engine":
        arguments["isolation_level"] = level
    elif database.dialect == "postgresql":
        default = level.lower().replace(" ", "\\ ")
        option = f"-c default_transaction_isolation={default}"
        arguments["connect_args"] = {"options": option}
    else:
        statement = f"SET SESSION TRANSACTION ISOLATION LEVEL {level}"
        arguments["connect_args"] = {"init_command": statement}
    app = sa.create_engine(database.url, **arguments)
    table = tables(database, like=app, sql_timeout=10.0)
    table.insert(row(KEY), soon())

    def write() -> int:
        done = 0
        while done < 10:
            found = table.read(KEY, soon())
            assert found is not None
            after = row(KEY, version=found.version + 1)
            done += table.update(after, found.version, soon())
        return done

    assert run_together(*[write] * 8) == [10] * 8
    with app.connect() as connection:
        assert connection.get_isolation_level() == level
    app.dispose()


def test_the_applications_transaction_is_left_alone(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """What the application has not committed is neither committed nor seen."""
    app = sa.create_engine(database.url)
    cart = sa.Table(new_table_name(), sa.MetaData(), sa.Column("item", sa.String(9)))
    cart.create(app)
    table = tables(database, like=app, sql_timeout=5.0)
    with app.connect() as connection:
        connection.execute(cart.insert(), {"item": "unpaid"})
        for call in calls(table).values():
            call(soon())
        with table.engine.connect() as ours:
            assert ours.execute(sa.select(cart)).all() == []
        connection.rollback()
        assert connection.execute(sa.select(cart)).all() == []
    app.dispose()


def test_credentials_are_the_applications(
    database: DatabaseServer, tables: Callable[..., SqlTable]
) -> None:
    """A connection is made the application's way, whatever that is."""
    made = []

    def creator() -> Any:
        made.append(True)
        return database.connect_to(database.url)

    nowhere = database.url.set(username="nobody", password="nothing", host="nowhere")
    app = sa.create_engine(nowhere, creator=creator)
    table = tables(database, like=app)
    assert table.insert(row(KEY), soon())
    assert made
    app.dispose()


def test_a_wrong_password_is_not_in_the_error(database: DatabaseServer) -> None:
    """The server's own words are shown, but neither password nor address."""
    url = database.url.set(password="not-the-password")
    table = server_table(None, url=url)
    text = fails(calls(table)["read"], 30.0)
    assert "not-the-password" not in text
    assert "tests" in text


def test_other_databases_are_refused() -> None:
    """A database that the statements were not made for is named, with a way out."""
    oracle = sa.create_mock_engine("oracle+oracledb://x", lambda *_: None)
    with pytest.raises(SetupError, match="cannot be kept in oracle"):
        own_engine(oracle, 1.0, PLACES)


def test_what_the_server_is_told(database: DatabaseServer, table: SqlTable) -> None:
    """It ends what nobody waits for any more, by itself."""
    with table.engine.connect() as connection:

        def ask(name: str) -> Any:
            text = "SHOW {}" if database.dialect == "postgresql" else "SELECT @@{}"
            return connection.exec_driver_sql(text.format(name)).scalar()

        if database.dialect == "postgresql":
            assert ask("lock_timeout") == "4500ms"
            assert ask("statement_timeout") == "30s"
            assert ask("transaction_isolation") == "read committed"
        else:
            assert ask("innodb_lock_wait_timeout") == 5
            assert ask("max_statement_time") == 30
            assert "STRICT_ALL_TABLES" in ask("sql_mode")
            assert ask("tx_isolation") == "READ-COMMITTED"


def test_every_statement_uses_an_index(
    database: DatabaseServer, table: SqlTable
) -> None:
    """Neither a session's row nor the reaper's next page is searched for."""
    columns = table.table.c
    dialect = table.engine.dialect
    with database.session() as cursor:
        if dialect.name == "postgresql":
            # In a small table it would rather look at each row.
            cursor.execute("SET enable_seqscan = off")
        for condition, index in (
            (columns.session_key == KEY, "pkey"),
            (columns.user_id == "bob", "user_id"),
            (columns.expires_at.between(0, 5), "expires_at"),
        ):
            query = sa.select(columns.record).where(condition)
            literal = {"literal_binds": True}
            text = query.compile(dialect=dialect, compile_kwargs=literal)
            cursor.execute(f"EXPLAIN {text}")
            assert index in str(cursor.fetchall()).replace("PRIMARY", "pkey")


# --- greenlets -------------------------------------------------------------------

_GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, sys, time
import sqlalchemy as sa
from flask_resilient_session.sql.calls import SqlCalls
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.common.errors import SqlUnavailable
from flask_resilient_session.sql.gate import Gate
from flask_resilient_session.sql.connections import plain_engine
from flask_resilient_session.sql.table import define_table
from flask_resilient_session.sql.statements import SqlTable

url, name = sa.make_url(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "cooperative":
    import psycopg2.extensions, select
    def wait(connection):
        # As psycogreen does it.
        while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
            if state == psycopg2.extensions.POLL_READ:
                gevent.socket.wait_read(connection.fileno())
            else:
                gevent.socket.wait_write(connection.fileno())
    psycopg2.extensions.set_wait_callback(wait)
table = SqlTable(SqlCalls(
    define_table(sa.MetaData(), name, None),
    lambda: plain_engine(url, 5.0, 8),
    create_table=True, sql_timeout=5.0,
    gate=Gate(8, SystemClock()), clock=SystemClock(),
))
def read(seconds=30):
    started = time.monotonic()
    try:
        table.read("0" * 64, started + seconds)
        outcome = "read"
    except SqlUnavailable as error:
        outcome = "failed"
    return outcome, time.monotonic() - started
def crowd(size, seconds=30):
    jobs = [gevent.spawn(read, seconds) for _ in range(size)]
    gevent.joinall(jobs)
    return [job.value for job in jobs]
table.count_expired(0, time.monotonic() + 30)
print(*{outcome for outcome, _ in crowd(12)}, flush=True)
sys.stdin.readline()
results = crowd(3, 0.3)
print(*{outcome for outcome, _ in results}, max(s for _, s in results), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 20
while read()[0] != "read" and time.monotonic() < deadline:
    gevent.sleep(0.05)
print(*{outcome for outcome, _ in crowd(12)}, flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("postgresql", "as it is"),
        ("postgresql", "cooperative"),
        ("mariadb", "as it is"),
    ],
)
def test_in_a_process_of_greenlets(
    request: pytest.FixtureRequest, table_name: str, kind: str, mode: str
) -> None:
    """Deadlines hold in a process that gevent patched, with each kind of driver."""
    server: DatabaseServer = request.getfixturevalue(kind)
    command = [sys.executable, "-W", "error", "-c", _GREENLETS]
    with subprocess.Popen(
        [*command, server.uri, table_name, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "read\n"
            server.freeze()
            process.stdin.write("\n")
            process.stdin.flush()
            outcome, seconds = process.stdout.readline().split()
            server.thaw()
            assert outcome == "failed"
            # A driver that waits in C lets one greenlet wait after the other.
            assert float(seconds) < 3 * PATIENCE + SLACK
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "read\n"
        finally:
            process.kill()


@pytest.fixture
def table_name() -> str:
    """A table that no other test uses."""
    return new_table_name()


# --- how it is done --------------------------------------------------------------


def _answers(table: SqlTable) -> bool:
    try:
        table.read(KEY, soon())
    except SqlUnavailable:
        return False
    return True


def _end_waiting_connection(server: DatabaseServer, table: SqlTable) -> None:
    """Wait until a statement waits for the locked row, and end its connection."""
    name = f"UPDATE {table.table.name}%"
    if server.dialect == "postgresql":
        waiting = (
            "SELECT pid FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND query LIKE %s"
        )
        end = "SELECT pg_terminate_backend(%s)"
    else:
        waiting = "SELECT id FROM information_schema.processlist WHERE info LIKE %s"
        end = "KILL %s"
    with server.session() as cursor:

        def find() -> Any:
            cursor.execute(waiting, (name,))
            return cursor.fetchone()

        (number,) = wait_until(find, 20.0, "a statement that waits")
        cursor.execute(end, (number,))


def _lose_answer(server: DatabaseServer, table: SqlTable, of: str) -> list[bool]:
    """Break the connection once, after the next statement of this kind was done."""
    lost: list[bool] = []

    def lose(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not lost and statement.startswith(of):
            lost.append(True)
            raise _broken(server.dialect)

    sa.event.listen(table.engine, "after_cursor_execute", lose)
    return lost


def _broken(dialect: str) -> Exception:
    """What a driver raises when its connection breaks."""
    if dialect == "postgresql":
        return psycopg2.OperationalError("server closed the connection unexpectedly")
    return pymysql.OperationalError(2013, "Lost connection to server during query")
