"""The session object: a dict that loads itself on first use and knows what changed.

It starts as a :class:`LazySession`. The first use of its data, by whatever method
and with or without a request context, loads it and turns the same object into a
:class:`LoadedSession`, whose methods are dict's own; or into an
:class:`UnavailableSession`, empty and read-only, where nobody could say whether the
session exists.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from typing import Any, Final, Protocol

from flask.sessions import SessionMixin

from ..common.errors import SessionUnavailable
from ..core.values import decode, encode

#: Bytes of chance in a session id: 256 bits.
_ID_BYTES: Final = 32

#: Keys that do not make a session worth storing: alone they count as empty.
_BOOKKEEPING: Final = frozenset({"_permanent"})


def new_sid() -> str:
    """A new session id: 43 characters that are safe in a cookie."""
    return secrets.token_urlsafe(_ID_BYTES)


class Visit(Protocol):
    """What a session asks of the request that it belongs to."""

    def load(self, session: Session) -> None:
        """Fill the session, or make it unavailable.

        :raises SessionUnavailable: once, where a response can still be chosen.
        """

    def session_key(self) -> str:
        """Digest of the id that the request came with; empty without one."""

    def refuse_write(self) -> None:
        """Answer a write to an unavailable session.

        :raises SessionUnavailable: while there is no response; afterwards the write
            is counted and logged.
        """


class Session(dict[str, Any], SessionMixin):
    """What all states of a session object share.

    :ivar new: nothing is stored under its id yet.
    :ivar modified: something was assigned or removed; set it yourself after changing
        a value in place, as with Flask's own session.
    :ivar accessed: this request used the session.
    :ivar cleared: :meth:`clear` was called in this request.
    :ivar sync_wanted: :meth:`sync` was called in this request.
    :ivar id_wanted_new: :meth:`regenerate` was called in this request.
    """

    new: bool = False
    modified: bool = False
    accessed: bool = False
    cleared: bool = False
    sync_wanted: bool = False
    id_wanted_new: bool = False
    #: Whether the data is here, so that there is something to save.
    loaded: bool = False

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self.visit = visit
        self._sid: str | None = None
        self._stored: Mapping[str, bytes] = {}

    # --- for users ---------------------------------------------------------------

    @property
    def sid(self) -> str:
        """The session id; a secret. A new session gets one when it is asked for."""
        self.ensure_loaded()
        if self._sid is None:
            self._sid = new_sid()
        return self._sid

    @property
    def unavailable(self) -> bool:
        """Whether nobody could say if the session exists; it is empty then.

        Asking does not raise, so that a page can decide for itself.
        """
        try:
            self.ensure_loaded()
        except SessionUnavailable:
            return True
        return isinstance(self, UnavailableSession)

    def regenerate(self) -> None:
        """Give the session a new id at the end of this request; the old one is dead.

        :raises SessionUnavailable: the session could not be loaded.
        """
        self.ensure_loaded()
        if self._writable():
            self._sid = new_sid()
            self.id_wanted_new = True
            self.modified = True

    def sync(self) -> None:
        """Write this session to SQL at the end of this request.

        What it holds then survives the loss of all memory.

        :raises SessionUnavailable: the session could not be loaded.
        """
        self.ensure_loaded()
        if self._writable():
            self.sync_wanted = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, a deep copy or a pickle of a session is a dict: there is one session
        # object for one request.
        self.ensure_loaded()
        return (dict, (dict(self),))

    # --- for the interface -------------------------------------------------------

    def ensure_loaded(self) -> None:
        """Load the data if this was not done yet."""

    def fill(self, sid: str | None, stored: Mapping[str, bytes]) -> None:
        """Become loaded.

        :param sid: None: a new session, with an id when one is needed.
        :param stored: key -> encoded value, the base of :meth:`changes`.
        """
        data = decode(stored)
        self._sid = sid
        self._stored = stored
        self.__dict__["new"] = sid is None
        dict.clear(self)
        dict.update(self, data)
        # Last: other threads of this request take it for complete then.
        self.__class__ = LoadedSession

    def rename(self, sid: str) -> None:
        """Take the id under which the session was stored in the end."""
        self._sid = sid

    def become_unavailable(self, sid: str) -> None:
        """Become empty and read-only.

        :param sid: the id in its cookie.
        """
        self._sid = sid
        dict.clear(self)
        self.__class__ = UnavailableSession

    def changes(self) -> dict[str, bytes | None]:
        """Key -> encoded value, None for a removed key; nothing if not modified.

        Every key is compared by its encoded bytes, so that only what this request
        changed is written and concurrent changes of other keys stay.

        :raises TypeError: a value cannot be stored; names its key and type.
        """
        if not self.modified:
            return {}
        encoded = encode(self)
        stored = self._stored
        changes: dict[str, bytes | None] = {
            key: value for key, value in encoded.items() if stored.get(key) != value
        }
        changes.update(dict.fromkeys(key for key in stored if key not in encoded))
        return changes

    def is_empty(self) -> bool:
        """Whether there is nothing in it that is worth storing."""
        return self.keys() <= _BOOKKEEPING

    def _writable(self) -> bool:
        return True


class LoadedSession(Session):
    """A session whose data is here."""

    loaded = True

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.modified = True

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.modified = True

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        super().__ior__(other)
        self.modified = True
        return self

    def clear(self) -> None:
        """Remove everything: the session ends, and its id is dead for good."""
        super().clear()
        self.modified = self.cleared = True

    def pop(self, key: str, *default: Any) -> Any:
        """As dict's."""
        known = key in self
        value = super().pop(key, *default)
        self.modified = self.modified or known
        return value

    def popitem(self) -> tuple[str, Any]:
        """As dict's."""
        item = super().popitem()
        self.modified = True
        return item

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As dict's."""
        known = key in self
        value = super().setdefault(key, default)
        self.modified = self.modified or not known
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As dict's."""
        super().update(*args, **kwargs)
        self.modified = True


class UnavailableSession(Session):
    """An empty session that cannot be written."""

    def _writable(self) -> bool:
        self.visit.refuse_write()
        return False

    def __setitem__(self, key: str, value: Any) -> None:
        self._writable()

    def __delitem__(self, key: str) -> None:
        self._writable()
        raise KeyError(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self._writable()
        return self

    def clear(self) -> None:
        """Refused: it may not be known whether there is something to end."""
        self._writable()

    def pop(self, key: str, *default: Any) -> Any:
        """Refused: somebody may believe that this logged them out."""
        self._writable()
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Refused."""
        self._writable()
        return super().popitem()

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Refused; afterwards the default, as if it had been set."""
        self._writable()
        return default

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        self._writable()


class LazySession(Session):
    """A session that nobody has looked into yet."""

    def __init__(self, visit: Visit) -> None:
        super().__init__(visit)
        # Code in C that asks for dict's own size, as json's encoder does before it
        # asks for the items, must not take it for empty.
        dict.__setitem__(self, "", None)
        self._loading = threading.RLock()
        self._under_way = False

    @property
    def new(self) -> bool:  # type: ignore[override]
        """Whether nothing is stored under its id yet; loads to find out."""
        self.ensure_loaded()
        return False if isinstance(self, LazySession) else self.new

    def ensure_loaded(self) -> None:
        """Load the data."""
        self.accessed = True
        with self._loading:
            if isinstance(self, LazySession) and not self._under_way:
                self._under_way = True
                try:
                    self.visit.load(self)
                finally:
                    self._under_way = False


#: Every method of dict that looks at the data or changes it.
_DATA_METHODS: Final = (
    *("__contains__", "__delitem__", "__eq__", "__ge__", "__getitem__", "__gt__"),
    *("__ior__", "__iter__", "__le__", "__len__", "__lt__", "__ne__", "__or__"),
    *("__repr__", "__reversed__", "__ror__", "__setitem__", "__str__", "clear"),
    *("copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update"),
    "values",
)


#: Those of them that change it.
_WRITES: Final = frozenset(
    {"__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem"}
    | {"setdefault", "update"}
)


def _loading(name: str) -> Any:
    """A method that loads the data and then is the loaded session's."""

    def method(self: LazySession, *args: Any, **kwargs: Any) -> Any:
        self.ensure_loaded()
        if not isinstance(self, LazySession):
            return getattr(self, name)(*args, **kwargs)
        # A listener or a log filter looks at the session while it is being loaded.
        if name in _WRITES:
            raise RuntimeError("The session is being loaded and cannot be changed yet.")
        return getattr({}, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _DATA_METHODS:
    setattr(LazySession, _name, _loading(_name))
