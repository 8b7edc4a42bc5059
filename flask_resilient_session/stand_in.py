"""When a third node stands in for a home that is down.

With a home down, its sessions have one copy, which alone may be old: SQL is asked at
every request. On rings of three or more the next node, the *stand-in*, gets a copy of
what SQL vouched for, and the home that is left and the stand-in settle the reads from
then on. Writes go to SQL first as they do without it.

Why that is safe: of the two homes and the stand-in, every change that is acknowledged
has reached two, as far as they answer and have room; two of them that agree while the
third is silent have therefore not missed any. Ends are told to all three. A copy on the
stand-in never settles anything against a home that answers, and is forgotten after a
while, so that one from an old outage does not meet a later one.

Nothing here reads a clock or does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .config import Timing
from .record import (
    Hit,
    Record,
    Reply,
    Tombstone,
    Unreachable,
    join_records,
    same_state,
)
from .replication import (
    PAIR,
    Gone,
    Live,
    Standing,
    agreed,
    all_stored,
    buried,
    holds,
    live_copies,
    places_of,
    tombstone_of,
)
from .wire import Ack


def judge_stand_in(
    homes: Mapping[str, Reply],
    stand_in: Mapping[str, Reply],
    timing: Timing,
    now_ms: int,
) -> Live | Gone | None:
    """What one home and the stand-in settle where the other home is silent.

    :param homes: home -> reply, for all of the session's homes.
    :param stand_in: the stand-in's reply by its name; empty where it was not asked.
    :returns: None: SQL has to be asked.
    """
    replies = {**homes, **stand_in}
    tombstone = tombstone_of(stand_in)
    if tombstone is not None:
        return buried(tombstone, replies, now_ms)
    silent = [reply for reply in homes.values() if isinstance(reply, Unreachable)]
    if len(homes) != PAIR or len(silent) != 1 or silent[0].sealed:
        # What is sealed under an unknown key is a word that cannot be read here.
        return None
    record = agreed(live_copies(replies), frozenset(homes), timing, now_ms)
    if record is None or record.never_synced:
        return None
    return Live(record, Standing.STOOD_IN, places_of(replies))


def with_stand_in(
    live: Live, homes: Mapping[str, Reply], stand_in: Mapping[str, Reply]
) -> Live:
    """What SQL vouched for, and the stand-in that is to hold it as well.

    Only while a home is silent: with both there is nothing to stand in for.
    """
    silent = any(isinstance(reply, Unreachable) for reply in homes.values())
    if not silent or live.standing is not Standing.CONFIRMED:
        return live
    also = places_of(stand_in)
    names = frozenset(homes)
    behind = [n for n in also if not holds(stand_in[n], live.record, names)]
    return replace(
        live,
        places={**live.places, **also},
        repairs=(*live.repairs, *behind),
    )


def to_be_told(homes: Sequence[str], acks: Mapping[str, Ack]) -> bool:
    """Whether a stand-in has to hear of what was written: not both homes took it.

    :param acks: answers of the nodes that were written.
    """
    return not all_stored(acks, homes)


def with_what_stands(record: Record, reply: Reply) -> Record | None:
    """What to write to a stand-in that was told of a change after SQL was.

    It may have heard of later changes meanwhile: nothing that stands there is undone.

    :returns: None: there is nothing to write.
    """
    if not isinstance(reply, Hit):
        return None if isinstance(reply, Unreachable) else record
    if isinstance(reply.copy, Tombstone):
        return None
    joined = replace(join_records(record, reply.copy), homes=record.homes)
    return None if same_state(joined, reply.copy) else joined
