"""``ConnectionPool`` and ``BlockingConnectionPool`` of redis-py, on connections that all workers of the host share.

    import redis
    from mppool.integrations.redis import BlockingConnectionPool

    client = redis.Redis(connection_pool=BlockingConnectionPool.from_url("redis://localhost:6379/0", max_connections=8))

For ``redis.asyncio`` there is mppool.integrations.redis.asyncio.
"""

from __future__ import annotations

import os
import time
from typing import Any

try:
    import redis
except ImportError as error:
    raise ImportError("mppool.integrations.redis needs redis-py: pip install mppool[redis]") from error

from mppool import errors
from mppool.drivers.redis import RedisDriver
from mppool.integrations.redis.shared import PATIENCE, MaxConnectionsError, Shared, is_full, split, translated, without_caching
from mppool.pool import Pool

__all__ = ["BlockingConnectionPool", "ConnectionPool"]


class ConnectionPool(Shared, redis.ConnectionPool):
    """``redis.ConnectionPool``: its arguments mean what they mean there, but for these.

    ``max_connections`` (default 100, at most 1024) is the cap of all workers of the host together. When all are in use, MaxConnectionsError,
    a ConnectionError, is raised at once. ``name`` (default: from server, database and login) says who shares; ``on_transfer``: "reset"
    (the default) undoes what another process left in a session, with RESET (Redis 6.2) and the login in one round trip, "trust"
    does nothing. ``broker``, ``autostart``, ``max_idle``, ``max_lifetime`` and the others are ``mppool.Pool``'s.
    """

    _driver_class = RedisDriver
    _pool_class = Pool

    mppool: Pool

    def __init__(self, connection_class: Any = redis.Connection, max_connections: int | None = None, **kwargs: Any) -> None:
        kwargs, ours = split(kwargs)
        super().__init__(connection_class=connection_class, max_connections=max_connections, **without_caching(redis.ConnectionPool, kwargs), **kwargs)
        self._begin(ours)

    def _renew(self) -> None:
        super()._renew()
        self._getconn, self._putconn = self.mppool.getconn, self.mppool.putconn

    # What redis-py's clients call.

    def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """A connection that is logged in; ``release`` gives it back. Raises redis-py's errors."""
        try:
            return self._getconn()
        except errors.Error as error:
            return self._get_unusual(error)

    def _get_unusual(self, error: errors.Error) -> Any:
        """Nothing was to be had at once. All in use: that is an error; but what is just being made or closed is worth waiting for."""
        until = time.monotonic() + PATIENCE
        while isinstance(error, errors.PoolTimeout) and error.__cause__ is None and not is_full(self.mppool) and time.monotonic() < until:
            try:
                return self.mppool.getconn(timeout=0.02)
            except errors.Error as another:
                error = another
        raise translated(error, MaxConnectionsError("Too many connections")) from error

    def release(self, connection: Any) -> None:
        """Give a connection back. One that is in no state for others is reset or closed. One that is not lent is left alone."""
        try:
            self._putconn(connection)
        except errors.Error as error:
            self._release_unusual(connection, error)

    def _release_unusual(self, connection: Any, error: errors.Error) -> None:
        if type(error) is not errors.Error:
            raise error
        for pool in list(self._former):
            try:
                pool.putconn(connection)
            except errors.Error:
                continue
            self._former = [former for former in self._former if former._leaving is not None]
            return

    def disconnect(self, inuse_connections: bool = True) -> None:
        """This process lets go of its idle connections, others go on with them; what is in use is disconnected, and closed at its release.

        The next ``get_connection`` begins anew. ``pool.mppool.drain()`` replaces the connections of all workers.
        """
        former, lent = self.mppool, self._get_in_use_connections()
        self._renew()
        former.close()
        if inuse_connections:
            for connection in lent:
                connection.disconnect()
        if lent:
            self._former.append(former)

    def reset(self) -> None:
        """Begin anew: what was lent is closed at its release."""
        super().reset()
        if "mppool" in vars(self):
            self.disconnect(inuse_connections=False)

    def make_connection(self) -> Any:
        raise NotImplementedError("mppool makes connections: use get_connection()")

    def owns_connection(self, connection: Any) -> bool:
        return bool(connection.pid == os.getpid())

    def re_auth_callback(self, token: Any) -> None:
        """A new token: sessions that were opened with the old one are replaced, in all workers, as they come back."""
        self.mppool.drain()


class BlockingConnectionPool(ConnectionPool):
    """``redis.BlockingConnectionPool``: when all ``max_connections`` (default 50) of the host are in use, callers queue, in order over all workers.

    After ``timeout`` seconds (default 20, None: for ever) ConnectionError is raised. ``queue_class`` is accepted and not needed.
    """

    def __init__(
        self,
        max_connections: int = 50,
        timeout: float | None = 20,
        connection_class: Any = redis.Connection,
        queue_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self.timeout = timeout
        super().__init__(connection_class=connection_class, max_connections=max_connections, **kwargs)

    def _begin(self, ours: dict[str, Any], timeout: float = 0.0) -> None:
        super()._begin(ours, 1e9 if self.timeout is None else self.timeout)

    def _get_unusual(self, error: errors.Error) -> Any:
        raise translated(error, redis.ConnectionError("No connection available.")) from error
