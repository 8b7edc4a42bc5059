"""The durable row: its columns on each database, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

#: Longest names of homes stored with a row: two names of 100 characters and a comma.
_HOMES_LENGTH: Final = 255

#: Longest user id that is indexed as it is. MySQL indexes at most 767 bytes of a
#: column in its older formats, at 4 bytes a character.
USER_ID_LENGTH: Final = 191


@dataclass(frozen=True, slots=True)
class Row:
    """One row; times are Unix milliseconds.

    :ivar record: sealed bytes; None in a tombstone.
    :ivar homes: names of the nodes that held the session at the last sync.
    :ivar revoked_at: None while the session is live.
    :ivar reason: of a tombstone: ``ended`` or ``moved``.
    """

    session_key: str
    version: int
    record: bytes | None
    user_id: str | None
    homes: tuple[str, ...]
    created_at: int
    synced_at: int
    expires_at: int
    revoked_at: int | None = None
    reason: str | None = None


def define_table(metadata: sa.MetaData, name: str, schema: str | None) -> sa.Table:
    """The table in a metadata; the one that is there already if it has one.

    :param name: ``RESILIENT_SESSION_TABLE``.
    """
    schema = schema or metadata.schema
    known = metadata.tables.get(f"{schema}.{name}" if schema else name)
    if known is not None:
        return known
    digest = sa.CHAR(64).with_variant(
        mysql.CHAR(64, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )
    # Compared byte by byte: MySQL's default collation takes Bob and bob for one.
    user_id = sa.String(USER_ID_LENGTH).with_variant(
        mysql.VARCHAR(USER_ID_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"),
        "mysql",
        "mariadb",
    )
    # LargeBinary alone is a BLOB of 64 KB on MySQL.
    blob = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
    # Names in any script, whatever the database was set up for.
    homes = sa.String(_HOMES_LENGTH).with_variant(
        mysql.VARCHAR(_HOMES_LENGTH, charset="utf8mb4"), "mysql", "mariadb"
    )
    time = sa.BigInteger
    return sa.Table(
        name,
        metadata,
        sa.Column("session_key", digest, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("record", blob, nullable=True),
        sa.Column("user_id", user_id, nullable=True),
        sa.Column("homes", homes, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("synced_at", time, nullable=False),
        sa.Column("expires_at", time, nullable=False),
        sa.Column("revoked_at", time, nullable=True),
        sa.Column("reason", sa.String(8), nullable=True),
        sa.Index(f"ix_{name}_user_id", "user_id"),
        sa.Index(f"ix_{name}_expires_at", "expires_at", "session_key"),
        schema=schema,
    )


#: Columns that an update writes: all but the key and the time of creation.
UPDATED: Final[Sequence[str]] = (
    "version",
    "record",
    "user_id",
    "homes",
    "synced_at",
    "expires_at",
    "revoked_at",
    "reason",
)


def columns_of(row: Row) -> dict[str, Any]:
    """A row as the columns hold it."""
    return {
        "session_key": row.session_key,
        "version": row.version,
        "record": row.record,
        "user_id": row.user_id,
        "homes": ",".join(row.homes),
        "created_at": row.created_at,
        "synced_at": row.synced_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
        "reason": row.reason,
    }


def row_of(found: Any) -> Row:
    """What a query found, as a row."""
    values = dict(found._mapping)
    values["homes"] = tuple(name for name in values["homes"].split(",") if name)
    if values["record"] is not None:
        values["record"] = bytes(values["record"])
    return Row(**values)
