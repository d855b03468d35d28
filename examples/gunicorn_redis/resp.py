"""Just enough of Redis' protocol (RESP 2): one command out, exactly one reply in.

A pooled connection may go to another process the moment it is returned, so a reply that is only half read, or followed by
bytes nobody asked for, would reach a stranger's request. Hence one rule: **on any doubt, raise**. An exception inside
``with pool.connection()`` closes that session, and the next user gets a clean one.
"""

from __future__ import annotations

import socket
from typing import Union

__all__ = ["Doubt", "RedisError", "Reply", "command", "parse"]

Reply = Union[bytes, int, None, "list[Reply]", "RedisError"]


class Doubt(Exception):
    """What came is not exactly one reply: this connection can be trusted no more."""


class RedisError(Exception):
    """Redis said no. That is a complete reply, and the session is fine: so it is returned, and raised by who wants to."""


def command(sock: socket.socket, *words: str | bytes | int) -> Reply:
    """Send one command and return its reply. Raises Doubt or OSError; then the session must not be used again."""
    sock.sendall(encode(*words))
    received = b""
    while True:
        data = sock.recv(65536)
        if not data:
            raise Doubt(f"Redis ended the connection after {len(received)} bytes of a reply")
        received += data
        parsed = parse(received)
        if parsed is not None:
            reply, end = parsed
            if end != len(received):
                raise Doubt(f"{len(received) - end} bytes came after the reply: {received[end : end + 40]!r}")
            return reply


def encode(*words: str | bytes | int) -> bytes:
    """An array of strings, as Redis wants its commands."""
    pieces = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(pieces) + b"".join(b"$%d\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def parse(data: bytes, start: int = 0) -> tuple[Reply, int] | None:
    """The reply that begins at ``start`` and where it ends; None if more bytes are needed. Raises Doubt."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, line, end = data[start : start + 1], data[start + 1 : line_end], line_end + 2
    if kind == b"+":
        return line, end
    if kind == b"-":
        return RedisError(line.decode(errors="replace")), end
    if kind == b":":
        return number(line), end
    if kind == b"$":
        size = number(line)
        if size == -1:
            return None, end
        if len(data) < end + size + 2:
            return None
        if size < 0 or data[end + size : end + size + 2] != b"\r\n":
            raise Doubt(f"a string of {size} bytes does not end where it should")
        return data[end : end + size], end + size + 2
    if kind == b"*":
        count, items = number(line), []
        if count == -1:
            return None, end
        for _ in range(count):
            item = parse(data, end)
            if item is None:
                return None
            items.append(item[0])
            end = item[1]
        return items, end
    raise Doubt(f"not the beginning of a reply: {data[start : start + 40]!r}")


def number(line: bytes) -> int:
    try:
        return int(line)
    except ValueError:
        raise Doubt(f"not a number: {line[:40]!r}") from None
