"""Questions to workers, over connections that are kept."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from typing import Any, Final

from werkzeug.http import parse_cookie

from served_app import SECONDS_HEADER, SILENT_HEADER

#: Seconds for one answer; a worker waits for a part of that.
ANSWER: Final = 20.0


class Wire:
    """A kept-alive connection to each worker.

    :ivar seconds: what the last answer took in the worker.
    :ivar silent: nodes that did not answer the worker meanwhile.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self.seconds = 0.0
        self.silent: frozenset[str] = frozenset()
        self._connections: dict[int, http.client.HTTPConnection] = {}

    def ask(
        self, worker: int, method: str, path: str, cookie: str | None
    ) -> tuple[int, Any, str | None]:
        """Status, page and new cookie; status 0: no answer."""
        connection = self._connections.get(worker)
        if connection is None:
            port = self._ports[worker]
            connection = http.client.HTTPConnection("127.0.0.1", port, ANSWER)
            self._connections[worker] = connection
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        self.seconds, self.silent = 0.0, frozenset()
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return 0, None, cookie
        self.seconds = float(response.headers.get(SECONDS_HEADER, 0))
        self.silent = frozenset(response.headers.get(SILENT_HEADER, "").split())
        for header in response.headers.get_all("Set-Cookie") or ():
            cookie = parse_cookie(header).get("session") or None
        page = json.loads(body) if response.status == 200 else None
        return response.status, page, cookie

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
