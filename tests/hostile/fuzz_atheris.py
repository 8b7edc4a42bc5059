"""Coverage-guided fuzzing of what reads bytes that others may have written.

Not collected by pytest, and atheris is no dependency of the tests::

    pip install atheris
    python tests/hostile/fuzz_atheris.py decode -max_total_time=300 -rss_limit_mb=512

The first argument is ``decode``, ``unseal`` or ``wire``; the rest is libFuzzer's.
``MSGPACK_PUREPYTHON=1`` lets it look into msgpack as well, more slowly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from decimal import Decimal
from typing import Any
from uuid import UUID

import atheris

with atheris.instrument_imports(include=["flask_resilient_session", "msgpack"]):
    from flask_resilient_session.core import envelope, record
    from flask_resilient_session.core import values as codec
    from flask_resilient_session.memcached import text_protocol

#: Seconds that no input may take; libFuzzer's own limit is in whole seconds.
SLOW = 2.0
KEY = "0" * 64
KEYRING = envelope.Keyring(["a secret", "an older one"], "fuzz")
ENCRYPTING = envelope.Keyring(["a secret"], "fuzz", encrypt=True)
#: A value is made of these types and no others.
TYPES = (
    *(type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset),
    *(codec.Markup, UUID, Decimal, datetime, date, clock_time, timedelta),
)
CHILDREN = (list, tuple, set, frozenset)
WRITES = (
    text_protocol.Add("k", b"", 1),
    text_protocol.Cas("k", b"", 1, 1, 1),
    text_protocol.Set("k", b"", 1),
    text_protocol.Delete("k"),
)


STATE = record.Record(
    entries={"a": record.Entry(1, 2, b"\x01"), "b": record.Entry(3, 4, None)},
    homes=("one", "two"),
)
GENUINE = [KEYRING.seal(KEY, STATE), ENCRYPTING.seal(KEY, STATE)]


def check_types(value: Any) -> None:
    """Whether a value holds nothing but what the codec lists."""
    stack = [value]
    while stack:
        part = stack.pop()
        assert type(part) in TYPES, type(part)
        if isinstance(part, dict):
            stack += [*part.keys(), *part.values()]
        elif isinstance(part, CHILDREN):
            stack += part


def decode(data: bytes) -> None:
    """One value: it has a listed type, or it is a ValueError."""
    try:
        value = codec.decode_value(data)
    except ValueError:
        return
    check_types(value)
    try:
        again = codec.encode_value("key", value)
    except TypeError:
        # Deeper than msgpack writes, or a lone offset that no zone has.
        return
    codec.decode_value(again)


def unseal(data: bytes) -> None:
    """Bytes as they are, and as the body of a good seal; never an exception."""
    for keyring in (KEYRING, ENCRYPTING):
        forged = keyring.unseal(KEY, data)
        genuine = isinstance(forged, (record.Record, record.Tombstone))
        assert not genuine or data in GENUINE
    for keyring in (KEYRING, ENCRYPTING):
        header = keyring._header
        keyring.unseal(KEY, header + keyring._mac(header, KEY, data) + data)


def wire_replies(data: bytes) -> None:
    """A reply in one piece and byte by byte: the same answer, or a ProtocolError."""
    get = text_protocol.Get("k", 1000)
    for request in (get, *WRITES):
        try:
            parsed = request.parse(data)
        except text_protocol.ProtocolError:
            continue
        if parsed is None:
            continue
        reply, length = parsed
        if isinstance(reply, text_protocol.Value) and reply.data is None:
            # Longer than it may be: its length says how much to skip.
            assert length > get.limit
            continue
        assert 0 < length <= len(data)
        if isinstance(reply, text_protocol.Value):
            assert len(reply.data) <= get.limit
            assert request.parse(data[:length]) == parsed
            assert request.parse(data[: length - 1]) is None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "decode": decode,
    "unseal": unseal,
    "wire": wire_replies,
}


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    values: list[Any] = [
        {"a": (1, {2}), "b": frozenset([b"x"])},
        [datetime(2026, 1, 1), date(2026, 1, 1), clock_time(1, 2, 3)],
        [UUID(int=1), Decimal("1.5"), timedelta(1), codec.Markup("<b>"), 2**70],
    ]
    whole = [codec.encode_value("key", value) for value in values]
    bodies = [envelope._pack(STATE), envelope._pack(record.Tombstone("ended", 1))]
    replies = [b"VALUE k 0 1 5\r\nx\r\nEND\r\n", b"END\r\n", b"STORED\r\n"]
    return [*whole, *bodies, *GENUINE, *replies]


def main() -> None:
    """Fuzz one target with libFuzzer's arguments."""
    target = TARGETS[sys.argv.pop(1)]
    # Each input may instead be a change of a valid one: bytes to cut and to put.
    valid = seeds()

    def one(data: bytes) -> None:
        started = time.monotonic()
        target(data)
        if len(data) > 3:
            base = valid[data[0] % len(valid)]
            at = int.from_bytes(data[1:3], "big") % (len(base) + 1)
            target(base[:at] + data[3:] + base[at + len(data[3:]) :])
        assert time.monotonic() - started < SLOW, "slow"

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
