"""Real memcached processes that a test may kill, freeze and look into.

A :class:`Memcached` is one process on a port of its own, which it keeps when it
is restarted. What a test asks about its contents goes over a short raw
connection, never through the package under test.

Two things are less obvious than they look:

-   **Ports** come from below the range from which the kernel gives ports to
    outgoing connections. Inside it a client that keeps trying the port of a
    killed server ends up connected to itself, and keeps the port. No port is given
    twice, nor by two of the processes that share the tests: while its server is
    down, nobody else comes to listen on it.
-   **Nothing is left behind.** The kernel kills a server when the thread that
    started it dies. Only the main thread lives as long as the tests do, so a
    server started from another thread is stopped at exit and by nothing else.
    memcached keeps root's identity when root runs the tests, because a change
    of user switches this off.
"""

from __future__ import annotations

import atexit
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar
from urllib.parse import unquote
from weakref import WeakSet

T = TypeVar("T")

#: Seconds for anything that a healthy server does at once.
DEADLINE = 10.0
#: Seconds for one inspection; less, so that asking a frozen server soon fails.
INSPECTION_TIMEOUT = 2.0
#: Seconds between two looks at what is awaited.
PAUSE = 0.002
#: Other ports that are tried when the one found is taken in the meantime.
PORT_ATTEMPTS = 20

#: Whether the test at hand may start servers; see :mod:`grouping`.
permitted = True

_SYSTEM_DIRECTORIES = ("/usr/local/bin", "/usr/bin", "/usr/sbin", "/usr/local/sbin")
_MISSING = "memcached is not installed; run make test or apt-get install memcached"


class ServerError(AssertionError):
    """A server did not do what the test needs of it."""


class ServerMissing(ServerError):
    """The program is not installed."""


class _AddressInUse(ServerError):
    """Somebody else listens on the port."""


def wait_until(
    predicate: Callable[[], T | None], timeout: float = 5.0, what: str = "the condition"
) -> T:
    """Call ``predicate`` until its answer is true, and return that answer.

    :param timeout: seconds after which waiting fails.
    :param what: what is awaited, for the text of the :exc:`AssertionError`.
    """
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"still waiting for {what} after {timeout:g} s")
        time.sleep(PAUSE)
    return answer


def find_program(name: str) -> str:
    """Path of a program, also where the user's PATH leaves out its directory."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SYSTEM_DIRECTORIES))
    found = shutil.which(name, path=path)
    if found is None:
        raise ServerMissing(_MISSING if name == "memcached" else f"no program {name}")
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, and that no outgoing connection is given."""
    # The processes of pytest-xdist are called gw0, gw1 and so on.
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for _ in range(PORT_ATTEMPTS):
        # Those below are the demo's, which are always the same.
        port = random.randrange(22000 + process, _first_outgoing_port(), processes)
        if port not in _taken and _can_listen(host, port):
            _taken.add(port)
            return port
    raise ServerError(f"no free port on {host}")


def check_permission(server: object) -> None:
    """Fail where the test at hand does not say that it starts servers."""
    if not permitted:
        raise ServerError(
            f"a test without the marker 'servers' starts {server!r}: mark it"
        )


class Memcached:
    """One memcached process, on a port that it keeps over restarts.

    As a context manager it is started and, at the end, stopped.

    :param host: address to listen on; ``127.0.0.2`` and ``::1`` work as well.
    :param port: port to listen on; by default a free one is found.
    :param memory_megabytes: memory for items, at least 2.
    :param extra: more arguments, such as ``["-M"]`` to refuse instead of evict.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        *,
        memory_megabytes: int = 64,
        extra: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.memory_megabytes = memory_megabytes
        self.extra = tuple(extra)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._frozen = False

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "alive" if self.alive else "dead"
        return f"<Memcached {self.host}:{self._port} {state}>"

    def __enter__(self) -> Memcached:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # What it is

    @property
    def port(self) -> int:
        """The port; known once the server was started, or where one was given."""
        if self._port is None:
            raise ServerError("this memcached was never started: it has no port yet")
        return self._port

    @property
    def address(self) -> str:
        """``host:port``, as ``RESILIENT_SESSION_NODES`` takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._running().pid

    @property
    def alive(self) -> bool:
        """Whether the process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def frozen(self) -> bool:
        """Whether the process exists and is stopped by :meth:`freeze`."""
        return self._frozen and self.alive

    # What a test does to it

    def start(self) -> Memcached:
        """Start it, empty, and return when it answers."""
        check_permission(self)
        if self.alive:
            raise ServerError(f"{self!r} is running already")
        port_is_given = self._port is not None
        for _ in range(PORT_ATTEMPTS):
            if not port_is_given:
                self._port = free_port(self.host)
            try:
                self._start_once()
            except _AddressInUse:
                if port_is_given:
                    time.sleep(PAUSE)
                continue
            return self
        raise ServerError(f"memcached found port {self._port} in use, again and again")

    def kill(self) -> None:
        """Kill it like the power switch; on return connecting is refused."""
        self._running().kill()
        self._bury()
        wait_until(self._refuses, DEADLINE, f"port {self.port} to refuse connections")

    def freeze(self) -> None:
        """Stop the process: it still accepts connections but answers nothing."""
        process = self._running()
        if self._frozen:
            return
        process.send_signal(signal.SIGSTOP)
        # The kernel reports it when every thread of the process has stopped.
        options = os.WSTOPPED | os.WNOHANG
        wait_until(
            lambda: os.waitid(os.P_PID, process.pid, options),
            DEADLINE,
            f"{self!r} to stop",
        )
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen process go on; on return it answers."""
        if not self.frozen:
            return
        self._running().send_signal(signal.SIGCONT)
        self._frozen = False
        wait_until(self.answers, DEADLINE, f"{self!r} to answer")

    def restart(self) -> None:
        """End it if it is there, frozen or not; start it empty on the same port."""
        if self.alive:
            self.kill()
        self.start()

    def stop(self) -> None:
        """End it, whatever its state, and wait for it; harmless if it has ended."""
        if self._process is not None:
            self._process.kill()
            self._bury()

    # What is in it

    def answers(self) -> bool:
        """Whether this very process answers, not another one at its address."""
        try:
            return self.stats()["pid"] == str(self.pid)
        except (OSError, ServerError, KeyError):
            return False

    def raw_get(self, key: str) -> bytes | None:
        """The bytes stored under ``key``, or None."""
        with self._conversation() as wire:
            wire.write(f"get {key}\r\n".encode())
            head = _line(wire)
            if head == b"END":
                return None
            size = int(_expect(head, b"VALUE ").split()[3])
            data = wire.read(size)
            _expect(_line(wire), b"")
            _expect(_line(wire), b"END")
            return data

    def raw_set(self, key: str, data: bytes, flags: int = 0, exptime: int = 0) -> None:
        """Store ``data`` under ``key``, whatever was there."""
        _expect(self._store("set", key, data, flags, exptime), b"STORED")

    def raw_add(self, key: str, data: bytes, flags: int = 0, exptime: int = 0) -> bool:
        """Store ``data`` if there is nothing under ``key``; whether it was."""
        return self._store("add", key, data, flags, exptime) == b"STORED"

    def raw_delete(self, key: str) -> bool:
        """Delete ``key``; whether it was there."""
        return self._ask(f"delete {key}") == b"DELETED"

    def raw_ttl(self, key: str) -> int | None:
        """Seconds that ``key`` has left, -1 for ever, None where it is missing."""
        reply = self._ask(f"mg {key} t")
        return None if reply == b"EN" else int(_expect(reply, b"HD t")[4:])

    def evict(self, key: str) -> None:
        """Take away ``key``, which has to be there, as memory pressure would."""
        if not self.raw_delete(key):
            raise ServerError(f"{self!r} holds no {key} that could be evicted")

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return wait_until(self._crawl, DEADLINE, f"the crawler of {self!r}")[0]

    def stats(self) -> dict[str, str]:
        """The answer to ``stats``."""
        with self._conversation() as wire:
            wire.write(b"stats\r\n")
            found = {}
            while (line := _line(wire)) != b"END":
                _, name, value = _expect(line, b"STAT ").decode().split(" ", 2)
                found[name] = value
            return found

    def command_counts(self) -> dict[str, int]:
        """Its counters of commands (``cmd_get``, ``cas_hits``, …).

        The inspections here are counted too: compare two calls.
        """
        endings = ("_hits", "_misses", "_badval", "_expired", "_flushed")
        return {
            name: int(value)
            for name, value in self.stats().items()
            if name.startswith("cmd_") or name.endswith(endings)
        }

    def flush(self) -> None:
        """Empty it, and set its counters to zero."""
        _expect(self._ask("flush_all"), b"OK")
        _expect(self._ask("stats reset"), b"RESET")

    # How it is done

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"{self!r} is not running{self._last_words()}")
        return self._process

    def _start_once(self) -> None:
        self._bury()
        command = self._command()
        # It is read when the process has ended, and closed with it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        _started.add(self)
        try:
            wait_until(self._is_up, DEADLINE, f"{self!r} to answer")
        except BaseException:
            self.stop()
            raise

    def _command(self) -> list[str]:
        command = [find_program("memcached"), "-l", self.host, "-p", str(self.port)]
        command += ["-U", "0", "-m", str(self.memory_megabytes), *self.extra]
        if os.geteuid() == 0:
            command += ["-u", "root"]
        setpriv = shutil.which("setpriv")
        if setpriv and threading.current_thread() is threading.main_thread():
            command = [setpriv, "--pdeathsig", "KILL", *command]
        return command

    def _is_up(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return self.answers()
        words = self._last_words()
        if os.strerror(errno.EADDRINUSE) in words:
            raise _AddressInUse(words)
        raise ServerError(f"memcached ended with status {code}{words}")

    def _last_words(self) -> str:
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip()
        return f"; it said: {words}" if words else ""

    def _bury(self) -> None:
        """Wait for the process, which has ended or is about to."""
        if self._process is not None:
            self._process.wait(DEADLINE)
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._stderr = None
        self._frozen = False

    def _refuses(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), PAUSE).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def _store(self, verb: str, key: str, data: bytes, flags: int, ttl: int) -> bytes:
        head = f"{verb} {key} {flags} {ttl} {len(data)}"
        return self._ask(head, data + b"\r\n")

    def _ask(self, line: str, body: bytes = b"") -> bytes:
        with self._conversation() as wire:
            wire.write(line.encode() + b"\r\n" + body)
            return _line(wire)

    def _crawl(self) -> tuple[list[str]] | None:
        """The keys in a tuple, so that none is an answer too; None when busy."""
        with self._conversation() as wire:
            wire.write(b"lru_crawler metadump all\r\n")
            found = []
            while (line := _line(wire)) != b"END":
                if line.startswith((b"BUSY", b"ERROR locked")):
                    return None
                key = _expect(line, b"key=").split()[0].removeprefix(b"key=")
                found.append(unquote(key.decode()))
            return (sorted(found),)

    @contextmanager
    def _conversation(self) -> Iterator[_Wire]:
        address = (self.host, self.port)
        with socket.create_connection(address, INSPECTION_TIMEOUT) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as replies:
                yield _Wire(connection, replies)


class MemcachedPool:
    """Servers that are lent to one test after another.

    Starting a process for each test is slow, so one that a test leaves healthy
    is emptied and lent again; one that it killed is started again.
    """

    def __init__(self) -> None:
        self._free: list[Memcached] = []

    @contextmanager
    def lend(self, count: int) -> Iterator[list[Memcached]]:
        """Lend ``count`` servers that are running and empty."""
        lent = [self._free.pop() if self._free else Memcached() for _ in range(count)]
        try:
            for server in lent:
                self._clean(server)
            yield lent
        finally:
            for server in lent:
                # Nothing of the test that is over may wait for a frozen server.
                server.thaw()
            self._free.extend(reversed(lent))

    def close(self) -> None:
        """Stop every server that is not lent."""
        while self._free:
            self._free.pop().stop()

    def _clean(self, server: Memcached) -> None:
        server.thaw()
        if server.answers():
            server.flush()
        else:
            server.restart()


class _Wire:
    """One connection: what is written to it, and the replies."""

    def __init__(self, connection: socket.socket, replies: IO[bytes]) -> None:
        self.write = connection.sendall
        self.read = replies.read
        self.readline = replies.readline


def _line(wire: _Wire) -> bytes:
    line = wire.readline()
    if not line.endswith(b"\n"):
        raise ServerError(f"memcached closed the connection after {line!r}")
    return line.rstrip(b"\r\n")


def _expect(line: bytes, start: bytes) -> bytes:
    if not line.startswith(start):
        raise ServerError(f"memcached answered {line!r} instead of {start!r}")
    return line


def _first_outgoing_port() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        first = int(text.split()[0])
    except OSError:
        first = 32768
    # Where the range begins very low there is nothing below it to choose from.
    return first if first > 16000 else 32768


def _can_listen(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            return False
    return True


#: Those that were given, and those that the demo likes best.
_taken: set[int] = {21211, 21212, 21213}
_started: WeakSet[Memcached] = WeakSet()
_owner = os.getpid()


@atexit.register
def _stop_all() -> None:
    # A forked child inherits this list, but not the servers.
    if os.getpid() == _owner:
        for server in list(_started):
            server.stop()
