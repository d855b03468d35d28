"""Raw sockets over TCP or Unix sockets: lends a ``socket.socket``."""

from __future__ import annotations

import os
import socket

from mppool.errors import DialFailed
from mppool.options import Target

__all__ = ["RawDriver"]

# A Python socket without a timeout is blocking in the kernel too, and that would reach every process that has it. A
# timeout of eleven days is as good, and leaves the connection non-blocking.
FOREVER = 1_000_000.0


class RawDriver:
    """Plain connections to ``target``. Lent sockets have a timeout of eleven days; ``settimeout`` holds until return.

    TCP sockets have NODELAY and keepalive set: probes after 60 s, given up after 90 s.
    """

    name = "raw"
    baggage_version = 1
    transferable = True

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.target = target
        self.connect_timeout = connect_timeout

    def key(self) -> str:
        return "raw/1"

    def dial(self) -> socket.socket:
        """Raises DialFailed; permanent if the host name does not exist."""
        target = self.target
        try:
            if target.kind == "unix":
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.settimeout(self.connect_timeout)
                    sock.connect(target.host)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = connect(target.host, target.port, self.connect_timeout)
        except socket.gaierror as error:
            permanent = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            raise DialFailed(f"target={str(target)!r}: cannot resolve {target.host!r}: {error.strerror}", permanent=permanent) from error
        except UnicodeError as error:
            raise DialFailed(f"target={str(target)!r}: {target.host!r} cannot be a host name: {error}", permanent=True) from error
        except OSError as error:
            raise DialFailed(f"target={str(target)!r}: {error}") from error
        try:
            if target.kind == "tcp":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            sock.settimeout(FOREVER)
        except BaseException:
            sock.close()
            raise
        return sock

    def detach(self, session: socket.socket) -> bytes:
        return b""

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        made: list[socket.socket] = []
        # Duplicated and wrapped in one step: whatever a signal handler throws, no descriptor is left open.
        made.extend(map(socket.socket, (-1,), (-1,), (-1,), map(os.dup, (fd,))))
        made[0].settimeout(FOREVER)
        return made[0]

    @staticmethod
    def is_clean(session: socket.socket) -> bool:
        """Not closed, and no ``makefile()`` left that may have read ahead. Puts the timeout back."""
        if session.fileno() < 0 or session._io_refs:  # type: ignore[attr-defined]
            return False
        if session.timeout != FOREVER:
            session.settimeout(FOREVER)
        return True

    def reset(self, session: socket.socket) -> None:
        """Nothing to reset: what bytes mean is the user's business."""

    def ping(self, session: socket.socket) -> None:
        """Nothing to ask: the pool looks at the socket itself."""

    def close(self, session: socket.socket) -> None:
        session.close()

    def abort(self, session: socket.socket) -> None:
        fd = session.detach()  # close() would wait for the last ``makefile()``
        if fd >= 0:
            os.close(fd)

    def fileno(self, session: socket.socket) -> int:
        return session.fileno()


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """An address needs no look-up, whose locks in the C library a fork in another thread leaves locked in the child for ever."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return sock
    return socket.create_connection((host, port), timeout=timeout)
