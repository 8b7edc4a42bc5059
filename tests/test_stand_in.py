"""When the stand-in settles what a silent home cannot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from answers import (
    ANSWERS,
    COPIES,
    DEAD,
    OTHER,
    SAME,
    TIMING,
    TOKENS,
    joined,
    reply,
)
from builders import FIRST_HOME, KEYRING, NOW, PAIR, SECOND_HOME, session_key
from flask_resilient_session.access import Access
from flask_resilient_session.cluster import Cluster
from flask_resilient_session.homes import Homes
from flask_resilient_session.record import (
    Entry,
    Hit,
    Miss,
    Record,
    Reply,
    Token,
    Tombstone,
    Unreachable,
)
from flask_resilient_session.replication import Gone, Live, Standing, confirmed
from flask_resilient_session.ring import Ring, RingNode
from flask_resilient_session.stand_in import (
    judge_stand_in,
    to_be_told,
    with_stand_in,
    with_what_stands,
)
from flask_resilient_session.wire import Ack

KEY = session_key("alice")
STAND_IN = "stand-in"
TOKEN = Token(33, 3)
SILENT = Unreachable("down")


def standing_in(answer: str) -> dict[str, Reply]:
    """What the stand-in answers."""
    if answer in COPIES:
        return {STAND_IN: Hit(COPIES[answer], TOKEN)}
    return {STAND_IN: reply(answer, FIRST_HOME)}


def one_silent(answer: str, silent: str) -> dict[str, Reply]:
    """What the homes answer, one of them nothing."""
    return {name: SILENT if name == silent else reply(answer, name) for name in PAIR}


EVERY_ANSWER = list(itertools.product(ANSWERS, repeat=2))


@pytest.mark.parametrize("silent", PAIR)
@pytest.mark.parametrize(("home", "third"), EVERY_ANSWER)
def test_what_a_home_and_the_stand_in_settle(
    home: str, third: str, silent: str
) -> None:
    """Two live copies that nothing speaks against, or the stand-in's tombstone."""
    homes = one_silent(home, silent)
    verdict = judge_stand_in(homes, standing_in(third), TIMING, NOW)
    (left,) = set(PAIR) - {silent}
    if third == "dead":
        spread = () if home in ("dead", "unreachable") else (left,)
        assert verdict == Gone("ended", DEAD.ended_ms, DEAD, spread)
        return
    agree = (
        {"same"},
        {"other"},
        # Times may differ, as between homes.
        {"same", "never"},
        {"same", "expired"},
        {"never", "expired"},
    )
    if {home, third} not in agree:
        assert verdict is None
        return
    copies = [COPIES[home], COPIES[third]]
    record = joined(*(copy for copy in copies if isinstance(copy, Record)))
    places = {left: TOKENS[left], STAND_IN: TOKEN}
    assert verdict == Live(record, Standing.STOOD_IN, places)


@pytest.mark.parametrize(("first", "second"), EVERY_ANSWER)
def test_nothing_is_settled_against_a_home_that_answers(
    first: str, second: str
) -> None:
    """Both homes answer: SQL is asked, whatever the stand-in holds."""
    if "unreachable" in (first, second):
        return
    homes = {FIRST_HOME: reply(first, FIRST_HOME), SECOND_HOME: reply(second, PAIR[1])}
    assert judge_stand_in(homes, standing_in("same"), TIMING, NOW) is None


def test_a_record_that_cannot_be_read_here_is_no_silence() -> None:
    """A home under a newer key has heard of something: SQL is asked."""
    homes: dict[str, Reply] = {
        FIRST_HOME: reply("same", FIRST_HOME),
        SECOND_HOME: Unreachable("a key unknown here", sealed=True),
    }
    assert judge_stand_in(homes, standing_in("same"), TIMING, NOW) is None


def test_without_a_stand_in_or_a_pair_nothing_is_settled() -> None:
    """Two nodes, or one home."""
    homes = one_silent("same", SECOND_HOME)
    assert judge_stand_in(homes, {}, TIMING, NOW) is None
    only = {FIRST_HOME: reply("same", FIRST_HOME)}
    assert judge_stand_in(only, standing_in("same"), TIMING, NOW) is None
    assert (
        judge_stand_in({FIRST_HOME: SILENT}, standing_in("same"), TIMING, NOW) is None
    )


@pytest.mark.parametrize("third", ANSWERS)
def test_what_sql_vouched_for_goes_to_the_stand_in_too(third: str) -> None:
    """Where it can be written, and is repaired unless it holds exactly that."""
    homes = one_silent("same", SECOND_HOME)
    live = with_stand_in(confirmed(SAME, homes), homes, standing_in(third))
    places: dict[str, Token | None] = {FIRST_HOME: TOKENS[FIRST_HOME]}
    if third in COPIES:
        places[STAND_IN] = TOKEN
    elif third == "corrupt":
        places[STAND_IN] = TOKENS[FIRST_HOME]
    elif third == "miss":
        places[STAND_IN] = None
    assert live.places == places
    well = third in ("same", "expired", "unreachable")
    assert live.repairs == (() if well else (STAND_IN,))


def test_with_both_homes_there_is_nothing_to_stand_in_for() -> None:
    """The stand-in is left alone, and so it is where SQL could not be asked."""
    homes: dict[str, Reply] = {name: reply("same", name) for name in PAIR}
    live = confirmed(SAME, homes)
    assert with_stand_in(live, homes, standing_in("miss")) is live
    homes = one_silent("same", SECOND_HOME)
    live = replace(confirmed(SAME, homes), standing=Standing.UNVERIFIED)
    assert with_stand_in(live, homes, standing_in("miss")) is live


@pytest.mark.parametrize(("first", "second"), list(itertools.product(Ack, repeat=2)))
def test_the_stand_in_hears_of_what_not_both_homes_took(
    first: Ack, second: Ack
) -> None:
    """What a stand-in took is not a home's."""
    told = {first, second} != {Ack.STORED}
    assert to_be_told(PAIR, {FIRST_HOME: first, SECOND_HOME: second}) is told
    assert to_be_told(PAIR, {FIRST_HOME: first, STAND_IN: Ack.STORED})


def test_what_the_stand_in_has_heard_of_is_not_undone() -> None:
    """A change that comes late is joined with what stands there."""
    later = replace(SAME, entries={**SAME.entries, "more": Entry(NOW + 5, 1, b"x")})
    (there,) = standing_in("same").values()
    assert with_what_stands(later, there) == later
    assert with_what_stands(SAME, Hit(later, TOKEN)) is None
    assert with_what_stands(SAME, Hit(DEAD, TOKEN)) is None
    both = with_what_stands(OTHER, Hit(later, TOKEN))
    assert both is not None
    assert both.entries == {**later.entries, **OTHER.entries}
    for answer in ("miss", "corrupt"):
        assert with_what_stands(SAME, reply(answer, FIRST_HOME)) == SAME
    assert with_what_stands(SAME, SILENT) is None


class OneNode:
    """A stand-in that others tell something as well.

    :ivar meanwhile: what they put there before each of our writes.
    """

    def __init__(self, *meanwhile: Record | Tombstone) -> None:
        self._meanwhile = list(meanwhile)
        self.holds: Record | Tombstone | None = None
        self._token = 1

    def read(
        self, names: Sequence[str], session_key: str, keyring: object, deadline: float
    ) -> dict[str, Reply]:
        """What it holds."""
        if self.holds is None:
            return dict.fromkeys(names, Miss())
        return dict.fromkeys(names, Hit(self.holds, Token(self._token, 1)))

    def place(
        self, session_key: str, data: bytes, exptime: int, token: Token | None
    ) -> tuple[bytes, int]:
        """A write that stands for a request."""
        return data, 0 if token is None else token.value

    def write(self, requests: Sequence[Any], deadline: float) -> list[Ack]:
        """Only where it was read."""
        if self._meanwhile:
            self.holds = self._meanwhile.pop(0)
            self._token += 1
        ((_, (data, value)),) = requests
        if value != (0 if self.holds is None else self._token):
            return [Ack.CONFLICT]
        copy = KEYRING.unseal(KEY, data)
        assert isinstance(copy, Record)
        self.holds = copy
        return [Ack.STORED]

    def remove(self, session_key: str) -> None:
        """Nothing that others put there is removed."""
        raise AssertionError("removed")


def tell(node: OneNode, record: Record) -> None:
    """Tell it of a change that one home took."""
    ring = Ring([RingNode(name) for name in "abc"], 2)
    homes = Homes(ring, cast(Cluster, node))
    access = Access(KEY, KEYRING, TIMING, 0.0)
    homes.tell_stand_in(access, record, {ring.homes(KEY)[0]: Ack.STORED}, NOW)


def test_others_tell_it_at_the_same_time() -> None:
    """Nothing that they told it is lost: a change is joined, an end stays."""
    later = replace(SAME, entries={**SAME.entries, "more": Entry(NOW + 5, 1, b"x")})
    node = OneNode(SAME, later)
    tell(node, OTHER)
    assert isinstance(node.holds, Record)
    assert node.holds.entries == {**later.entries, **OTHER.entries}
    node = OneNode(SAME, DEAD)
    tell(node, OTHER)
    assert node.holds == DEAD
