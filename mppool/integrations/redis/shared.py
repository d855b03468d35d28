"""What the pools for ``redis`` and ``redis.asyncio`` have in common: their options, and what they raise."""

from __future__ import annotations

import inspect
from typing import Any

import redis

from mppool import errors
from mppool.options import Options, default_name
from mppool.snapshot import snapshot

__all__ = ["MaxConnectionsError", "Shared", "is_full", "name_of", "split", "translated", "without_caching"]

MaxConnectionsError: type[redis.ConnectionError] = getattr(redis.exceptions, "MaxConnectionsError", redis.ConnectionError)

OURS = (Options.names() - {"max_size", "timeout", "connect_timeout", "debug"}) | {"broker", "autostart", "name", "on_transfer"}
PATIENCE = 10.0  # seconds that a pool which does not block waits for connections that are just being made or closed


class Shared:
    """What is in the place of redis-py's two lists."""

    _driver_class: type[Any]
    _pool_class: type[Any]
    connection_class: Any
    connection_kwargs: dict[str, Any]
    max_connections: int
    mppool: Any

    def _begin(self, ours: dict[str, Any], timeout: float = 0.0) -> None:
        ours = dict(ours)
        on_transfer = ours.pop("on_transfer", "reset")
        driver = self._driver_class(self.connection_class, on_transfer, **self.connection_kwargs)
        ours.setdefault("name", name_of(driver))
        self._make = lambda: self._pool_class(str(driver.login.target), driver=driver, max_size=self.max_connections, timeout=timeout, **ours)
        self._driver = driver
        self._former: list[Any] = []
        self._renew()

    def _renew(self) -> None:
        self.mppool = self._make()

    def set_retry(self, retry: Any) -> None:
        self.connection_kwargs["retry"] = self._driver.login.kwargs["retry"] = retry
        for connection in (*self._get_free_connections(), *self._get_in_use_connections()):
            connection.retry = retry

    def _get_free_connections(self) -> Any:
        """This process's."""
        worker = self.mppool._worker
        return [entry.conn for entry, _ in list(worker.idle)] if worker is not None else []

    def _get_in_use_connections(self) -> Any:
        worker = self.mppool._worker
        return {entry.conn for entry, _ in list(worker.leases.values())} if worker is not None and worker.guard[0] else set()

    def __del__(self) -> None:
        """(redis-py's looks at lists that are empty here.)"""


def split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is redis-py's, and what is mppool's. (From a URL's query, numbers come as text.)"""
    ours = {name: kwargs.pop(name) for name in list(kwargs) if name in OURS}
    for name, value in ours.items():
        if isinstance(value, str) and name not in ("broker", "name", "on_transfer"):
            ours[name] = value.lower() in ("1", "true", "yes") if name == "autostart" else number(name, value)
    return kwargs, ours


def number(name: str, text: str) -> float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"Invalid value for {name!r} in connection URL.") from None


def without_caching(base: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sessions that the server writes to on its own are not for sharing: neither client-side caching nor maintenance notifications."""
    if kwargs.get("cache") is not None or kwargs.get("cache_config") is not None:
        raise redis.RedisError("client-side caching needs connections of one's own: mppool's pools do not support it")
    config = kwargs.pop("maint_notifications_config", None)
    if config is not None and config.enabled is True:
        raise redis.RedisError("maintenance notifications need connections of one's own: mppool's pools do not support them")
    if "maint_notifications_config" not in inspect.signature(base.__init__).parameters:  # type: ignore[misc]
        return {}
    from redis.maint_notifications import MaintNotificationsConfig

    return {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def name_of(driver: Any) -> str:
    """Workers that ask for the same server, database and login share a pool."""
    login = driver.login
    return f"redis-{default_name(login.target)[-38:].strip('-.:')}-{login.db}-{login.digest()[:8]}"


def is_full(pool: Any) -> bool:
    """Is every connection that the cap allows in somebody's hands?"""
    worker = pool._worker
    if worker is None:
        return False
    stats = snapshot(worker.table)
    return bool(stats["in_use"] + stats["dialing"] >= stats["max_size"])


def translated(error: errors.Error, full: redis.ConnectionError) -> Exception:
    """What redis-py's users expect: its own error if the server is to blame, ``full`` if all connections are in use."""
    cause = error if isinstance(error, errors.DialFailed) else error.__cause__
    if isinstance(cause, errors.DialFailed):
        theirs = cause.__cause__
        return theirs if isinstance(theirs, redis.RedisError) else redis.ConnectionError(str(cause))
    if isinstance(error, (errors.PoolTimeout, errors.TooManyWaiting)):
        return full
    return redis.ConnectionError(str(error))
