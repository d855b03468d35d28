"""Who is the broker of a socket: one at a time, and how the place passes from one to the next without a moment of doubt.

The place is a lock file beside the socket: whoever holds its lock is the broker. The kernel frees it when he dies.

    the next one                                            the one that is there

    everything slow: imports, checks
    REPLACE ------------------------------------------->    gives the keeper what it lacks, lets go of everything, gives up the
                                                            lock; waits, with this one link open
    takes the lock, starts as after a death    <----- LEAVE
    serves
    REPLACED ------------------------------------------->   ends

If the link ends without REPLACED, the next one has died on the way, and the one that was there comes back as any broker
starts after a death. Whoever else takes the lock meanwhile is as good: it decides, not the messages.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable

from mppool.errors import Error, ProtocolError
from mppool.kernel import link
from mppool.kernel.locks import LockFile
from mppool.wire import Kind, Message, decode, encode

__all__ = ["AlreadyRunning", "ask_for_place", "give_place", "is_asking", "is_taken", "say_left", "say_serving", "take_place", "was_followed"]

PATIENCE = 5.0  # seconds for the other one
LOOK_AGAIN = 0.002
LINGERING = 0.3  # seconds, for a place whose holder may have just died
_CREDENTIALS = struct.Struct("3i")


class AlreadyRunning(Error):
    """Another broker serves this socket."""


def place_of(path: str) -> str:
    return f"{path}.lock"


def take_place(path: str, patience: float = LINGERING) -> LockFile:
    """The right to serve this socket, for life. Raises AlreadyRunning.

    Asked again for a moment: a child that a broker had just forked when it was killed holds its place until it executes something else.
    """
    until = time.monotonic() + patience
    while True:
        lock = LockFile(place_of(path))
        if not lock.take(0):
            lock.close()
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
            raise AlreadyRunning(f"broker={path!r}: a broker serves this socket already")
        if lock.is_current():
            return lock
        lock.close()  # its last holder removed it while we opened it


def give_place(lock: LockFile) -> None:
    """Give up the lock, and its file."""
    try:
        if lock.is_current():
            os.unlink(lock.path)
    except FileNotFoundError:
        pass  # the whole directory was removed
    lock.close()


def is_taken(path: str) -> bool:
    """Is there a broker, or one that is about to be?"""
    try:
        lock = LockFile(place_of(path), create=False)
    except FileNotFoundError:
        return False
    try:
        return lock.is_held(0)
    finally:
        lock.close()


# The next one.


def ask_for_place(path: str, told_to_end: Callable[[], bool]) -> tuple[LockFile, socket.socket | None]:
    """Take the place, from the broker that has it if there is one; that one waits at the link then.

    Raises Error if it does not make room within 5 s, or if we are told to end before.
    """
    until = time.monotonic() + PATIENCE
    asked, pid, left = None, 0, False
    try:
        while not told_to_end():
            try:
                lock = take_place(path, 0.0)
            except AlreadyRunning:
                pass
            else:
                found, asked = asked, None
                return lock, found
            if time.monotonic() >= until:
                raise Error(silent(path, pid))
            if left and asked is not None:  # somebody was faster: ask him
                asked.close()
                asked = None
            left = False
            if asked is None:
                asked = ask(path)
                pid = peer_pid(asked) if asked is not None else 0
            if asked is None:
                time.sleep(LOOK_AGAIN)
            elif link.wait_readable(asked.fileno(), LOOK_AGAIN):
                left = has_left(asked, path)
        raise Error(f"broker={path!r}: told to end before the place was ours")
    finally:
        if asked is not None:
            asked.close()


def ask(path: str) -> socket.socket | None:
    """The link on which the broker was asked; None if it does not listen yet, or no more."""
    try:
        sock = link.connect(path)
    except OSError:
        return None
    try:
        link.send(sock, encode(Message(Kind.REPLACE)))
    except OSError:
        sock.close()
        return None
    return sock


def has_left(asked: socket.socket, path: str) -> bool:
    """The broker we asked has made room, or has died. Raises Error if it refuses."""
    try:
        answer = heard(asked)
    except BlockingIOError:
        return False
    except (OSError, ProtocolError):
        return True
    if answer is None:
        return True
    if answer.kind is Kind.REFUSED:
        raise Error(f"broker={path!r}: {named(peer_pid(asked))} does not make room: {answer.body.decode(errors='replace')}")
    return answer.kind is Kind.LEAVE


def say_serving(asked: socket.socket) -> None:
    """We serve: the one that made room may end. Owns the link."""
    try:
        link.send(asked, encode(Message(Kind.REPLACED)))
    except OSError:
        pass  # it has ended already
    asked.close()


def silent(path: str, pid: int) -> str:
    if not pid:
        return f"broker={path!r}: somebody holds {place_of(path)} and does not listen; `fuser {place_of(path)}` says who; end that one, then try again"
    return (
        f"broker={path!r}: {named(pid)} does not make room within {PATIENCE:g} s; if it is stopped, `kill -CONT {pid}` and try again; "
        f"`kill -KILL {pid}` ends it, and a new broker then takes over what it had"
    )


def named(pid: int) -> str:
    return f"the broker that runs (pid {pid})" if pid > 1 else "the broker that runs"


def peer_pid(sock: socket.socket) -> int:
    """Who listens; 0 if it cannot be seen from here."""
    return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0])


# The one that is there.


def is_asking(link_to_next: socket.socket) -> bool:
    """Does the one that asked still wait? (We may have been stopped for long.)"""
    poller = select.poll()
    poller.register(link_to_next, select.POLLRDHUP)
    return not poller.poll(0)


def say_left(link_to_next: socket.socket) -> None:
    """Our place is free."""
    try:
        link.send(link_to_next, encode(Message(Kind.LEAVE)))
    except OSError:
        pass  # it has died; was_followed finds out


def was_followed(link_to_next: socket.socket, told_to_end: Callable[[], bool]) -> bool:
    """We made room: wait until the next one serves. False: it will not. Owns the link."""
    until = time.monotonic() + PATIENCE
    with link_to_next:
        while time.monotonic() < until and not told_to_end():
            if not link.wait_readable(link_to_next.fileno(), 0.1):
                continue
            try:
                said = heard(link_to_next)
            except (OSError, ProtocolError):
                return False
            return said is not None and said.kind is Kind.REPLACED
    return False


def heard(sock: socket.socket) -> Message | None:
    """What is said on a link that carries no descriptors, None at its end. Raises OSError, ProtocolError."""
    data, fd = link.receive(sock)
    try:
        return decode(data, 1 if fd >= 0 else 0) if data else None
    finally:
        if fd >= 0:
            os.close(fd)
