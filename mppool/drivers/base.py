"""The seam between the pool and a protocol.

The pool moves the *right to use* a session among processes, and each process attaches its own driver object to its own
duplicate of the socket, once. A driver says how; it never sees semaphores, the table or the broker.

A driver derives from ``DriverBase`` and fills in what its protocol has: at the least ``name``, ``key``, ``dial`` and
``fileno``, and to let sessions move ``detach`` and ``attach``. The life of a session, as the driver sees it:

    dial ── lent ── is_clean? ── tidy ── idle ── transferred ── lent ── ... ── close
              │          in another process:  attach ── transferred ── lent ── ...

Which of them is called when, at the least: ``is_clean`` at every return, and ``tidy`` only if that says no; ``transferred`` before a session
is lent that was just attached, or that another process has had meanwhile; ``abort`` in forked children and when this process leaves.

``mppool.testing.check_driver`` tries a driver with real processes; examples/own_protocol is a complete one.

For ``AsyncPool`` a driver derives from ``AsyncDriverBase`` and may make coroutine functions of those that talk to the server:
``dial``, ``attach``, ``tidy``, ``transferred``, ``reset``, ``ping``, ``close``. The others never wait for anything.
"""

from __future__ import annotations

from typing import Any

from mppool.errors import OptionError
from mppool.states import Residence

__all__ = ["AsyncDriverBase", "DriverBase", "policy"]


class DriverBase:
    """What the pool asks of a protocol. A *session* below is whatever the driver lends to the user.

    Obligations. The connection of every attached session is non-blocking in the kernel at all times that nobody uses it:
    O_NONBLOCK belongs to the connection, not to the process. Baggage describes the login (at most 64 KiB); it may hold
    secrets and is never logged. No method may say goodbye to the server except ``close``: others may have the session, too. That goes for
    what the client library does by itself, too, in ``__del__`` or at exit: take the socket out of its object before you let go of that.
    With Python's sockets, non-blocking means any timeout but None: dialer.py has one that is as good.
    """

    name = ""
    """Of the protocol; the part of ``key`` before its first slash. Broker and command line know protocols by it."""

    baggage_version = 1

    minds_transfer = False
    """True: sessions carry state that a process remembers or sets. ``transferred`` is called before one that another process used is lent."""

    tidies_always = False
    """True: ``tidy`` is called at every return, not only when ``is_clean`` says no."""

    def key(self) -> str:
        """Says which sessions are interchangeable: protocol and version of the baggage, then server, login, options. Pools of one name must agree on it.

        Begin it with ``f"{name}/{baggage_version}"``; of the whole at most 255 bytes are compared. It stands in shared memory and in messages:
        no secrets (a digest of them will do).
        """
        raise NotImplementedError

    def dial(self) -> Any:
        """Open a new session. Raises DialFailed (or any OSError); ``permanent`` in it ends the checkout at once.

        If it raises, whatever it is, nothing is left open. Let nothing in it wait for ever: it holds a permit, and one of few rights to dial.
        """
        raise NotImplementedError

    def fileno(self, session: Any) -> int:
        """The descriptor to watch for unread bytes and the end, -1 if there is none (any more). The pool makes a duplicate of its own."""
        raise NotImplementedError

    def residence(self, session: Any) -> Residence:
        """Does this session move? If not, why it stays with the process that dialed it: capped, ended for others in need, never shared."""
        return Residence.no_adapter

    def detach(self, session: Any) -> bytes:
        """The baggage with which ``attach`` makes an equal session of a duplicate of the socket. ``session`` itself lives on."""
        return b""

    def farewell(self, session: Any) -> bytes:
        """What to say to the server, on a connection of its own, if a holder dies in the middle of a request: a PostgreSQL cancel request, say.

        At most 255 bytes; b"" is nothing. Whoever takes the session back says it, so that the server does not work on for nobody.
        """
        return b""

    def expect(self) -> None:
        """A descriptor was asked for, and ``attach`` will be called with it if it comes: what takes time and needs none can be done now. Never raises.

        Most do not need this. What was made and is not used, because nothing came, is kept for the next ``attach``, or let go.
        """

    def attach(self, fd: int, baggage: bytes) -> Any:
        """Make a session of a duplicate of ``fd`` and baggage. ``fd`` itself stays the pool's, which closes it.

        Says nothing to the server and waits for nothing; what needs a round trip belongs into ``transferred``. If it raises, the duplicate is closed.
        """
        raise NotImplementedError

    def is_clean(self, session: Any) -> bool:
        """May the next user have it, as it is? Only what this process can see without I/O; the pool itself looks at the socket.

        False also for a session whose user was interrupted in the middle of a request: the answer that is still to come would be the next one's.
        """
        return True

    def tidy(self, session: Any) -> Any:
        """At return: bring it into a state in which ``is_clean`` is true (roll back, unsubscribe), with round trips if need be. Raises if it cannot."""

    def transferred(self, session: Any) -> Any:
        """Another process used the session since this one did, or this one never had it: forget what was known of it, reset it if that is the policy.

        Raises if the session is no good any more; it is closed then (``reset_failed``).
        """

    def reset(self, session: Any) -> Any:
        """Back to how it was after ``dial``; may do round trips; raises if it cannot. For ``transferred``, ``tidy`` and users to call; the pool does not."""

    def ping(self, session: Any) -> Any:
        """One round trip; raises if the session is broken. For users' ``check=`` to call; the pool does not."""

    def close(self, session: Any) -> Any:
        """End the session, politely if the protocol knows how. Never raises, never waits for long."""
        self.abort(session)

    def abort(self, session: Any) -> None:
        """Let go of this process's descriptor without a word to the server: in a forked child, or when others go on. Never raises, nor does a second time."""
        raise NotImplementedError

    def forked(self) -> bool:
        """In a forked child: let go, without a word, of connections that other threads of the parent were just dialing.

        False: they cannot all be known. Then what the parent held counts for as long as the child lives.
        """
        return False


class AsyncDriverBase(DriverBase):
    """A driver for ``AsyncPool``. ``is_clean`` also stops reading, so that what arrives next stays in the kernel for the next holder.

    The methods that talk to the server may be coroutine functions here. ``abort`` is also for sessions that have ended already.
    """

    def resume(self, session: Any) -> None:
        """The session is ours again (lent, or about to be tidied or checked): read from it again. May be repeated."""


def policy(on_transfer: str, *known: str) -> str:
    """When a driver resets sessions: "reset" is when they change processes, "always" at every return, "trust" never. Raises OptionError for any other word."""
    known = known or ("reset", "always", "trust")
    if on_transfer not in known:
        raise OptionError(f"on_transfer={on_transfer!r}: expected one of {', '.join(known)}")
    return on_transfer
