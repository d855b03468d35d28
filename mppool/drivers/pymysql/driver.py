"""``PyMySQLDriver``."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import socket
import ssl
import struct
from typing import Any

from pymysql import err
from pymysql.constants import COMMAND, ER, SERVER_STATUS

from mppool.drivers.base import DriverBase, policy
from mppool.drivers.dialer import FOREVER, Dialer
from mppool.drivers.pymysql.connection import Raw, Session
from mppool.drivers.pymysql.packets import COM_QUIT, COM_RESET_CONNECTION, OK, command, greeting, packet, settings
from mppool.errors import DialFailed, OptionError
from mppool.options import Target
from mppool.states import Residence

__all__ = ["PyMySQLDriver"]

# What the server said last of its own state, and must say again before somebody else has the session.
IN_TRANSACTION = SERVER_STATUS.SERVER_STATUS_IN_TRANS | 0x2000  # read only
UNREAD = SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS | SERVER_STATUS.SERVER_STATUS_CURSOR_EXISTS
AUTOCOMMIT = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
SETTINGS = AUTOCOMMIT | SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES
WATCHED = IN_TRANSACTION | UNREAD | SETTINGS

# Waiting will not help: access denied, to the database or at all; no such database; an unknown or unusable authentication plugin or character set.
PERMANENT = frozenset({ER.DBACCESS_DENIED_ERROR, ER.ACCESS_DENIED_ERROR, ER.BAD_DB_ERROR, ER.UNKNOWN_CHARACTER_SET, 1251, 1524, 1698, 2054, 2059, 2061})


class _Dialer(Dialer):
    def __init__(self, target: Target, connect_timeout: float, source: str | None) -> None:
        super().__init__(target, connect_timeout)
        self.source = source

    def _make(self, family: int) -> socket.socket:
        sock = super()._make(family)
        if self.source is not None and family != socket.AF_UNIX:
            sock.bind((self.source, 0))
        return sock


class PyMySQLDriver(DriverBase):
    """Sessions as ``pymysql.connect(**arguments)`` makes them; lends ``pymysql.Connection`` objects.

    ``on_transfer``: "reset" (default) resets a session that another process used before it is lent; "always" at every return,
    so that not even users in one process see each other's state; "trust" never, which saves one round trip and lets session
    state leak (see the table in the README). In all three an open transaction is rolled back at return.

    A connection that PyMySQL makes over TLS, which it does by default if the server offers it, stays with the process that
    made it; ``ssl_disabled=True`` lets sessions move. Without a ``read_timeout`` a lent connection waits eleven days for an answer.

    Raises OptionError if PyMySQL does not take the arguments.
    """

    name = "pymysql"
    minds_transfer = True

    def __init__(self, *, on_transfer: str = "reset", **arguments: Any) -> None:
        self.on_transfer = policy(on_transfer)
        self.tidies_always = on_transfer == "always"
        self.arguments = {**arguments, "defer_connect": True}
        for name in ("read_timeout", "write_timeout"):
            # PyMySQL's None is a blocking socket, and that would reach every process that has the connection.
            self.arguments[name] = min(arguments.get(name) or FOREVER, FOREVER)
        self._template: Session | None = None
        self._pid = 0
        model = self._model()
        self.target = Target("unix", str(model.unix_socket)) if model.unix_socket else Target("tcp", model.host, model.port)
        self.dialer = _Dialer(self.target, model.connect_timeout or 10.0, model.bind_address)
        self._settings = settings(model)
        self._encoding = model.encoding

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_template": None, "_pid": 0}

    def _model(self) -> Session:
        """A session that is not connected, to be copied: PyMySQL's constructor may take 20 ms, loading certificates."""
        if self._template is None or self._pid != os.getpid():  # which it tells the server
            try:
                self._template = Session(**self.arguments)
            except Exception as error:
                raise OptionError(f"pymysql.connect(): {type(error).__name__}: {error}") from error
            self._pid = os.getpid()
        return self._template

    def key(self) -> str:
        """Who, where, and a digest of what else makes sessions different. No password."""
        model = self._model()
        parts = (
            model.charset,
            model.collation,
            model.sql_mode,
            model.init_command,
            model.autocommit_mode,
            model.client_flag,
            bool(model.ssl),
            model.bind_address,
            self.on_transfer,
        )
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        return f"pymysql/1 {text(model.user)}@{self.target}/{text(model.db)} {digest}"

    def dial(self) -> Session:
        model = self._model()
        session = copy.copy(model)
        sock = self.dialer.dial()
        try:
            session.host_info = "Localhost via UNIX socket" if self.target.kind == "unix" else f"socket {self.target.host}:{self.target.port}"
            session._secure = self.target.kind == "unix"
            # A server that accepts and then says nothing must not keep the right to dial for ever.
            session._read_timeout = session._write_timeout = min(self.dialer.connect_timeout, model._read_timeout)
            session.connect(sock)
            session._read_timeout, session._write_timeout = model._read_timeout, model._write_timeout
            self._ready(session)
            self.settle(session)
        except BaseException as error:
            session.let_go()
            sock.close()
            if not isinstance(error, Exception):
                raise
            raise self._failed(error) from error
        return session

    def _failed(self, error: Exception) -> DialFailed:
        code = error.args[0] if isinstance(error, err.MySQLError) and error.args else None
        permanent = code in PERMANENT or not isinstance(error, (err.MySQLError, OSError))
        return DialFailed(f"target={str(self.target)!r}: {type(error).__name__}: {error}", permanent=permanent)

    def _ready(self, session: Session) -> None:
        """Connected. From here on its reader is one that can be asked if it has read ahead."""
        session._rfile.close()
        session._rfile = io.BufferedReader(Raw(session._sock, "r"))
        session.unanswered = False

    def settle(self, session: Session) -> None:
        """Its settings are now how its user wants them, and nothing to be put right at its return."""
        session.at_rest = session.server_status & SETTINGS

    def fileno(self, session: Session) -> int:
        return session._sock.fileno() if session._sock is not None else -1

    def residence(self, session: Session) -> Residence:
        return Residence.tls if isinstance(session._sock, ssl.SSLSocket) else Residence.moves

    def detach(self, session: Session) -> bytes:
        """The server's capabilities, and its greeting without those that would lead to more than two answers."""
        return struct.pack("<I", session.server_capabilities) + greeting(session)

    def attach(self, fd: int, baggage: bytes) -> Session:
        model = self._model()
        session = copy.copy(model)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                theirs.sendall(baggage[4:] + packet(2, OK) + packet(1, OK))  # greeting, login, SET NAMES
                theirs.shutdown(socket.SHUT_WR)  # whatever else is read is not waited for
                session.ssl = False
                session.sql_mode = session.init_command = session.autocommit_mode = None
                session.connect(ours)
                session.sql_mode, session.init_command, session.autocommit_mode = model.sql_mode, model.init_command, model.autocommit_mode
                session.ssl = model.ssl
                session.host_info = f"socket {self.target.host}:{self.target.port}"
                session.server_capabilities = struct.unpack_from("<I", baggage)[0]
                os.dup2(fd, ours.fileno(), inheritable=False)
                self._ready(session)
                self.settle(session)
            except BaseException:
                session.let_go()
                ours.close()
                raise
        return session

    def is_clean(self, session: Session) -> bool:
        """Nothing owed, nothing unread, no transaction, and the settings that the server speaks of are those of the login.

        After a SELECT the server's word on transactions is not passed on by PyMySQL: without autocommit, one is open then.
        """
        if session._sock is None or session.unanswered or session.server_status & WATCHED != session.at_rest:
            return False
        result = session._result
        if result is not None and (result.has_next or result.unbuffered_active or (result.server_status is None and not session.at_rest & AUTOCOMMIT)):
            return False
        return not session.read_ahead() and session.encoding == self._encoding

    def tidy(self, session: Session) -> None:
        """Roll back; reset, if that is the policy, or if settings have changed that the driver knows of."""
        result = session._result
        if session._sock is None or session.unanswered or (result is not None and result.unbuffered_active):
            raise err.InterfaceError(0, "an answer was not read to its end")
        if session.read_ahead() and not (result is not None and result.has_next):
            raise err.InterfaceError(0, "the server said something that nobody asked for")
        session.rollback()  # after reading what further results there are
        if self.tidies_always or not self.is_clean(session):
            self.reset(session)

    def transferred(self, session: Session) -> None:
        self._forget(session)
        if self.on_transfer == "reset":
            self.reset(session)

    def _forget(self, session: Session) -> None:
        model = self._model()
        session._result = None
        session.server_status = session.at_rest
        session.charset, session.encoding, session.collation = model.charset, model.encoding, model.collation
        session.autocommit_mode = model.autocommit_mode

    def reset(self, session: Session) -> None:
        """One write, and two or three answers: reset, database, settings of the login. Then the init_command, if there is one."""
        self._forget(session)
        out = COM_RESET_CONNECTION
        if session.db:
            out += command(COMMAND.COM_INIT_DB, session.db if isinstance(session.db, bytes) else session.db.encode(session.encoding))
        session._write_bytes(out + command(COMMAND.COM_QUERY, self._settings))
        for _ in range(3 if session.db else 2):
            session._next_seq_id = 1
            session._read_ok_packet()
        if not session.db:
            self._refuse_database(session)
        if session.init_command is not None:
            with session.cursor() as cursor:
                cursor.execute(session.init_command)
            if session.autocommit_mode is not None:
                session.autocommit(session.autocommit_mode)
            session._result = None

    def _refuse_database(self, session: Session) -> None:
        """A reset does not leave the current database, and there is no command to leave it."""
        session.query("SELECT DATABASE()")
        rows = session._result.rows
        session._result = None
        if rows[0][0] is not None:
            raise err.InterfaceError(0, "a database was selected, in a session that has none")

    def ping(self, session: Session) -> None:
        session.ping(reconnect=False)

    def close(self, session: Session) -> None:
        try:
            if session._sock is not None:
                session._sock.settimeout(0)
                session._sock.send(COM_QUIT)
        except (OSError, ValueError):
            pass  # the end of the connection says it, too
        self.abort(session)

    def abort(self, session: Session) -> None:
        session.let_go()

    def forked(self) -> bool:
        return self.dialer.forked() and not self._model().ssl


def text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
