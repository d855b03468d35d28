"""A pool for PyMySQL, which has none of its own: psycopg_pool's names, ``pymysql.connect``'s arguments, one cap for all workers.

    pool = ConnectionPool(max_size=8, host="db", user="app", password="...", database="shop", ssl_disabled=True)

    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("select ...")

Without ``ssl_disabled`` PyMySQL uses TLS where the server offers it, and TLS connections stay with the process that made them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    from pymysql import err
except ImportError as error:
    raise ImportError("mppool.integrations.pymysql needs PyMySQL: pip install mppool[pymysql]") from error

from mppool import errors
from mppool.drivers.pymysql import PyMySQLDriver
from mppool.integrations.names import digest, readable
from mppool.options import Options
from mppool.pool import Lease, Pool

__all__ = ["ConnectFailed", "Connection", "ConnectionPool", "PoolTimeout"]

CR_CONN_HOST_ERROR = 2003

OURS = (Options.names() | {"name", "broker", "autostart"}) - {"connect_timeout"}  # which is PyMySQL's, too, and means the same there


class ConnectFailed(errors.DialFailed, err.OperationalError):
    """The server refuses for good (wrong password, no such database). Also PyMySQL's OperationalError; ``args`` are the server's code and words."""

    def __init__(self, code: int, message: str, *, permanent: bool) -> None:
        super().__init__(message, permanent=permanent)
        self.args = (code, message)


class PoolTimeout(errors.PoolTimeout, err.OperationalError):
    """No connection became free in time. Also PyMySQL's OperationalError."""


class ConnectionPool(Pool):
    """A ``mppool.Pool`` that lends ``pymysql.Connection`` objects.

    Takes the options of ``mppool.Pool``, ``on_transfer`` (see ``mppool.drivers.pymysql.PyMySQLDriver``) and the arguments of
    ``pymysql.connect``. The default for ``name`` is made from server, login and options: workers that give the same ones share a pool.

    What a ``configure`` hook sets in a session is dropped when it is reset; ``init_command`` is done again.
    """

    def __init__(self, *, max_size: int = 4, on_transfer: str = "reset", **arguments: Any) -> None:
        self._given = {"max_size": max_size, "on_transfer": on_transfer, **arguments}
        options = {name: arguments.pop(name) for name in OURS & set(arguments)}
        driver = PyMySQLDriver(on_transfer=on_transfer, **arguments)
        if options.get("name") is None:
            options["name"] = readable(f"mysql@{driver.target.host}", digest(driver.key()))
        super().__init__(str(driver.target), driver=driver, max_size=max_size, **options)

    def __reduce__(self) -> tuple[Callable[[], ConnectionPool], tuple[()]]:
        return functools.partial(type(self), **self._given), ()

    def getconn(self, timeout: float | None = None) -> Any:
        """As ``mppool.Pool.getconn``; DialFailed and PoolTimeout are also ``pymysql.err.OperationalError``."""
        try:
            return super().getconn(timeout)
        except errors.DialFailed as error:
            cause = error.__cause__
            code, message = cause.args if isinstance(cause, err.MySQLError) and len(cause.args) == 2 else (CR_CONN_HOST_ERROR, str(error))
            raise ConnectFailed(code, message, permanent=error.permanent) from error
        except errors.PoolTimeout as error:
            raise PoolTimeout(str(error)) from error.__cause__

    def connection(self, timeout: float | None = None) -> Transaction:
        """``with pool.connection() as conn:`` lends a session for the block, and commits at its end; after an exception it rolls back.

        As with psycopg_pool. A session that cannot be rolled back is closed, and so is one whose block ends by anything else than an Exception.
        """
        return Transaction(self, timeout)

    def connect(self, timeout: float | None = None) -> Connection:
        """A connection for code that makes and closes its own: ``close()`` gives it back. What was not committed is rolled back then.

        Raises as ``getconn`` does.
        """
        return Connection(Lease(self, timeout))


class Transaction(Lease):
    """A session for a ``with`` block that is a transaction."""

    __slots__ = ()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._is_ours() and self._conn.open and not self._pool._driver.is_clean(self._conn):
                self._conn.commit()
        except BaseException as failure:
            super().__exit__(type(failure), failure, failure.__traceback__)
            raise
        if isinstance(error, Exception):
            kind = error = None  # the driver knows if an answer is still owed
        super().__exit__(kind, error, trace)

    def _is_ours(self) -> bool:
        worker = self._worker
        return worker is not None and bool(worker.guard[0]) and id(self._conn) in worker.leases


class Connection:
    """What ``ConnectionPool.connect()`` returns: everything is the lent ``pymysql.Connection``'s, until ``close()`` gives that back.

    One that is forgotten without ``close()`` is closed, at some later checkout.
    """

    __slots__ = ("_lease", "_session")

    def __init__(self, lease: Lease) -> None:
        object.__setattr__(self, "_lease", lease)
        object.__setattr__(self, "_session", lease.__enter__())

    def close(self) -> None:
        """Give the connection back. Raises pymysql.err.Error if that was done already."""
        if self._session is None:
            raise err.Error("Already closed")
        object.__setattr__(self, "_session", None)
        self._lease.__exit__(None, None, None)

    @property
    def open(self) -> bool:
        return self._session is not None and self._session.open

    def __getattr__(self, name: str) -> Any:
        session = object.__getattribute__(self, "_session")
        if session is None:
            raise err.InterfaceError(0, "the connection was given back")
        return getattr(session, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._session is None:
            raise err.InterfaceError(0, "the connection was given back")
        setattr(self._session, name, value)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Given back, as PyMySQL's is closed; what was not committed is rolled back. After anything else than an Exception it is closed."""
        if self._session is not None:
            object.__setattr__(self, "_session", None)
            if isinstance(error, Exception):
                kind = error = None
            self._lease.__exit__(kind, error, trace)
