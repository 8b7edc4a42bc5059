"""Servers that do what memcached never does, and callers that come in crowds."""

from __future__ import annotations

import os
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def run_together(*jobs: Any) -> list[Any]:
    """Run callables in threads at once; what each returned, or its exception."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        start.wait(10)
        try:
            results[index] = jobs[index]()
        except Exception as error:  # noqa: BLE001 - handed to the caller
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def in_child(work: Callable[[], bool]) -> bool:
    """Whether the work came out true in a forked child."""
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, which a test's servers have.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            passed = work()
        except BaseException:  # noqa: BLE001 - nothing may leave the child
            traceback.print_exc()
            passed = False
        os._exit(0 if passed else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class FakeServer:
    """Something that listens, and does to each connection what a test says.

    :param serve: called in a thread with the server and each connection.
    """

    def __init__(self, serve: Callable[[FakeServer, socket.socket], None]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.closing = threading.Event()
        self._serve = serve
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """As python-memcached takes it."""
        return f"inet:127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        # Closing alone does not end an accept that waits in another thread.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError):
            self._serve(self, connection)

    def request(self, connection: socket.socket) -> bytes:
        """The next bytes that came; empty when the client has gone."""
        data = connection.recv(65536)
        if data:
            self.requests.append(data)
        return data


def answering(*replies: bytes) -> Callable[[FakeServer, socket.socket], None]:
    """Answers one request after the other with these bytes, then says nothing."""

    def serve(server: FakeServer, connection: socket.socket) -> None:
        for reply in replies:
            if not server.request(connection):
                return
            connection.sendall(reply)
        while server.request(connection):
            pass

    return serve


def hang(server: FakeServer, connection: socket.socket) -> None:
    """Takes requests and answers none."""
    while server.request(connection):
        pass


@contextmanager
def black_hole() -> Iterator[str]:
    """An address where nobody answers, not even to a wish to connect."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    # The queue of waiting connections is filled, so that the next one is ignored.
    waiting = [socket.socket() for _ in range(3)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
    try:
        yield f"inet:127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in (*waiting, listener):
            one.close()
