"""Messages with at most one descriptor each over Unix ``SOCK_SEQPACKET`` sockets.

Own helpers on ``sendmsg``/``recvmsg``: ``socket.recv_fds`` ignores its flags, so what it receives is inheritable.
A sent message proves nothing: whoever needs to know asks and waits for the answer.
"""

from __future__ import annotations

import _socket
import array
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from mppool.errors import BrokerUnavailable, ProtocolError
from mppool.kernel.runtime import distrust

__all__ = ["MAX_MESSAGE", "connect", "has_ended", "listen", "poller", "receive", "send", "send_beyond", "wait_readable"]

MAX_MESSAGE = 66 * 1024  # 64 KiB of baggage and a header; SO_SNDBUF is larger
_ROOM = socket.CMSG_LEN(16 * 4)  # for more than the one we expect: extra descriptors are seen and closed, not lost
_CREDENTIALS = struct.Struct("3i")
# As plain numbers: the module's flags are enums, and these are used for every message.
_CUT = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_NOSIGNAL = int(socket.MSG_NOSIGNAL)


def connect(path: str) -> socket.socket:
    """A non-blocking connection to the socket at ``path``, whose owner is us or root, in a directory that only they write to.

    Raises OSError if nobody listens (or its backlog is full: EAGAIN), BrokerUnavailable if it is another user's or may be. Nothing was sent then.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)  # (not by SOCK_NONBLOCK, which gevent's sockets do not know of: they would wait, and for ever)
        try:
            sock.connect(path)
        except PermissionError as error:
            raise BrokerUnavailable(f"broker={path!r}: this socket belongs to another user") from error
        if (uid := peer_uid(sock)) not in (os.geteuid(), 0):
            raise BrokerUnavailable(f"broker={path!r}: its broker runs as uid {uid}, we are {os.geteuid()}")
        if why := distrust(path):
            raise BrokerUnavailable(f"broker={path!r}: {why}")
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: str) -> socket.socket:
    """Listen at ``path``, mode 0600, replacing a socket that is there. Only the holder of the socket's lock may call this."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    making = f"{path}.new"
    try:
        if os.path.lexists(making):
            os.unlink(making)
        sock.bind(making)
        os.chmod(making, 0o600)
        sock.listen(1024)
        os.rename(making, path)
    except BaseException:
        sock.close()
        raise
    return sock


def peer_uid(sock: socket.socket) -> int:
    return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


def send(sock: socket.socket, data: bytes, fd: int = -1) -> None:
    """Send one message, with ``fd`` if given; the sender keeps its copy. BlockingIOError if the queue is full, OSError if the peer is gone."""
    if fd < 0:
        sock.send(data, _NOSIGNAL)
    else:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))], _NOSIGNAL)


def send_beyond(sock: socket.socket, data: bytes) -> None:
    """Send one message though the queue is full: there is as much room again for such. OSError if there is none all the same, or the peer is gone."""
    try:
        return send(sock, data)
    except BlockingIOError:
        usual = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual)  # which the kernel doubles
        send(sock, data)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual // 2)


def receive(sock: socket.socket) -> tuple[bytes, int]:
    """One message and its descriptor (-1 if none), which is the caller's. ``b""`` is the end.

    Raises BlockingIOError if there is none yet, ProtocolError (every descriptor closed) if it was cut or carried more than one.
    """
    got: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
    try:
        # Received and kept in one step of the interpreter: what a signal handler throws finds every descriptor where it can be closed.
        got.extend(map(sock.recvmsg, (MAX_MESSAGE,), (_ROOM,), (_CLOEXEC,)))
        data, ancillary, flags, _ = got[0]
        fds = descriptors_in(ancillary) if ancillary else []
        if flags & _CUT or (ancillary and len(fds) != 1):
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("a descriptor was lost on its way: too few file descriptors allowed (RLIMIT_NOFILE)")
            raise ProtocolError(f"a message with {len(fds)} descriptors, or longer than {MAX_MESSAGE} bytes")
        return data, fds[0] if fds else -1
    except BaseException:
        for fd in descriptors_in(got[0][1]) if got else ():
            os.close(fd)
        raise


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return fds.tolist()


def has_ended(sock: _socket.socket) -> bool:
    """After our side was shut down: has the server ended its own? Reads and drops what it still sends."""
    try:
        for _ in range(64):
            if not wait_readable(sock.fileno(), 0):
                return False  # asked first: a socket with a timeout would wait in spite of MSG_DONTWAIT
            if not sock.recv(65536, socket.MSG_DONTWAIT):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def wait_readable(fd: int, seconds: float) -> bool:
    """Wait for bytes, the end or an error. Signal handlers run meanwhile, and what they raise goes through."""
    return bool(poller(fd)(min(max(0.0, seconds), 1e6) * 1000))


def poller(fd: int) -> Callable[[float], list[tuple[int, int]]]:
    """What waits for the same, milliseconds; for who waits on the same descriptor again and again."""
    made = select.poll()
    made.register(fd, select.POLLIN | select.POLLPRI | select.POLLRDHUP)
    return made.poll
