"""``make demo``: three memcached nodes, an SQLite file, and the shop on top.

Everything is fresh in each run and lives in ``.demo/``. Ctrl-C or SIGTERM ends it
with all nodes.

``flask --app example_app.demo`` runs a command, such as ``reap-sessions``, on the
sessions of the demo that is running.
"""

from __future__ import annotations

import errno
import logging
import random
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import click
from flask import Flask
from werkzeug.serving import make_server

from . import create_app as create_shop
from .memcached import HOST, Memcached, NodeError, find_memcached, port_is_free
from .nodes import DIRECTORY, Control, State, give_order, read_state, write_state

_PORT: Final = 5000
_FIRST_NODE_PORT: Final = 21211
_NODES: Final = 3

#: Other ports for nodes. Below those that the kernel gives to outgoing connections,
#: or one of these may hold the port of a killed node.
_OTHER_PORTS: Final = range(15000, 32000)
#: Ports that are tried for each node.
_PORT_ATTEMPTS: Final = 3


def create_app() -> Flask:
    """The shop on the nodes and the database of the demo that is running."""
    try:
        return create_shop(read_state(DIRECTORY).config)
    except NodeError as error:
        raise click.ClickException(str(error)) from error


@click.command(help="Run the example shop on three real memcached nodes.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_PORT,
    envvar="PORT",
    show_default=True,
    show_envvar=True,
    help="Port of the web page; 0 takes a free one.",
)
def main(port: int) -> None:
    """Run until Ctrl-C or SIGTERM."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    # One line per request would hide what happens to the nodes.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        _run(port)
    except NodeError as error:
        raise click.ClickException(str(error)) from error
    except _Stopped:
        pass
    click.echo("\nThe demo and its nodes have ended.")


class _Stopped(BaseException):
    """The user has seen enough."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # Once is enough: what follows must not be interrupted.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _Stopped


def _run(port: int) -> None:
    find_memcached()
    _refuse_a_second()
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        nodes = stack.enter_context(_running_nodes())
        state = _fresh_state(stack, url, nodes)
        app = create_shop(state.config)
        control = Control(Path(state.control), nodes)
        stack.callback(control.server_close)
        control.start()
        write_state(DIRECTORY, state)
        _explain(url, nodes.values())
        server = make_server(
            HOST, listener.getsockname()[1], app, threaded=True, fd=listener.fileno()
        )
        server.serve_forever()


def _refuse_a_second() -> None:
    """Two demos in one directory would take each other's files."""
    try:
        state = read_state(DIRECTORY)
        give_order(state.control, "status")
    except NodeError:
        return
    raise NodeError(f"A demo runs here already: {state.url}")


@contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    """The socket of the web page, before anything is started for it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise NodeError(
                    f"Port {port} is in use. Name another: make demo PORT=5001"
                ) from error
            raise NodeError(f"Port {port} cannot be used: {error.strerror}.") from error
        listener.listen()
        yield listener


@contextmanager
def _running_nodes() -> Iterator[dict[str, Memcached]]:
    nodes: dict[str, Memcached] = {}
    ports = iter(_free_ports())
    try:
        for number in range(1, _NODES + 1):
            _start_node(nodes, f"node{number}", ports)
        yield nodes
    finally:
        for node in nodes.values():
            node.stop()


def _start_node(nodes: dict[str, Memcached], name: str, ports: Iterator[int]) -> None:
    # Somebody may take a port between the look at it and the start.
    for attempts_left in reversed(range(_PORT_ATTEMPTS)):
        nodes[name] = Memcached(name, next(ports))
        try:
            nodes[name].start()
        except NodeError:
            if not attempts_left:
                raise
        else:
            return


def _free_ports() -> Sequence[int]:
    preferred = range(_FIRST_NODE_PORT, _FIRST_NODE_PORT + _NODES)
    others = random.sample(_OTHER_PORTS, 200)
    free = [port for port in (*preferred, *others) if port_is_free(port)]
    if len(free) < _NODES * _PORT_ATTEMPTS:
        raise NodeError("There are not enough free ports for the nodes.")
    return free


def _fresh_state(stack: ExitStack, url: str, nodes: dict[str, Memcached]) -> State:
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir(mode=0o700)
    stack.callback((DIRECTORY / "state.json").unlink, missing_ok=True)
    return State(
        url=url,
        # Relative: a socket's path may have about a hundred bytes.
        control=str(DIRECTORY / "control"),
        secret_key=secrets.token_hex(),
        database=f"sqlite:///{DIRECTORY.absolute() / 'shop.sqlite'}",
        nodes={name: node.address for name, node in nodes.items()},
    )


def _explain(url: str, nodes: Iterable[Memcached]) -> None:
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    order = f"{python} -m example_app.nodes"
    lines = [
        "",
        f"The shop is on {url} - log in, fill the cart, then take a node away.",
        "",
        *(f"    {n.name}  {n.address}  pid {n.pid}  kill -9 {n.pid}" for n in nodes),
        "",
        "From another terminal, in this directory:",
        "",
        f"    {order} status",
        f"    {order} kill 1      # like a power cut",
        f"    {order} start 1     # empty, on the same port",
        f"    {order} freeze 2    # it hangs: takes connections, answers nothing",
        f"    {order} thaw 2      # it goes on, with what it held before",
        f"    {python.with_name('flask')} --app example_app.demo reap-sessions",
        "",
        f"The database and all settings of this run are in {DIRECTORY}/,"
        " fresh each time.",
        "Ctrl-C ends the shop and its nodes.",
        "",
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()


if __name__ == "__main__":
    main(prog_name="python -m example_app.demo")
