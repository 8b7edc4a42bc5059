"""The servers of the tests do to themselves what they say they do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import servers
from servers import Memcached, MemcachedPool, ServerError, ServerMissing, wait_until

pytestmark = pytest.mark.servers


def connect(server: Memcached) -> socket.socket:
    return socket.create_connection((server.host, server.port), 0.2)


def process_is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # An orphan may be left as a zombie where nobody collects it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_stored_bytes_come_back(memcached: Memcached) -> None:
    """What is set is read back, byte for byte, and a missing key is None."""
    data = b"\r\nEND\r\n\x00\xff"
    memcached.raw_set("k", data, flags=3)
    assert memcached.raw_get("k") == data
    assert memcached.raw_get("other") is None


def test_add_and_delete_say_whether_they_did(memcached: Memcached) -> None:
    """Add stores only where nothing is, delete tells whether something was."""
    assert memcached.raw_add("k", b"1")
    assert not memcached.raw_add("k", b"2")
    assert memcached.raw_get("k") == b"1"
    assert memcached.raw_delete("k")
    assert not memcached.raw_delete("k")


def test_evict_needs_something_to_evict(memcached: Memcached) -> None:
    """Evicting takes the key away, and fails where that would do nothing."""
    memcached.raw_set("k", b"1")
    memcached.evict("k")
    assert memcached.keys() == []
    with pytest.raises(ServerError, match="holds no k"):
        memcached.evict("k")


def test_keys_are_all_listed(memcached: Memcached) -> None:
    """Every key is listed, sorted, also one that memcached has to quote."""
    names = sorted(f"session:{number}%" for number in range(500))
    for size, name in enumerate(names):
        memcached.raw_set(name, b"x" * size)
    assert memcached.keys() == names


def test_keys_waits_for_a_busy_crawler(memcached: Memcached) -> None:
    """Two listings at once both get an answer."""
    memcached.raw_set("k", b"")
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(memcached.keys()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["k"]] * 8


def test_time_to_live(memcached: Memcached) -> None:
    """The seconds left are told, -1 for ever and None for a missing key."""
    memcached.raw_set("short", b"", exptime=100)
    memcached.raw_set("long", b"")
    assert memcached.raw_ttl("short") in range(98, 102)
    assert memcached.raw_ttl("long") == -1
    assert memcached.raw_ttl("none") is None


def test_commands_are_counted(memcached: Memcached) -> None:
    """The counters grow by the commands that were sent."""
    before = memcached.command_counts()
    memcached.raw_set("k", b"")
    memcached.raw_get("k")
    memcached.raw_get("none")
    after = memcached.command_counts()
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["cmd_set"], grown["get_hits"], grown["get_misses"]) == (1, 1, 1)


def test_killed_server_refuses(memcached: Memcached) -> None:
    """A killed server is gone when kill returns, and kept its address."""
    address, pid = memcached.address, memcached.pid
    memcached.kill()
    assert not memcached.alive
    assert process_is_gone(pid)
    with pytest.raises(ConnectionRefusedError):
        connect(memcached)
    assert memcached.address == address
    with pytest.raises(ServerError, match="is not running"):
        memcached.kill()


def test_frozen_server_accepts_but_does_not_answer(memcached: Memcached) -> None:
    """A frozen server takes connections, is silent, and answers after the thaw."""
    memcached.freeze()
    memcached.freeze()
    assert memcached.frozen
    with connect(memcached) as connection:
        connection.sendall(b"version\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(100)
        memcached.thaw()
        assert connection.recv(100).startswith(b"VERSION ")
    assert not memcached.frozen


def test_freezing_again_after_a_thaw(memcached: Memcached) -> None:
    """Freezing is confirmed each time, not once."""
    for _ in range(20):
        memcached.freeze()
        state = Path(f"/proc/{memcached.pid}/stat").read_text().rpartition(")")[2]
        assert state.split()[0] == "T"
        memcached.thaw()
        assert memcached.answers()


@pytest.mark.parametrize("before", ["alive", "frozen", "killed"])
def test_restart_is_empty_on_the_same_port(memcached: Memcached, before: str) -> None:
    """A restarted server is another process, empty, at the same address."""
    memcached.raw_set("k", b"1")
    address, pid = memcached.address, memcached.pid
    if before == "frozen":
        memcached.freeze()
    elif before == "killed":
        memcached.kill()
    memcached.restart()
    assert memcached.address == address
    assert memcached.pid != pid
    assert memcached.keys() == []
    assert not memcached.frozen


def test_restart_with_clients_connected(memcached: Memcached) -> None:
    """Connections that are still open do not keep the port from a new process."""
    clients = [connect(memcached) for _ in range(20)]
    memcached.restart()
    assert memcached.answers()
    for client in clients:
        client.close()


def test_stop_is_harmless_twice() -> None:
    """Stopping ends a frozen server as well, and a stopped one is left alone."""
    server = Memcached().start()
    pid = server.pid
    server.freeze()
    server.stop()
    server.stop()
    assert process_is_gone(pid)


def test_two_servers_differ(nodes: list[Memcached]) -> None:
    """Each server has an address and contents of its own."""
    first, second = nodes
    first.raw_set("k", b"1")
    assert first.address != second.address
    assert second.raw_get("k") is None


def test_three_servers(three_nodes: list[Memcached]) -> None:
    """Three servers at three addresses."""
    assert len({server.address for server in three_nodes}) == 3


def test_fixtures_lend_different_servers(
    memcached: Memcached, nodes: list[Memcached]
) -> None:
    """A test that uses two fixtures gets servers that are not the same."""
    assert memcached.address not in {server.address for server in nodes}


def test_other_loopback_address() -> None:
    """A server can listen on another address of the machine, as another host."""
    with Memcached(host="127.0.0.2") as server:
        assert server.address == f"127.0.0.2:{server.port}"
        assert server.answers()


def test_another_server_at_the_address(memcached: Memcached) -> None:
    """A new server can take the place of a killed one, and is told apart."""
    memcached.kill()
    with Memcached(port=memcached.port) as other:
        assert other.answers()
        assert not memcached.answers()


def test_full_server_refuses() -> None:
    """With ``-M`` a full server refuses to store instead of evicting."""
    with Memcached(memory_megabytes=2, extra=["-M"]) as server:
        taken = 0
        while server.raw_add(f"k{taken}", b"x" * 10_000):
            taken += 1
        assert 0 < taken < 400
        assert server.stats()["evictions"] == "0"
        assert server.raw_get("k0") is not None
        with pytest.raises(ServerError, match="SERVER_ERROR out of memory"):
            server.raw_set("more", b"x" * 10_000)


def test_taken_port_is_given_up_for_another(
    memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that is taken between being found and being used costs nothing."""
    offered = iter([memcached.port, memcached.port])
    find = servers.free_port
    monkeypatch.setattr(
        servers, "free_port", lambda host: next(offered, None) or find(host)
    )
    with Memcached() as server:
        assert next(offered, None) is None
        assert server.port != memcached.port
        assert server.answers()


def test_given_port_in_use_is_an_error(memcached: Memcached) -> None:
    """A port that the test asked for is not exchanged for another."""
    with pytest.raises(ServerError, match="in use, again and again"):
        Memcached(port=memcached.port).start()


def test_failure_to_start_shows_what_the_server_said() -> None:
    """The text of the error is the server's own."""
    with pytest.raises(ServerError, match="no-such-option"):
        Memcached(extra=["--no-such-option"]).start()


def test_missing_program_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without memcached there is a plain error, not a skipped test."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "_SYSTEM_DIRECTORIES", ())
    with pytest.raises(ServerMissing, match="apt-get install memcached"):
        Memcached().start()


def test_pool_lends_clean_servers_again() -> None:
    """What one test left, froze or killed, the next finds empty and running."""
    pool = MemcachedPool()
    with pool.lend(3) as (left, frozen, killed):
        pids = {left.pid, frozen.pid, killed.pid}
        left.raw_set("k", b"1")
        frozen.raw_set("k", b"1")
        frozen.freeze()
        killed.kill()
    with pool.lend(3) as again:
        assert again == [left, frozen, killed]
        assert [server.keys() for server in again] == [[], [], []]
        assert len({server.pid for server in again} & pids) == 2
        assert left.command_counts()["cmd_set"] == 0
    pool.close()
    assert not any(server.alive for server in again)


def test_servers_die_with_the_process_that_started_them() -> None:
    """A test run that is killed leaves no memcached behind."""
    code = """
        import time
        from servers import Memcached
        print(Memcached().start().pid, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(servers.__file__).parent,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not process_is_gone(pid)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: process_is_gone(pid), what="memcached to die")


def test_server_outlives_a_thread_that_restarted_it(memcached: Memcached) -> None:
    """A restart from a thread is not undone when that thread ends."""
    thread = threading.Thread(target=memcached.restart)
    thread.start()
    thread.join()
    with connect(memcached) as connection:
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert memcached.answers()


def test_wait_until_returns_the_answer() -> None:
    """The first answer that is true is handed back."""
    answers = iter([None, 0, "yes"])
    assert wait_until(lambda: next(answers)) == "yes"


def test_wait_until_names_what_was_awaited() -> None:
    """The error says what was awaited, and comes when it was said to."""
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"waiting for rain after 0\.05 s"):
        wait_until(lambda: False, timeout=0.05, what="rain")
    assert time.monotonic() - started < 2
