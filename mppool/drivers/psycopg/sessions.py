"""What both drivers are told, what is known of a session, and when it is reset.

Every call is a public one of psycopg's or libpq's, but for the seam ``_connect_gen`` and what has to be forgotten when a session
comes back from another process.
"""

from __future__ import annotations

import _socket
import hashlib
import secrets
import socket
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus

from mppool.drivers.base import policy
from mppool.drivers.postgres import REMEMBERED, cancel_request, is_greeting, is_hopeless, settings_of
from mppool.drivers.psycopg import libpq
from mppool.drivers.psycopg.connecting import Login
from mppool.drivers.psycopg.connections import movable
from mppool.drivers.psycopg.conninfo import effective, for_adopting
from mppool.drivers.psycopg.libpq import Stage, bury, remember, replay
from mppool.errors import DialFailed, Error, ProtocolError
from mppool.states import Residence

__all__ = ["Sessions", "command"]

IDLE, ACTIVE, INTRANS, INERROR = 0, 1, 2, 3  # psycopg's TransactionStatus, as plain numbers: is_clean is on the fast path
SECRET = ("password", "sslpassword", "passfile")
EQUIPMENT = ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")  # arguments of connect() that are not the server's
MADE = ("_autocommit", "_isolation_level", "_read_only", "_deferrable", "_begin_statement", "row_factory", "cursor_factory", "server_cursor_factory")
"""Attributes that users may change."""

Conninfo = str | Callable[[], str]
Arguments = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


class Sessions:
    """What both drivers are told, and know of a session.

    ``on_transfer``: what happens to a session that another process used. "reset": DISCARD ALL before it is lent here; "always": at
    every return; "trust": nothing, so that what others set, locked, listened to or created temporarily may be met.
    ``configure`` is called with each session in each process that has it, and again whenever it was reset.
    """

    name = "postgres"
    baggage_version = 1
    minds_transfer = True

    plain: type[Any]
    """psycopg's own class, for who asks for no other."""

    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        kwargs: Arguments = None,
        connection_class: type[Any] | None = None,
        on_transfer: str = "reset",
        configure: Callable[[Any], Any] | None = None,
    ) -> None:
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.on_transfer = policy(on_transfer)
        self.tidies_always = on_transfer == "always"
        self.configure = configure
        self.connection_class = connection_class or self.plain
        self.cls = movable(self.connection_class)  # type: ignore[arg-type]  # classes are hashable
        self._told: dict[str, Any] | None = None
        self._shown: tuple[str, dict[str, Any]] | None = None
        self._made: dict[str, Any] | None = None  # what all have in common that are shown a login
        self._expected: deque[tuple[Stage, Any]] = deque()  # one that nobody used yet, perhaps

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cls": None, "_told": None, "_shown": None, "_made": None, "_expected": deque()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, cls=movable(state["connection_class"]))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.connection_class.__name__}>"  # the connection string may hold a password

    def arguments(self) -> tuple[str, dict[str, Any]]:
        conninfo = self.conninfo() if callable(self.conninfo) else self.conninfo
        kwargs = self.kwargs() if callable(self.kwargs) else self.kwargs
        return conninfo, {"prepare_threshold": None, **(kwargs or {})}

    def parameters(self) -> dict[str, Any]:
        """Of the connection, with what libpq finds in the environment and in files; no password."""
        return {name: value for name, value in self.told().items() if name not in SECRET}

    def told(self) -> dict[str, Any]:
        """The same with the password. Found out once: it takes libpq a quarter of a millisecond."""
        if self._told is None:
            conninfo, kwargs = self.arguments()
            self._told = effective(make_conninfo(conninfo, **{name: value for name, value in kwargs.items() if name not in EQUIPMENT}))
        return self._told

    def key(self) -> str:
        said = repr(sorted((name, str(value)) for name, value in self.parameters().items() if name != "connect_timeout"))
        return f"{self.name}/{self.baggage_version}/{hashlib.blake2b(said.encode(), digest_size=8).hexdigest()}"

    def fileno(self, session: Any) -> int:
        try:
            return int(session.fileno())
        except psycopg.OperationalError:
            return -1

    def residence(self, session: Any) -> Residence:
        return session._mppool.residence  # type: ignore[no-any-return]

    def detach(self, session: Any) -> bytes:
        host = session._mppool.host.encode()[:255]
        return bytes([len(host)]) + host + session._mppool.greeting  # type: ignore[no-any-return]

    def farewell(self, session: Any) -> bytes:
        return cancel_request(session._mppool.greeting)

    def attach(self, fd: int, baggage: bytes) -> Any:
        size = baggage[0] if baggage else 0
        host, greeting = baggage[1 : 1 + size].decode(errors="replace"), baggage[1 + size :]
        if not is_greeting(greeting):
            raise ProtocolError(f"a baggage of {len(greeting)} bytes is no greeting of a PostgreSQL server")
        stage, conn = self.expected()
        try:
            replay(stage, greeting, fd)
            family, address = peer_of(conn.fileno())
            conn._mppool = Login(greeting, family, address, host, Residence.moves)
            conn._adopted = True
            conn._reported = reported(conn)
            return conn
        except BaseException:
            self.abort(conn)
            raise

    def expect(self) -> None:
        """While the descriptor is on its way, libpq is started, and psycopg's object made: most of the work of ``attach``."""
        if not self._expected:
            try:
                self._expected.append(self.started())
            except (OSError, psycopg.Error):
                pass  # ``attach`` tries again, and says so

    def expected(self) -> tuple[Stage, Any]:
        try:
            return self._expected.pop()
        except IndexError:
            return self.started()

    def started(self) -> tuple[Stage, Any]:
        """A connection that lacks nothing but to be shown a login."""
        conninfo, equipment = self.stage_arguments()
        stage = Stage(conninfo)
        conn = self.cls(stage.begun())
        self.equip(conn, equipment)
        if self._made is None:
            self._made = made(conn)
        conn._made = self._made
        return stage, conn

    def stage_arguments(self) -> tuple[str, dict[str, Any]]:
        """How libpq is started to be shown a greeting, and what psycopg is told besides."""
        if self._shown is None:
            kwargs = self.arguments()[1]
            self._shown = for_adopting(self.told()), {name: kwargs[name] for name in EQUIPMENT if name in kwargs}
        return self._shown

    def equip(self, conn: Any, equipment: Mapping[str, Any]) -> None:
        """What ``connect()`` does to a connection after the login."""
        conn._autocommit = bool(equipment.get("autocommit", False))
        if equipment.get("row_factory"):
            conn.row_factory = equipment["row_factory"]
        if equipment.get("cursor_factory"):
            conn.cursor_factory = equipment["cursor_factory"]
        if equipment.get("context"):
            conn._adapters = AdaptersMap(equipment["context"].adapters)
        conn.prepare_threshold = equipment.get("prepare_threshold")

    def note(self, conn: Any) -> None:
        """This is how it was made."""
        conn._made = made(conn)
        conn._reported = reported(conn)

    def as_made(self, conn: Any) -> None:
        """What users and ``configure`` did to it here is undone, as far as it is psycopg's."""
        state = dict(conn._made)
        conn.prepare_threshold, conn.prepared_max = state.pop("thresholds")
        adapters = state.pop("adapters")
        conn._adapters = adapters and AdaptersMap(adapters)
        vars(conn).update(state)
        conn._notice_handlers.clear()
        conn._notify_handlers.clear()

    def is_clean(self, session: Any) -> bool:
        """Idle, no pipeline, no notifications left, none being waited for."""
        pgconn = session.pgconn
        return (
            pgconn.transaction_status == IDLE
            and session._pipeline is None
            and session._tpc is None
            and not session._notifies_backlog
            and session._notifies_backlog is not None
            and (self.on_transfer != "trust" or list(map(pgconn.parameter_status, REMEMBERED)) == session._reported)  # as ``reported``
        )

    def check_tidy(self, session: Any) -> bool:
        """Is it in a transaction? Raises Error if it is in the middle of anything else."""
        status = session.pgconn.transaction_status
        if session._pipeline is not None or session._tpc is not None or session._notifies_backlog is None or status not in (IDLE, INTRANS, INERROR):
            raise Error("the connection is in the middle of something")
        session._notifies_backlog.clear()
        return status != IDLE  # type: ignore[no-any-return]

    def must_reset(self, session: Any) -> bool:
        """At a return. Under "trust", too, if settings were changed that other processes read by and would not be told of."""
        return self.on_transfer == "always" or (self.on_transfer == "trust" and reported(session) != session._reported)

    def begins_anew(self, session: Any) -> bool:
        """At a transfer. One that is to be configured in a process that never had it is reset first: it would not be told of what others configured already."""
        return self.on_transfer == "reset" or bool(session._adopted and self.configure is not None)

    def must_deallocate(self, session: Any) -> bool:
        """At a transfer: statements that others prepared are of no use here (their names are never ours), and would pile up."""
        return self.on_transfer == "trust" and session.prepare_threshold is not None

    def was_set_up(self, session: Any) -> None:
        """``configure`` was called. Raises ProgrammingError if it left a transaction open."""
        if session.pgconn.transaction_status != IDLE:
            raise psycopg.ProgrammingError(f"connection left in status {session.info.transaction_status.name} by configure={self.configure!r}; commit in it")
        self.settle(session)

    def must_cancel(self, session: Any) -> bool:
        """At the end of a session: a statement in progress is cancelled first, or the server would go on with it."""
        return bool(session._mppool.greeting and session.pgconn.transaction_status == ACTIVE)

    def was_discarded(self, session: Any) -> None:
        """The server has forgotten all that was set since the login: so do we."""
        self.forget(session)
        self.believe(session)
        self.as_made(session)

    def forget(self, session: Any) -> None:
        """What this process remembers of the session is void."""
        prepared = session._prepared
        for memory in (prepared._names, prepared._counts, getattr(prepared, "_to_flush", None), getattr(prepared, "_maint_commands", None)):
            if memory is not None:
                memory.clear()
        if self.on_transfer == "trust":  # others' statements may be there, and a user may yet set prepare_threshold: no name is taken
            prepared._prepared_idx = secrets.randbits(48)
        if session._notifies_backlog:
            session._notifies_backlog.clear()

    def believe(self, session: Any) -> None:
        """After a reset: what libpq remembers of settings must be as at the login, whoever it was that the server told of changes."""
        greeting = session._mppool.greeting
        if any(session.pgconn.parameter_status(name) not in (None, value) for name, value in settings_of(greeting)):
            self.renew(session)

    def renew(self, session: Any) -> None:
        """libpq remembers settings that were changed here, and reset elsewhere: it is shown the login again."""
        older, login = session.pgconn, session._mppool
        pgconn = replay(Stage(self.stage_arguments()[0]), login.greeting, older.socket)
        wself = weakref.ref(session)
        pgconn.notice_handler = partial(psycopg.BaseConnection._notice_handler, wself)
        pgconn.notify_handler = partial(psycopg.BaseConnection._notify_handler, wself)
        session.pgconn = pgconn
        bury(older)

    def renewed(self, session: Any) -> Any:
        """Another connection object over the same libpq connection, as one that was just made; the older one is closed, as far as it knows.

        For integrations that promise a new object for each adoption: it costs a tenth of adopting.
        """
        newer = self.cls(session.pgconn)
        newer._mppool, newer._adopted = session._mppool, session._adopted
        self.equip(newer, self.stage_arguments()[1])
        newer._made, newer._reported = session._made, session._reported
        remember(newer)
        session.pgconn = ended()
        return newer

    def settle(self, session: Any) -> None:
        """Whatever was set since the login is how its user wants it, and nothing to be put right at its return."""
        session._reported = reported(session)

    def abort(self, session: Any) -> None:
        session._closed = True
        bury(session.pgconn)

    def forked(self) -> bool:
        self._expected.clear()
        return libpq.forked()

    @staticmethod
    def failed(error: psycopg.Error) -> DialFailed:
        text = str(error)
        hopeless = is_hopeless(error.sqlstate or "") or "password authentication failed" in text or "no password supplied" in text
        return DialFailed(text, permanent=hopeless)


def peer_of(fd: int) -> tuple[int, Any]:
    """Family and address of the other end; no address if that has gone. (With its kind given, the kernel is not asked for it.)"""
    known = _socket.socket(-1, socket.SOCK_STREAM, 0, fd)
    try:
        return known.family, known.getpeername()
    except OSError:
        return known.family, None  # the pool looks at the connection next
    finally:
        known.detach()


def command(pgconn: pq.abc.PGconn, sql: bytes) -> Any:
    """A round trip, as psycopg's own: told by ``Connection.wait``."""
    pgconn.send_query(sql)
    results = yield from generators.execute(pgconn)
    for result in results:
        if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.EMPTY_QUERY):
            raise psycopg.errors.error_from_result(result)


@cache
def ended() -> pq.abc.PGconn:
    """A libpq connection to nowhere, for objects that have lost theirs."""
    pgconn = pq.PGconn.connect_start(b"host=@mppool-nobody hostaddr='' port=1")
    pgconn.finish()
    return pgconn


def made(conn: Any) -> dict[str, Any]:
    adapters = conn._adapters and AdaptersMap(conn._adapters)
    return {**{name: getattr(conn, name) for name in MADE}, "thresholds": (conn.prepare_threshold, conn.prepared_max), "adapters": adapters}


def reported(session: Any) -> list[bytes | None]:
    """The settings that libpq was told of and by which a client reads."""
    return list(map(session.pgconn.parameter_status, REMEMBERED))
