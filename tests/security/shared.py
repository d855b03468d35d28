"""What these tests do in their pools, and see."""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Callable
from typing import Any

import mppool
from mppool.wire import Message, encode
from tests.helpers.server import Judge
from tests.helpers.users import Home

AT_ONCE = 10.0  # seconds, of a busy machine


def pool_of(home: Home, server: Judge, **options: Any) -> mppool.Pool:
    return mppool.Pool(server.address, name="web", broker=home.socket, **options)


def said_by(pool: mppool.Pool) -> dict[str, str]:
    """What a checkout comes to: the error and its words, or that it lent."""
    try:
        pool.putconn(pool.getconn(timeout=3))
    except mppool.Error as error:
        return {type(error).__name__: str(error)}
    return {"lent": ""}


def tried(*actions: Callable[[], object]) -> list[str]:
    """What each of these came to: the name of an errno, or "done"."""
    found = []
    for action in actions:
        try:
            action()
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
        else:
            found.append("done")
    return found


def send_fds(sock: socket.socket, message: Message, fds: list[int], announced: int = 1) -> None:
    sock.sendmsg([encode(message, announced)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
