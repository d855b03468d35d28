"""Showing libpq a login, which cannot be given a socket.

libpq connects by itself, to a Unix socket of ours (a Door), and at once ``dup2`` puts one end of a pair of sockets under its descriptor.
When a session is dialed, we relay what libpq and the server say, and record the server's greeting. When the session is adopted
elsewhere, libpq is shown that greeting, and believes to be logged in; then ``dup2`` puts the live connection under its descriptor.

Nobody speaks, or listens, through a Door: what queues at it, be it another thread's, another process's or another user's, does not
matter. The generators are of psycopg's kind: they yield what to wait for, and psycopg waits, blocking or in an event loop.
"""

from __future__ import annotations

import _socket
import errno
import os
import secrets
import socket
import time
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg import pq
from psycopg.pq import ConnStatus, PollingStatus
from psycopg.waiting import Ready, Wait

from mppool.drivers.dialer import abandon, prepare
from mppool.drivers.postgres import SSL_REQUEST, greeting_of, refusal_in
from mppool.errors import ProtocolError
from mppool.kernel.remembered import Remembered

__all__ = ["Stage", "Waits", "bury", "by_itself", "connected", "forked", "in_time", "offers_tls", "relayed", "remember", "replay"]

KEEPALIVE = {
    "keepalives_idle": socket.TCP_KEEPIDLE,
    "keepalives_interval": socket.TCP_KEEPINTVL,
    "keepalives_count": socket.TCP_KEEPCNT,
    "tcp_user_timeout": socket.TCP_USER_TIMEOUT,
}

UNHURRIED = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
TRIES = 4  # at a start-up: another thread may be closing the door that is full

C = TypeVar("C")
Waits = Generator[tuple[int, Wait], Ready, C]

_dialing: Remembered[socket.socket] = Remembered()
_made: Remembered[psycopg.BaseConnection[Any]] = Remembered()
_stages: Remembered[Stage] = Remembered()
_unknown: set[object] = set()  # connections that libpq itself is just making
_doors: list[Door] = []  # one, or as many as threads found none at the same moment


class Door:
    """A Unix socket to which libpq may connect, and behind which is nobody: whatever comes in is never looked at.

    Its abstract name is in no directory, and ends with it. It serves as many start-ups as may queue at it: each stays in the queue.
    """

    ROOM = 64

    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock
        self.host = f"@mppool-{secrets.token_hex(12)}"
        sock.bind(f"\0{self.host[1:]}/.s.PGSQL.1")
        sock.listen(self.ROOM)

    def close(self) -> None:
        self.sock.close()

    __del__ = close


class Stage:
    """A start-up of libpq, which believes that it has connected to a server: we are that server.

    What it has connected to is a Door. In the place of that connection it is given one end of a pair of sockets, whose other end is
    ours. ``conninfo`` is without a place. Raises OperationalError, OSError.
    """

    def __init__(self, conninfo: str) -> None:
        self.pgconn: pq.abc.PGconn | None = None  # libpq's side, until somebody takes it
        self.ends: tuple[_socket.socket, ...] = ()  # ours, and libpq's until it has it
        _stages.add(self)
        try:
            self.start(conninfo)
        except BaseException:
            self.close()
            raise

    def start(self, conninfo: str) -> None:
        self.ends = ours, theirs = _socket.socketpair(socket.AF_UNIX, UNHURRIED)
        for _ in range(TRIES):
            door = a_door()
            self.host = door.host
            self.pgconn = pgconn = pq.PGconn.connect_start(f"{conninfo} host={door.host} hostaddr='' port=1 sslmode=disable gssencmode=disable".encode())
            if pgconn.status != ConnStatus.BAD:
                os.dup2(theirs.fileno(), pgconn.socket, inheritable=False)
                theirs.close()
                self.ends = (ours,)
                return
            shut(door)
        raise psycopg.OperationalError(f"connection is bad: {pgconn.get_error_message()}")

    def begun(self) -> pq.abc.PGconn:
        """libpq's side, which has said what a client says first. It stays the stage's."""
        assert self.pgconn is not None
        self.pgconn.connect_poll()
        return self.pgconn

    def take(self) -> pq.abc.PGconn:
        """libpq's side, which is the caller's from now on."""
        assert self.pgconn is not None
        pgconn, self.pgconn = self.pgconn, None
        return pgconn

    def said(self) -> bytes:
        """What libpq has to say to its server."""
        try:
            return self.ends[0].recv(65536)
        except BlockingIOError:
            return b""

    def show(self, data: bytes) -> None:
        if data:
            self.ends[0].sendall(data)
        else:
            self.ends[0].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self.ends:
            end.close()
        self.ends = ()
        if self.pgconn is not None:
            self.pgconn.finish()

    __del__ = close


def a_door() -> Door:
    try:
        return _doors[-1]
    except IndexError:
        _doors.append(Door(_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
        return _doors[-1]


def shut(door: Door) -> None:
    """It is full, or another thread has found it so."""
    try:
        _doors.remove(door)
    except ValueError:
        pass
    door.close()


def replay(stage: Stage, greeting: bytes, fd: int) -> pq.abc.PGconn:
    """A libpq connection over a duplicate of ``fd``, logged in as the greeting says. Ends ``stage``."""
    try:
        pgconn = stage.take()
        stage.show(greeting)
        for _ in range(2):  # to say what a client says first, unless it has, and to read
            status = pgconn.connect_poll()
            if status == PollingStatus.OK:
                break
            if status == PollingStatus.FAILED:
                raise ProtocolError(f"libpq does not believe the greeting of {len(greeting)} bytes: {pgconn.get_error_message()}")
        else:
            raise ProtocolError("libpq waits for more than a greeting")
        os.dup2(fd, pgconn.socket, inheritable=False)
        pgconn.nonblocking = 1
        return pgconn
    finally:
        stage.close()


def relayed(conninfo: str, real: socket.socket, where: str) -> Waits[tuple[pq.abc.PGconn, bytes]]:
    """A login on ``real``, which becomes libpq's; libpq's connection, and the greeting. Raises OperationalError as a login of libpq's own would.

    ``where``: what to say of the place in an error.
    """
    stage = Stage(conninfo)
    heard = bytearray()
    try:
        pgconn = stage.take()
        while True:
            status = pgconn.connect_poll()
            left = memoryview(stage.said())
            while left:
                try:
                    left = left[real.send(left, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    yield from until(real, Wait.W)
            if status == PollingStatus.OK:
                break
            if status == PollingStatus.FAILED:
                said = pgconn.get_error_message().replace(f'on socket "{stage.host}/.s.PGSQL.1"', where)
                error = psycopg.OperationalError(f"connection failed: {said}")
                error.sqlstate = refusal_in(bytes(heard)) or None
                pgconn.finish()
                raise error
            if status == PollingStatus.READING:
                yield from until(real, Wait.R)
                try:
                    data = real.recv(65536)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                heard += data
                stage.show(data)
        os.dup2(real.fileno(), pgconn.socket, inheritable=False)
        pgconn.nonblocking = 1
        return pgconn, greeting_of(bytes(heard))
    finally:
        stage.close()


def until(sock: socket.socket, what: Wait) -> Waits[None]:
    while not (yield sock.fileno(), what):
        pass


def connected(family: int, address: Any, params: Mapping[str, Any]) -> Waits[socket.socket]:
    """A connection without a login, non-blocking. Of ``params`` those on keeping it alive are obeyed."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    _dialing.add(sock)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EAGAIN):
            yield from until(sock, Wait.W)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        prepare(sock)
        if family != socket.AF_UNIX:
            keep_alive(sock, params)
        return sock
    except BaseException:
        sock.close()
        raise


def keep_alive(sock: socket.socket, params: Mapping[str, Any]) -> None:
    if str(params.get("keepalives", "1")) == "0":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    for name, option in KEEPALIVE.items():
        if int(params.get(name) or 0) > 0:
            sock.setsockopt(socket.IPPROTO_TCP, option, int(params[name]))


def offers_tls(sock: socket.socket) -> Waits[bool]:
    """Ask a server that we have just connected to. If it does not, the login can go on here."""
    sock.send(SSL_REQUEST, socket.MSG_NOSIGNAL)
    yield from until(sock, Wait.R)
    answer = sock.recv(1)
    if answer not in (b"S", b"N"):
        raise OSError("the server answers neither yes nor no when asked for TLS")
    return answer == b"S"


def bury(pgconn: pq.abc.PGconn) -> None:
    """Let go of a libpq connection: its goodbye goes into a dead socket."""
    try:
        fd = pgconn.socket
    except psycopg.OperationalError:
        return
    with socket.socket(socket.AF_UNIX) as dead:
        os.dup2(dead.fileno(), fd, inheritable=False)
    pgconn.finish()


def remember(conn: psycopg.BaseConnection[Any]) -> None:
    """It has a connection that a forked child must let go of."""
    _made.add(conn)


def in_time(making: Waits[C], seconds: float) -> Waits[C]:
    """psycopg before 3.3 leaves it to its generators to give up after ``connect_timeout``. Raises ConnectionTimeout."""
    deadline = time.monotonic() + seconds
    try:
        wanted = next(making)
        while True:
            ready = yield wanted
            if time.monotonic() > deadline:
                raise psycopg.errors.ConnectionTimeout("connection timeout expired")
            wanted = making.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        making.close()


def by_itself(making: Waits[C]) -> Waits[C]:
    """libpq makes a connection without us, whose descriptor nobody knows."""
    mark = object()
    _unknown.add(mark)
    try:
        return (yield from making)
    finally:
        _unknown.discard(mark)


def forked() -> bool:
    """In a forked child: let go of what other threads of the parent were connecting. False: there was something that only libpq knows."""
    for sock in _dialing:
        abandon(sock)
    while _doors:
        _doors.pop().close()
    for stage in _stages:
        stage.close()
    for conn in _made:
        bury(conn.pgconn)
    unknown = bool(_unknown)
    _unknown.clear()
    return not unknown
