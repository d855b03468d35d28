"""The seam between the pool and a protocol.

The pool moves the *right to use* a session among processes, and each process attaches its own driver object to its own
duplicate of the socket, once. A driver says how; it never sees semaphores, the table or the broker.
"""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Driver"]


class Driver(Protocol):
    """What the pool asks of a protocol. ``S`` below is whatever the driver lends to the user.

    Obligations. The connection of every attached session is non-blocking in the kernel at all times that nobody uses it:
    O_NONBLOCK belongs to the connection, not to the process. ``baggage`` describes the login (at most 64 KiB); it may hold
    secrets and is never logged. No method may say goodbye to the server except ``close``: others may have the session, too.
    """

    name: str
    baggage_version: int
    transferable: bool
    """False: sessions stay with the process that dialed them (*resident*): capped, ended for others in need, never shared."""

    def key(self) -> str:
        """Says which sessions are interchangeable: server, login, options. Pools of one name must agree on it."""

    def dial(self) -> Any:
        """Open a new session. Raises DialFailed (or any OSError)."""

    def detach(self, session: Any) -> bytes:
        """The baggage with which ``attach`` makes an equal session of a duplicate of the socket. ``session`` itself lives on."""

    def attach(self, fd: int, baggage: bytes) -> Any:
        """Make a session of a duplicate of ``fd`` and baggage. ``fd`` itself stays the pool's, which closes it."""

    def is_clean(self, session: Any) -> bool:
        """May the next user have it? Only what this process can see without I/O; the pool itself looks at the socket."""

    def reset(self, session: Any) -> None:
        """Back to how it was after ``dial``; may do round trips; raises if it cannot."""

    def ping(self, session: Any) -> None:
        """One round trip; raises if the session is broken."""

    def close(self, session: Any) -> None:
        """End the session, politely if the protocol knows how. Never raises, never waits for long."""

    def abort(self, session: Any) -> None:
        """Let go of this process's descriptor without a word to the server: in a forked child, or when others go on."""

    def forked(self) -> bool:
        """In a forked child: let go, without a word, of connections that other threads of the parent were just dialing.

        False: they cannot all be known. Then what the parent held counts for as long as the child lives.
        """

    def fileno(self, session: Any) -> int:
        """The descriptor to watch for unread bytes and the end, -1 if there is none."""
