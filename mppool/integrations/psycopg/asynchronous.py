"""``AsyncConnectionPool``, for asyncio."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from inspect import isawaitable
from types import TracebackType
from typing import Any, Generic

import psycopg

from mppool import errors
from mppool.aio import AsyncPool
from mppool.drivers.psycopg import AsyncPsycopgDriver
from mppool.integrations.psycopg.shared import IDLE, C, Hook, Shared, translated

__all__ = ["AsyncConnectionPool"]

log = logging.getLogger("mppool")


class AsyncHook(Hook):
    async def __call__(self, conn: Any) -> Any:
        with self.closing(conn):
            said = self.function(conn)
            return await said if isawaitable(said) else said


class AsyncConnectionPool(Shared[C]):
    """A drop-in for ``psycopg_pool.AsyncConnectionPool``: as ConnectionPool, which says what differs, with psycopg's AsyncConnection."""

    _pool: AsyncPool

    __module__ = "mppool.integrations.psycopg"

    _connection_class = psycopg.AsyncConnection
    _driver_class = AsyncPsycopgDriver
    _pool_class = AsyncPool
    _hook_class = AsyncHook

    def connection(self, timeout: float | None = None) -> _AsyncLease[C]:
        """``async with pool.connection() as conn:`` commits at the end of the block, or rolls back after an exception, and returns the connection."""
        return _AsyncLease(self, timeout)

    async def getconn(self, timeout: float | None = None) -> C:
        """Obtain a connection; give it back with ``putconn``. Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed."""
        try:
            conn: Any = await self._pool.getconn(timeout)
        except errors.Error as error:
            if isinstance(error, errors.DialFailed) and not error.permanent and self._reconnect_failed is not None:
                said = self._reconnect_failed(self)
                if isawaitable(said):
                    await said
            raise translated(error) from error.__cause__
        conn._pool = self
        return conn  # type: ignore[no-any-return]

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
        broken: list[Any] = []

        async def give_back(conn: Any) -> None:
            await self._pool.putconn(conn, discard=conn in broken)

        async with AsyncExitStack() as lent:
            conns = []
            try:
                for _ in range(self._pool.get_stats()["idle"]):
                    conn = await self._pool.getconn(timeout=0)
                    lent.push_async_callback(give_back, conn)
                    conns.append(conn)
            except errors.PoolTimeout:
                pass  # others were faster
            for conn in conns:
                try:
                    await self.check_connection(conn)
                except BaseException as error:
                    broken.append(conn)
                    if not isinstance(error, psycopg.Error):
                        raise
                    log.warning("connection %s is lost: %s", conn, error)

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

    async def __aenter__(self) -> AsyncConnectionPool[C]:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _AsyncLease(Generic[C]):
    """A connection for an ``async with`` block."""

    __slots__ = ("_conn", "_pool", "_timeout")

    def __init__(self, pool: AsyncConnectionPool[C], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    async def __aenter__(self) -> C:
        self._conn = await self._pool.getconn(self._timeout)
        return self._conn

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        conn: Any = self._conn
        pool = self._pool
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
