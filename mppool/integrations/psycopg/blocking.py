"""``ConnectionPool``, which blocks."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic

import psycopg

from mppool import errors
from mppool.drivers.psycopg import PsycopgDriver
from mppool.integrations.psycopg.shared import IDLE, C, Shared, translated
from mppool.pool import Pool

__all__ = ["ConnectionPool"]

log = logging.getLogger("mppool")


class ConnectionPool(Shared[C]):
    """A drop-in for ``psycopg_pool.ConnectionPool`` whose connections all worker processes of the host share.

    The arguments are psycopg_pool's; besides them ``on_transfer`` says what happens to a session that another process used:

    "reset"    (the default) DISCARD ALL before it is lent here: nothing travels
    "always"   DISCARD ALL at every return: nothing is left, not even for the same process
    "trust"    nothing: settings, temporary tables, advisory locks, LISTEN of other workers may be met. Only where a user changed what clients read
               by (client_encoding, TimeZone, DateStyle, IntervalStyle, standard_conforming_strings) is it reset, at its return

    and ``broker autostart max_dialing max_lease close_timeout turn`` are those of ``mppool.Pool``.

    What differs from psycopg_pool:

    - ``min_size`` and ``max_size`` are for all workers together; the cap is strict; there are no background workers (``num_workers`` has no meaning).
    - ``name``: workers that give the same share a pool. Letters, digits and ``. _ : @ + -``, for it is a file's name, too.
    - A pool opens at its first use, in each process anew; made before a fork it works in every child. ``open=True`` opens at once.
    - A server that refuses for good (wrong password, no such database) raises ConnectFailed at once, not PoolTimeout after ``timeout``.
    - ``configure`` is called in each process, when it first has a session, and after each DISCARD ALL: what it sets is always set.
    - Prepared statements are off unless ``kwargs`` says ``prepare_threshold``. They are safe: DISCARD ALL drops what other processes prepared
      (under "trust" that costs a DEALLOCATE ALL), and they are forgotten here; a process that keeps its session keeps its statements.
    - Connections over TLS stay with their process (``sslmode=disable``, or a Unix socket, lets them move). They count in the cap.
    - ``check`` that closes the connection instead of raising costs that connection, too: a closed one is never lent.
    - ``connection_class=None``, the default, is ``psycopg.Connection``; what is lent is of a subclass of yours.
    - A connection that was returned is as a closed one to whoever still has it, or a cursor of it: OperationalError. ``close()`` and
      ``cancel()`` do nothing then; before, ``close()`` ends the session.
    - ``min_size`` is dialed by each process that opens the pool, as far as it is missing, and by ``wait()``; not refilled in the background.

    Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed: all are psycopg.OperationalError, too.
    """

    _pool: Pool

    __module__ = "mppool.integrations.psycopg"

    _connection_class = psycopg.Connection
    _driver_class = PsycopgDriver
    _pool_class = Pool

    def _begin(self) -> None:
        self.open()

    # Connections.

    def connection(self, timeout: float | None = None) -> _Lease[C]:
        """``with pool.connection() as conn:`` commits at the end of the block, or rolls back after an exception, and returns the connection."""
        return _Lease(self, timeout)

    def getconn(self, timeout: float | None = None) -> C:
        """Obtain a connection; give it back with ``putconn``. Raises PoolTimeout, TooManyRequests, PoolClosed, ConnectFailed."""
        return _Lease(self, timeout).__enter__()

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
        broken: list[Any] = []

        def give_back(conn: Any) -> None:
            self._pool.putconn(conn, discard=conn in broken)

        with ExitStack() as lent:
            conns = []
            try:
                for _ in range(self._pool.get_stats()["idle"]):
                    conn = self._pool.getconn(timeout=0)
                    lent.callback(give_back, conn)
                    conns.append(conn)
            except errors.PoolTimeout:
                pass  # others were faster
            for conn in conns:
                try:
                    self.check_connection(conn)
                except BaseException as error:
                    broken.append(conn)
                    if not isinstance(error, psycopg.Error):
                        raise
                    log.warning("connection %s is lost: %s", conn, error)

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

    def __enter__(self) -> ConnectionPool[C]:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, error: errors.Error) -> None:
        if isinstance(error, errors.DialFailed) and not error.permanent and self._reconnect_failed is not None:
            self._reconnect_failed(self)


class _Lease(Generic[C]):
    """A connection for a ``with`` block."""

    __slots__ = ("_conn", "_pool", "_timeout")

    _conn: Any

    def __init__(self, pool: ConnectionPool[C], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> C:
        pool = self._pool
        try:
            conn = self._conn = pool._pool.getconn(self._timeout)
        except errors.Error as error:
            pool._failed(error)
            raise translated(error) from error.__cause__
        if conn._pool is not pool:
            conn._pool = pool
        return conn  # type: ignore[no-any-return]

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
