"""One memcached process of the demo, which can be killed, frozen and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import Final

HOST: Final = "127.0.0.1"

#: Seconds for what a healthy server does at once.
_DEADLINE: Final = 10.0
_PAUSE: Final = 0.005

#: Megabytes: a demo's sessions are few.
_MEMORY: Final = "16"

#: A user's PATH often leaves out the directories for system programs.
_SYSTEM_DIRECTORIES: Final = (
    "/usr/local/bin",
    "/usr/bin",
    "/usr/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/bin",
)


class NodeError(Exception):
    """A node cannot do what was asked; the text is for the person who asked."""


def find_memcached() -> str:
    """Path of memcached.

    :raises NodeError: it is not installed.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SYSTEM_DIRECTORIES))
    found = shutil.which("memcached", path=path)
    if found is None:
        raise NodeError(
            "memcached is not installed. On Debian and Ubuntu:"
            " apt-get install memcached. Then try again."
        )
    return found


def port_is_free(port: int) -> bool:
    """Whether a server could listen on a port of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Memcached:
    """A memcached on a port of its own, which it keeps when it is started again."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    @property
    def address(self) -> str:
        """As ``RESILIENT_SESSION_NODES`` takes it."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run, whoever ended it."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    @property
    def status(self) -> str:
        """``running``, ``frozen`` or ``stopped``."""
        if self.pid is None:
            return "stopped"
        return "frozen" if self._frozen else "running"

    def start(self) -> None:
        """Start it, empty, and return when it answers."""
        if self._frozen and self.pid is not None:
            raise NodeError(f"{self.name} is frozen, not stopped. Thaw it, or kill it.")
        if self.pid is not None:
            raise NodeError(f"{self.name} is running already.")
        self._frozen = False
        self._process = subprocess.Popen(
            self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _DEADLINE
        while not self._answers():
            if self.pid is None or time.monotonic() > deadline:
                self.stop()
                raise NodeError(f"{self.name} did not start on port {self.port}.")
            time.sleep(_PAUSE)

    def kill(self) -> None:
        """End it like a power cut."""
        self._running().kill()
        self._wait()

    def freeze(self) -> None:
        """Make it hang: it accepts connections and answers nothing."""
        self._running().send_signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Let it go on, with all that it held."""
        self._running().send_signal(signal.SIGCONT)
        self._frozen = False

    def stop(self) -> None:
        """End it in whatever state it is; harmless if it has ended."""
        if self._process is not None:
            self._process.kill()
            self._wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            number = self.name.removeprefix("node")
            raise NodeError(
                f"{self.name} does not run. Start it:"
                f" .venv/bin/python -m example_app.nodes start {number}"
            )
        return self._process

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait(_DEADLINE)
        self._frozen = False

    def _command(self) -> list[str]:
        command = [find_memcached(), "-l", HOST, "-p", str(self.port)]
        command += ["-U", "0", "-m", _MEMORY]
        if os.geteuid() == 0:
            # A change of user would switch off what setpriv sets.
            command += ["-u", "root"]
        setpriv = shutil.which("setpriv")
        if setpriv is not None:
            # The kernel ends it with the demo, even where the demo is killed.
            command = [setpriv, "--pdeathsig", "KILL", *command]
        return command

    def _answers(self) -> bool:
        """Whether this very process answers, not another one at its address."""
        try:
            with socket.create_connection((HOST, self.port), _DEADLINE) as connection:
                connection.sendall(b"stats\r\n")
                with connection.makefile("rb") as reply:
                    return reply.readline() == f"STAT pid {self.pid}\r\n".encode()
        except OSError:
            return False
