"""PostgreSQL's protocol, as far as moving sessions needs it. No I/O here, and no client.

What a server says at the end of a login (welcome, its settings, the key to cancel with, ready) is all that a client needs to
believe that it is logged in. It is recorded when a session is dialed, some 400 bytes, and shown again to whoever adopts the
session, in whatever client: that is the baggage. It holds the cancel key, so it is never logged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache

__all__ = ["SSL_REQUEST", "cancel_request", "greeting_of", "is_greeting", "is_hopeless", "refusal_in", "settings_of"]

WELCOME = b"R\0\0\0\x08\0\0\0\0"  # AuthenticationOk
READY = b"Z\0\0\0\x05I"  # for a query, in no transaction
_HEAD = struct.Struct("!BI").unpack_from  # of a message: its kind, and its size without that
SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # answered b"S": go on with TLS, or b"N": go on as we are
REMEMBERED = (b"client_encoding", b"DateStyle", b"TimeZone", b"IntervalStyle", b"standard_conforming_strings")
_HOPELESS = ("28", "3D")  # classes of SQLSTATE that waiting does not help: not allowed in, no such database


def messages(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each whole message in what a server sent."""
    at = 0
    while at + 5 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 5], "big")
        if size < 4 or at + 1 + size > len(data):
            return
        yield data[at : at + 1], data[at + 5 : at + 1 + size]
        at += 1 + size


def greeting_of(heard: bytes) -> bytes:
    """Of all that a server said at a login, what it said last: welcome, its settings, the key to cancel with, ready. b"" if it never was ready."""
    greeting = WELCOME
    for kind, content in messages(heard):
        if kind in (b"S", b"K", b"Z"):
            greeting += kind + (len(content) + 4).to_bytes(4, "big") + content
        if kind == b"Z":
            return greeting
    return b""


def is_greeting(baggage: bytes) -> bool:
    """Is it what ``greeting_of`` makes, whole, and of an idle session?"""
    at, last = len(WELCOME), len(baggage) - len(READY)
    if not baggage.startswith(WELCOME) or not baggage.endswith(READY):
        return False
    while at < last:
        kind, size = _HEAD(baggage, at)
        if kind not in b"SK" or size < 4:
            return False
        at += 1 + size
    return at == last


@lru_cache(maxsize=256)
def settings_of(greeting: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The settings that clients remember, as the server greeted with them."""
    found = (content.split(b"\0")[:2] for kind, content in messages(greeting) if kind == b"S")
    return tuple((name, value) for name, value in found if name in REMEMBERED)


def cancel_request(greeting: bytes) -> bytes:
    """What to say on a connection of its own to cancel what that session is doing; b"" if the server gave no key."""
    for kind, content in messages(greeting):
        if kind == b"K" and len(content) >= 8:
            return struct.pack("!ii", 8 + len(content), 80877102) + content
    return b""


def refusal_in(heard: bytes) -> str:
    """The SQLSTATE with which a server refused a login, "" if it did not."""
    for kind, content in messages(heard):
        if kind == b"E":
            for field in content.split(b"\0"):
                if field[:1] == b"C":
                    return field[1:].decode("ascii", "replace")
    return ""


def is_hopeless(sqlstate: str) -> bool:
    """Will it be refused again, however long one waits?"""
    return sqlstate.startswith(_HOPELESS)
