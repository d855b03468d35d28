"""psycopg 3: sessions that move between processes under libpq; libpq.py says how.

Every call is a public one of psycopg's or libpq's, but for the seam ``_connect_gen`` and what has to be forgotten when a session
comes back from another process. What libpq does not know is where the server really is, so cancelling is ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import isawaitable
from typing import Any, NamedTuple

try:
    import psycopg
except ImportError as error:
    raise ImportError("mppool needs psycopg 3 for this: pip install 'mppool[psycopg]'") from error

from psycopg import generators, pq
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus

from mppool.drivers import libpq
from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.drivers.conninfo import effective, for_adopting, for_dialing, place_of, residence_by
from mppool.drivers.libpq import Waits, bury, by_itself, connected, offers_tls, relayed, remember, replay
from mppool.drivers.postgres import REMEMBERED, cancel_request, is_greeting, is_hopeless, settings_of
from mppool.drivers.streams import within
from mppool.errors import DialFailed, Error, OptionError, ProtocolError
from mppool.states import Residence

__all__ = ["AsyncPsycopgDriver", "PsycopgDriver"]

IDLE, ACTIVE, INTRANS, INERROR = 0, 1, 2, 3  # psycopg's TransactionStatus, as plain numbers: is_clean is on the fast path
SECRET = ("password", "sslpassword", "passfile")
EQUIPMENT = ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")  # arguments of connect() that are not the server's
MADE = ("_autocommit", "_isolation_level", "_read_only", "_deferrable", "_begin_statement", "row_factory", "cursor_factory", "server_cursor_factory")
"""Attributes that users may change."""
CANCELING = 0.5  # seconds that cancelling a statement may take when its session is closed


class Login(NamedTuple):
    """What we know of a connection and libpq does not: the recorded greeting, and where the server is."""

    greeting: bytes = b""
    family: int = 0
    address: Any = None
    host: str = ""
    residence: Residence = Residence.tls
    adopted: bool = False  # and not yet configured in this process

    def __repr__(self) -> str:
        return f"Login({self.host!r}, {self.address!r}, {self.residence.name})"  # the greeting holds a secret


def movable_gen(cls: Any, plain: Callable[..., Any], conninfo: str, options: dict[str, Any]) -> Waits[Any]:
    """In place of psycopg's ``_connect_gen``: one attempt to connect to one place. ``plain`` is psycopg's own, for what cannot move."""
    params = effective(conninfo)
    family, address, host = place_of(params)
    mode = params.get("sslmode") or "prefer"
    residence = residence_by(params, family)
    where = f'on socket "{address}"' if family == socket.AF_UNIX else f'at "{host}", port {address[1]}'
    if residence is Residence.moves:
        try:
            real = yield from connected(family, address, params)
        except OSError as error:
            raise psycopg.OperationalError(f"connection failed: connection to server {where} failed: {error}") from error
        try:
            if mode == "prefer" and family != socket.AF_UNIX:
                try:
                    residence = Residence.tls if (yield from offers_tls(real)) else Residence.moves
                except OSError as error:
                    raise psycopg.OperationalError(f"connection failed: connection to server {where} failed: {error}") from error
            if residence is Residence.moves:
                pgconn, greeting = yield from relayed(for_dialing(conninfo, params.get("password")), real, where)
                conn = cls(pgconn)
                remember(conn)
                conn._mppool = Login(greeting, family, address, host, Residence.moves if is_greeting(greeting) else Residence.no_adapter)
                return conn
        except psycopg.OperationalError:
            if mode != "allow" or family == socket.AF_UNIX:
                raise  # else libpq goes on with TLS
        finally:
            real.close()  # libpq has it now, or nobody
    conn = yield from by_itself(plain(conninfo, **options))
    remember(conn)
    secured = Residence.tls if conn.pgconn.ssl_in_use else Residence.no_adapter
    conn._mppool = Login(residence=residence if residence is Residence.gssapi else secured)
    return conn


class Info(psycopg.ConnectionInfo):
    """Where the server really is, which libpq does not know."""

    def __init__(self, pgconn: pq.abc.PGconn, login: Login) -> None:
        super().__init__(pgconn)
        self._login = login

    @property
    def host(self) -> str:
        return self._login.host

    @property
    def hostaddr(self) -> str:
        return str(self._login.address[0]) if isinstance(self._login.address, tuple) else ""

    @property
    def port(self) -> int:
        address = self._login.address
        return int(address[1]) if isinstance(address, tuple) else int(address.rpartition(".")[2])


class Movable:
    """What is other about a connection of ours: how it connects, and how it cancels."""

    _mppool = Login()
    _made: dict[str, Any]  # attributes, when it was made and not yet configured
    _reported: list[bytes | None]  # settings that libpq was told of, when it was configured
    _pool: Any = None  # that has lent it
    closed: bool
    pgconn: pq.abc.PGconn
    _should_cancel: Callable[[], bool]

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **options: Any) -> Waits[Any]:
        return movable_gen(cls, super()._connect_gen, conninfo, options)  # type: ignore[misc]

    def __del__(self, *_: Any) -> None:
        """Forgotten, not closed: others may have the session. (libpq's own end would say goodbye on it.)"""
        if self._mppool.residence is Residence.moves:
            bury(self.pgconn)

    @property
    def info(self) -> psycopg.ConnectionInfo:
        moved = self._mppool.residence is Residence.moves
        return Info(self.pgconn, self._mppool) if moved else super().info  # type: ignore[misc]

    def cancel(self) -> None:
        """Cancel the current operation on the connection."""
        if self._mppool.residence is not Residence.moves:
            super().cancel()  # type: ignore[misc]
        elif self._should_cancel():
            cancel(self._mppool, None)


class MovableConnection(Movable):
    def close(self) -> None:
        """End the session; after it was returned, nothing: it may be somebody else's by now."""
        pool = self._pool
        if pool is None or self.closed:
            super().close()  # type: ignore[misc]
        elif pool.lends(self):
            if pool.close_returns:
                pool.putconn(self)
            else:
                end(self)

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the current operation on the connection, within ``timeout`` seconds."""
        if self._mppool.residence is not Residence.moves:
            super().cancel_safe(timeout=timeout)  # type: ignore[misc]
        elif self._should_cancel():
            cancel(self._mppool, timeout or None)


class AsyncMovableConnection(Movable):
    async def close(self) -> None:
        """End the session; after it was returned, nothing: it may be somebody else's by now."""
        pool = self._pool
        if pool is None or self.closed:
            await super().close()  # type: ignore[misc]
        elif pool.lends(self):
            if pool.close_returns:
                await pool.putconn(self)
            else:
                end(self)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the current operation on the connection, within ``timeout`` seconds."""
        if self._mppool.residence is not Residence.moves:
            await super().cancel_safe(timeout=timeout)  # type: ignore[misc]
        elif self._should_cancel():
            await cancel_async(self._mppool, timeout or None)


def cancel(login: Login, timeout: float | None) -> None:
    """Ask the server to cancel what that session does, and wait until it has been asked."""
    try:
        with socket.socket(login.family, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(login.address)
            sock.sendall(cancel_request(login.greeting))
            sock.recv(1)
    except TimeoutError:
        raise psycopg.errors.CancellationTimeout("cancellation timeout expired") from None
    except OSError as error:
        raise psycopg.OperationalError(f"couldn't send cancellation: {error}") from error


async def cancel_async(login: Login, timeout: float | None) -> None:
    loop = asyncio.get_running_loop()

    async def ask() -> None:
        with socket.socket(login.family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, login.address)
            await loop.sock_sendall(sock, cancel_request(login.greeting))
            await loop.sock_recv(sock, 1)

    try:
        await within(timeout, ask())
    except asyncio.TimeoutError:
        raise psycopg.errors.CancellationTimeout("cancellation timeout expired") from None
    except OSError as error:
        raise psycopg.OperationalError(f"couldn't send cancellation: {error}") from error


_classes: dict[type[Any], type[Any]] = {}


def movable(base: type[Any]) -> type[Any]:
    """The user's connection class, able to move."""
    if base not in _classes:
        _classes[base] = _movable(base)
    return _classes[base]


def _movable(base: type[Any]) -> type[Any]:
    kind = AsyncMovableConnection if issubclass(base, psycopg.AsyncConnection) else MovableConnection
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__doc__": base.__doc__})


# The drivers.

Conninfo = str | Callable[[], str]
Arguments = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


def end(session: Any) -> None:
    """Say goodbye to the server."""
    session._closed = True
    session.pgconn.finish()


class Sessions:
    """What both drivers are told, and know of a session.

    ``on_transfer``: what happens to a session that another process used. "reset": DISCARD ALL before it is lent here; "always": at
    every return; "trust": nothing, so that what others set, locked, listened to or created temporarily may be met.
    ``configure`` is called with each session in each process that has it, and again whenever it was reset.
    """

    name = "postgres"
    baggage_version = 1
    minds_transfer = True

    def __init__(
        self,
        conninfo: Conninfo,
        *,
        kwargs: Arguments,
        connection_class: type[Any],
        on_transfer: str,
        configure: Callable[[Any], Any] | None,
    ) -> None:
        if on_transfer not in ("reset", "always", "trust"):
            raise OptionError(f'on_transfer={on_transfer!r}: expected "reset", "always" or "trust"')
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.on_transfer = on_transfer
        self.tidies_always = on_transfer == "always"
        self.configure = configure
        self.connection_class = connection_class
        self.cls = movable(connection_class)
        self._shown: tuple[str, dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cls": None, "_shown": None}

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
        conninfo, kwargs = self.arguments()
        given = make_conninfo(conninfo, **{name: value for name, value in kwargs.items() if name not in EQUIPMENT})
        return {name: value for name, value in effective(given).items() if name not in SECRET}

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

    def _attach(self, fd: int, baggage: bytes) -> Any:
        size = baggage[0] if baggage else 0
        host, greeting = baggage[1 : 1 + size].decode(errors="replace"), baggage[1 + size :]
        if not is_greeting(greeting):
            raise ProtocolError(f"a baggage of {len(greeting)} bytes is no greeting of a PostgreSQL server")
        conn = self.cls(replay(self.stage_arguments()[0], greeting, fd))
        try:
            with socket.socket(fileno=conn.fileno()) as known:
                family, address = known.family, known.getpeername()
                known.detach()
            conn._mppool = Login(greeting, family, address, host, Residence.moves, adopted=True)
            self.equip(conn, self.stage_arguments()[1])
            self.note(conn)
            return conn
        except BaseException:
            self.abort(conn)
            raise

    def stage_arguments(self) -> tuple[str, dict[str, Any]]:
        """How libpq is started to be shown a greeting, and what psycopg is told besides."""
        if self._shown is None:
            kwargs = self.arguments()[1]
            self._shown = for_adopting(self.parameters()), {name: kwargs[name] for name in EQUIPMENT if name in kwargs}
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
        conn._made = {**{name: getattr(conn, name) for name in MADE}, "thresholds": (conn.prepare_threshold, conn.prepared_max)}
        conn._reported = reported(conn)

    def as_made(self, conn: Any) -> None:
        """What users and ``configure`` did to it here is undone, as far as it is psycopg's."""
        made = dict(conn._made)
        conn.prepare_threshold, conn.prepared_max = made.pop("thresholds")
        vars(conn).update(made)
        conn._notice_handlers.clear()
        conn._notify_handlers.clear()

    def is_clean(self, session: Any) -> bool:
        """Idle, no pipeline, no notifications left, none being waited for."""
        return (
            session.pgconn.transaction_status == IDLE
            and session._pipeline is None
            and session._tpc is None
            and not session._notifies_backlog
            and session._notifies_backlog is not None
            and (self.on_transfer != "trust" or reported(session) == session._reported)
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
        return self.on_transfer == "reset" or bool(session._mppool.adopted and self.configure is not None)

    def must_deallocate(self, session: Any) -> bool:
        """Statements that others prepared may have the names that psycopg would use here."""
        return self.on_transfer == "trust" and session.prepare_threshold is not None

    def check_set_up(self, session: Any) -> None:
        if session.pgconn.transaction_status != IDLE:
            raise psycopg.ProgrammingError(f"connection left in status {session.info.transaction_status.name} by configure={self.configure!r}; commit in it")

    def forget(self, session: Any) -> None:
        """What this process remembers of the session is void."""
        prepared = session._prepared
        for memory in (prepared._names, prepared._counts, getattr(prepared, "_to_flush", None), getattr(prepared, "_maint_commands", None)):
            if memory is not None:
                memory.clear()
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
        pgconn = replay(self.stage_arguments()[0], login.greeting, older.socket)
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
        newer._mppool = session._mppool
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
        return libpq.forked()

    @staticmethod
    def failed(error: psycopg.Error) -> DialFailed:
        text = str(error)
        hopeless = is_hopeless(error.sqlstate or "") or "password authentication failed" in text or "no password supplied" in text
        return DialFailed(text, permanent=hopeless)


class PsycopgDriver(Sessions, DriverBase):
    """Lends ``psycopg.Connection`` objects (of a subclass of ``connection_class``). Arguments as of ``psycopg_pool.ConnectionPool``; see ``Sessions``."""

    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        kwargs: Arguments = None,
        connection_class: type[psycopg.Connection[Any]] = psycopg.Connection,
        on_transfer: str = "reset",
        configure: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(conninfo, kwargs=kwargs, connection_class=connection_class, on_transfer=on_transfer, configure=configure)

    def dial(self) -> Any:
        """Raises DialFailed, with psycopg's error as its cause."""
        conninfo, kwargs = self.arguments()
        try:
            conn = self.cls.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise self.failed(error) from error
        try:
            self.note(conn)
            self.set_up(conn)
        except BaseException:
            end(conn)
            raise
        return conn

    def attach(self, fd: int, baggage: bytes) -> Any:
        return self._attach(fd, baggage)

    def tidy(self, session: Any) -> None:
        if self.check_tidy(session):
            session.rollback()
        if self.must_reset(session):
            self.reset(session)

    def transferred(self, session: Any) -> None:
        if self.begins_anew(session):
            self.reset(session)
        else:
            self.forget(session)
            if self.must_deallocate(session):
                session.wait(command(session.pgconn, b"DEALLOCATE ALL"))
        session._mppool = session._mppool._replace(adopted=False)

    def set_up(self, session: Any) -> None:
        """Call the user's ``configure``. Raises what it raises, ProgrammingError if it leaves a transaction open."""
        if self.configure is not None:
            self.configure(session)
            self.check_set_up(session)
            session._reported = reported(session)

    def reset(self, session: Any) -> None:
        session.wait(command(session.pgconn, b"DISCARD ALL"))
        self.forget(session)
        self.believe(session)
        self.as_made(session)
        self.set_up(session)

    def ping(self, session: Any) -> None:
        session.wait(command(session.pgconn, b""))

    def close(self, session: Any) -> None:
        """Say goodbye; a statement in progress is cancelled first, or the server would go on with it."""
        if session._mppool.greeting and session.pgconn.transaction_status == ACTIVE:
            try:
                cancel(session._mppool, CANCELING)
            except psycopg.Error:
                pass  # it finds out by itself, later
        end(session)


class AsyncPsycopgDriver(Sessions, AsyncDriverBase):
    """Lends ``psycopg.AsyncConnection`` objects; as PsycopgDriver. Nothing has to stop reading: psycopg watches a connection while it waits for it only."""

    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        kwargs: Arguments = None,
        connection_class: type[psycopg.AsyncConnection[Any]] = psycopg.AsyncConnection,
        on_transfer: str = "reset",
        configure: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(conninfo, kwargs=kwargs, connection_class=connection_class, on_transfer=on_transfer, configure=configure)

    async def dial(self) -> Any:
        """Raises DialFailed, with psycopg's error as its cause."""
        conninfo, kwargs = self.arguments()
        try:
            conn = await self.cls.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise self.failed(error) from error
        try:
            self.note(conn)
            await self.set_up(conn)
        except BaseException:
            end(conn)
            raise
        return conn

    def attach(self, fd: int, baggage: bytes) -> Any:
        return self._attach(fd, baggage)  # some 50 us, with nobody to wait for

    async def tidy(self, session: Any) -> None:
        if self.check_tidy(session):
            await session.rollback()
        if self.must_reset(session):
            await self.reset(session)

    async def transferred(self, session: Any) -> None:
        if self.begins_anew(session):
            await self.reset(session)
        else:
            self.forget(session)
            if self.must_deallocate(session):
                await session.wait(command(session.pgconn, b"DEALLOCATE ALL"))
        session._mppool = session._mppool._replace(adopted=False)

    async def set_up(self, session: Any) -> None:
        """Call the user's ``configure``. Raises what it raises, ProgrammingError if it leaves a transaction open."""
        if self.configure is not None:
            said = self.configure(session)
            if isawaitable(said):
                await said
            self.check_set_up(session)
            session._reported = reported(session)

    async def reset(self, session: Any) -> None:
        await session.wait(command(session.pgconn, b"DISCARD ALL"))
        self.forget(session)
        self.believe(session)
        self.as_made(session)
        await self.set_up(session)

    async def ping(self, session: Any) -> None:
        await session.wait(command(session.pgconn, b""))

    async def close(self, session: Any) -> None:
        if session._mppool.greeting and session.pgconn.transaction_status == ACTIVE:
            try:
                await cancel_async(session._mppool, CANCELING)
            except psycopg.Error:
                pass  # it finds out by itself, later
        end(session)


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


def reported(session: Any) -> list[bytes | None]:
    """The settings that libpq was told of and by which a client reads."""
    return list(map(session.pgconn.parameter_status, REMEMBERED))
