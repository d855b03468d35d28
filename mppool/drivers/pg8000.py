"""pg8000: PostgreSQL in pure Python. Adopts through its public ``sock=``: the recorded greeting is replayed to it, then the live socket takes over."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from typing import Any

from mppool.drivers.base import DriverBase, policy
from mppool.drivers.dialer import FOREVER, Dialer, abandon
from mppool.drivers.postgres import cancel_request, greeting_of, is_hopeless
from mppool.errors import DialFailed, Error, OptionError, ProtocolError
from mppool.options import Target
from mppool.states import Residence

try:
    import pg8000.dbapi
    from pg8000.core import CoreConnection
except ImportError as error:
    raise ImportError("mppool.drivers.pg8000 needs pg8000: pip install pg8000") from error

__all__ = ["Pg8000Driver"]

CLOSING = 0.5  # seconds that a goodbye may take


class Wire(io.RawIOBase):
    """The bytes of one connection: recorded during a login, replayed during an adoption, then live. In the end it is dead and swallows all."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard: bytearray | None = None  # recording
        self.canned: memoryview | None = None  # replaying: what is left of it
        self.peeking = False
        self.broken = False  # a read or write failed, or was interrupted: nobody knows where in the conversation

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.peeking:
            return None
        if self.canned is not None:
            part, self.canned = self.canned[: len(buffer)], self.canned[len(buffer) :]
            buffer[: len(part)] = part
            return len(part)
        try:
            count = self.sock.recv_into(buffer)
        except ConnectionError:
            count = 0  # pg8000 makes its own error of an end, and lets this one through
        except BaseException:
            self.broken = True
            raise
        self.broken = self.broken or not count
        if self.heard is not None:
            self.heard += buffer[:count]
        return count

    def write(self, data: Any) -> int:
        if self.canned is not None:
            return len(data)
        try:
            return self.sock.send(data)
        except BaseException:
            self.broken = True
            raise


class Shim(socket.socket):
    """What pg8000 is given: a socket whose file is a Wire."""

    wire: Wire
    file: io.BufferedRWPair
    greeting = b""

    def makefile(self, *_: Any, **__: Any) -> io.BufferedRWPair:  # type: ignore[override]
        self.file = io.BufferedRWPair(self.wire, self.wire)
        return self.file

    def has_read_ahead(self) -> bool:
        """Are there bytes in the buffer that pg8000 has not looked at?"""
        self.wire.peeking = True
        try:
            return bool(self.file.peek(1))
        finally:
            self.wire.peeking = False

    def drop(self) -> None:
        """Let go of this process's descriptor without a word, now and later."""
        self.wire.canned = memoryview(b"")
        abandon(self)


class Pg8000Driver(DriverBase):
    """Lends pg8000's connections. The options are those of ``pg8000.dbapi.connect``, but for ``sock``.

    ``on_transfer``: what happens to a session that another process used. "reset": ``DISCARD ALL`` before it is lent here; "always":
    at every return; "trust": nothing, so that settings, temporary tables, advisory locks and LISTEN of others may be met.
    ``connection_class``: ``pg8000.dbapi.Connection``, if it is not given.

    Over TLS, which ``ssl_context=None`` uses where the server offers it, sessions stay in their process.
    """

    name = "pg8000"
    minds_transfer = True

    def __init__(
        self,
        user: str,
        host: str | None = "localhost",
        database: str | None = None,
        port: int = 5432,
        *,
        on_transfer: str = "reset",
        connection_class: type[CoreConnection] = pg8000.dbapi.Connection,
        unix_sock: str | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        if options.get("sock") is not None:
            raise OptionError("sock=...: the pool opens its own connections")
        self.on_transfer = policy(on_transfer)
        self.tidies_always = on_transfer == "always"
        self.connection_class = connection_class
        self.patience = FOREVER if timeout is None else timeout
        target = Target("unix", unix_sock) if unix_sock is not None else Target("tcp", host or "localhost", int(port))
        self.dialer = Dialer(target, 10.0 if timeout is None else timeout)
        self.options = {"user": user, "host": host, "database": database, **options}

    def key(self) -> str:
        said = [str(self.dialer.target), *(str(self.options.get(name)) for name in ("user", "database", "application_name", "replication", "startup_params"))]
        return f"{self.name}/{self.baggage_version}/{hashlib.blake2b(repr(said).encode(), digest_size=6).hexdigest()}"

    def dial(self) -> CoreConnection:
        """Raises DialFailed, with pg8000's error as its cause."""
        shim = Shim(fileno=self.dialer.dial().detach())
        shim.wire = Wire(shim)
        try:
            self.dialer.remember(shim)
            shim.settimeout(self.dialer.connect_timeout)
            shim.wire.heard = bytearray()
            conn = self.connection_class(sock=shim, **self.options)
            shim.greeting, shim.wire.heard = greeting_of(bytes(shim.wire.heard)), None
            conn._usock.settimeout(self.patience)
            return conn
        except BaseException as error:
            shim.close()
            if isinstance(error, (pg8000.dbapi.Error, OSError)):
                raise DialFailed(f"target={str(self.dialer.target)!r}: {said_by(error)}", permanent=is_hopeless(sqlstate_of(error))) from error
            raise

    def fileno(self, session: CoreConnection) -> int:
        return session._usock.fileno() if session._usock is not None else -1

    def residence(self, session: CoreConnection) -> Residence:
        return Residence.moves if isinstance(session._usock, Shim) else Residence.tls

    def detach(self, session: CoreConnection) -> bytes:
        return session._usock.greeting if isinstance(session._usock, Shim) else b""

    def farewell(self, session: CoreConnection) -> bytes:
        return cancel_request(self.detach(session))

    def attach(self, fd: int, baggage: bytes) -> CoreConnection:
        made: list[Shim] = []
        made.extend(map(Shim, (-1,), (-1,), (-1,), map(os.dup, (fd,))))  # in one step: see dialer.adopt
        shim = made[0]
        wire = shim.wire = Wire(shim)
        try:
            shim.settimeout(self.patience)
            wire.canned = memoryview(baggage)
            conn = self.connection_class(sock=shim, **{**self.options, "ssl_context": False})
            if len(wire.canned) or shim.has_read_ahead():
                raise ProtocolError("a greeting with something after it")
            shim.greeting, wire.canned = baggage, None
            return conn
        except BaseException:
            shim.drop()
            raise

    def is_clean(self, session: CoreConnection) -> bool:
        """Idle, outside of a transaction, nothing read ahead. (``_transaction_status`` is None before the first query.)"""
        sock = session._usock
        if sock is None or session._transaction_status not in (b"I", None):
            return False
        return not (isinstance(sock, Shim) and (sock.wire.broken or sock.has_read_ahead()))

    def tidy(self, session: CoreConnection) -> None:
        sock = session._usock
        if sock is None or (isinstance(sock, Shim) and sock.wire.broken):
            raise Error("the connection is closed, or broken")
        if session._transaction_status in (b"T", b"E"):
            session.execute_simple("rollback")
        if self.on_transfer == "always":
            self.reset(session)

    def transferred(self, session: CoreConnection) -> None:
        if self.on_transfer == "reset":
            self.reset(session)
        else:
            self.forget(session)

    def reset(self, session: CoreConnection) -> None:
        """Raises if a transaction is open."""
        session.execute_simple("DISCARD ALL")
        self.forget(session)

    def forget(self, session: CoreConnection) -> None:
        """What this process knew of it: statements that are others' or discarded, notifications, pg8000's own setting."""
        session._statement_nums.clear()
        session.notifications.clear()
        session.autocommit = False

    def ping(self, session: CoreConnection) -> None:
        session.execute_simple("")

    def close(self, session: CoreConnection) -> None:
        sock = session._usock
        try:
            if sock is not None:
                sock.settimeout(CLOSING)
                session.close()
        except Exception:
            pass  # it is going away; there is nobody to tell
        if isinstance(sock, Shim):
            sock.drop()

    def abort(self, session: CoreConnection) -> None:
        sock = session._usock
        if isinstance(sock, Shim):
            sock.drop()
        elif sock is not None:
            abandon(sock)

    def forked(self) -> bool:
        return self.dialer.forked() and self.options.get("ssl_context") is False


def said_by(error: Exception) -> str:
    """pg8000 raises the server's fields as a dictionary."""
    fields = error.args[0] if error.args else ""
    return f"{fields.get('M')} ({fields.get('C')})" if isinstance(fields, dict) else str(error)


def sqlstate_of(error: Exception) -> str:
    fields = error.args[0] if error.args else ""
    return str(fields.get("C", "")) if isinstance(fields, dict) else ""
