"""What worker, broker and keeper say to each other, as bytes. No I/O here; both roles in one place.

A link carries one conversation at a time, so an answer needs no number: a worker that wants two things at once opens two
links. (Several FETCHes in a row are one conversation: they are answered in their order.)
A message is a fixed head and, for some, a body of bytes (a session's baggage, or a sentence for humans):

    HELLO     worker -> broker    pool (body), row, incarnation           answered WELCOME or REFUSED
    SHARE     worker -> broker    slot, generation, session + descriptor  a duplicate of a session, so that others can attach
    SHOWN     worker -> broker    everything this process has was shared
    FETCH     worker -> broker    slot, generation                        answered SESSION + descriptor, or GONE
    WAIT      worker -> broker    lane, FRONT if it was first before      answered, when its turn comes, GRANT or DIAL; or TOO_MANY
    CANCEL    worker -> broker    which; strike my WAIT; GIVEN_UP: and    answered STRUCK, the same number, after GRANT or DIAL if that
                                  take back what it was granted           was on its way
    LOOK      worker -> broker    something became free
    PUT       broker -> keeper    pool, slot, generation + descriptor     answered KEPT
    DROP      broker -> keeper    pool, slot, generation
    GIVE_ALL  broker -> keeper                                            answered with a PUT a session, then SHOWN
    LEAVE     broker -> keeper    pool                                    the broker goes, workers are there: watch over it
    REPLACE   next broker -> broker    make room for me                   answered LEAVE when the place is free, or REFUSED
    REPLACED  next broker -> the last  I serve; if the link ends without this, the last one comes back
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import NamedTuple

from mppool.errors import ProtocolError
from mppool.kernel.link import MAX_MESSAGE
from mppool.options import MAX_SLOTS

__all__ = [
    "FRONT",
    "GIVEN_UP",
    "MAX_BAGGAGE",
    "RESIDENT",
    "Kind",
    "Message",
    "OtherVersion",
    "decode",
    "encode",
    "is_pool",
    "pack_held",
    "pack_session",
    "unpack_held",
    "unpack_session",
]

WIRE_VERSION = 0xA3  # A: mppool; anything else that begins otherwise is not ours
MAX_BAGGAGE = 64 * 1024

FRONT = 1  # flag of WAIT
GIVEN_UP = 4  # flag of CANCEL: nobody looks at the lane any more before this was answered
RESIDENT = 2  # flag of SHARE and PUT: the session cannot move, the duplicate is there to end it

_HEAD = struct.Struct("<BBBBIQ")  # version, kind, flags, descriptors, slot or lane or row, generation or incarnation or a count


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    SHARE = 4
    SHOWN = 5
    FETCH = 6
    SESSION = 7
    GONE = 8
    WAIT = 9
    GRANT = 10
    DIAL = 11
    TOO_MANY = 12
    CANCEL = 13
    STRUCK = 14
    LOOK = 15
    PUT = 16
    KEPT = 17
    DROP = 18
    GIVE_ALL = 19
    LEAVE = 20
    REPLACE = 21
    REPLACED = 22


_KINDS = {int(kind): kind for kind in Kind}
_WITH_DESCRIPTOR = frozenset({Kind.SHARE, Kind.SESSION, Kind.PUT})
_MAY_HAVE_DESCRIPTOR = _WITH_DESCRIPTOR | {Kind.GRANT}


_tuple = tuple.__new__


class OtherVersion(ProtocolError):
    """The other side is another version of mppool."""


class Message(NamedTuple):
    kind: Kind
    number: int = 0  # of a slot, lane or row
    serial: int = 0  # a generation, an incarnation, an epoch, or which CANCEL
    flags: int = 0
    body: bytes = b""

    def __repr__(self) -> str:
        """Without the body's content: baggage is a login's secret, and messages end up in tracebacks."""
        return f"Message({self.kind.name}, number={self.number}, serial={self.serial}, flags={self.flags}, body=<{len(self.body)} bytes>)"


def encode(message: Message, descriptors: int = 0) -> bytes:
    kind, number, serial, flags, body = message
    return _HEAD.pack(WIRE_VERSION, kind, flags, descriptors, number, serial) + body


def decode(data: bytes, descriptors: int) -> Message:
    """The message in ``data``, which came with so many descriptors. Raises ProtocolError for anything out of bounds."""
    if not _HEAD.size <= len(data) <= MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes")
    version, number_of_kind, flags, announced, number, serial = _HEAD.unpack_from(data)
    if version != WIRE_VERSION:
        error = OtherVersion if version >> 4 == WIRE_VERSION >> 4 else ProtocolError
        raise error(f"a message of wire version {version}, this mppool speaks {WIRE_VERSION}")
    kind = _KINDS.get(number_of_kind)
    if kind is None:
        raise ProtocolError(f"a message of unknown kind {number_of_kind}")
    if announced != descriptors or (descriptors and kind not in _MAY_HAVE_DESCRIPTOR) or (not descriptors and kind in _WITH_DESCRIPTOR):
        raise ProtocolError(f"{kind.name} announced {announced} descriptors and came with {descriptors}")
    if number > MAX_SLOTS * 4:
        raise ProtocolError(f"{kind.name} names place {number}")
    return _tuple(Message, (kind, number, serial, flags, data[_HEAD.size :]))  # a call of Message() would be half of this function's time


def pack_session(baggage: bytes, farewell: bytes) -> bytes:
    """The body of SHARE, SESSION and GRANT: how to attach the session, and what to say to the server if its holder dies."""
    return bytes([len(farewell)]) + farewell + baggage


def unpack_session(body: bytes) -> tuple[bytes, bytes]:
    """Baggage and farewell; whatever the bytes are."""
    size = body[0] if body else 0
    return body[1 + size :], body[1 : 1 + size]


def pack_held(ident: str, baggage: bytes) -> bytes:
    """The body of PUT, DROP, KEPT and LEAVE: which pool, and the baggage."""
    name = ident.encode()
    return bytes([len(name)]) + name + baggage


def unpack_held(body: bytes) -> tuple[str, bytes]:
    if not body or len(body) < 1 + body[0]:
        raise ProtocolError("a held session without the name of its pool")
    return body[1 : 1 + body[0]].decode(errors="replace"), body[1 + body[0] :]


def is_pool(ident: str) -> bool:
    """Can this be the name of a pool? What comes over a link becomes part of a path only if it can."""
    return re.fullmatch("mppool-[0-9a-f]{8}-[0-9a-f]{10}", ident) is not None
