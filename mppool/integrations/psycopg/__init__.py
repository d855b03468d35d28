"""psycopg 3: ``ConnectionPool`` and ``AsyncConnectionPool`` in the place of psycopg_pool's.

    from mppool.integrations.psycopg import ConnectionPool

    pool = ConnectionPool("dbname=app user=app", min_size=0, max_size=10, kwargs={"autocommit": True})
    with pool.connection() as conn:
        conn.execute("select 1")

``max_size`` is for all worker processes of the host together; so are ``min_size``, ``max_waiting`` and what get_stats() says.
"""

from mppool.integrations.psycopg.asynchronous import AsyncConnectionPool
from mppool.integrations.psycopg.blocking import ConnectionPool
from mppool.integrations.psycopg.shared import ConnectFailed, PoolClosed, PoolTimeout, TooManyRequests

__all__ = ["AsyncConnectionPool", "ConnectFailed", "ConnectionPool", "PoolClosed", "PoolTimeout", "TooManyRequests"]
