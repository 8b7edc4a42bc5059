"""The example application and its demo, on real nodes that come and go."""

from __future__ import annotations

import http.cookiejar
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask
from werkzeug.test import TestResponse

from example_app import create_app
from example_app import demo as demo_module
from example_app.memcached import NodeError, find_memcached
from example_app.models import db
from example_app.nodes import main as nodes_command
from servers import Memcached, wait_until

# The demo starts its own, and each demo likes the same ports best.
pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("demo")]

REPOSITORY = Path(__file__).parents[2]
TOKEN = re.compile(r'name="csrf_token" value="([^"]+)"')
TITLE = re.compile(r'class="origin \w+">.*?<h1>([^<]+)</h1>', re.DOTALL)
LINE = re.compile(r'class="number">(\d+) \W</td>\s*<td class="wide">([^<]+)</td>')
HOME = re.compile(r"<strong>(node\d)</strong> <span[^>]*>home</span>")


def cart_of(page: str) -> dict[str, int]:
    """Product -> quantity in the cart."""
    return {name: int(quantity) for quantity, name in LINE.findall(page)}


def title_of(page: str) -> str:
    """What the page says about its session."""
    found = TITLE.search(page)
    assert found is not None, page
    return found[1]


class Shopper:
    """Somebody with a browser."""

    def __init__(self, app: Flask) -> None:
        self.client = app.test_client()

    def look(self) -> str:
        """The shop's page."""
        response = self.client.get("/")
        assert response.status_code == 200
        return response.text

    def send(self, path: str, **fields: str) -> TestResponse:
        """Send one of the page's forms."""
        token = TOKEN.search(self.look())
        assert token is not None
        return self.client.post(path, data={"csrf_token": token[1], **fields})

    def arrive(self, name: str = "Ada") -> None:
        """Log in and put two things into the cart."""
        for path, fields in (
            ("/login", {"name": name}),
            ("/cart/1", {}),
            ("/cart/1", {}),
            ("/cart/4", {}),
        ):
            assert self.send(path, **fields).status_code == 303

    def is_as_before(self) -> bool:
        """Whether a page shows what :meth:`arrive` has done; fails if it does not."""
        page = self.look()
        assert "Logged in as <strong>Ada</strong>" in page
        assert cart_of(page) == {"Assam": 2, "Rooibos": 1}
        return True

    def sees(self, title: str) -> bool:
        """Whether a page shows this about its session, and nothing is lost."""
        page = self.look()
        assert cart_of(page) == {"Assam": 2, "Rooibos": 1}
        return title_of(page) == title


@pytest.fixture
def app(three_nodes: list[Memcached], tmp_path: Path) -> Iterator[Flask]:
    """The shop on three nodes."""
    yield from serve(tmp_path, named(three_nodes))


def named(nodes: list[Memcached]) -> list[dict[str, str]]:
    return [
        {"name": f"node{number}", "address": node.address}
        for number, node in enumerate(nodes, start=1)
    ]


def serve(tmp_path: Path, nodes: list[dict[str, str]]) -> Iterator[Flask]:
    app = create_app(
        {
            "TESTING": True,
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path / 'shop.sqlite'}",
            "RESILIENT_SESSION_NODES": nodes,
            "RESILIENT_SESSION_NODE_RETRY": 0.01,
            "RESILIENT_SESSION_NODE_RETRY_MAX": 0.02,
        }
    )
    yield app
    with app.app_context():
        db.engine.dispose()
    app.extensions["resilient_session"].close()


@pytest.fixture
def shopper(app: Flask) -> Shopper:
    """Somebody in the shop."""
    return Shopper(app)


# --- the shop --------------------------------------------------------------------


def test_a_visitors_cart_is_there_after_logging_in(shopper: Shopper) -> None:
    """What a visitor put into the cart stays when the visitor logs in."""
    shopper.send("/cart/2")
    shopper.send("/login", name="Ada")
    page = shopper.look()
    assert "Logged in as <strong>Ada</strong>" in page
    assert cart_of(page) == {"Sencha": 1}


def test_things_can_be_taken_out_again(shopper: Shopper) -> None:
    """Removing a product takes all of it out and leaves the others."""
    shopper.arrive()
    shopper.send("/cart/1/remove")
    assert cart_of(shopper.look()) == {"Rooibos": 1}


def test_a_name_is_shown_as_text(shopper: Shopper) -> None:
    """A name with markup in it is only a strange name."""
    shopper.send("/login", name="<b>Ada</b>")
    assert "<strong>&lt;b&gt;Ada&lt;/b&gt;</strong>" in shopper.look()


@pytest.mark.parametrize("token", [{}, {"csrf_token": "guessed"}])
def test_forged_forms_are_refused(shopper: Shopper, token: dict[str, str]) -> None:
    """A form without this session's token changes nothing, and says so politely."""
    shopper.arrive()
    response = shopper.client.post("/cart/2", data=token)
    assert response.status_code == 400
    assert "out of date" in response.text
    assert shopper.is_as_before()


@pytest.mark.parametrize("path", ["/cart/999", "/nowhere"])
def test_what_does_not_exist_is_not_found(shopper: Shopper, path: str) -> None:
    """An unknown product or address is a page that says so."""
    shopper.arrive()
    response = shopper.send(path)
    assert response.status_code == 404
    assert "Back to the shop" in response.text


def test_a_login_needs_a_name(shopper: Shopper) -> None:
    """Nobody is logged in under a name of blanks."""
    assert shopper.send("/login", name="   ").status_code == 400


def test_the_shop_works_without_nodes(tmp_path: Path) -> None:
    """With SQL alone everything works, and the page says what it is."""
    for app in serve(tmp_path, []):
        shopper = Shopper(app)
        shopper.arrive()
        assert shopper.sees("Read from SQL")


# --- faults ----------------------------------------------------------------------


def test_each_node_in_turn_may_die(
    shopper: Shopper, three_nodes: list[Memcached]
) -> None:
    """A node that dies, whichever, leaves everybody logged in with their cart."""
    shopper.arrive()
    for node in three_nodes:
        node.kill()
        assert shopper.is_as_before()
        node.start()
        wait_until(lambda: shopper.sees("Read from memory"), what="the node's return")


def test_all_memory_may_be_lost(shopper: Shopper, three_nodes: list[Memcached]) -> None:
    """A synced cart and its login survive three empty nodes."""
    shopper.arrive()
    for node in three_nodes:
        node.kill()
    assert shopper.is_as_before()
    for node in three_nodes:
        node.start()
    assert shopper.is_as_before()
    wait_until(lambda: shopper.sees("Read from memory"), what="two new copies")


def test_the_page_tells_what_happened(
    shopper: Shopper, three_nodes: list[Memcached]
) -> None:
    """Memory, a silent home, its repair, and memory again are told apart."""
    shopper.arrive()
    page = shopper.look()
    assert title_of(page) == "Read from memory"
    assert "nothing changed since." in page
    homes = HOME.findall(page)
    assert len(homes) == 2
    home = three_nodes[int(homes[0].removeprefix("node")) - 1]

    home.kill()
    page = shopper.look()
    assert title_of(page) == "Recovered with SQL"
    assert f"{homes[0]} did not answer." in page
    assert f"{homes[0]} is skipped for a while" in page

    home.start()
    wait_until(lambda: shopper.sees("Recovered and repaired"), what="the repair")
    page = shopper.look()
    assert title_of(page) == "Read from memory"
    assert "copies brought up to date" in page
    assert f"{homes[0]} answers again" in page


def test_logging_out_is_final(shopper: Shopper, three_nodes: list[Memcached]) -> None:
    """The cookie of before the logout opens nothing, whichever node comes back."""
    shopper.arrive()
    cookie = shopper.client.get_cookie("session")
    assert cookie is not None
    three_nodes[0].kill()
    assert shopper.send("/logout").status_code == 303
    three_nodes[0].start()
    for node in three_nodes:
        shopper.client.set_cookie("session", cookie.value)
        page = shopper.look()
        assert "Not logged in" in page
        assert cart_of(page) == {}
        node.restart()


def test_nobody_can_say(
    app: Flask, shopper: Shopper, three_nodes: list[Memcached], tmp_path: Path
) -> None:
    """Without nodes and SQL the shop asks for patience, and forgets nobody."""
    shopper.arrive()
    for node in three_nodes:
        node.kill()
    other = sqlite3.connect(tmp_path / "shop.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    response = shopper.client.get("/")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert "Set-Cookie" not in response.headers
    assert "You are not logged out" in response.text
    assert shopper.client.get("/health").text == "ok\n"
    other.close()
    wait_until(lambda: shopper.client.get("/").status_code == 200, what="SQL's return")
    assert shopper.is_as_before()


def test_health_touches_no_session(app: Flask, shopper: Shopper) -> None:
    """The load balancer's page costs no session I/O."""
    shopper.arrive()
    stats = app.extensions["resilient_session"].observer.stats
    before = dict(stats)
    assert shopper.client.get("/health").status_code == 200
    assert dict(stats) == before


def test_the_page_hides_the_id(shopper: Shopper) -> None:
    """The session id is in the cookie and nowhere on the page."""
    shopper.arrive()
    cookie = shopper.client.get_cookie("session")
    assert cookie is not None
    sid, _, signature = cookie.value.partition(".")
    page = shopper.look()
    assert sid not in page
    assert signature not in page


# --- the demo --------------------------------------------------------------------


class Demo:
    """The demo as a process of its own, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "FLASK_RESILIENT_SESSION_NODE_RETRY": "0.01",
            "FLASK_RESILIENT_SESSION_NODE_RETRY_MAX": "0.02",
        }
        self.log = (directory / "log").open("w+")
        self.process = self._run("demo", "--port", "0", stdout=self.log)
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.browser = urllib.request.build_opener(cookies)

    def wait(self) -> None:
        """Wait until it serves."""
        wait_until(self._serves, 30, "the demo")
        state = json.loads((self.directory / ".demo/state.json").read_text())
        self.url = state["url"]

    def look(self) -> str:
        """The shop's page."""
        with self.browser.open(self.url, timeout=10) as response:
            page: str = response.read().decode()
        return page

    def send(self, path: str, **fields: str) -> None:
        """Send one of the page's forms."""
        token = TOKEN.search(self.look())
        assert token is not None
        data = urllib.parse.urlencode({"csrf_token": token[1], **fields}).encode()
        self.browser.open(self.url + path, data, timeout=10).close()

    def order(self, *words: str) -> str:
        """What the nodes' command answers in this directory."""
        return CliRunner().invoke(nodes_command, words).output.strip()

    def order_of(self, module: str, *words: str) -> str:
        """What a module of the example answers as a process of its own."""
        process = self._run(module, *words, stdout=subprocess.PIPE)
        answer, _ = process.communicate(timeout=30)
        return answer.strip()

    def pids(self) -> list[int]:
        """Process ids of the running nodes."""
        return [int(pid) for pid in re.findall(r"pid (\d+)", self.order("status"))]

    def said(self) -> str:
        """All that it has printed."""
        self.log.flush()
        return (self.directory / "log").read_text()

    def close(self) -> None:
        """End it in whatever state it is."""
        self.process.kill()
        self.process.wait(10)
        self.log.close()

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.said()
        return "Ctrl-C ends the shop" in self.said()

    def _run(self, module: str, *words: str, stdout: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", f"example_app.{module}", *words],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demo]:
    """A demo that serves, in the working directory."""
    monkeypatch.chdir(tmp_path)
    demo = Demo(tmp_path)
    try:
        demo.wait()
        yield demo
    finally:
        demo.close()


def all_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # An orphan may be left as a zombie where nobody collects it.
    return status.rpartition(")")[2].split()[0] != "Z"


def test_the_demo_survives_its_nodes(demo: Demo) -> None:
    """Nodes are killed, frozen and started again by its own commands, no login lost."""
    demo.send("/login", name="Ada")
    demo.send("/cart/1")
    pids = demo.pids()
    assert len(pids) == 3
    assert demo.order_of("nodes", "status") == demo.order("status")
    for number in "123":
        assert "stopped" in demo.order("kill", number)
        assert cart_of(demo.look()) == {"Assam": 1}
        assert "running" in demo.order("start", number)
        wait_until(
            lambda: title_of(demo.look()) == "Read from memory", what="the repair"
        )
    assert "frozen" in demo.order("freeze", "2")
    assert "Logged in as <strong>Ada</strong>" in demo.look()
    assert "running" in demo.order("thaw", "2")
    assert len(demo.pids()) == 3
    assert not set(pids) & set(demo.pids())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_ends_with_its_nodes(demo: Demo, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end the demo and all of its nodes, also a frozen one."""
    demo.order("kill", "1")
    demo.order("start", "1")
    demo.order("freeze", "2")
    pids = demo.pids()
    assert len(pids) == 3
    demo.process.send_signal(number)
    assert demo.process.wait(10) == 0
    assert all_gone(pids)
    assert "Traceback" not in demo.said()
    assert "does not run" in demo.order("status") or "No demo" in demo.order("status")


def test_no_node_outlives_a_killed_demo(demo: Demo) -> None:
    """A demo that is killed takes its nodes along, one started later too."""
    demo.order("kill", "1")
    demo.order("start", "1")
    pids = demo.pids()
    demo.process.kill()
    wait_until(lambda: all_gone(pids), what="the nodes to end")
    assert "does not run any more" in demo.order("status")


def test_commands_work_on_the_demos_sessions(demo: Demo) -> None:
    """The reaper runs on the sessions of the demo that is running."""
    demo.send("/login", name="Ada")
    command = [sys.executable, "-m", "flask", "--app", "example_app.demo"]
    done = subprocess.run(
        [*command, "reap-sessions", "--json"],
        cwd=demo.directory,
        env=demo.environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reaped"] == 0


def test_wrong_orders_are_answered(demo: Demo) -> None:
    """An order that makes no sense says what would."""
    assert "There is no node4; the nodes are 1, 2, 3." in demo.order("kill", "4")
    assert "node1 is running already." in demo.order("start", "1")
    assert "Which node?" in demo.order("kill")
    demo.order("kill", "1")
    assert "example_app.nodes start 1" in demo.order("freeze", "1")


def test_a_second_demo_is_refused(demo: Demo) -> None:
    """In the directory of a running demo another one names it, and harms nothing."""
    demo.send("/login", name="Ada")
    second = demo.order_of("demo", "--port", "0")
    assert f"A demo runs here already: {demo.url}" in second
    assert "Logged in as <strong>Ada</strong>" in demo.look()


def test_a_port_that_is_taken_is_said_plainly(tmp_path: Path) -> None:
    """With its port taken the demo names another, and starts nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "example_app.demo", "--port", str(port)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert done.returncode == 1
    assert f"Port {port} is in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".demo").exists()


def test_a_port_that_is_taken_meanwhile_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody takes a node's port after it was free: the node gets another."""
    free = demo_module._free_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(demo_module, "_free_ports", lambda: [port, *free])
        with demo_module._running_nodes() as nodes:
            assert list(nodes) == ["node1", "node2", "node3"]
            assert port not in {node.port for node in nodes.values()}


def test_a_missing_memcached_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memcached the demo says how to get it."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("example_app.memcached._SYSTEM_DIRECTORIES", ())
    with pytest.raises(NodeError, match="apt-get install memcached"):
        find_memcached()
