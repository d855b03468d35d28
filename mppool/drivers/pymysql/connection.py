"""What is other about PyMySQL's connections here: they know when an answer is owed to them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

from pymysql import err
from pymysql.connections import Connection
from pymysql.constants import CR

from mppool.drivers.dialer import abandon

__all__ = ["Raw", "Session"]

T = TypeVar("T")


class Session(Connection):
    """A ``pymysql.Connection`` that knows when an answer is owed to it, and never connects by itself: that would be outside the cap."""

    # What of PyMySQL's own state this file looks at or sets; the stubs do not know it.
    server_status: int
    server_capabilities: int
    server_version: str
    server_thread_id: tuple[int]
    server_language: int
    protocol_version: int
    _sock: Any
    _rfile: Any
    _result: Any
    _secure: bool
    _next_seq_id: int
    _read_timeout: float
    _write_timeout: float

    at_rest = 0  # WATCHED bits of the server's status after the login
    unanswered = False  # something was sent, and what the server says to it was not read to its end

    def connect(self, sock: Any = None) -> None:
        if sock is None:
            raise err.OperationalError(CR.CR_SERVER_LOST, "a pooled connection does not connect again: give it back and take another")
        super().connect(sock)

    def _write_bytes(self, data: bytes) -> None:
        self.unanswered = True
        super()._write_bytes(data)  # type: ignore[misc]

    def _answer(self, read: Callable[..., T], *args: Any) -> T:
        """An error of MySQL's is an answer, too. Whatever else is raised may have come in the middle of one."""
        try:
            answer = read(*args)
        except err.MySQLError:
            self.unanswered = False
            raise
        self.unanswered = False
        return answer

    def _read_ok_packet(self) -> Any:
        return self._answer(super()._read_ok_packet)  # type: ignore[misc]

    def _read_query_result(self, unbuffered: bool = False) -> Any:
        return self._answer(super()._read_query_result, unbuffered)  # type: ignore[misc]

    def set_character_set(self, charset: str, collation: str | None = None) -> None:
        self._answer(super().set_character_set, charset, collation)

    def show_warnings(self) -> Any:
        return self._answer(super().show_warnings)

    def read_ahead(self) -> bool:
        """Does the reader hold bytes that nobody asked for yet? (No I/O: see Raw.)"""
        return bool(self._rfile.tell() != Raw.PLACE)

    def let_go(self) -> None:
        """Close our descriptor without a word: no COM_QUIT, and no cursor that later reads the rest of its result."""
        result, sock = self._result, self._sock
        if result is not None:
            result.unbuffered_active = False
        self._sock = self._rfile = None
        if sock is not None:
            abandon(sock)


class Raw(socket.SocketIO):
    """Stands at a fixed place: a buffered reader on it says ``tell() == PLACE`` exactly when its buffer is empty."""

    PLACE = 1 << 40

    def tell(self) -> int:
        return self.PLACE
