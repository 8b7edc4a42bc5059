"""Which combinations of a scenario's parameters are run on which database.

A scenario is run in all of them on SQLite. What a database answers does not depend on,
say, how a wire to a node was cut and to which one, and a combination takes long where a
node hangs or many threads work. Such scenarios are marked, and on each server they get
every value of every parameter, in as few combinations as that takes. The two servers
begin at opposite ends, so that they get different ones, and each has one of the homes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import pytest

#: The marker, as pytest lists it.
EACH_VALUE: Final = (
    "each_value: on servers, with each value of each parameter instead of with all"
    " combinations, and one home each"
)

_MARKER: Final = EACH_VALUE.partition(":")[0]
_DATABASE: Final = "lab_database"
_HOME: Final = {"postgresql": "first_home", "mariadb": "second_home"}


def without_needless_combinations(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """These tests, in their order, but of marked ones on servers only some."""
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        database = _parameters(item).get(_DATABASE, "sqlite")
        if item.get_closest_marker(_MARKER) and database != "sqlite":
            groups[item.nodeid.partition("[")[0], database].append(item)
    needless = {
        item
        for (_, database), group in groups.items()
        for item in _needless(database, group)
    }
    return [item for item in items if item not in needless]


def _needless(database: str, group: list[pytest.Item]) -> set[pytest.Item]:
    """Those that have no value that the others have not."""
    home = _HOME[database]
    # Who asks for one combination by its name gets it.
    left = [i for i in group if _parameters(i).get("home", home) == home] or group[:]
    if database == "mariadb":
        left.reverse()
    needed, seen = set[pytest.Item](), set[tuple[str, str]]()

    def new_values(item: pytest.Item) -> int:
        return len(_values(item) - seen)

    while left and new_values(best := max(left, key=new_values)):
        seen |= _values(best)
        needed.add(best)
        left.remove(best)
    return set(group) - needed


def _values(item: pytest.Item) -> set[tuple[str, str]]:
    return {(name, repr(value)) for name, value in _parameters(item).items()}


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params
