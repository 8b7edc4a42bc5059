"""The configured nodes: every form of an address, and every mistake."""

from __future__ import annotations

from itertools import permutations

import memcache
import pytest

from flask_resilient_session.common.errors import ConfigurationError
from flask_resilient_session.node_list import NodeSettings, parse_nodes

ADDRESSES = [
    ("cache1:11212", "inet:cache1:11212", "cache1:11212", "cache1"),
    ("cache1", "inet:cache1:11211", "cache1:11211", "cache1"),
    (" cache1 ", "inet:cache1:11211", "cache1:11211", "cache1"),
    ("Cache1.Example:1", "inet:cache1.example:1", "Cache1.Example:1", "cache1.example"),
    ("127.0.0.1", "inet:127.0.0.1:11211", "127.0.0.1:11211", "127.0.0.1"),
    ("localhost:65535", "inet:localhost:65535", "localhost:65535", "localhost"),
    ("my_service:0443", "inet:my_service:443", "my_service:443", "my_service"),
    ("inet:cache1:11212", "inet:cache1:11212", "cache1:11212", "cache1"),
    ("inet:cache1", "inet:cache1:11211", "cache1:11211", "cache1"),
    ("[::1]:11212", "inet6:[::1]:11212", "[::1]:11212", "::1"),
    ("[::1]", "inet6:[::1]:11211", "[::1]:11211", "::1"),
    ("[0:0::1]:5", "inet6:[::1]:5", "[0:0::1]:5", "::1"),
    ("inet6:[FE80::A]:5", "inet6:[fe80::a]:5", "[FE80::A]:5", "fe80::a"),
    ("[fe80::1%eth0]:5", "inet6:[fe80::1%eth0]:5", "[fe80::1%eth0]:5", "fe80::1%eth0"),
    ("inet6:[cache1]:5", "inet6:[cache1]:5", "[cache1]:5", "cache1"),
    ("unix:/run/m.sock", "unix:/run/m.sock", "unix:/run/m.sock", "localhost"),
    ("unix:///run//m.sock", "unix:/run/m.sock", "unix:/run/m.sock", "localhost"),
]

BAD_ADDRESSES = [
    "",
    "  ",
    ":11211",
    "cache1:",
    "cache1:0",
    "cache1:65536",
    "cache1:123456",
    "cache1:port",
    "cache1:-1",
    "cache1:11211:11211",
    "cache 1:11211",
    "cache1:11211\n:1",
    "cache1:1\n1",
    "cache1:1/0",
    "me@cache1:1",
    "-cache1",
    "caché",
    "a" * 254,
    "11211",
    "127.0.0.256",
    "127.1",
    "::1",
    "::1:11211",
    "[::1",
    "[]:1",
    "[cache1]:11211",
    "[::g]:11211",
    "[::1]a:1",
    "a[::1]:1",
    "[::1%a b]:1",
    "inet:",
    "inet:11211",
    "inet:[::1]:11211",
    "inet6:::1",
    "inet6:cache1:11211",
    "inet6:[a/b]:11211",
    "unix:",
    "unix:/",
    "unix:relative.sock",
    "unix:11211",
    "unix:/run/a\x00b",
    "unix:/" + "a" * 107,
    "/run/m.sock",
    "redis://cache1:6379",
]


def refused(value: object) -> str:
    """The text of the error for a value that is refused."""
    with pytest.raises(ConfigurationError) as caught:
        parse_nodes(value)
    assert caught.value.key == "RESILIENT_SESSION_NODES"
    assert "RESILIENT_SESSION_NODES = " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("written", "address", "name", "zone"), ADDRESSES)
def test_address_forms(written: str, address: str, name: str, zone: str) -> None:
    """Every form of an address gives its normal form, a name and a zone."""
    assert parse_nodes([written]) == (NodeSettings(name, address, 1.0, zone),)


@pytest.mark.parametrize("address", [row[1] for row in ADDRESSES])
def test_normal_form_is_stable(address: str) -> None:
    """An address in its normal form stays as it is."""
    assert parse_nodes([address])[0].address == address


@pytest.mark.parametrize("address", [row[1] for row in ADDRESSES])
def test_client_reads_the_normal_form(address: str) -> None:
    """python-memcached finds the same host and port in the normal form."""
    host = memcache.Client([address]).servers[0]
    if address.startswith("unix:"):
        assert host.address == address.removeprefix("unix:")
    else:
        _, _, rest = address.partition(":")
        assert rest.replace("[", "").replace("]", "") == f"{host.ip}:{host.port}"


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_bad_addresses(address: str) -> None:
    """What is no address is refused, with the forms that are."""
    text = refused([address])
    assert repr(address) in text
    assert '"host:port", "host", "[::1]:port" or "unix:/path"' in text


@pytest.mark.parametrize("value", [None, "", " ", "none", "None", "NULL", [], ()])
def test_no_nodes(value: object) -> None:
    """None, its spellings and an empty list mean no nodes."""
    assert parse_nodes(value) == ()


@pytest.mark.parametrize(
    "value",
    [
        ["a:1", "[::1]:2", "unix:/m"],
        ("a:1", "[::1]:2", "unix:/m"),
        "a:1,[::1]:2,unix:/m",
        " a:1 , [::1]:2 , unix:/m , ",
        [{"address": "a:1"}, "[::1]:2", {"address": "unix:/m", "name": None}],
    ],
)
def test_lists_of_nodes(value: object) -> None:
    """A list, a tuple and a comma-separated string give the same nodes."""
    names = [node.name for node in parse_nodes(value)]
    assert names == ["a:1", "[::1]:2", "unix:/m"]


@pytest.mark.parametrize(
    "value", [5, 0, 1.5, True, False, b"a:1", {"address": "a:1"}, {"a:1"}, object()]
)
def test_not_a_list(value: object) -> None:
    """Anything but a list or a string is refused, a single mapping included."""
    text = refused(value)
    assert repr(value) in text
    assert "a list of" in text


@pytest.mark.parametrize("entry", [None, 5, True, b"a:1", ["a:1"], ("a:1", 2)])
def test_not_an_entry(entry: object) -> None:
    """An entry is a string or a mapping."""
    text = refused([entry])
    assert repr(entry) in text
    assert "a mapping with an address" in text


def test_full_mapping() -> None:
    """A mapping gives name, address, weight and zone."""
    entry = {"name": "a", "address": "cache1", "weight": 2, "zone": "rack 1"}
    assert parse_nodes([entry]) == (
        NodeSettings("a", "inet:cache1:11211", 2.0, "rack 1"),
    )


def test_mapping_defaults() -> None:
    """A mapping of an address alone equals the address, also with None elsewhere."""
    entry = {"name": None, "address": "cache1", "weight": None, "zone": None}
    assert parse_nodes([entry]) == parse_nodes(["cache1"])


def test_numbers_become_names() -> None:
    """A name and a zone that were parsed as numbers are text again."""
    node = parse_nodes([{"name": 1, "address": "cache1", "zone": 2.5}])[0]
    assert (node.name, node.zone) == ("1", "2.5")


@pytest.mark.parametrize("weight", [0.01, 1, 2.5, 100, "0.5"])
def test_weights(weight: float | str) -> None:
    """A weight is any number within its bounds, both ends included."""
    node = parse_nodes([{"address": "a", "weight": weight}])[0]
    assert node.weight == float(weight)


@pytest.mark.parametrize(
    "weight",
    [0, 0.009, 100.1, -1, "", "heavy", True, float("nan"), float("inf"), [1], 10**400],
)
def test_bad_weights(weight: object) -> None:
    """A weight out of range or not a number is refused, with the range."""
    entry = {"address": "a", "weight": weight}
    text = refused([entry])
    assert repr(entry) in text
    assert "a weight from 0.01 to 100" in text


@pytest.mark.parametrize("name", ["x", "x" * 100, "größe", "a:1/b=c"])
def test_names(name: str) -> None:
    """A name is any printable text up to its length."""
    assert parse_nodes([{"name": name, "address": "a"}])[0].name == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 101, "a,b", "a b", "a\t", "a\n", "a\u00a0b", "\x00", "\ud800", True, []],
)
def test_bad_names(name: object) -> None:
    """A name that is empty, too long or would break a list of names is refused."""
    entry = {"name": name, "address": "a"}
    text = refused([entry])
    assert repr(entry) in text
    assert "a name of 1 to 100 printable characters without comma or" in text


@pytest.mark.parametrize("address", ["unix:/a b", "unix:/" + "a" * 100, "a" * 120])
def test_address_that_is_no_name(address: str) -> None:
    """An address that is no name either needs a name of its own."""
    assert "a name of 1 to 100" in refused([address])
    assert parse_nodes([{"address": address, "name": "a"}])[0].name == "a"


@pytest.mark.parametrize("zone", ["", " ", "z" * 101, "a\nb", True, ["z"]])
def test_bad_zones(zone: object) -> None:
    """A zone that is empty, too long or not printable is refused."""
    entry = {"address": "a", "zone": zone}
    text = refused([entry])
    assert repr(entry) in text
    assert "a zone of 1 to 100 printable characters" in text


def test_unknown_field() -> None:
    """An unknown key of a mapping is named, beside those that exist."""
    text = refused([{"address": "a", "wieght": 2, "port": 1}])
    assert "['wieght', 'port']" in text
    assert "name, address, weight, zone" in text


@pytest.mark.parametrize("entry", [{}, {"name": "a"}, {"address": None}])
def test_missing_address(entry: dict[str, object]) -> None:
    """A mapping without an address is refused."""
    text = refused([entry])
    assert repr(entry) in text
    assert "an address of the form" in text


@pytest.mark.parametrize(
    "value",
    [
        "a:1,a:1",
        "a,a:11211",
        "a:1,inet:a:1",
        [{"name": "n", "address": "a"}, {"name": "n", "address": "b"}],
        [{"name": "b:11211", "address": "a"}, "b"],
    ],
)
def test_one_name_twice(value: object) -> None:
    """Two nodes with one name are refused, given or by default."""
    assert "each name for one node only" in refused(value)


@pytest.mark.parametrize(
    ("value", "names", "address"),
    [
        ("A:1,a:1", ("A:1", "a:1"), "inet:a:1"),
        ("[::1]:1,[0::1]:1", ("[::1]:1", "[0::1]:1"), "inet6:[::1]:1"),
        (["a", {"name": "n", "address": "a"}], ("a:11211", "n"), "inet:a:11211"),
    ],
)
def test_two_names_at_one_address(
    value: object, names: tuple[str, str], address: str
) -> None:
    """Two names at one address are refused, however the address is written."""
    text = refused(value)
    assert repr(names) in text
    assert f"one name for each address; both are at {address}" in text


def test_order_does_not_matter() -> None:
    """Name, weight and zone of a node are the same in any order of the list."""
    entries = ["a", "[::1]", {"name": "n", "address": "unix:/m", "weight": 3}]
    results = {frozenset(parse_nodes(order)) for order in permutations(entries)}
    assert len(results) == 1
