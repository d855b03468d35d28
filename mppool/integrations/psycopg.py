"""psycopg 3: ``ConnectionPool`` and ``AsyncConnectionPool`` in the place of psycopg_pool's.

    from mppool.integrations.psycopg import ConnectionPool

    pool = ConnectionPool("dbname=app user=app", min_size=0, max_size=10, kwargs={"autocommit": True})
    with pool.connection() as conn:
        conn.execute("select 1")

``max_size`` is for all worker processes of the host together; so are ``min_size``, ``max_waiting`` and what get_stats() says.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from inspect import isawaitable
from types import TracebackType
from typing import Any

from mppool import errors
from mppool.aio import AsyncPool
from mppool.drivers.psycopg import AsyncPsycopgDriver, PsycopgDriver
from mppool.pool import Pool

try:
    import psycopg_pool  # its exceptions are what its users catch

    _Timeout: Any = psycopg_pool.PoolTimeout
    _Closed: Any = psycopg_pool.PoolClosed
    _TooMany: Any = psycopg_pool.TooManyRequests
except ImportError:
    from psycopg import OperationalError

    _Timeout = _Closed = _TooMany = OperationalError

import psycopg
from psycopg.pq import TransactionStatus

__all__ = ["AsyncConnectionPool", "ConnectFailed", "ConnectionPool", "PoolClosed", "PoolTimeout", "TooManyRequests"]

log = logging.getLogger("mppool")

IDLE, ACTIVE = TransactionStatus.IDLE, TransactionStatus.ACTIVE


class PoolTimeout(errors.PoolTimeout, _Timeout):  # type: ignore[misc]
    """No connection became free in time. Also psycopg_pool's PoolTimeout, if that is installed, and psycopg's OperationalError."""


class PoolClosed(errors.PoolClosed, _Closed):  # type: ignore[misc]
    """The pool was used after ``close()``. Also psycopg_pool's PoolClosed and psycopg's OperationalError."""


class TooManyRequests(errors.TooManyWaiting, _TooMany):  # type: ignore[misc]
    """``max_waiting`` callers wait already. Also psycopg_pool's TooManyRequests and psycopg's OperationalError."""


class ConnectFailed(errors.DialFailed, psycopg.OperationalError):
    """The server refuses for good (wrong password, no such database), or was down for longer than ``reconnect_timeout``."""


def translated(error: errors.Error) -> errors.Error:
    """What psycopg_pool's users expect, with the same words and cause."""
    for ours, theirs in ((errors.PoolTimeout, PoolTimeout), (errors.PoolClosed, PoolClosed), (errors.TooManyWaiting, TooManyRequests)):
        if isinstance(error, ours):
            raised: errors.Error = theirs(str(error))
            break
    else:
        if not isinstance(error, errors.DialFailed):
            return error
        raised = ConnectFailed(str(error), permanent=error.permanent)
    raised.__cause__ = error.__cause__
    return raised


class _Shared:
    """What both pools are told, and say of themselves."""

    _pool: Any

    def __init__(
        self,
        driver: Callable[..., PsycopgDriver | AsyncPsycopgDriver],
        conninfo: str | Callable[[], str],
        *,
        connection_class: Any,
        configure: Callable[[Any], Any] | None,
        reset: Callable[[Any], Any] | None,
        kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None,
        min_size: int,
        max_size: int | None,
        name: str | None,
        close_returns: bool,
        reconnect_failed: Callable[[Any], Any] | None,
        num_workers: int,
        on_transfer: str,
        **options: Any,
    ) -> None:
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.connection_class = connection_class
        self.close_returns = close_returns
        self.num_workers = num_workers
        self._reconnect_failed = reconnect_failed
        self._popped: dict[str, int] = {}
        made = driver(conninfo, kwargs=kwargs, connection_class=connection_class, on_transfer=on_transfer, configure=configure)
        given = {"max_size": max_size if max_size is not None else max(min_size, 1), "min_size": min_size, "reset": reset, **options}
        self._pool = self._make(driver=made, name=name if name is not None else name_of(made), **given)

    def _make(self, **options: Any) -> Any:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Workers that give the same share a pool; by default it says database, server and user."""
        return str(self._pool.name)

    @property
    def closed(self) -> bool:
        return bool(self._pool.closed)

    @property
    def min_size(self) -> int:
        return int(self._pool.options.min_size)

    @property
    def max_size(self) -> int:
        return int(self._pool.options.max_size)

    def __getattr__(self, name: str) -> Any:
        if name in ("timeout", "max_waiting", "max_lifetime", "max_idle", "reconnect_timeout"):
            return getattr(self._pool.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} {self._pool!r}>"

    def get_stats(self) -> dict[str, int]:
        """psycopg_pool's numbers, of all workers together, since the pool came to be. ``usage_ms`` and ``connections_ms`` are not measured."""
        found = self._pool.get_stats()
        closed = found["closed"]
        return {
            "pool_min": found["min_size"],
            "pool_max": found["max_size"],
            "pool_size": found["size"],
            "pool_available": found["idle"],
            "requests_waiting": found["waiting"],
            "requests_num": found["checkouts"],
            "requests_queued": found["waits"],
            "requests_wait_ms": found["wait_us"] // 1000,
            "requests_errors": found["timeouts"] + found["rejected"],
            "returns_bad": closed.get("discarded", 0) + closed.get("reset_failed", 0),
            "connections_num": found["dials"] + found["dial_failures"],
            "connections_errors": found["dial_failures"],
            "connections_lost": closed.get("peer_closed", 0) + closed.get("check_failed", 0),
        }

    def pop_stats(self) -> dict[str, int]:
        """As get_stats(), counted since this process last popped them."""
        found = self.get_stats()
        since = {name: value - self._popped.get(name, 0) if is_counter(name) else value for name, value in found.items()}
        self._popped = found
        return since

    def lends(self, conn: Any) -> bool:
        """Is this connection lent by this pool, in this process, just now?"""
        worker = self._pool._worker or self._pool._leaving
        return worker is not None and bool(worker.guard[0]) and id(conn) in worker.leases

    def _not_ours(self, conn: Any) -> ValueError:
        other = getattr(conn, "_pool", None)
        whose = f"it comes from pool {other.name!r}" if other is not None and other is not self else "it was returned already, or comes from no pool"
        return ValueError(f"can't return connection to pool {self.name!r}, {whose}: {conn}")

    def _judged(self, conn: Any) -> bool:
        """Is this to be closed? Says in the log what psycopg_pool would say."""
        status = conn.pgconn.transaction_status
        if status == IDLE:
            return False
        if status == TransactionStatus.UNKNOWN:
            log.warning("discarding closed connection: %s", conn)
            return True
        if status == ACTIVE:
            log.warning("closing returned connection: %s", conn)
            return True
        log.warning("rolling back returned connection: %s", conn)
        return False


class ConnectionPool(_Shared):
    """A drop-in for ``psycopg_pool.ConnectionPool`` whose connections all worker processes of the host share.

    The arguments are psycopg_pool's; besides them ``on_transfer`` says what happens to a session that another process used:

    "reset"    (the default) DISCARD ALL before it is lent here: nothing travels
    "always"   DISCARD ALL at every return: nothing is left, not even for the same process
    "trust"    nothing: settings, temporary tables, advisory locks, LISTEN of other workers may be met. Only where a user changed what clients read
               by (client_encoding, TimeZone, DateStyle, IntervalStyle, standard_conforming_strings) is it reset, at its return

    and ``broker autostart max_dialing max_lease close_timeout`` are those of ``mppool.Pool``.

    What differs from psycopg_pool:

    - ``min_size`` and ``max_size`` are for all workers together; the cap is strict; there are no background workers (``num_workers`` has no meaning).
    - A pool opens at its first use, in each process anew; made before a fork it works in every child. ``open=True`` opens at once.
    - A server that refuses for good (wrong password, no such database) raises ConnectFailed at once, not PoolTimeout after ``timeout``.
    - ``configure`` is called in each process, when it first has a session, and after each DISCARD ALL: what it sets is always set.
    - Prepared statements are off unless ``kwargs`` says ``prepare_threshold``. They are safe: DISCARD ALL drops what other processes prepared
      (under "trust" that costs a DEALLOCATE ALL), and they are forgotten here; a process that keeps its session keeps its statements.
    - Connections over TLS stay with their process (``sslmode=disable``, or a Unix socket, lets them move). They count in the cap.
    - ``conn.close()`` after the connection was returned does nothing; before, it ends the session.
    - ``min_size`` is dialed when the pool is opened, and not refilled in the background.

    Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed: all are psycopg.OperationalError, too.
    """

    _pool: Pool

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[psycopg.Connection[Any]] = psycopg.Connection,
        kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callable[[Any], None] | None = None,
        check: Callable[[Any], None] | None = None,
        reset: Callable[[Any], None] | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 3600.0,
        max_idle: float = 600.0,
        reconnect_timeout: float = 300.0,
        reconnect_failed: Callable[[Any], None] | None = None,
        num_workers: int = 3,
        on_transfer: str = "reset",
        **options: Any,
    ) -> None:
        super().__init__(
            PsycopgDriver,
            conninfo,
            connection_class=connection_class,
            kwargs=kwargs,
            configure=configure,
            check=check,
            reset=reset,
            min_size=min_size,
            max_size=max_size,
            name=name,
            close_returns=close_returns,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            num_workers=num_workers,
            on_transfer=on_transfer,
            **options,
        )
        if open:
            self.open()

    def _make(self, **options: Any) -> Pool:
        return Pool(**options)

    # Connections.

    def connection(self, timeout: float | None = None) -> _Lease:
        """``with pool.connection() as conn:`` commits at the end of the block, or rolls back after an exception, and returns the connection."""
        return _Lease(self, timeout)

    def getconn(self, timeout: float | None = None) -> Any:
        """Obtain a connection; give it back with ``putconn``. Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed."""
        try:
            conn = self._pool.getconn(timeout)
        except errors.Error as error:
            self._failed(error)
            raise translated(error) from error.__cause__
        if conn._pool is not self:
            conn._pool = self
        return conn

    def putconn(self, conn: Any) -> None:
        """Return a connection. In a transaction it is rolled back, in the middle of something closed. ValueError if it is not lent by this pool."""
        try:
            self._pool.putconn(conn, discard=self._judged(conn))
        except errors.Error as error:
            if self.lends(conn):
                raise
            raise self._not_ours(conn) from error

    def check(self) -> None:
        """Ask each idle connection if it still works; those that do not are closed."""
        lent: list[Any] = []
        try:
            for _ in range(self._pool.get_stats()["idle"]):
                lent.append(self._pool.getconn(timeout=0))  # noqa: PERF401 (what was lent before a failure is returned)
        except errors.PoolTimeout:
            pass  # others were faster
        finally:
            for conn in lent:
                try:
                    self.check_connection(conn)
                except psycopg.Error as error:
                    log.warning("connection %s is lost: %s", conn, error)
                    self._pool.putconn(conn, discard=True)
                else:
                    self._pool.putconn(conn)

    @staticmethod
    def check_connection(conn: Any) -> None:
        """One round trip; for ``check=``, too. Raises OperationalError if the connection does not work."""
        if conn.autocommit:
            conn.execute("")
        else:
            conn.autocommit = True
            try:
                conn.execute("")
            finally:
                conn.autocommit = False

    # The pool.

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Take part in the pool, and connect until ``min_size`` connections are there. ``wait``: PoolTimeout if they are not within ``timeout`` seconds."""
        try:
            self._pool.open(wait, timeout)
        except errors.Error as error:
            raise translated(error) from error.__cause__

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until ``min_size`` connections are there. Raises PoolTimeout."""
        self.open(wait=True, timeout=timeout)

    def close(self, timeout: float = 5.0) -> None:
        """This process uses the pool no more. Connections live on for others, what is still lent after its return. ``timeout`` has no meaning."""
        self._pool.close()

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change both sizes, for all workers, at once."""
        self._pool.resize(max_size if max_size is not None else min_size, min_size=min_size)

    def drain(self) -> None:
        """Replace all connections, of all workers: idle ones are closed at once or when they are next met, lent ones after their return."""
        self._pool.drain()

    def __enter__(self) -> ConnectionPool:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, error: errors.Error) -> None:
        if isinstance(error, errors.DialFailed) and not error.permanent and self._reconnect_failed is not None:
            self._reconnect_failed(self)


class _Lease:
    """A connection for a ``with`` block."""

    __slots__ = ("_conn", "_pool", "_timeout")

    def __init__(self, pool: ConnectionPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> Any:
        self._conn = self._pool.getconn(self._timeout)
        return self._conn

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        conn, pool = self._conn, self._pool
        if kind is None and conn.pgconn.transaction_status == IDLE and conn._pipeline is None:  # nothing to commit
            try:
                pool._pool.putconn(conn)
            except errors.Error:
                if pool.lends(conn):
                    raise
            return  # (else it was returned in the block)
        try:
            conn.__exit__(kind, error, trace)  # which commits, or rolls back
        finally:
            if pool.lends(conn):
                pool.putconn(conn)


class AsyncConnectionPool(_Shared):
    """A drop-in for ``psycopg_pool.AsyncConnectionPool``: as ConnectionPool, which says what differs, with psycopg's AsyncConnection."""

    _pool: AsyncPool

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: type[psycopg.AsyncConnection[Any]] = psycopg.AsyncConnection,
        kwargs: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callable[[Any], Any] | None = None,
        check: Callable[[Any], Any] | None = None,
        reset: Callable[[Any], Any] | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 3600.0,
        max_idle: float = 600.0,
        reconnect_timeout: float = 300.0,
        reconnect_failed: Callable[[Any], Any] | None = None,
        num_workers: int = 3,
        on_transfer: str = "reset",
        **options: Any,
    ) -> None:
        """``open`` has no meaning: a pool of asyncio's opens with ``await pool.open()``, ``async with pool:`` or its first use."""
        super().__init__(
            AsyncPsycopgDriver,
            conninfo,
            connection_class=connection_class,
            kwargs=kwargs,
            configure=configure,
            check=check,
            reset=reset,
            min_size=min_size,
            max_size=max_size,
            name=name,
            close_returns=close_returns,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            num_workers=num_workers,
            on_transfer=on_transfer,
            **options,
        )

    def _make(self, **options: Any) -> AsyncPool:
        return AsyncPool(**options)

    def connection(self, timeout: float | None = None) -> _AsyncLease:
        """``async with pool.connection() as conn:`` commits at the end of the block, or rolls back after an exception, and returns the connection."""
        return _AsyncLease(self, timeout)

    async def getconn(self, timeout: float | None = None) -> Any:
        """Obtain a connection; give it back with ``putconn``. Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed."""
        try:
            conn = await self._pool.getconn(timeout)
        except errors.Error as error:
            if isinstance(error, errors.DialFailed) and not error.permanent and self._reconnect_failed is not None:
                said = self._reconnect_failed(self)
                if isawaitable(said):
                    await said
            raise translated(error) from error.__cause__
        conn._pool = self
        return conn

    async def putconn(self, conn: Any) -> None:
        """Return a connection. In a transaction it is rolled back, in the middle of something closed. ValueError if it is not lent by this pool."""
        try:
            await self._pool.putconn(conn, discard=self._judged(conn))
        except errors.Error as error:
            if self.lends(conn):
                raise
            raise self._not_ours(conn) from error

    async def check(self) -> None:
        """Ask each idle connection if it still works; those that do not are closed."""
        lent: list[Any] = []
        try:
            for _ in range(self._pool.get_stats()["idle"]):
                lent.append(await self._pool.getconn(timeout=0))  # noqa: PERF401 (what was lent before a failure is returned)
        except errors.PoolTimeout:
            pass  # others were faster
        finally:
            for conn in lent:
                try:
                    await self.check_connection(conn)
                except psycopg.Error as error:
                    log.warning("connection %s is lost: %s", conn, error)
                    await self._pool.putconn(conn, discard=True)
                else:
                    await self._pool.putconn(conn)

    @staticmethod
    async def check_connection(conn: Any) -> None:
        """One round trip; for ``check=``, too. Raises OperationalError if the connection does not work."""
        if conn.autocommit:
            await conn.execute("")
        else:
            await conn.set_autocommit(True)
            try:
                await conn.execute("")
            finally:
                await conn.set_autocommit(False)

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Take part in the pool, and connect until ``min_size`` connections are there. ``wait``: PoolTimeout if they are not within ``timeout`` seconds."""
        try:
            await self._pool.open(wait, timeout)
        except errors.Error as error:
            raise translated(error) from error.__cause__

    async def wait(self, timeout: float = 30.0) -> None:
        """Wait until ``min_size`` connections are there. Raises PoolTimeout."""
        await self.open(wait=True, timeout=timeout)

    async def close(self, timeout: float = 5.0) -> None:
        """This process uses the pool no more. Connections live on for others, what is still lent after its return. ``timeout`` has no meaning."""
        await self._pool.close()

    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change both sizes, for all workers, at once."""
        await self._pool.resize(max_size if max_size is not None else min_size, min_size=min_size)

    async def drain(self) -> None:
        """Replace all connections, of all workers: idle ones are closed at once or when they are next met, lent ones after their return."""
        await self._pool.drain()

    async def __aenter__(self) -> AsyncConnectionPool:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _AsyncLease:
    """A connection for an ``async with`` block."""

    __slots__ = ("_conn", "_pool", "_timeout")

    def __init__(self, pool: AsyncConnectionPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    async def __aenter__(self) -> Any:
        self._conn = await self._pool.getconn(self._timeout)
        return self._conn

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        conn, pool = self._conn, self._pool
        if kind is GeneratorExit:  # nothing can be awaited any more
            if pool.lends(conn):
                pool._pool._drop(conn)
            return
        try:
            if kind is not None or conn.pgconn.transaction_status != IDLE or conn._pipeline is not None:
                await conn.__aexit__(kind, error, trace)  # which commits, or rolls back
        finally:
            if pool.lends(conn):  # else it was returned in the block
                await pool.putconn(conn)


def is_counter(name: str) -> bool:
    return not name.startswith("pool_") and name != "requests_waiting"


def name_of(driver: PsycopgDriver | AsyncPsycopgDriver) -> str:
    """A name that says where the pool leads, and is another one for each other server, login or option."""
    parameters = driver.parameters()
    said = f"{parameters.get('dbname') or parameters.get('user') or 'postgres'}@{parameters.get('host') or 'local'}"
    readable = re.sub(r"[^A-Za-z0-9._@-]+", "-", said)[:40].strip("-.@_") or "postgres"
    return f"{readable}-{hashlib.blake2b(driver.key().encode(), digest_size=4).hexdigest()}"
