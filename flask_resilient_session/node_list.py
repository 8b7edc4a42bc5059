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
from math import nan
from typing import NoReturn
from urllib.parse import urlsplit

from .common.errors import ConfigurationError

#: The key that every error of this module names.
NODES_KEY = "RESILIENT_SESSION_NODES"

#: memcached's own port, used where an address names none.
DEFAULT_PORT = 11211

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
_NAME = re.compile(rf"[^\s,]{{1,{MAX_NAME_LENGTH}}}")
_BRACKETED = re.compile(r"\[([^\[\]\s,]+)\]")
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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


def is_none(value: object) -> bool:
    """Whether a value means None, as an environment variable has to spell it.

    :param value: any value of the configuration.
    """
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "null")
    return value is None


def to_number(value: object) -> float:
    """Read a number.

    :param value: an int, a float or a string that holds one.
    :returns: the number as a float; NaN, which no bounds include, where it is
        something else or a bool.
    """
    try:
        return float(to_text(value) or "")
    except ValueError:
        return nan


def to_text(value: object) -> str | None:
    """Read a text.

    :param value: a string, or a number: a text such as ``5`` comes out of
        ``from_prefixed_env`` as a number.
    :returns: the text; None where it is something else or a bool.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None


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
    if is_none(value):
        entries = ()
    elif isinstance(value, str):
        # A trailing comma is harmless; an empty entry of a list is not, it is
        # what a forgotten variable leaves behind.
        entries = [part for part in value.split(",") if part.strip()]
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
    # Only what follows the brackets: what urlsplit takes in them depends on Python.
    bare = rest.rpartition("]")[2]
    url = urlsplit(f"//{bare}")
    if url.netloc != bare or url.port == 0:
        raise ValueError("more than a host and a port")
    written, port = rest, DEFAULT_PORT
    if url.port is not None:
        written, port = rest.rpartition(":")[0], url.port
    if scheme != "inet" and (match := _BRACKETED.fullmatch(written)):
        # A host name in brackets is python-memcached's way to ask for IPv6.
        named = scheme == "inet6" and ":" not in written
        host = _host_name(match[1]) if named else str(IPv6Address(match[1]))
        return f"inet6:[{host}]:{port}", f"{written}:{port}", host
    if scheme != "inet6":
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
    given = {field: value for field, value in fields.items() if value is not None}
    try:
        address, named, host = parse_address(to_text(given.get("address")) or "")
    except ValueError:
        _refuse(entry, f"an address of the form {_ADDRESS}")
    # The name by default has to fit as well; a host name as zone may be longer.
    name = to_text(given.get("name", named))
    if not name or not name.isprintable() or not _NAME.fullmatch(name):
        _refuse(
            entry,
            f"a name of 1 to {MAX_NAME_LENGTH} printable characters without comma or"
            " whitespace",
        )
    weight = to_number(given.get("weight", 1))
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        _refuse(entry, f"a weight from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    zone = host
    if "zone" in given:
        zone = (to_text(given["zone"]) or "").strip()
        if not zone.isprintable() or not 1 <= len(zone) <= MAX_NAME_LENGTH:
            _refuse(entry, f"a zone of 1 to {MAX_NAME_LENGTH} printable characters")
    return NodeSettings(name, address, weight, zone)


def _check_distinct(nodes: tuple[NodeSettings, ...]) -> None:
    """Refuse two nodes with one name, and two names at one address.

    :raises ConfigurationError: there are two such nodes.
    """
    named: dict[str, str] = {}
    for node in nodes:
        if node.name in named.values():
            _refuse(node.name, "each name for one node only")
        if node.address in named:
            _refuse(
                (named[node.address], node.name),
                f"one name for each address; both are at {node.address}",
            )
        named[node.address] = node.name


def _host_name(written: str) -> str:
    """A host name or IPv4 address in lower case, as host names are compared.

    :raises ValueError: it is neither.
    """
    if not _HOST_NAME.fullmatch(written) or len(written) > MAX_HOST_LENGTH:
        raise ValueError("no host name")
    if written.replace(".", "").isdigit():
        return str(IPv4Address(written))
    return written.lower()


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
