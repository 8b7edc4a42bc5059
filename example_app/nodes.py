"""``python -m example_app.nodes``: what a person does to the demo's nodes.

::

    python -m example_app.nodes status
    python -m example_app.nodes kill 1
    python -m example_app.nodes start 1
    python -m example_app.nodes freeze 2
    python -m example_app.nodes thaw 2

The demo itself carries it out, so that a node that was started again ends with it
like the others. Where to find the running demo is in the file ``.demo/state.json``.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Final

import click

from .memcached import Memcached, NodeError

#: Below the directory that the demo is started in, as the Makefile has it.
DIRECTORY: Final = Path(".demo")

_SECONDS: Final = 15.0
_LONGEST_REPLY: Final = 64 * 1024
_OK: Final = "ok "


@dataclass(frozen=True)
class State:
    """What other processes have to know of the running demo.

    :ivar control: path of the socket on which it takes orders, from the directory that
        the demo was started in.
    :ivar nodes: name -> address.
    """

    url: str
    control: str
    secret_key: str
    database: str
    nodes: Mapping[str, str]

    @property
    def config(self) -> dict[str, object]:
        """The configuration of the demo's application."""
        return {
            "DEMO": True,
            "SECRET_KEY": self.secret_key,
            "SQLALCHEMY_DATABASE_URI": self.database,
            "RESILIENT_SESSION_NODES": [
                {"name": name, "address": address}
                for name, address in self.nodes.items()
            ],
        }


def write_state(directory: Path, state: State) -> None:
    """Leave word for other processes of this user; it holds a secret key."""
    path = directory / "state.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(directory: Path) -> State:
    """What the running demo has left.

    :raises NodeError: none was started here.
    """
    try:
        return State(**json.loads((directory / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise NodeError(
            f"No demo runs here ({directory / 'state.json'}: {error})."
            " Start one in another terminal: make demo"
        ) from error


class Control(socketserver.UnixStreamServer):
    """Takes orders on a socket and carries them out, one at a time.

    :param path: of the socket.
    :param nodes: by name.
    """

    def __init__(self, path: Path, nodes: Mapping[str, Memcached]) -> None:
        self.nodes = nodes
        super().__init__(str(path), _Order)

    def start(self) -> None:
        """Serve from a thread that lives as long as this process.

        The kernel ends a node together with the thread that started it.
        """
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def carry_out(self, action: str, name: str) -> str:
        """Do it.

        :returns: the answer for the person who asked.
        :raises NodeError: it cannot be done.
        """
        if action == "status":
            return "\n".join(_line(node) for node in self.nodes.values())
        node = self.nodes.get(name)
        if node is None:
            numbers = ", ".join(n.removeprefix("node") for n in self.nodes)
            raise NodeError(f"There is no {name}; the nodes are {numbers}.")
        actions = {
            "kill": node.kill,
            "start": node.start,
            "freeze": node.freeze,
            "thaw": node.thaw,
        }
        actions[action]()
        return _line(node)


class _Order(socketserver.StreamRequestHandler):
    """One line in, one answer out."""

    server: Control

    def handle(self) -> None:
        action, _, name = self.rfile.readline(256).decode().strip().partition(" ")
        try:
            answer = _OK + self.server.carry_out(action, name)
        except NodeError as error:
            answer = str(error)
        except KeyError:
            answer = f"There is no action {action}."
        self.wfile.write(answer.encode())


def _line(node: Memcached) -> str:
    pid = "" if node.pid is None else f"  pid {node.pid}"
    return f"{node.name}  {node.address}  {node.status}{pid}"


def give_order(control: str, action: str, name: str = "") -> str:
    """Ask the running demo to do something.

    :returns: its answer.
    :raises NodeError: it does not run, or could not do it.
    """
    try:
        with socket(AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(control)
            connection.sendall(f"{action} {name}\n".encode())
            with connection.makefile("rb") as reader:
                reply = reader.read(_LONGEST_REPLY).decode()
    except OSError as error:
        raise NodeError(
            "The demo does not run any more. Start it in another terminal: make demo"
        ) from error
    if not reply.startswith(_OK):
        raise NodeError(reply)
    return reply.removeprefix(_OK)


@click.command(
    help="Kill, start, freeze or thaw a node of the running demo, or show all nodes."
)
@click.argument(
    "action", type=click.Choice(["status", "kill", "start", "freeze", "thaw"])
)
@click.argument("node", default="")
def main(action: str, node: str) -> None:
    """Carry out one order from the command line."""
    if action != "status" and not node:
        raise click.UsageError(f"Which node? For example: {action} 1")
    try:
        state = read_state(DIRECTORY)
        click.echo(
            give_order(state.control, action, f"node{node.removeprefix('node')}")
        )
    except NodeError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m example_app.nodes")
