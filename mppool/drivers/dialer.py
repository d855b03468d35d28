"""Connections to a target, as all drivers that own their sockets open them."""

from __future__ import annotations

import _socket
import os
import socket
from collections import deque
from functools import partial
from typing import Any, TypeVar, overload

from mppool.errors import DialFailed
from mppool.kernel.remembered import Remembered
from mppool.options import Target

__all__ = ["FOREVER", "Dialer", "abandon", "addresses", "adopt", "dial_failed", "prepare"]

# A Python socket without a timeout is blocking in the kernel too, and that would reach every process that has it. A
# timeout of eleven days is as good, and leaves the connection non-blocking.
FOREVER = 1_000_000.0

S = TypeVar("S", bound=socket.socket)


class Dialer:
    """Opens plain connections to ``target`` and remembers them weakly, so that a forked child can let go of those in the making.

    TCP sockets have NODELAY and keepalive set: probes after 60 s, given up after 90 s.
    """

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.target = target
        self.connect_timeout = connect_timeout
        self._dialed: Remembered[socket.socket] = Remembered()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_dialed"}  # for a spawned process, which has none of our connections

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _dialed=Remembered())

    def dial(self) -> socket.socket:
        """A connected socket whose timeout is FOREVER. Raises DialFailed; permanent if the host name does not exist."""
        target = self.target
        try:
            if target.kind == "unix":
                sock = self._make(socket.AF_UNIX)
                try:
                    sock.connect(target.host)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = self._connect(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise dial_failed(target, error) from error
        try:
            prepare(sock)
            sock.settimeout(FOREVER)
        except BaseException:
            sock.close()
            raise
        return sock

    def forked(self) -> bool:
        """In a forked child: close what other threads of the parent were opening, without a word.

        Not those over TLS, whose sockets are others: a driver that makes such connections answers False.
        """
        for sock in self._dialed:
            abandon(sock)
        return True

    def _connect(self, host: str, port: int) -> socket.socket:
        """The first address that answers. One that is given as such needs no look-up: a fork while another thread is in one may block the child's for ever."""
        failure: OSError | None = None
        for family, address in addresses(host, port):
            sock = self._make(family)
            try:
                sock.connect(address)
                return sock
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
        raise failure or OSError(f"no address for {host!r}")

    def _make(self, family: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        self.remember(sock)
        sock.settimeout(self.connect_timeout)
        return sock

    def remember(self, sock: socket.socket) -> None:
        self._dialed.add(sock)


def prepare(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def dial_failed(target: Target, error: OSError | UnicodeError) -> DialFailed:
    """What is said of a connection that did not come about."""
    if isinstance(error, socket.gaierror):
        permanent = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
        return DialFailed(f"target={str(target)!r}: cannot resolve {target.host!r}: {error.strerror}", permanent=permanent)
    if isinstance(error, UnicodeError):
        return DialFailed(f"target={str(target)!r}: {target.host!r} cannot be a host name: {error}", permanent=True)
    return DialFailed(f"target={str(target)!r}: {error}")


@overload
def adopt(fd: int) -> socket.socket: ...
@overload
def adopt(fd: int, kind: type[S]) -> S: ...
def adopt(fd: int, kind: type[socket.socket] = socket.socket) -> Any:
    """A socket object of its own, with timeout FOREVER, for a duplicate of ``fd``.

    Duplicated and wrapped in one step of the interpreter: whatever a signal handler throws, no descriptor is left open.
    """
    if issubclass(socket.socket, _socket.socket):
        sock: Any = kind.__new__(kind)
        sock._io_refs, sock._closed = 0, False
        # What its __init__ in Python does: an exception before that one's first line would lose what is duplicated already.
        deque(map(partial(_socket.socket.__init__, sock, -1, -1, -1), map(os.dup, (fd,))), 0)
    else:  # gevent has put its own in its place
        sock = kind(fileno=os.dup(fd))
    sock.settimeout(FOREVER)
    return sock


def abandon(sock: socket.socket) -> None:
    """Close this process's descriptor, and nothing else. (``close()`` would wait for the last ``makefile()``.)"""
    fd = sock.detach()
    if fd >= 0:
        os.close(fd)


def addresses(host: str, port: int) -> list[tuple[int, Any]]:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
