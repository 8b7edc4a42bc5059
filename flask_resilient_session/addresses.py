"""The memcached nodes as they are configured: name, address, weight and zone.

A node's place on the ring comes from its name, so that a name has to stand for
one address, everywhere and for good. This module checks that as far as one
configuration can show it; it resolves no host name and opens no socket.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from math import isfinite
from typing import NoReturn

from .errors import ConfigurationError

#: The key that every error of this module names.
NODES_KEY = "RESILIENT_SESSION_NODES"

#: memcached's own port, used where an address names none.
DEFAULT_PORT = 11211

#: The largest TCP port; 0 is no port that a client can connect to.
MAX_PORT = 65535

#: The longest path of a Unix socket in bytes: Linux keeps 108, one of them the
#: closing zero.
MAX_PATH_BYTES = 107

#: The longest host name in characters, as the domain name system has it.
MAX_HOST_LENGTH = 253

#: The longest name or zone in characters. Every copy and every row carries the
#: names of its homes, so that they have to stay short beside the session.
MAX_NAME_LENGTH = 100

#: The least and the largest weight. They bound the points that one node gets on
#: the ring: a node of less gets hardly any, a node of more makes the ring large.
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0

#: What a mapping that describes a node may hold.
NODE_FIELDS = ("name", "address", "weight", "zone")

_ADDRESS = '"host:port", "host", "[::1]:port" or "unix:/path"'
_NAME = (
    f"a name of 1 to {MAX_NAME_LENGTH} printable characters without comma or whitespace"
)
_BRACKETED = re.compile(r"\[([^\[\]\s,]+)\](?::([0-9]{1,5}))?")
_PLAIN = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One memcached node.

    :param name: its name on the ring, unique.
    :param address: python-memcached's form, ``inet:host:port``,
        ``inet6:[::1]:port`` or ``unix:/path``, unique.
    :param weight: its share of the copies, relative to the other nodes.
    :param zone: what it shares its fate with; two copies of a session go to two
        zones where there are enough.
    """

    name: str
    address: str
    weight: float
    zone: str


def to_number(value: object) -> float:
    """Read a number.

    :param value: an int, a float or a string that holds one.
    :returns: the number as a float.
    :raises ValueError: it is something else, a bool, NaN or infinite.
    """
    number = float(to_text(value))
    if not isfinite(number):
        raise ValueError("not a finite number")
    return number


def to_text(value: object) -> str:
    """Read a text.

    :param value: a string, or a number: a text such as ``5`` comes out of
        ``from_prefixed_env`` as a number.
    :returns: the text.
    :raises ValueError: it is something else, or a bool.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError("neither a text nor a number")


def parse_nodes(value: object) -> tuple[NodeSettings, ...]:
    """Read the value of ``RESILIENT_SESSION_NODES``.

    :param value: a list or tuple of addresses and mappings, a comma-separated
        string of addresses, or None, ``""``, ``"none"`` or ``"null"`` for no
        nodes.
    :returns: the nodes, in the order in which they were written.
    :raises ConfigurationError: an entry cannot be read, or two entries have one
        name or one address.
    """
    entries: list[object] | tuple[object, ...]
    if value is None:
        entries = ()
    elif isinstance(value, str):
        none = value.strip().lower() in ("", "none", "null")
        # A trailing comma is harmless; an empty entry of a list is not, it is
        # what a forgotten variable leaves behind.
        entries = () if none else [part for part in value.split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        entries = value
    else:
        _refuse(value, f"a list of {_ADDRESS}, or one comma-separated string of them")
    nodes = tuple(_parse_node(entry) for entry in entries)
    _check_distinct(nodes)
    return nodes


def parse_address(text: str) -> tuple[str, str, str]:
    """Read one address.

    :param text: one of the forms of the configuration; python-memcached's own
        ``inet:`` and ``inet6:`` forms are taken as well.
    :returns: the address in python-memcached's form; the address as it was
        written, without ``inet:`` or ``inet6:`` and with its port; the host,
        ``"localhost"`` for a Unix socket.
    :raises ValueError: it is no address.
    """
    text = text.strip()
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        path = _socket_path(rest)
        return f"unix:{path}", f"unix:{path}", "localhost"
    if scheme not in ("inet", "inet6"):
        scheme, rest = "", text
    if scheme != "inet" and (match := _BRACKETED.fullmatch(rest)):
        written, port = match[1], _port(match[2])
        # A host name in brackets is python-memcached's way to ask for IPv6.
        named = scheme == "inet6" and ":" not in written
        host = _host_name(written) if named else str(IPv6Address(written))
        return f"inet6:[{host}]:{port}", f"[{written}]:{port}", host
    if scheme != "inet6" and (match := _PLAIN.fullmatch(rest)):
        written, port = match[1], _port(match[2])
        host = _host_name(written)
        return f"inet:{host}:{port}", f"{written}:{port}", host
    raise ValueError("no address")


def _parse_node(entry: object) -> NodeSettings:
    """Read one entry of the list, an address or a mapping.

    :raises ConfigurationError: it cannot be read; the text shows the entry.
    """
    if isinstance(entry, str):
        fields: Mapping[object, object] = {"address": entry}
    elif isinstance(entry, Mapping):
        fields = entry
    else:
        _refuse(entry, f"{_ADDRESS}, or a mapping with an address")
    unknown = [field for field in fields if field not in NODE_FIELDS]
    if unknown:
        known = ", ".join(NODE_FIELDS)
        _refuse(entry, f"only the keys {known} for a node, not {unknown!r}")
    try:
        address, name, zone = parse_address(to_text(fields.get("address")))
    except ValueError:
        _refuse(entry, f"an address of the form {_ADDRESS}")
    return NodeSettings(
        name=_parse_name(entry, fields.get("name"), name),
        address=address,
        weight=_parse_weight(entry, fields.get("weight")),
        zone=_parse_zone(entry, fields.get("zone"), zone),
    )


def _parse_name(entry: object, value: object, default: str) -> str:
    """The name of a node; for None the default, which has to fit as well."""
    try:
        name = default if value is None else to_text(value)
    except ValueError:
        _refuse(entry, _NAME)
    spaced = any(char == "," or char.isspace() for char in name)
    if spaced or not name.isprintable() or not 1 <= len(name) <= MAX_NAME_LENGTH:
        _refuse(entry, _NAME)
    return name


def _parse_weight(entry: object, value: object) -> float:
    """The weight of a node; 1 for None."""
    try:
        weight = 1.0 if value is None else to_number(value)
    except ValueError:
        weight = 0.0
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        _refuse(entry, f"a weight from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


def _parse_zone(entry: object, value: object, default: str) -> str:
    """The zone of a node; for None the default, its host."""
    try:
        zone = default if value is None else to_text(value).strip()
    except ValueError:
        zone = ""
    # A host name may be longer than what a zone of one's own may have.
    if value is not None and not (
        1 <= len(zone) <= MAX_NAME_LENGTH and zone.isprintable()
    ):
        _refuse(entry, f"a zone of 1 to {MAX_NAME_LENGTH} printable characters")
    return zone


def _check_distinct(nodes: tuple[NodeSettings, ...]) -> None:
    """Refuse two nodes with one name, and two names at one address.

    :raises ConfigurationError: there are two such nodes.
    """
    names: set[str] = set()
    named: dict[str, str] = {}
    for node in nodes:
        if node.name in names:
            _refuse(node.name, "each name for one node only")
        other = named.setdefault(node.address, node.name)
        if other != node.name:
            _refuse(
                (other, node.name),
                f"one name for each address; both are at {node.address}",
            )
        names.add(node.name)


def _host_name(written: str) -> str:
    """A host name or IPv4 address in lower case, as host names are compared.

    :raises ValueError: it is neither.
    """
    if not _PLAIN.fullmatch(written) or len(written) > MAX_HOST_LENGTH:
        raise ValueError("no host name")
    if written.replace(".", "").isdigit():
        return str(IPv4Address(written))
    return written.lower()


def _port(digits: str | None) -> int:
    """The port that the digits name; memcached's own where there are none.

    :raises ValueError: it is out of range.
    """
    port = DEFAULT_PORT if digits is None else int(digits)
    if not 1 <= port <= MAX_PORT:
        raise ValueError("no port")
    return port


def _socket_path(path: str) -> str:
    """The absolute path of a Unix socket, repeated slashes made one.

    A relative path would depend on the directory a worker was started in.

    :raises ValueError: it is not absolute, not printable or too long.
    """
    path = re.sub("/{2,}", "/", path)
    if path == "/" or not path.startswith("/") or not path.isprintable():
        raise ValueError("no absolute path")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError("path too long")
    return path


def _refuse(value: object, allowed: str) -> NoReturn:
    """Raise the error that shows the value and says what is allowed."""
    raise ConfigurationError(NODES_KEY, value, allowed)
