"""``ConnectionPool`` and ``BlockingConnectionPool`` of ``redis.asyncio``, on connections that all workers of the host share.

    import redis.asyncio
    from mppool.integrations.redis.asyncio import BlockingConnectionPool

    client = redis.asyncio.Redis(connection_pool=BlockingConnectionPool.from_url("redis://localhost:6379/0", max_connections=8))

They share with ``redis.Redis`` of the same server, database and login, too.
"""

from __future__ import annotations

import time
from typing import Any

import redis.asyncio

from mppool import errors
from mppool.aio import AsyncPool
from mppool.drivers.redis import AsyncRedisDriver
from mppool.integrations.redis.shared import PATIENCE, MaxConnectionsError, Shared, is_full, split, translated, without_caching

__all__ = ["BlockingConnectionPool", "ConnectionPool"]


class ConnectionPool(Shared, redis.asyncio.ConnectionPool):
    """``redis.asyncio.ConnectionPool``; what is different is as for ``mppool.integrations.redis.ConnectionPool``.

    A task that is cancelled in the middle of a command closes its connection: the reply that is still to come reaches nobody.
    """

    _driver_class = AsyncRedisDriver
    _pool_class = AsyncPool

    mppool: AsyncPool

    def __init__(self, connection_class: Any = redis.asyncio.Connection, max_connections: int | None = None, **kwargs: Any) -> None:
        kwargs, ours = split(kwargs)
        theirs = without_caching(redis.asyncio.ConnectionPool, kwargs)
        super().__init__(connection_class=connection_class, max_connections=max_connections, **theirs, **kwargs)
        self._begin(ours)

    # What the clients call.

    async def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """A connection that is logged in; ``release`` gives it back. Raises redis-py's errors."""
        try:
            return await self.mppool.getconn()
        except errors.Error as error:
            return await self._get_unusual(error)

    async def _get_unusual(self, error: errors.Error) -> Any:
        until = time.monotonic() + PATIENCE
        while isinstance(error, errors.PoolTimeout) and error.__cause__ is None and not is_full(self.mppool) and time.monotonic() < until:
            try:
                return await self.mppool.getconn(timeout=0.02)
            except errors.Error as another:
                error = another
        raise translated(error, MaxConnectionsError("Too many connections")) from error

    async def release(self, connection: Any) -> None:
        """Give a connection back. One that is in no state for others is reset or closed. KeyError if it is not lent."""
        try:
            await self.mppool.putconn(connection)
        except errors.Error as error:
            await self._release_unusual(connection, error)

    async def _release_unusual(self, connection: Any, error: errors.Error) -> None:
        if type(error) is not errors.Error:
            raise error
        for pool in list(self._former):
            try:
                await pool.putconn(connection)
            except errors.Error:
                continue
            self._former = [former for former in self._former if former._leaving is not None]
            return
        raise KeyError(connection) from error

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """This process lets go of its idle connections, others go on with them; what is in use is disconnected, and closed at its release.

        The next ``get_connection`` begins anew. ``await pool.mppool.drain()`` replaces the connections of all workers.
        """
        former, lent = self.mppool, self._get_in_use_connections()
        self._renew()
        if lent:
            self._former.append(former)
        await former.close()
        if inuse_connections:
            for connection in lent:
                await connection.disconnect()

    def reset(self) -> None:
        """Begin anew: what was lent is closed at its release."""
        former, lent = self.mppool, self._get_in_use_connections()
        self._renew()
        former._close()
        if lent:
            self._former.append(former)

    def can_get_connection(self) -> bool:
        return not is_full(self.mppool)

    def get_available_connection(self) -> Any:
        raise NotImplementedError("mppool makes connections: use get_connection()")

    make_connection = get_available_connection

    async def re_auth_callback(self, token: Any) -> None:
        """A new token: sessions that were opened with the old one are replaced, in all workers, as they come back."""
        await self.mppool.drain()


class BlockingConnectionPool(ConnectionPool):
    """``redis.asyncio.BlockingConnectionPool``: when all ``max_connections`` (default 50) of the host are in use, tasks queue, in order over all workers.

    After ``timeout`` seconds (default 20, None: for ever) ConnectionError is raised. ``queue_class`` is accepted and not needed.
    """

    def __init__(
        self,
        max_connections: int = 50,
        timeout: float | None = 20,
        connection_class: Any = redis.asyncio.Connection,
        queue_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self.timeout = timeout
        super().__init__(connection_class=connection_class, max_connections=max_connections, **kwargs)

    def _begin(self, ours: dict[str, Any], timeout: float = 0.0) -> None:
        super()._begin(ours, 1e9 if self.timeout is None else self.timeout)

    async def _get_unusual(self, error: errors.Error) -> Any:
        raise translated(error, redis.ConnectionError("No connection available.")) from error
