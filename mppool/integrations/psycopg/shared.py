"""What both pools are told, say of themselves, and raise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic

from mppool import errors
from mppool.drivers.psycopg import AsyncPsycopgDriver, PsycopgDriver
from mppool.integrations.names import digest, readable

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

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    C = TypeVar("C", default=Any)
else:
    from typing import TypeVar

    C = TypeVar("C")  # has no default before Python 3.13

__all__ = ["C", "ConnectFailed", "Hook", "PoolClosed", "PoolTimeout", "Shared", "TooManyRequests", "translated"]

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
    """What psycopg_pool's users expect, in the same words; to be raised ``from`` the same cause."""
    for ours, theirs in ((errors.PoolTimeout, PoolTimeout), (errors.PoolClosed, PoolClosed), (errors.TooManyWaiting, TooManyRequests)):
        if isinstance(error, ours):
            return theirs(str(error))
    return ConnectFailed(str(error), permanent=error.permanent) if isinstance(error, errors.DialFailed) else error


class Hook:
    """A user's function for connections. In it ``close()`` is psycopg's own, which ends the session, and what was closed there is not lent."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, conn: Any) -> Any:
        with self.closing(conn):
            return self.function(conn)

    @contextmanager
    def closing(self, conn: Any) -> Iterator[None]:
        pool, conn._pool = conn._pool, None
        try:
            yield
            closed = conn.closed
        finally:
            conn._pool = pool
        if closed:
            raise psycopg.OperationalError(f"connection closed by {self}: discarded")


class Shared(Generic[C]):
    """What both pools are told, and say of themselves."""

    _connection_class: type[Any]
    _driver_class: Callable[..., PsycopgDriver | AsyncPsycopgDriver]
    _pool_class: Callable[..., Any]
    _hook_class: Callable[[Callable[[Any], Any]], Hook] = Hook
    _pool: Any

    lends: Callable[[Any], bool]
    """Is this connection lent by this pool, in this process, just now? (An attribute: every statement asks.)"""

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        *,
        connection_class: Any = None,
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
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.connection_class = connection_class or self._connection_class
        self.close_returns = close_returns
        self.num_workers = num_workers
        self._reconnect_failed = reconnect_failed
        self._popped: dict[str, int] = {}
        configure, check, reset = (self._hook_class(function) if function is not None else None for function in (configure, check, reset))
        driver = self._driver_class(conninfo, kwargs=kwargs, connection_class=self.connection_class, on_transfer=on_transfer, configure=configure)
        self._pool = self._pool_class(
            driver=driver,
            name=name if name is not None else name_of(driver),
            min_size=min_size,
            max_size=max_size if max_size is not None else max(min_size, 1),
            check=check,
            reset=reset,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            **options,
        )
        self.lends = self._pool._lends
        if open:
            self._begin()

    def _begin(self) -> None:
        """With ``open=True``; in asyncio nothing can be awaited here, and the first use opens."""

    @property
    def name(self) -> str:
        """Workers that give the same share a pool; by default it says database, server and user."""
        return str(self._pool.name)

    @property
    def closed(self) -> bool:
        return bool(self._pool.closed)

    @property
    def min_size(self) -> int:
        return self._size("min_size")

    @property
    def max_size(self) -> int:
        return self._size("max_size")

    def _size(self, which: str) -> int:
        """As it was resized, by whomever; before the first use, and after the last, as it was given."""
        return int(self._pool.get_stats()[which] if self._pool._worker is not None else getattr(self._pool.options, which))

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


def is_counter(name: str) -> bool:
    return not name.startswith("pool_") and name != "requests_waiting"


def name_of(driver: PsycopgDriver | AsyncPsycopgDriver) -> str:
    """A name that says where the pool leads, and is another one for each other server, login or option."""
    parameters = driver.parameters()
    said = f"{parameters.get('dbname') or parameters.get('user') or 'postgres'}@{parameters.get('host') or 'local'}"
    return readable(said, digest(driver.key()))
