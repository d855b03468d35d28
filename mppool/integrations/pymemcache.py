"""``PooledClient`` and ``HashClient`` of pymemcache, on a pool that all workers of the host share.

- from pymemcache import PooledClient
+ from mppool.integrations.pymemcache import PooledClient

client = PooledClient("cache:11211", max_pool_size=8)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from pymemcache.client import base, hash
    from pymemcache.exceptions import MemcacheIllegalInputError
except ImportError as error:
    raise ImportError("mppool.integrations.pymemcache needs pymemcache: pip install mppool[pymemcache]") from error

from mppool.drivers.pymemcache import PymemcacheDriver
from mppool.errors import DialFailed, Error, PoolTimeout, TooManyWaiting
from mppool.options import default_name
from mppool.pool import Lease, Pool

__all__ = ["HashClient", "ObjectPool", "PooledClient", "TooManyObjects"]

MAX_POOL_SIZE = 16  # where the caller names none, which for pymemcache means UNLIMITED
UNLIMITED = 2**31
NEVER = 1e9  # seconds


class TooManyObjects(Error, RuntimeError):
    """No connection became free within ``pool_timeout``. A RuntimeError, as pymemcache's own pool raises.

    (Not a TimeoutError: ``HashClient`` takes that for a sign that the server is down.)
    """


class PooledClient(base.PooledClient):
    """``pymemcache.PooledClient``; its arguments mean what they mean there, with these differences.

    ``max_pool_size`` is the cap of all workers of the host together; None means 16. When so many connections are in use, a
    command waits for one, ``pool_timeout`` seconds at most (1 by default), and then raises TooManyObjects, a RuntimeError.
    ``pool_idle_timeout`` is looked after by the broker. ``lock_generator`` is accepted and not needed. ``connect_timeout`` is 10 s
    if it is not given. While the server is down, commands fail at once with DialFailed, a ConnectionError; where ``ignore_exc``
    makes reads of pymemcache's pool a miss, it does so for this, and for TooManyObjects, too.

    ``pool_name`` (default: from the server), ``pool_broker`` and ``pool_autostart`` are ``mppool.Pool``'s; other ``pool_`` options likewise.
    """

    client_pool: Any

    def __init__(self, server: Any, *args: Any, pool_timeout: float = 1.0, **kwargs: Any) -> None:
        ours = {name.removeprefix("pool_"): kwargs.pop(name) for name in list(kwargs) if name.startswith("pool_") and name != "pool_idle_timeout"}
        super().__init__(server, *args, **kwargs)
        theirs = self.client_pool  # has looked at max_pool_size and pool_idle_timeout, wherever they stood among the arguments
        driver = PymemcacheDriver(
            self.server,
            client_class=self.client_class,
            serde=self.serde,
            connect_timeout=self.connect_timeout,
            timeout=self.timeout,
            no_delay=self.no_delay,
            socket_module=self.socket_module,
            socket_keepalive=self.socket_keepalive,
            key_prefix=self.key_prefix,
            default_noreply=self.default_noreply,
            allow_unicode_keys=self.allow_unicode_keys,
            encoding=self.encoding,
            tls_context=self.tls_context,
        )
        ours.setdefault("name", f"memcached@{default_name(driver.target)}"[:63])
        ours.setdefault("reconnect_timeout", 0.0)  # a cache that is down is a miss, at once
        ours.setdefault("max_idle", theirs.idle_timeout or NEVER)
        size = theirs.max_size if theirs.max_size != UNLIMITED else MAX_POOL_SIZE
        self.client_pool = ObjectPool(lambda: Pool(driver=driver, max_size=size, timeout=pool_timeout, **ours))

    @property
    def pool(self) -> Pool:
        return self.client_pool.pool  # type: ignore[no-any-return]

    def get(self, key: Any, default: Any = None) -> Any:
        return self._read(default, super().get, key, default)

    def get_many(self, keys: Any) -> Any:
        return self._read({}, super().get_many, keys)

    get_multi = get_many

    def gets(self, key: Any) -> Any:
        return self._read((None, None), super().gets, key)

    def gets_many(self, keys: Any) -> Any:
        return self._read({}, super().gets_many, keys)

    def stats(self, *args: Any) -> Any:
        return self._read({}, super().stats, *args)

    def _read(self, missing: Any, command: Any, *args: Any) -> Any:
        """pymemcache makes an error a miss once it has a client; here having one may be the error."""
        try:
            return command(*args)
        except (DialFailed, TooManyObjects):
            if self.ignore_exc:
                return missing
            raise

    def quit(self) -> None:
        with self.client_pool.get_and_release() as client:
            client.quit()

    def close(self) -> None:
        """This process lets go of its connections; the next command begins anew. Other workers go on with theirs."""
        self.client_pool.clear()

    disconnect_all = close


class ObjectPool:
    """``pymemcache.pool.ObjectPool``, as far as clients use it, on a ``Pool``."""

    def __init__(self, make: Callable[[], Pool]) -> None:
        self._make = make
        self.pool = make()

    @property
    def max_size(self) -> int:
        return self.pool.options.max_size

    def get(self) -> Any:
        try:
            return self.pool.getconn()
        except (PoolTimeout, TooManyWaiting) as error:
            raise why(error) from error

    def release(self, obj: Any, silent: bool = True) -> None:
        self._put(obj, silent, discard=False)

    def destroy(self, obj: Any, silent: bool = True) -> None:
        self._put(obj, silent, discard=True)

    def _put(self, obj: Any, silent: bool, *, discard: bool) -> None:
        try:
            self.pool.putconn(obj, discard=discard)
        except Error as error:
            if not silent:
                raise ValueError(str(error)) from error

    def get_and_release(self, destroy_on_fail: bool = False) -> Loan:
        return Loan(self.pool, None)

    def clear(self) -> None:
        """Let go of everything here, and begin anew."""
        pool, self.pool = self.pool, self._make()
        pool.close()


class Loan(Lease):
    """A client for a ``with`` block. An exception closes it, but for illegal input, which pymemcache finds before it sends anything."""

    __slots__ = ()

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, (PoolTimeout, TooManyWaiting)):
            raise why(error) from error

    def _spoils(self, error: BaseException | None) -> bool:
        return not isinstance(error, MemcacheIllegalInputError)


def why(error: Exception) -> Error:
    """What pymemcache's users know: a ConnectionError if the server is down, else a RuntimeError."""
    return DialFailed(str(error.__cause__)) if isinstance(error.__cause__, DialFailed) else TooManyObjects(str(error))


class HashClient(hash.HashClient):
    """``pymemcache.HashClient`` whose clients are PooledClients of all workers: ``max_pool_size`` is the cap for each server.

    ``pool_`` options as for ``PooledClient``, but ``pool_name``: each server has a pool, named after it. ``use_pooling`` is always true.
    """

    client_class = PooledClient

    def __init__(
        self,
        servers: Any,
        *args: Any,
        max_pool_size: int | None = None,
        pool_idle_timeout: float = 0,
        lock_generator: Any = None,
        use_pooling: bool = True,
        **kwargs: Any,
    ) -> None:
        self._pooling = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("pool_")}
        self._pooling.update(max_pool_size=max_pool_size, pool_idle_timeout=pool_idle_timeout, lock_generator=lock_generator)
        super().__init__(servers, *args, **kwargs)

    def add_server(self, server: Any, port: Any = None) -> None:
        """Also called for a server that was given up and is tried again: its client's pool is closed then, and begun anew."""
        earlier = self.clients.get(self._make_client_key((server, port) if port is not None else server))
        if earlier is not None:
            earlier.pool.close()
        self.default_kwargs.update(self._pooling)
        super().add_server(server, port)
