"""Raw sockets over TCP or Unix sockets: lends a ``socket.socket``."""

from __future__ import annotations

import os
import socket
import weakref
from typing import Any

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
        self._dialed: list[weakref.ref[socket.socket]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_dialed": []}  # for a spawned process, which has none of our connections

    def key(self) -> str:
        return "raw/1"

    def dial(self) -> socket.socket:
        """Raises DialFailed; permanent if the host name does not exist."""
        target = self.target
        try:
            if target.kind == "unix":
                sock = self.make(socket.AF_UNIX)
                try:
                    sock.connect(target.host)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = self.connect(target.host, target.port)
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

    def forked(self) -> bool:
        for reference in self._dialed:
            sock = reference()
            if sock is not None:
                self.abort(sock)
        return True

    def connect(self, host: str, port: int) -> socket.socket:
        """The first address that answers. One that is given as such needs no look-up: a fork while another thread is in one may block the child's for ever."""
        failure: OSError | None = None
        for family, address in addresses(host, port):
            sock = self.make(family)
            try:
                sock.connect(address)
                return sock
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
        raise failure or OSError(f"no address for {host!r}")

    def make(self, family: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        self._dialed = [*(reference for reference in self._dialed if reference() is not None), weakref.ref(sock)]
        sock.settimeout(self.connect_timeout)
        return sock


def addresses(host: str, port: int) -> list[tuple[int, Any]]:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
