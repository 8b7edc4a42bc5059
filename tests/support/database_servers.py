"""Real PostgreSQL and MariaDB servers that a test may stop, kill and freeze.

Each one is a server of its own in a temporary folder, on a port that it keeps when it
is started again; what was committed is there again then. It writes to the disk when
it likes, so that tests are quick, and ends with the tests whatever becomes of them,
because the kernel kills it with the thread that started it.

Neither server starts as root: where root runs the tests, another user runs them.
PostgreSQL has a process per connection, each in a process group of its own, so that
it is killed or frozen process by process, the one that makes the others first.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import psycopg2
import pymysql
import pytest
import sqlalchemy as sa

from builders import PLACES, some_gate
from flask_resilient_session.common.clock import SystemClock
from flask_resilient_session.sql.calls import SqlCalls
from flask_resilient_session.sql.connections import own_engine, plain_engine
from flask_resilient_session.sql.statements import SqlTable
from flask_resilient_session.sql.table import define_table
from servers import (
    ServerError,
    ServerMissing,
    check_permission,
    find_program,
    free_port,
    wait_until,
)

#: Seconds for a server to start, recovery from a kill included, or to end.
DEADLINE = 30.0

USER, PASSWORD, DATABASE = "tests", "open-sesame", "tests"

_numbers = count(1)


def new_table_name() -> str:
    """A table that no other test uses."""
    return f"sessions_{next(_numbers)}"


def server_table(
    server: DatabaseServer | None,
    *,
    url: sa.URL | None = None,
    name: str | None = None,
    like: sa.Engine | None = None,
    **changes: Any,
) -> SqlTable:
    """A table on this server, or wherever ``url`` says.

    :param like: the application's engine, where there is one.
    """
    usual: dict[str, Any] = {
        "create_table": True,
        "sql_timeout": 5.0,
        "gate": some_gate(),
        "clock": SystemClock(),
    }
    settings = usual | changes
    timeout = settings["sql_timeout"]

    def new_engine() -> sa.Engine:
        if like is not None:
            return own_engine(like, timeout, PLACES)
        assert url is not None
        return plain_engine(url, timeout, PLACES)

    if server is not None:
        url = server.url

    table = define_table(sa.MetaData(), name or new_table_name(), None)
    return SqlTable(SqlCalls(table, new_engine, **settings))


class DatabaseServer(ABC):
    """One database server in a folder and on a port of its own."""

    #: SQLAlchemy's names.
    dialect: ClassVar[str]
    driver: ClassVar[str]

    _first_database: ClassVar[str] = DATABASE

    #: Arguments of the driver that make connecting cheaper.
    _quicker: ClassVar[dict[str, str]] = {}

    #: The driver's arguments for deadlines: pytest's cannot end a wait in C.
    _deadlines: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self.check_installed()
        self._user = _unprivileged_user()
        self.folder = Path(tempfile.mkdtemp(prefix=f"frs-{self.dialect}-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[int] = []
        try:
            self._own(self.folder)
            self._create_cluster()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        _started.add(self)

    def __repr__(self) -> str:
        state = "frozen" if self._frozen else "alive" if self.alive else "dead"
        return f"<{type(self).__name__} {self.port} {state}>"

    # What it is

    @property
    def url(self) -> sa.URL:
        """Where an application finds it."""
        return sa.URL.create(
            f"{self.dialect}+{self.driver}",
            USER,
            PASSWORD,
            "127.0.0.1",
            self.port,
            DATABASE,
        )

    @property
    def uri(self) -> str:
        """The same as text, for ``SQLALCHEMY_DATABASE_URI``."""
        return self.url.render_as_string(hide_password=False)

    @property
    def quick_url(self) -> sa.URL:
        """The same for who connects often."""
        return self.url.update_query_dict(self._quicker)

    @cached_property
    def engine(self) -> sa.Engine:
        """Connections of the tests' own, on which each statement commits.

        They outlive a restart of the server: one that broke is replaced.
        """
        return sa.create_engine(
            self.quick_url,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            connect_args=self._deadlines,
        )

    @property
    def alive(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @classmethod
    @abstractmethod
    def check_installed(cls) -> None:
        """Find its programs.

        :raises ServerMissing: they are not there.
        """

    @abstractmethod
    def connect_to(self, url: sa.URL) -> Any:
        """A connection of the driver's, not of the package under test."""

    def connect(self) -> Any:
        """A connection to the database that was there first."""
        return self.connect_to(self.url.set(database=self._first_database))

    @abstractmethod
    def _create_cluster(self) -> None: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    # What a test does to it

    def start(self) -> None:
        """Start it and return when it answers."""
        check_permission(self)
        if self.alive:
            raise ServerError(f"{self!r} is running already")
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._unprivileged(self._command(), die_with_us=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            wait_until(self._is_up, DEADLINE, f"{self!r} to answer")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut it down in good order: its clients are told."""
        process = self._running()
        self.thaw()
        process.send_signal(self._polite_signal)
        process.wait(DEADLINE)

    def kill(self) -> None:
        """Kill it like the power switch; on return connecting is refused."""
        self._signal(signal.SIGSTOP)
        killed = self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(DEADLINE)
        # One that still ends keeps the shared memory, and no other can be started.
        for process in killed:
            wait_until(lambda p=process: _state(p) in "ZX", DEADLINE, "the last one")
        self._frozen.clear()

    def freeze(self) -> None:
        """Stop every process of it: connections stay open, nothing is answered."""
        self._frozen = self._signal(signal.SIGSTOP)
        for process in self._frozen:
            wait_until(lambda p=process: _state(p) in "TtZX", DEADLINE, "the freeze")

    def thaw(self) -> None:
        """Let a frozen server go on."""
        for process in reversed(self._frozen):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        self._frozen.clear()

    def restart(self) -> None:
        """Kill it if it is there, and start it with what was committed."""
        if self.alive:
            self.kill()
        self.start()

    def heal(self) -> None:
        """Whatever a test did to it: on return it answers."""
        self.thaw()
        if not self.alive:
            self.start()

    def close(self) -> None:
        """End it and remove its folder."""
        self.engine.dispose()
        if self.alive:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """A cursor of a connection that commits each statement."""
        connection = self.connect_to(self.url)
        try:
            if isinstance(connection, pymysql.Connection):
                connection.autocommit(True)
            else:
                connection.autocommit = True
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    # How it is done

    _polite_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"{self!r} is not running{self._last_words()}")
        return self._process

    def _is_up(self) -> bool:
        self._running()
        try:
            self.connect().close()
        except (psycopg2.OperationalError, pymysql.OperationalError):
            return False
        return True

    def _last_words(self) -> str:
        log = self.folder / "server.log"
        words = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        return f"; it said: {words}" if words else ""

    def _signal(self, number: signal.Signals) -> list[int]:
        """Send a signal to the server and then to its children."""
        first = self._running().pid
        reached = []
        for process in (first, *_children(first)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
                reached.append(process)
        return reached

    def _run(self, command: list[str]) -> None:
        """Run a program to its end."""
        done = subprocess.run(
            self._unprivileged(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=self.folder,
            timeout=4 * DEADLINE,
            check=False,
        )
        if done.returncode:
            words = (done.stdout + done.stderr).decode(errors="replace")
            raise ServerError(f"{command[0]} failed: {words}")

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _unprivileged(
        self, command: list[str], *, die_with_us: bool = False
    ) -> list[str]:
        before = []
        if self._user is not None:
            before += ["--reuid", str(self._user.pw_uid), "--clear-groups"]
            before += ["--regid", str(self._user.pw_gid)]
        if die_with_us and threading.current_thread() is threading.main_thread():
            # Set after the change of user, which would switch it off.
            before += ["--pdeathsig", "KILL"]
        return [find_program("setpriv"), *before, *command] if before else command


class PostgreSQL(DatabaseServer):
    """One PostgreSQL."""

    dialect, driver = "postgresql", "psycopg2"
    _first_database = "postgres"
    _deadlines: ClassVar[dict[str, Any]] = {
        "connect_timeout": int(DEADLINE),
        "options": f"-c statement_timeout={int(DEADLINE)}s",
    }
    # A fast shutdown, which ends connections instead of waiting for them.
    _polite_signal = signal.SIGINT

    @classmethod
    def check_installed(cls) -> None:
        """See :class:`DatabaseServer`."""
        _postgresql_program("initdb")
        _postgresql_program("postgres")

    def connect_to(self, url: sa.URL) -> Any:
        """See :class:`DatabaseServer`."""
        return psycopg2.connect(
            host=url.host,
            port=url.port,
            user=url.username,
            password=url.password,
            dbname=url.database,
            connect_timeout=5,
        )

    def _create_cluster(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        self._own(password)
        initdb = [_postgresql_program("initdb"), "--pgdata", str(self.folder / "data")]
        initdb += ["--username", USER, "--auth", "scram-sha-256"]
        initdb += ["--pwfile", str(password), "--no-sync"]
        self._run([*initdb, "--encoding", "UTF8", "--locale", "C"])
        self.start()
        connection = self.connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {DATABASE}")
        connection.close()

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": 60,
            # Deadlocks are looked for sooner than after a second.
            "deadlock_timeout": "100ms",
            "max_worker_processes": 0,
            "autovacuum": "off",
        }
        command = [_postgresql_program("postgres"), "-D", str(self.folder / "data")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command


class MariaDB(DatabaseServer):
    """One MariaDB."""

    dialect, driver = "mysql", "pymysql"
    # Otherwise each connection reads all certificates of the system, for 20 ms.
    _quicker: ClassVar[dict[str, str]] = {"ssl_disabled": "true"}
    _deadlines: ClassVar[dict[str, Any]] = {"read_timeout": DEADLINE}

    @classmethod
    def check_installed(cls) -> None:
        """See :class:`DatabaseServer`."""
        find_program("mariadbd")
        find_program("mariadb-install-db")

    def connect_to(self, url: sa.URL) -> Any:
        """See :class:`DatabaseServer`."""
        return pymysql.connect(
            host=url.host,
            port=url.port or 0,
            user=url.username,
            password=str(url.password),
            database=url.database,
            connect_timeout=5,
            read_timeout=DEADLINE,
        )

    def _create_cluster(self) -> None:
        install = [find_program("mariadb-install-db"), "--no-defaults"]
        install += [f"--datadir={self.folder / 'data'}", "--skip-test-db"]
        # In a shared one, servers that are made at the same time take each other's.
        install += [f"--tmpdir={self.folder}"]
        self._run([*install, "--auth-root-authentication-method=normal"])
        begin = self.folder / "begin.sql"
        begin.write_text(
            f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n"
            f"CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL ON *.* TO {USER}@'%';\n"
        )
        self._own(begin)
        self.start()

    def _command(self) -> list[str]:
        return [
            find_program("mariadbd"),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--tmpdir={self.folder}",
            f"--init-file={self.folder / 'begin.sql'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-doublewrite=OFF",
            # Making a table waits for the disk otherwise.
            "--innodb-flush-method=nosync",
            "--debug-no-sync",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
        ]


def only_session(factory: Callable[[], DatabaseServer]) -> Iterator[DatabaseServer]:
    """A server for all tests; without its programs they fail, never skip."""
    try:
        server = factory()
    except ServerMissing as exc:
        pytest.fail(str(exc), pytrace=False)
    try:
        yield server
    finally:
        server.close()


def _postgresql_program(name: str) -> str:
    """A program of the newest PostgreSQL; Debian keeps them out of the PATH."""
    found = glob.glob(f"/usr/lib/postgresql/*/bin/{name}")
    if found:
        return max(found, key=lambda path: int(Path(path).parts[4]))
    try:
        return find_program(name)
    except ServerMissing:
        raise ServerMissing(
            "PostgreSQL is not installed; run make test or apt-get install postgresql"
        ) from None


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Who runs the servers where root runs the tests."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _children(parent: int) -> list[int]:
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(stat).read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(Path(stat).parent.name))
    return found


def _state(process: int) -> str:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "X"
    return text.rpartition(")")[2].split()[0]


_started: WeakSet[DatabaseServer] = WeakSet()
_owner = os.getpid()


@atexit.register
def _close_all() -> None:
    # A forked child inherits this list, but not the servers.
    if os.getpid() == _owner:
        for server in list(_started):
            server.close()
