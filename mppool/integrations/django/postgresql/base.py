"""PostgreSQL for Django over one pool of connections for all worker processes.

    DATABASES = {"default": {
        "ENGINE": "mppool.integrations.django.postgresql",
        "NAME": "app", "USER": "app", "HOST": "db",
        "OPTIONS": {"max_size": 20, "timeout": 5},
    }}

A request takes a session from the pool when it first needs one, and gives it back at its end: leave ``CONN_MAX_AGE`` at 0. What a
session carries beyond its login is reset when it changes processes, so that nothing of one request is seen in another process's.

In ``OPTIONS``, ``name``, ``broker``, ``autostart``, ``on_transfer`` and the options of ``mppool.Pool`` are for the pool; everything else is
for psycopg, as ever. ("pool", Django's own, may hold the same options: who used ``{"pool": {"max_size": 4}}`` changes the ENGINE only.)

The same as with Django's engine are transactions, savepoints, ``on_commit`` and ``ATOMIC_REQUESTS``, ``isolation_level``, ``assume_role``, time
zones, cursors on the server, errors, threads, forks, and the tests runner, also with ``--parallel``. What differs:

- ``close()``, which Django calls at the end of a request, gives the session back; in a transaction it is rolled back first.
- ``connection_created`` is sent whenever a session is taken, so for each request: as often as with ``CONN_MAX_AGE = 0``, although nobody logs in.
- ``CONN_MAX_AGE``: what a thread keeps counts in the cap, and nobody else has it. (Django's own pool refuses that.)
- ``CONN_HEALTH_CHECKS``: a session is pinged whenever it is taken out of the pool.
- If all sessions are lent, a request waits for up to ``timeout`` seconds (30), and then gets ``OperationalError``.
- The time zone is an option of the login (``-c TimeZone=...``), not a statement after it.
- ``DatabaseWrapper.pool``, Django's own, is None. ``close_pool()`` ends the idle sessions of all processes.
- psycopg 3 only.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

try:
    from django.core.exceptions import ImproperlyConfigured
    from django.db.backends.base.base import NO_DB_ALIAS
    from django.db.backends.postgresql import base
    from django.db.backends.postgresql.psycopg_any import IsolationLevel
    from django.utils.asyncio import async_unsafe
except ImportError as error:
    raise ImportError("mppool.integrations.django.postgresql needs Django and psycopg 3: pip install mppool[django]") from error

from mppool.drivers.psycopg import PsycopgDriver
from mppool.errors import DialFailed, Error, PoolTimeout, TooManyWaiting
from mppool.integrations.django.postgresql.creation import DatabaseCreation
from mppool.integrations.names import digest, readable
from mppool.options import Options
from mppool.pool import Pool

__all__ = ["DatabaseWrapper"]

Place = tuple[Any, ...]
OURS = (Options.names() - {"connect_timeout"}) | {"name", "broker", "autostart", "on_transfer"}


class SharedDriver(PsycopgDriver):
    """A database that cannot be reached is an error at once, as it is without a pool."""

    def dial(self) -> Any:
        try:
            return super().dial()
        except DialFailed as error:
            raise DialFailed(str(error), permanent=True) from error.__cause__


class Lender:
    """For psycopg's connection, and cursors that were left open: what is not lent any more is closed, as far as they know."""

    close_returns = False

    def __init__(self, pool: Pool) -> None:
        self.lends = pool._lends


class Thread(threading.local):
    """What a thread still has when it ends goes back to the pool, as without a pool it is closed: nobody else may use its wrappers."""

    def __init__(self) -> None:
        self.end = End()


class End:
    def __init__(self) -> None:
        self.wrappers: dict[int, weakref.ref[DatabaseWrapper]] = {}  # (no WeakSet: what a signal handler throws in its callbacks is swallowed)

    def __del__(self) -> None:
        for reference in list(self.wrappers.values()):
            wrapper = reference()
            if wrapper is not None and not wrapper.allow_thread_sharing:
                wrapper._forgotten()


_thread = Thread()


class DatabaseWrapper(base.DatabaseWrapper):
    """Django's own, but for where connections come from and go to."""

    connection: Any
    creation_class = DatabaseCreation
    pool = None  # Django's own; ours is _shared
    _pools: ClassVar[dict[tuple[str, Place, str], Pool]] = {}  # of this process, by name, database, and what the driver says of its sessions
    _known: tuple[dict[str, Any], Pool] | None = None  # parameters, and the pool for them
    _lender: Pool | None = None  # of the connection there is

    def get_connection_params(self) -> dict[str, Any]:
        params: dict[str, Any] = super().get_connection_params()
        for name in (OURS | {"pool"}) & params.keys():  # "pool" is there before Django 5.1
            del params[name]
        if self.timezone_name:
            # At the login, so that a reset falls back to it: Django need not set it again and again.
            params["options"] = f"{params.get('options', '')} -c TimeZone={self.timezone_name}".strip()
        return params

    @async_unsafe
    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        if self.alias == NO_DB_ALIAS:
            return super().get_new_connection(conn_params)
        level = self.settings_dict["OPTIONS"].get("isolation_level")
        try:
            self.isolation_level = IsolationLevel.READ_COMMITTED if level is None else IsolationLevel(level)
        except ValueError:
            raise ImproperlyConfigured(f"Invalid transaction isolation level {level} specified. Use one of the psycopg.IsolationLevel values.") from None
        lender = self._shared(conn_params)
        try:
            connection = lender.getconn()
        except Error as error:
            raise self._translated(error) from error
        self._lender = lender
        _thread.end.wrappers[id(self)] = weakref.ref(self)
        if connection._pool is None:
            connection._pool = Lender(lender)
        connection.isolation_level = None if level is None else self.isolation_level
        return connection

    def _close(self) -> None:
        lender, self._lender = self._lender, None
        connection = self.connection
        if lender is None or connection is None:
            super()._close()
            return
        self.connection = None  # it is others' now, also where an atomic block is still open
        try:
            lender.putconn(connection)
        except Error:
            pass  # forked while it was lent: it is the parent's

    def _forgotten(self) -> None:
        """With its thread, or by the garbage collector."""
        if self._lender is not None and not sys.is_finalizing():
            self._close()

    __del__ = _forgotten

    def close_pool(self) -> None:
        """End all idle sessions to this database, and let go of its pools (aliases may have several), before the database is dropped or copied."""
        params = self.get_connection_params()
        self._shared(params)
        pools = [pool for (_, where, _), pool in list(self._pools.items()) if where == place(params) and not pool.closed]
        for pool in pools:
            pool.drain()
        until = time.monotonic() + 5
        while any(pool.get_stats()["idle"] for pool in pools) and time.monotonic() < until:
            time.sleep(0.01)
        for pool in pools:
            pool.close()

    def ensure_timezone(self) -> bool:
        """Django's own, but that it closes no pool, as Django does since 5.1."""
        if not hasattr(self, "_configure_timezone"):
            return bool(super().ensure_timezone())
        return self.connection is not None and bool(self._configure_timezone(self.connection))

    def _shared(self, params: dict[str, Any]) -> Pool:
        """This process's pool for these parameters, made at the first use."""
        known = self._known
        if known is None or known[0] != params or known[1].closed:
            known = self._known = params, self._make(params)
        return known[1]

    def _make(self, params: dict[str, Any]) -> Pool:
        given = self._pool_options()
        on_transfer = given.pop("on_transfer", "reset")
        driver = SharedDriver(kwargs={**params, "autocommit": True}, on_transfer=on_transfer)
        name = given.pop("name", None) or readable(f"{params.get('dbname', '')}@{params.get('host', '')}", digest(driver.key()))
        key = name, place(params), driver.key()  # of another database or login it is ConfigMismatch that is wanted, not the other's pool
        pool = self._pools.get(key)
        if pool is None or pool.closed:
            self._pools.pop(key, None)
            if self.settings_dict.get("CONN_HEALTH_CHECKS"):
                given.setdefault("check", driver.ping)
            pool = self._pools.setdefault(key, Pool(driver=driver, name=name, **{"reconnect_timeout": 0, **given}))
        return pool

    def _pool_options(self) -> dict[str, Any]:
        options = self.settings_dict["OPTIONS"]
        own = options.get("pool")
        return {**(own if isinstance(own, dict) else {}), **{name: options[name] for name in OURS & options.keys()}}

    def _translated(self, error: Error) -> BaseException:
        """What Django wraps in its own OperationalError."""
        cause = error.__cause__
        if isinstance(error, DialFailed) and isinstance(cause, base.Database.Error):
            return cause  # type: ignore[no-any-return]
        if isinstance(error, (PoolTimeout, TooManyWaiting, DialFailed)):
            return base.Database.OperationalError(str(error))  # type: ignore[no-any-return]
        return error


def place(params: Mapping[str, Any]) -> Place:
    return tuple(params.get(name) for name in ("service", "host", "port", "dbname"))
