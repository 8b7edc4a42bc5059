"""What databases say when something fails: what it means, and what may be told.

Their words are for people who run the application; values of a row are in none that
leaves this module.
"""

from __future__ import annotations

import re
from typing import Final

import sqlalchemy as sa

#: What PostgreSQL, and MariaDB, call that: a deadlock, or no serial order.
_UNDONE_STATES: Final = frozenset({"40P01", "40001"})
_UNDONE_NUMBERS: Final = frozenset({1213, 1020})

#: MariaDB's number for a row that stands already.
_DUPLICATE: Final = 1062

#: What to do where the table is missing.
MIGRATE: Final = "run your migrations, or set RESILIENT_SESSION_CREATE_TABLE"

_NO_TABLE: Final = re.compile(
    r"no such table|relation .* does not exist|Table .* doesn't exist"
)

#: Where databases quote a value that they do not like.
_QUOTED: Final = re.compile(r"(entry|value|value:|type [\w ]+:) ('.*'|\".*\")")


def explain(error: sa.exc.SQLAlchemyError) -> str:
    """What happened, without statements or parameters, and what to do."""
    cause = getattr(error, "orig", None) or error
    # PyMySQL puts a number before its words. PostgreSQL's second line quotes the row.
    words = cause.args[1] if len(cause.args) == 2 else cause
    lines = str(words).splitlines() or [""]
    shown = _QUOTED.sub(r"\1 (not shown)", lines[0])
    text = f"{type(cause).__name__}: {shown}"
    if "locked" in text:
        text += (
            " (another writer holds the SQLite file; commit before the view returns,"
            " or give sessions a file of their own with RESILIENT_SESSION_BIND_KEY)"
        )
    elif _NO_TABLE.search(text):
        text += f" ({MIGRATE})"
    return text


def is_duplicate(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether MariaDB says that a row with this key stands already."""
    return _number(error) == _DUPLICATE


def _number(error: sa.exc.SQLAlchemyError) -> int | None:
    """MariaDB's number of an error."""
    arguments = getattr(getattr(error, "orig", None), "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None


def was_undone(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether the database undid it for the sake of a concurrent one."""
    cause = getattr(error, "orig", None)
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return state in _UNDONE_STATES or _number(error) in _UNDONE_NUMBERS
