"""The session object: a dict that loads itself, whatever is done to it first."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import copy_current_request_context, session

from apps import Site, Sites
from servers import wait_until

STORED: dict[str, Any] = {"a": 1, "b": [1, 2]}


@pytest.fixture
def site(sites: Sites) -> Site:
    """An application whose visitor has a session that holds ``STORED``."""
    site = sites()
    site.set(**STORED)
    site.data()
    return site


def raw() -> Any:
    """The session object itself, not Flask's proxy of it."""
    return session._get_current_object()  # type: ignore[attr-defined]


# --- every way to look into it ---------------------------------------------------

READS: dict[str, Callable[[Any], object]] = {
    "dict": lambda s: dict(s),
    "unpacking": lambda s: {**s},
    "keywords": lambda s: (lambda **kwargs: kwargs)(**s),
    "json": lambda s: json.dumps(s),
    "json indented": lambda s: json.dumps(s, indent=1),
    "list": lambda s: list(s),
    "sorted": lambda s: sorted(s),
    "tuple": lambda s: tuple(s),
    "star": lambda s: [*s],
    "reversed": lambda s: list(reversed(s)),
    "len": lambda s: len(s),
    "bool": lambda s: bool(s),
    "not": lambda s: not s,
    "in": lambda s: "a" in s,
    "not in": lambda s: "z" not in s,
    "item": lambda s: s["a"],
    "get": lambda s: s.get("a"),
    "get missing": lambda s: s.get("z", 5),
    "keys": lambda s: list(s.keys()),
    "values": lambda s: list(s.values()),
    "items": lambda s: list(s.items()),
    "iteration": lambda s: [key for key in s],  # noqa: C416
    "equal": lambda s: s == STORED,
    "equal, reflected": lambda s: operator.eq(STORED, s),
    "unequal": lambda s: s != STORED,
    "unequal, reflected": lambda s: operator.ne({}, s),
    "or": lambda s: s | {"c": 3},
    "or, reflected": lambda s: {"c": 3} | s,
    "copy": lambda s: s.copy(),
    "copy.copy": lambda s: dict(copy.copy(s)),
    "copy.deepcopy": lambda s: dict(copy.deepcopy(s)),
    "repr": lambda s: repr(dict(s)),
    "update another": lambda s: (lambda d: d.update(s) or d)({"c": 3}),
    "or into another": lambda s: (lambda d: d.__ior__(s))({"c": 3}),
    "fromkeys": lambda s: dict.fromkeys(s),
    "dict.get": lambda s: dict(s).get("a"),
    "match": lambda s: _matched(s),
    "format": lambda s: f"{s['a']}{s['b']}",
    "max": lambda s: max(s),
    "any": lambda s: any(s),
    "zip": lambda s: list(zip(s, range(2), strict=True)),
    "popped default": lambda s: s.pop("z", 9),
}

#: These look at the type, which Flask's proxy cannot imitate.
BY_TYPE = {"json", "match"}


def _matched(value: Any) -> object:
    match value:
        case {"a": found}:
            return found
    return None


@pytest.mark.parametrize(
    ("how", "proxied"),
    [(how, proxied) for how in READS for proxied in {how not in BY_TYPE, False}],
)
def test_every_way_of_reading_loads_and_answers_as_dict(
    site: Site, how: str, proxied: bool
) -> None:
    """The first use may be any method or builtin, through Flask's proxy or not."""
    look = READS[how]
    found: list[object] = []
    modified: list[bool] = []

    def action() -> None:
        target = session if proxied else raw()
        found.append(look(target))
        modified.append(session.modified)

    assert site.visit(action).status_code == 200
    expected = look(dict(STORED))
    assert found == [expected]
    assert type(found[0]) is type(expected)
    assert modified == [False]
    assert site.data() == STORED


WRITES: dict[str, Callable[[Any], object]] = {
    "set item": lambda s: s.__setitem__("c", 3),
    "delete item": lambda s: s.__delitem__("a"),
    "update mapping": lambda s: s.update({"c": 3}),
    "update pairs": lambda s: s.update([("c", 3)], d=4),
    "or into it": lambda s: s.__ior__({"c": 3}) and None,
    "pop": lambda s: s.pop("a"),
    "popitem": lambda s: s.popitem(),
    "setdefault": lambda s: s.setdefault("c", 3),
    "clear": lambda s: s.clear(),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("proxied", [True, False])
def test_every_way_of_writing_loads_first_and_writes_as_dict(
    site: Site, how: str, proxied: bool
) -> None:
    """A write as the first use keeps all that it does not touch."""
    change = WRITES[how]
    found: list[object] = []
    modified: list[bool] = []

    def action() -> None:
        found.append(change(session if proxied else raw()))
        modified.append(session.modified)

    assert site.visit(action).status_code == 200
    expected = copy.deepcopy(STORED)
    assert found == [change(expected)]
    assert modified == [True]
    assert site.data() == expected


def test_setdefault_of_a_known_key_changes_nothing(site: Site) -> None:
    """It only reads then."""

    def action() -> str:
        assert session.setdefault("a", 9) == 1
        return str(session.modified)

    assert site.visit(action).text == "False"


@pytest.mark.parametrize(
    "mistake",
    [lambda s: s["z"], lambda s: s.pop("z"), lambda s: s.__delitem__("z")],
)
def test_a_missing_key_is_a_key_error(
    site: Site, mistake: Callable[[Any], Any]
) -> None:
    """As with dict, and nothing is modified."""

    def action() -> str:
        with pytest.raises(KeyError, match="z"):
            mistake(session)
        return str(session.modified)

    assert site.visit(action).text == "False"


def test_augmented_assignment_works_on_the_proxy(site: Site) -> None:
    """``g |= …`` on the session object keeps it the same object."""

    def action() -> str:
        target = before = raw()
        target |= {"c": 3}
        return str(target is before is raw())

    assert site.visit(action).text == "True"
    assert site.data() == STORED | {"c": 3}


def test_a_copy_is_a_plain_dict(site: Site) -> None:
    """What is done to a copy does not change the session, and cannot be saved."""

    def action() -> None:
        for duplicate in (session.copy(), copy.copy(raw()), copy.deepcopy(raw())):
            assert type(duplicate) is dict
            duplicate["c"] = 3
        assert pickle.loads(pickle.dumps(raw())) == STORED  # noqa: S301

    assert site.visit(action).status_code == 200
    assert site.data() == STORED


def test_threads_of_one_request_load_it_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copy_current_request_context: one load, and no thread's write is lost."""
    second_is_there = threading.Event()
    loads: list[object] = []
    load = site.state.store.load

    def slow_load(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        assert second_is_there.wait(10)
        return load(*args, **kwargs)

    def write(key: str) -> None:
        session[key] = 1

    def action() -> None:
        second_is_there.clear()
        threads = [
            threading.Thread(target=copy_current_request_context(write), args=(key,))
            for key in ("first", "second")
        ]
        threads[0].start()
        wait_until(lambda: loads)
        threads[1].start()
        second_is_there.set()
        for thread in threads:
            thread.join()

    monkeypatch.setattr(site.state.store, "load", slow_load)
    for _ in range(20):
        loads.clear()
        assert site.visit(action).status_code == 200
        assert len(loads) == 1
    monkeypatch.undo()
    assert site.data() == STORED | {"first": 1, "second": 1}
