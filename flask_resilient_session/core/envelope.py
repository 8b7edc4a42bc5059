"""Records as bytes, sealed: what a node and SQL hold.

Bytes are used only if their MAC fits this application and this session. Nothing in
them is ever executed.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets as secrets_module
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from .record import Copy, Entry, Record, Tombstone

#: What every record starts with: the magic, the format number, the cipher.
MAGIC: Final = b"frs"
FORMAT: Final = 1
PLAIN: Final = 0
AES_GCM: Final = 1

#: Random nonces are safe for 2**32 records under one key. A busy site writes as many
#: in weeks, so that each session is encrypted under a key of its own.
_NONCE_BYTES: Final = 12

_KEY_ID_BYTES: Final = 4
_MAC_BYTES: Final = 32
_HEADER_BYTES: Final = len(MAGIC) + 2 + _KEY_ID_BYTES

#: An upper bound of what the envelope adds to a session of the largest allowed
#: size: stamps and key names of its entries, and the markers of what was deleted since
#: the last sync. A longer item is not one of ours and is not read.
ENVELOPE_ALLOWANCE: Final = 256 * 1024

_LIVE: Final = 1
_DEAD: Final = 0
_NEVER_SYNCED: Final = 1
_UNVERIFIED: Final = 2
_DEBT: Final = 4


@dataclass(frozen=True, slots=True)
class CorruptBytes:
    """Bytes that are no record of this session: garbage, foreign or swapped."""


@dataclass(frozen=True, slots=True)
class UnknownFormat:
    """A record under a key or format that this worker does not know.

    Another worker may be ahead in a key rotation or an upgrade, so it is neither
    used nor overwritten.
    """


@dataclass(frozen=True, slots=True)
class _SealKey:
    """What one secret key is used for."""

    mac: hmac.HMAC
    encryption: bytes = field(repr=False)


class Keyring:
    """The keys that seal records: the current one, and older ones still accepted.

    :param secrets: the application's secret keys, the current one first.
    :param namespace: what the records belong to; bytes of another namespace are
        corrupt here.
    :param encrypt: encrypt what is sealed. What is opened may be either.
    :raises ImportError: ``encrypt`` without the library ``cryptography``.
    """

    def __init__(
        self,
        secrets: Iterable[str | bytes],
        namespace: str,
        *,
        encrypt: bool = False,
    ) -> None:
        self._keys: dict[bytes, _SealKey] = {}
        label = namespace.encode()
        for secret in secrets:
            raw = secret.encode() if isinstance(secret, str) else secret
            key = hmac.digest(raw, b"flask-resilient-session record", "sha256")
            key_id = hashlib.sha256(b"key id" + key).digest()[:_KEY_ID_BYTES]
            prepared = hmac.new(key, len(label).to_bytes(4, "big") + label, "sha256")
            cipher_key = hmac.digest(raw, b"flask-resilient-session cipher", "sha256")
            self._keys.setdefault(key_id, _SealKey(prepared, cipher_key))
        if not self._keys:
            raise ValueError("A keyring needs at least one secret key.")
        if encrypt:
            _aes_gcm(b"", "")
        self._cipher = AES_GCM if encrypt else PLAIN
        current = next(iter(self._keys))
        self._header = MAGIC + bytes((FORMAT, self._cipher)) + current

    def seal(self, session_key: str, copy: Copy) -> bytes:
        """A record or tombstone as bytes that only fit this session.

        :param session_key: hex digest of the session id.
        """
        body = _pack(copy)
        if self._cipher == AES_GCM:
            nonce = secrets_module.token_bytes(_NONCE_BYTES)
            cipher = _aes_gcm(self._keys[self._header[5:]].encryption, session_key)
            context = self._header + session_key.encode("ascii")
            body = nonce + cipher.encrypt(nonce, body, context)
        mac = self._mac(self._header, session_key, body)
        return self._header + mac + body

    def unseal(
        self, session_key: str, data: bytes
    ) -> Copy | CorruptBytes | UnknownFormat:
        """The reverse of :meth:`seal`; never raises, whatever the bytes are."""
        if len(data) < _HEADER_BYTES + _MAC_BYTES or not data.startswith(MAGIC):
            return CorruptBytes()
        header = data[:_HEADER_BYTES]
        known = data[3] == FORMAT and data[4] in (PLAIN, AES_GCM)
        if not known or header[5:] not in self._keys:
            return UnknownFormat()
        body = data[_HEADER_BYTES + _MAC_BYTES :]
        mac = data[_HEADER_BYTES : _HEADER_BYTES + _MAC_BYTES]
        if not hmac.compare_digest(mac, self._mac(header, session_key, body)):
            return CorruptBytes()
        return (
            _unpack(body) if data[4] == PLAIN else self._open(header, session_key, body)
        )

    def _open(
        self, header: bytes, session_key: str, body: bytes
    ) -> Copy | CorruptBytes | UnknownFormat:
        """Decrypt a body whose MAC has been verified."""
        try:
            from cryptography.exceptions import InvalidTag

            cipher = _aes_gcm(self._keys[header[5:]].encryption, session_key)
        except ImportError:
            # Another worker has the library; this one cannot say what is in it.
            return UnknownFormat()
        context = header + session_key.encode("ascii")
        nonce, sealed = body[:_NONCE_BYTES], body[_NONCE_BYTES:]
        try:
            return _unpack(cipher.decrypt(nonce, sealed, context))
        except (InvalidTag, ValueError):
            return CorruptBytes()

    def _mac(self, header: bytes, session_key: str, body: bytes) -> bytes:
        mac = self._keys[header[5:]].mac.copy()
        mac.update(header + session_key.encode("ascii") + body)
        return mac.digest()


@functools.lru_cache(maxsize=1024)
def _aes_gcm(key: bytes, session_key: str) -> Any:
    """The cipher of one session."""
    # Imported on use: it belongs to the extra "encryption".
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(hmac.digest(key, session_key.encode("ascii"), "sha256"))


def _pack(copy: Copy) -> bytes:
    if isinstance(copy, Tombstone):
        flags = _DEBT if copy.debt else 0
        fields: list[Any] = [_DEAD, copy.reason, copy.ended_ms, flags]
    else:
        flags = (_NEVER_SYNCED if copy.never_synced else 0) | (
            _UNVERIFIED if copy.unverified else 0
        )
        fields = [
            _LIVE,
            copy.created_ms,
            copy.last_use_ms,
            copy.synced_ms,
            copy.row_version,
            copy.writes,
            flags,
            copy.homes,
            copy.floor,
            copy.entries,
        ]
    packed: bytes = msgpack.packb(
        fields, use_bin_type=True, unicode_errors="surrogatepass"
    )
    return packed


def _unpack(body: bytes) -> Copy | CorruptBytes:
    # The MAC has vouched for the bytes, so what fails here was written by a bug.
    try:
        fields = msgpack.unpackb(body, use_list=False, unicode_errors="surrogatepass")
        if fields[0] == _DEAD:
            _, reason, ended_ms, flags = fields
            return Tombstone(reason, ended_ms, bool(flags & _DEBT))
        (_, created, used, synced, version, writes, flags, homes, floor, raw) = fields
        return Record(
            entries={key: Entry(*entry) for key, entry in raw.items()},
            floor=floor,
            created_ms=created,
            last_use_ms=used,
            synced_ms=synced,
            row_version=version,
            writes=writes,
            never_synced=bool(flags & _NEVER_SYNCED),
            unverified=bool(flags & _UNVERIFIED),
            homes=homes,
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return CorruptBytes()
