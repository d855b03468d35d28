"""HTTP/1.1 connections as urllib3 has them: between two requests nothing but the socket is left, so any process may go on with it."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from mppool.drivers.base import DriverBase
from mppool.drivers.dialer import FOREVER, abandon, adopt
from mppool.errors import DialFailed
from mppool.states import Residence

__all__ = ["HTTPDriver"]


class HTTPDriver(DriverBase):
    """Lends urllib3's connections. ``new`` makes one that is not connected, ``connect`` connects it (raising what urllib3 raises), ``origin`` is its place.

    Connections over TLS stay with the process that made them.
    """

    name = "http"

    def __init__(self, origin: str, new: Callable[[], Any], connect: Callable[[Any], None]) -> None:
        self.origin = origin
        self.new = new
        self.connect = connect

    def key(self) -> str:
        return f"http/1 {self.origin}"[:255]

    def dial(self) -> Any:
        """Raises DialFailed, always permanent (a request that finds the server down says so at once), with urllib3's error as its cause."""
        conn = self.new()
        try:
            self.connect(conn)
        except Exception as error:
            conn.close()
            raise DialFailed(f"{self.origin}: {error}", permanent=True) from error
        except BaseException:
            conn.close()
            raise
        conn.auto_open = 0  # a connection of its own making would be outside the cap
        return conn

    def fileno(self, session: Any) -> int:
        return session.sock.fileno() if session.sock is not None else -1

    def residence(self, session: Any) -> Residence:
        return Residence.tls if isinstance(session.sock, ssl.SSLSocket) else Residence.moves

    def attach(self, fd: int, baggage: bytes) -> Any:
        conn = self.new()
        conn.sock = adopt(fd)
        conn.auto_open = 0
        return conn

    def is_clean(self, session: Any) -> bool:
        """The last response was read to its end, and the server did not say that it closes. Puts the timeout back."""
        sock = session.sock
        if sock is None or session._HTTPConnection__state != "Idle" or (session._tunnel_host and not isinstance(sock, ssl.SSLSocket)):
            return False
        response = session._HTTPConnection__response
        if response is not None and (not response.isclosed() or response.status < 200):
            return False  # (to http.client a 103 is a whole response: the real one is still to come; after a 101 it is HTTP no more)
        if sock.gettimeout() != FOREVER:
            sock.settimeout(FOREVER)
        return True

    def close(self, session: Any) -> None:
        session.close()

    def abort(self, session: Any) -> None:
        sock, session.sock = session.sock, None
        if sock is not None:
            abandon(sock)
