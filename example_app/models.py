"""The shop's own table, in the database that also keeps the sessions."""

from __future__ import annotations

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """What the shop's models share."""


db = SQLAlchemy(model_class=Base)


class Product(Base):
    """Something to buy."""

    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    note: Mapped[str]
    colour: Mapped[str]
    cents: Mapped[int]


_SHELVES = (
    ("Assam", "Black, malty, gets up early", "#7a3b1d", 690),
    ("Sencha", "Green, grassy, a little sea", "#6f8f3a", 840),
    ("Oolong", "Half way between the two", "#b9803b", 1150),
    ("Rooibos", "Red, round, sleeps well", "#a4412e", 520),
    ("Peppermint", "Cool, and not tea at all", "#3f8f78", 450),
    ("Lapsang", "Smoke, mostly", "#4a4340", 980),
)


def all_products() -> list[Product]:
    """All products, in the order of the shelves."""
    return list(db.session.scalars(sa.select(Product).order_by(Product.id)))


def fill_shelves() -> None:
    """Put the products into an empty table."""
    if db.session.scalar(sa.select(Product.id).limit(1)) is not None:
        return
    db.session.add_all(
        Product(name=name, note=note, colour=colour, cents=cents)
        for name, note, colour, cents in _SHELVES
    )
    db.session.commit()
