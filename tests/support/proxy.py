"""A wire to one node that a test cuts, in one of several ways."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Final

from servers import Memcached, free_port

#: Seconds for everything that is waited for here.
PATIENCE: Final = 20.0


class Proxy:
    """A wire to one node that can be cut in several ways.

    ``refuse``  closes everything; connecting is refused.
    ``hold``    keeps what is sent to the node, until ``release`` or ``drop``.
    ``drip``    hands on the node's answers a byte at a time.
    ``reset``   resets a connection as soon as something is sent on it.
    ``mend``    ends all of these; what is held goes nowhere.
    """

    def __init__(self, server: Memcached) -> None:
        self._server = server
        self._port = free_port()
        self._mode = "pass"
        self._lock = threading.Lock()
        self._wires: list[_Wire] = []
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._listen()

    @property
    def address(self) -> str:
        """Where a worker connects to."""
        return f"127.0.0.1:{self._port}"

    @property
    def mode(self) -> str:
        """How it is cut at the moment; ``pass`` where it is not."""
        return self._mode

    def refuse(self) -> None:
        """Refuse connections and reset those that exist."""
        self._mode = "refuse"
        self._deafen()
        self._cut()

    def hold(self) -> None:
        """Keep from now on what is sent to the node."""
        self._mode = "hold"

    def drip(self) -> None:
        """Hand on answers from now on so slowly that none is ever complete."""
        self._mode = "drip"

    def reset(self) -> None:
        """Reset each connection that is used from now on."""
        self._mode = "reset"

    def holds(self, key: str) -> bool:
        """Whether something about this memcached key is held."""
        return any(wire.holds(key.encode()) for wire in self._all())

    def release(self) -> int:
        """Deliver what was held, also of connections that were given up since.

        :returns: how many bytes the node got late.
        """
        self._mode = "pass"
        return sum(wire.deliver() for wire in self._all())

    def mend(self) -> None:
        """Be a wire again; what was held is lost."""
        self._mode = "pass"
        self._cut()
        if self._listener is None:
            self._listen()

    def close(self) -> None:
        """Close everything."""
        self._mode = "refuse"
        self._deafen()
        self._cut()

    # --- how it is done ----------------------------------------------------------

    def _all(self) -> list[_Wire]:
        with self._lock:
            return list(self._wires)

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), daemon=True
        )
        self._acceptor.start()

    def _deafen(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None and self._acceptor is not None:
            # Closing alone would not wake the thread that waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(PATIENCE)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                address = (self._server.host, self._server.port)
                upstream = socket.create_connection(address, PATIENCE)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._wires.append(_Wire(self, client, upstream))

    def _cut(self) -> None:
        with self._lock:
            wires, self._wires = self._wires, []
        for wire in wires:
            wire.close()


class _Wire:
    """One connection through a :class:`Proxy`."""

    def __init__(
        self, proxy: Proxy, client: socket.socket, upstream: socket.socket
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._upstream = upstream
        self._held = b""
        self._lock = threading.Lock()
        for end in (client, upstream):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pumps = [
            threading.Thread(target=pump, daemon=True)
            for pump in (self._requests, self._replies)
        ]
        for pump in self._pumps:
            pump.start()

    def holds(self, key: bytes) -> bool:
        with self._lock:
            return key in self._held

    def deliver(self) -> int:
        with self._lock:
            held, self._held = self._held, b""
            if held:
                self._upstream.sendall(held)
        return len(held)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._upstream.shutdown(socket.SHUT_RDWR)
        _reset(self._client, close=False)
        for pump in self._pumps:
            pump.join(PATIENCE)
        self._client.close()
        self._upstream.close()

    def _requests(self) -> None:
        while data := _received(self._client):
            with self._lock:
                if self._proxy.mode == "hold":
                    self._held += data
                    continue
                if self._proxy.mode == "reset":
                    _reset(self._client, close=False)
                    return
                try:
                    self._upstream.sendall(data)
                except OSError:
                    return
        with self._lock:
            if not self._held:
                with contextlib.suppress(OSError):
                    self._upstream.shutdown(socket.SHUT_WR)

    def _replies(self) -> None:
        while data := _received(self._upstream):
            dripping = self._proxy.mode == "drip"
            # The last byte of an answer that drips comes never.
            pieces = [data[i : i + 1] for i in range(len(data) - 1)]
            try:
                for piece in pieces if dripping else [data]:
                    self._client.sendall(piece)
                    if dripping:
                        time.sleep(0.02)
            except OSError:
                return
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(65536)
    except OSError:
        return b""


def _reset(end: socket.socket, *, close: bool = True) -> None:
    with contextlib.suppress(OSError):
        # A linger of no time at all makes a close a reset.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    if close:
        end.close()
