"""``SharedPool``: SQLAlchemy's view of a pool that all worker processes share."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import exc, util
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from mppool.errors import DialFailed, Error, PoolTimeout, TooManyWaiting
from mppool.integrations.sqlalchemy.clients import client_for
from mppool.integrations.sqlalchemy.sessions import Record, Session, SessionDriver
from mppool.pool import Pool as HostPool

__all__ = ["SharedPool"]

TIMEOUT = "3o7r"  # SQLAlchemy's code, and page, for a pool's time-out
UNNAMED = (
    "SharedPool: this engine connects by a function of its own (creator=, or a do_connect listener that returns a connection); "
    "say with pool_name= which connections are interchangeable: workers that give the same name share a pool"
)


class SharedPool(Pool):
    """One pool of connections for the engines of all worker processes of a host.

        create_engine("postgresql+psycopg://app@db/app", poolclass=SharedPool, pool_size=20, pool_timeout=5)

    ``pool_size`` is what all processes together may have, idle ones included, and it is strict; ``max_overflow``, 0 if it is not
    given, is added to it, for there is no such thing as a connection beyond the cap. With psycopg, pg8000 and PyMySQL
    (without TLS) sessions move between the processes; with any other DBAPI, and with ``creator=``, they stay in the process that made
    them, are counted with all others, and are closed when another process is in need.

    In each process an adopted session is a new DBAPI connection without the handshake: "connect" is fired for it, and "close"
    when this process lets go of it; ``info`` is empty, and ``pool_pre_ping`` pings it. What the last process left is reset first (``DISCARD
    ALL`` and the like), unless ``pool_on_transfer="trust"``.

    Options of ``create_engine``, beside SQLAlchemy's own for pools:

    ``pool_name``          engines that give the same name share a pool; by default those with the same server, login and options do
    ``pool_broker``        a broker's socket; by default ``$MPPOOL_BROKER`` or the user's own
    ``pool_autostart``     start a broker if none answers
    ``pool_on_transfer``   "reset" (what it is by default), or what else the client's driver knows: "always", "trust"
    ``pool_options``       a dictionary of what else ``mppool.Pool`` can be told: ``{"max_waiting": 100, "max_idle": 60}``

    The same as with ``QueuePool`` are the pool's events and their order, ``pool_timeout``, ``pool_pre_ping``, ``pool_reset_on_return``,
    ``invalidate()``, also ``soft``, exc.DisconnectionError at "checkout", ``info``, threads, forgotten connections, ``echo_pool``,
    ``engine_from_config``, ``create_pool_from_url``. What differs:

    - ``pool_size`` and ``max_overflow`` are for the host, and 0 or -1 ("no limit") are refused.
    - ``pool_recycle`` counts from the login, whichever process it was in, and up to 10 % less, at random.
    - ``record_info`` lasts as long as ``info``: a connection that replaces another has a record of its own.
    - ``overflow()`` is 0: nothing is beyond the size. ``status()`` has more to say.
    - ``pool_use_lifo`` is always so. Idle connections are closed after ``max_idle``, 600 s.
    - ``Connection.detach()``: the connection counts in the cap until it is closed.
    - ``Engine.dispose()``: this process lets go; its connections live on if other processes use the pool. ``engine.pool.drain()`` ends all.
    - A fork needs no ``dispose(close=False)``; it does no harm.
    - If the database cannot be reached, one process at a time finds out; the others are told the same ``OperationalError`` without trying.
    - ``status()``, ``size()``, ``checkedin()`` and ``checkedout()`` speak of all processes together.

    Raises exc.ArgumentError for options that make no sense, mppool.ConfigMismatch at the first use if another engine has
    the same ``pool_name`` and another server or login. A checkout raises exc.TimeoutError after ``pool_timeout``, and the DBAPI's errors.
    """

    _is_asyncio = False
    _pool_class: type[Any] = HostPool
    _driver_class: type[SessionDriver] = SessionDriver
    _shared: Any = None  # of _pool_class, once it is used

    def __init__(
        self,
        creator: Callable[..., Any],
        pool_size: int = 5,
        max_overflow: int = 0,
        timeout: float = 30.0,
        use_lifo: bool = True,
        pool_name: str | None = None,
        pool_broker: str | None = None,
        pool_autostart: bool = False,
        pool_on_transfer: str = "reset",
        pool_options: Mapping[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        """``use_lifo`` is for those who come from QueuePool: it is always so."""
        if pool_size < 1 or max_overflow < 0:
            raise exc.ArgumentError(f"pool_size={pool_size}, max_overflow={max_overflow}: SharedPool has a strict cap, of 1 or more in all")
        self._arguments: dict[str, Any] = {
            "pool_size": pool_size,
            "max_overflow": max_overflow,
            "timeout": timeout,
            "pool_name": pool_name,
            "pool_broker": pool_broker,
            "pool_autostart": pool_autostart,
            "pool_on_transfer": pool_on_transfer,
            "pool_options": pool_options,
        }
        self.recycle = kw.pop("recycle", -1)  # is the pool's, and of all processes: see Options.max_lifetime
        super().__init__(creator, **kw)
        self.create, self._invoke_creator = self._invoke_creator, self._connection_of  # type: ignore[assignment]
        self._options = {
            "max_size": pool_size + max_overflow,
            "timeout": timeout,
            "max_lifetime": self.recycle if self.recycle > -1 else math.inf,
            "reconnect_timeout": 0,  # the server is down: say so at once
            "broker": pool_broker,
            "autostart": bool(util.asbool(pool_autostart)),
            **(pool_options or {}),
        }
        self._by_dialect = getattr(creator, "__module__", "") == "sqlalchemy.engine.create"  # not by a function of the user's
        self._known: dict[int, Session] = {}  # by id of the DBAPI connection

    # What SQLAlchemy asks of a pool.

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._lease().record
        assert record is not None
        if record.owner is not self:
            record = self._taken_over(record)
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        assert isinstance(record, Record)
        session = record.session
        if session is None:
            return  # closed, and given back then
        if record.dbapi_connection is None:
            self._detached(record, session)
            return
        try:
            self._give(session, discard=record._is_hard_or_soft_invalidated())
        except Error:
            if session.pid == os.getpid():
                raise
            # Forked while it was lent: it is the parent's.

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        session = self._known.get(id(connection))
        if session is None or session.at_hand() is not connection:
            super()._close_connection(connection, terminate=terminate)
            return
        if session.pid != os.getpid():
            return  # forked while it was lent: it is the parent's
        self.logger.debug("%s connection %r", "Hard-closing" if terminate else "Closing", connection)
        session.terminate = terminate
        if session.record is not None:
            session.record.session = None  # SQLAlchemy fires its events itself
            session.record = None
        self._give(session, discard=True)

    def end(self, connection: Any, *, terminate: bool) -> None:
        """Close a DBAPI connection that no client of ours made."""
        super()._close_connection(connection, terminate=terminate)

    def recreate(self) -> SharedPool:
        self.logger.info("Pool recreating")
        newer = self.__class__(
            self._creator,
            **self._arguments,
            recycle=self.recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        newer._known = self._known
        if self._shared is not None:
            newer._shared = self._shared
            newer._shared._driver.owner = newer
        return newer

    def dispose(self) -> None:
        """This process lets go of the pool; what is checked out is closed when it comes back. Nobody else there: idle sessions end, too."""
        shared = vars(self).pop("_shared", None)
        if shared is not None and not shared.closed:
            self._let_go(shared, is_alone(shared))
        self.logger.info("Pool disposed. %s", self.status())

    def status(self) -> str:
        stats = self.get_stats()
        return f"Pool size: {self.size()}  Connections in pool: {stats['idle']} Current Overflow: 0 Current Checked out connections: {stats['in_use']}" + (
            f" (all processes of pool {stats['name']!r}; waiting: {stats['waiting']})" if stats["name"] else ""
        )

    # QueuePool's.

    def size(self) -> int:
        """The cap of all processes together."""
        shared = self._shared
        return int(shared.get_stats()["max_size"]) if shared is not None and shared._worker is not None else int(self._options["max_size"])

    def timeout(self) -> float:
        return float(self._options["timeout"])

    def checkedin(self) -> int:
        return int(self.get_stats()["idle"])

    def checkedout(self) -> int:
        return int(self.get_stats()["in_use"])

    def overflow(self) -> int:
        return 0

    # mppool's.

    def get_stats(self) -> dict[str, Any]:
        """Of all processes: see ``mppool.Pool.get_stats``. Zeros if this process has not used the pool yet."""
        shared = self._shared
        if shared is None or shared._worker is None:
            return {"name": "", "max_size": self._options["max_size"], "size": 0, "idle": 0, "in_use": 0, "dialing": 0, "waiting": 0}
        return shared.get_stats()  # type: ignore[no-any-return]

    def drain(self) -> None:
        """Replace the connections of all processes: idle ones end now, or when they are next met; checked out ones when they come back."""
        self.shared().drain()

    def resize(self, max_size: int) -> None:
        """Change the cap of all processes together."""
        self.shared().resize(max_size)

    def shared(self) -> Any:
        """The pool underneath, made at the first use: only then is it known where the engine connects to."""
        shared = self._shared
        return shared if shared is not None else self._make()

    # Sessions.

    def _lease(self) -> Session:
        """A session of this engine, not older than its last invalidation."""
        shared = self._shared or self._make()
        try:
            session = self._take(shared)
            while session.login < self._invalidate_time:
                self._give(session, discard=True)
                session = self._take(shared)
            return session
        except Error as error:
            raised = self._translated(error)
        raise raised

    # How it is lent and given back, which AsyncSharedPool does by awaiting.

    def _take(self, shared: Any) -> Session:
        return shared.getconn()  # type: ignore[no-any-return]

    def _give(self, session: Session, *, discard: bool) -> None:
        session.pool.putconn(session, discard=discard)

    def _let_go(self, shared: Any, drain: bool) -> None:
        if drain:
            shared.drain()
        shared.close()

    def _connection_of(self, record: ConnectionPoolEntry) -> Any:
        """What a record connects to, in place of the creator: its session's connection. If it has none any more, another session's."""
        assert isinstance(record, Record)
        session = record.session
        if session is None:
            session = self._lease()
            if session.record is not None:
                session.record.session = None
            session.record, record.session = record, session
        record.starttime = session.login
        return session.connection

    def _taken_over(self, older: Record) -> Record:
        """A session that an earlier pool of this engine had in this process, before ``dispose(close=False)``."""
        session = older.session
        assert session is not None
        older.session = None
        session.record = Record(self, session)
        return session.record

    def _detached(self, record: Record, session: Session) -> None:
        """The user has it for good. It stays leased, and counted, for as long as the connection lives."""
        record.session = session.record = None
        key, known, pid = id(session.connection), self._known, os.getpid()

        def is_gone(_: object) -> None:
            if known.get(key) is session:
                del known[key]
            if pid == os.getpid():
                try:
                    self._give(session, discard=True)
                except Error:
                    pass  # the pool has ended

        try:
            session.loose = weakref.ref(session.connection, is_gone)
        except TypeError:
            return  # as sqlite3's: counted until it is closed
        session.connection = None

    def _make(self) -> Any:
        dialect, given = self._dialect, self._arguments["pool_name"]
        driver = self._driver_class(self, self._known, client_for(dialect) if self._by_dialect else None, self._arguments["pool_on_transfer"])
        name = driver.learn(given) if self._by_dialect else given
        if name is None:
            raise exc.ArgumentError(UNNAMED)
        made = driver.pool = self._pool_class(driver=driver, name=name, **self._options)
        return vars(self).setdefault("_shared", made)  # if another thread was faster, ours is forgotten: it has done nothing yet

    def _translated(self, error: Error) -> BaseException:
        """What SQLAlchemy's users expect to be told."""
        cause = error.__cause__
        if isinstance(error, DialFailed) and cause is not None and not isinstance(cause, (Error, OSError)):
            return cause  # what the DBAPI, or a listener, raised
        if isinstance(error, DialFailed) or isinstance(cause, DialFailed):
            dbapi = getattr(self._dialect, "loaded_dbapi", None)
            if dbapi is not None:
                said = dbapi.OperationalError(str(cause if isinstance(cause, DialFailed) else error))
                said.__cause__ = error
                return said  # type: ignore[no-any-return]
        if isinstance(error, (PoolTimeout, TooManyWaiting)):
            return exc.TimeoutError(f"SharedPool limit of size {self._options['max_size']} reached: {error}", code=TIMEOUT)
        return error


def is_alone(shared: Any) -> bool:
    """Does no other living process use the pool?"""
    if shared._worker is None:
        return False
    return sum(worker["alive"] is not False for worker in shared.get_stats()["workers"]) <= 1
