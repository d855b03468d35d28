"""A session as one process has it: the driver's object, and a socket of the pool's own to look at it and to end it."""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

from mppool.claims import Slot
from mppool.errors import Error
from mppool.kernel import link
from mppool.states import CloseReason, Residence

__all__ = ["Entry"]

ALONE = 2  # references to a list that only its entry has, as CPython counts them: the entry's, and that of the call that asks


class Entry:
    """A session attached in this process: the driver's object, and a socket of our own, whatever the user does to his.

    ``sock`` is a duplicate that the entry owns, None if the session has no socket: looking at the session and ending it go through it.
    """

    __slots__ = ("block", "closed", "conn", "generation", "lent", "poll", "residence", "slot", "sock", "turn_ends", "uses")

    def __init__(self, slot: Slot, generation: int, uses: int, conn: Any, fd: int) -> None:
        self.slot = slot
        self.generation = generation
        self.uses = uses  # when we last had it; unchanged means that nobody had it since
        self.turn_ends = 0  # nanoseconds: see Worker.may_overtake
        self.block = [-1]  # the ``with`` block that had it last has this list, too: which of the uses that was
        self.conn = conn
        self.residence = Residence.moves
        self.closed = False  # by its driver
        self.lent: Any = conn  # what the user has in hand; with debug=True a duplicate
        self.sock = duplicate(fd) if fd >= 0 else None
        self.poll: Callable[[int], list[tuple[int, int]]] = _nothing
        if self.sock is not None:
            poller = _poll()
            poller.register(self.sock, select.POLLIN | select.POLLPRI | select.POLLRDHUP)
            self.poll = poller.poll

    def left_behind(self) -> bool:
        """Was it lent to a ``with`` block, and is that one gone without having given it back? (A weak reference would say it, too, and costs more.)"""
        return self.block[0] == self.uses and sys.getrefcount(self.block) == ALONE

    def shutdown(self, how: int) -> None:
        """End the connection, or our side of it, for everybody who has it."""
        if self.sock is not None:
            try:
                self.sock.shutdown(how)
            except OSError:
                pass  # the server was faster

    def has_ended(self) -> bool:
        """After our side was shut down: has the server ended its own? Reads and drops what it still sends."""
        return self.sock is None or link.has_ended(self.sock)

    def why_readable(self) -> CloseReason:
        """The idle session has something to read: bytes nobody asked for, or the end?"""
        try:
            unread = self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if self.sock is not None else b""
        except OSError:
            unread = b""
        return CloseReason.unread_data if unread else CloseReason.peer_closed

    def end_loan(self) -> bool:
        """With debug: the user's duplicate ends with the lease. True: he had closed it, and is not to be trusted with the rest."""
        if self.lent is self.conn:
            return False
        spoilt = self.lent.fileno() < 0
        self.lent.close()
        self.lent = self.conn
        return bool(spoilt)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


def duplicate(fd: int) -> _socket.socket | None:
    """A socket of our own for the same connection; None if the descriptor is not a socket's. Raises Error if there is no room for it.

    Duplicated and wrapped in one step of the interpreter: an exception from a signal handler in between would leave a
    descriptor that nobody owns, and a connection that nobody ends.
    """
    made: list[_socket.socket] = []
    try:
        made.extend(map(_socket.socket, (-1,), (-1,), (-1,), map(os.dup, (fd,))))
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            return None
        raise Error(f"no socket of our own for a session: {error.strerror} (RLIMIT_NOFILE?)") from error
    return made[0]


def _poll() -> Any:
    """``select.poll`` itself, also where gevent has put its own in its place: with a timeout of 0 it never waits."""
    if "gevent.monkey" in sys.modules:
        return sys.modules["gevent.monkey"].get_original("select", "poll")()
    return select.poll()


def _nothing(_timeout: int) -> list[tuple[int, int]]:
    return []
