"""Raw sockets over TCP or Unix sockets: lends a ``socket.socket``."""

from __future__ import annotations

import socket

from mppool.drivers.base import DriverBase
from mppool.drivers.dialer import FOREVER, Dialer, abandon, adopt
from mppool.options import Target
from mppool.states import Residence

__all__ = ["RawDriver"]


class RawDriver(DriverBase):
    """Plain connections to ``target``. Lent sockets have a timeout of eleven days; ``settimeout`` holds until return."""

    name = "raw"

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.dialer = Dialer(target, connect_timeout)

    def key(self) -> str:
        return "raw/1"

    def dial(self) -> socket.socket:
        return self.dialer.dial()

    def fileno(self, session: socket.socket) -> int:
        return session.fileno()

    def residence(self, session: socket.socket) -> Residence:
        return Residence.moves

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        return adopt(fd)

    def is_clean(self, session: socket.socket) -> bool:
        """Not closed, and no ``makefile()`` left that may have read ahead. Puts the timeout back."""
        if session.fileno() < 0 or session._io_refs:  # type: ignore[attr-defined]
            return False
        if session.timeout != FOREVER:
            session.settimeout(FOREVER)
        return True

    def close(self, session: socket.socket) -> None:
        session.close()

    def abort(self, session: socket.socket) -> None:
        abandon(session)

    def forked(self) -> bool:
        return self.dialer.forked()
