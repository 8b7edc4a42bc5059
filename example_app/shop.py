"""The shop: log in with a name, fill a cart, log out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from flask import Blueprint, abort, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response

from flask_resilient_session import Session

from .models import Product, all_products, db
from .panel import look_inside

bp = Blueprint("shop", __name__)

#: Session key of the user's name. It is RESILIENT_SESSION_USER_KEY as well, so that
#: logging in gives the session a new id and is in SQL before it is acknowledged.
USER: Final = "user"

_TOKEN: Final = "csrf_token"

#: Each product in the cart is a session key of its own: two tabs that add different
#: products at the same moment change different keys, and both changes survive.
_IN_CART: Final = "cart:"

_MOST_OF_ONE: Final = 99
_LONGEST_NAME: Final = 40


@dataclass(frozen=True)
class CartLine:
    """One product in the cart, and how many of it."""

    product: Product
    quantity: int

    @property
    def cents(self) -> int:
        """What they cost together."""
        return self.product.cents * self.quantity


# --- pages -----------------------------------------------------------------------


@bp.get("/")
def index() -> str:
    """Shelves, cart, and what happened to the session for this very page."""
    token = _token()
    cart = _cart()
    return render_template(
        "shop.html",
        user=session.get(USER),
        token=token,
        products=all_products(),
        cart=cart,
        total=sum(line.cents for line in cart),
        panel=look_inside(_session()),
    )


@bp.post("/login")
def login() -> Response:
    """Any name will do."""
    name = request.form.get("name", "").strip()[:_LONGEST_NAME]
    if not name:
        abort(400, "A name is needed to log in.")
    session[USER] = name
    session[_TOKEN] = secrets.token_urlsafe()
    return _home()


@bp.post("/logout")
def logout() -> Response:
    """End the session: its id is dead for good, on every node and in SQL."""
    session.clear()
    return _home()


@bp.post("/cart/<int:product_id>")
def add(product_id: int) -> Response:
    """Put one more into the cart."""
    if db.session.get(Product, product_id) is None:
        abort(404, "This product does not exist.")
    key = f"{_IN_CART}{product_id}"
    session[key] = min(session.get(key, 0) + 1, _MOST_OF_ONE)
    # In SQL before the page is answered: it survives the loss of all memory.
    _session().sync()
    return _home()


@bp.post("/cart/<int:product_id>/remove")
def remove(product_id: int) -> Response:
    """Take all of one product out of the cart."""
    session.pop(f"{_IN_CART}{product_id}", None)
    _session().sync()
    return _home()


@bp.get("/health")
def health() -> str:
    """For a load balancer. No session is touched: it works when no store does."""
    return "ok\n"


# --- parts -----------------------------------------------------------------------


@bp.before_request
def refuse_forgeries() -> None:
    """A form counts only with the token that this session's page carried."""
    if request.method != "POST":
        return
    expected = session.get(_TOKEN)
    given = request.form.get(_TOKEN, "")
    if expected is None or not secrets.compare_digest(
        expected.encode(), given.encode()
    ):
        abort(400, "This form is out of date. Go back to the shop and try again.")


@bp.app_template_filter("price")
def price(cents: int) -> str:
    """An amount of money."""
    return f"{cents // 100}.{cents % 100:02}"


def _token() -> str:
    if _TOKEN not in session:
        session[_TOKEN] = secrets.token_urlsafe()
    token: str = session[_TOKEN]
    return token


def _cart() -> list[CartLine]:
    return [
        CartLine(product, session[key])
        for product in all_products()
        if (key := f"{_IN_CART}{product.id}") in session
    ]


def _session() -> Session:
    """The session itself, for what Flask's own has not got."""
    proxy: Any = session
    current = proxy._get_current_object()
    assert isinstance(current, Session)
    return current


def _home() -> Response:
    return redirect(url_for("shop.index"), 303)
