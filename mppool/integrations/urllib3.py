"""urllib3: a ``PoolManager`` whose connections all worker processes of the host share.

    from mppool.integrations.urllib3 import PoolManager

    http = PoolManager(maxsize=8)
    http.request("GET", "http://service.local/items")

At most eight connections to each origin are open, of all workers together.
"""

from __future__ import annotations

import ssl
import threading
from functools import partial
from http.client import HTTPException
from typing import Any

try:
    import urllib3.connection
except ImportError as error:
    raise ImportError("mppool needs urllib3 2 for this: pip install 'mppool[urllib3]'") from error

from urllib3.connection import _wrap_proxy_error
from urllib3.exceptions import ClosedPoolError, EmptyPoolError, HTTPError, NewConnectionError, SSLError
from urllib3.util import Timeout, parse_url
from urllib3.util.proxy import connection_requires_http_tunnel
from urllib3.util.ssl_match_hostname import CertificateError

from mppool.drivers.dialer import FOREVER
from mppool.drivers.http1 import HTTPDriver
from mppool.errors import DialFailed, Error, PoolClosed, PoolTimeout, TooManyWaiting
from mppool.integrations.names import digest, readable
from mppool.pool import Pool

__all__ = ["HTTPConnectionPool", "HTTPSConnectionPool", "PoolManager", "ProxyManager"]

WAIT = 30.0  # seconds a request waits for a connection, where urllib3 would open one more


class _Connection:
    """urllib3 closes connections without a word to their pool (after errors, or with a response): these give their place back then."""

    lender: Pool | None = None
    """Set while it is lent."""

    def close(self) -> None:
        lender, self.lender = self.lender, None
        super().close()  # type: ignore[misc]
        if lender is not None:
            try:
                lender.putconn(self, discard=True)
            except Error:
                pass  # the pool has ended, or this is a forked child

    def getresponse(self) -> Any:
        lender, self.lender = self.lender, None  # http.client closes it in here if the response ends with the connection; the body is still to come
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            self.lender = lender


class HTTPConnection(_Connection, urllib3.connection.HTTPConnection):
    """A connection of HTTPConnectionPool's."""


class HTTPSConnection(_Connection, urllib3.connection.HTTPSConnection):
    """A connection of HTTPSConnectionPool's."""


class _Shared:
    """What is other about a connection pool of ours: where connections come from, and where they go."""

    host: str
    port: int | None
    scheme: Any
    proxy: Any
    proxy_config: Any
    conn_kw: dict[str, Any]
    block: bool
    timeout: Timeout
    ConnectionCls: Any
    _new_conn: Any
    _prepare_proxy: Any
    _raise_timeout: Any

    def __init__(self, host: str, port: int | None = None, *args: Any, shared: dict[str, Any] | None = None, maxsize: int = 10, **kwargs: Any) -> None:
        self._begun = threading.local()
        super().__init__(host, port, *args, maxsize=1, **kwargs)  # type: ignore[call-arg]
        origin = f"{self.scheme}://{self.host}:{self.port or ''}"
        if self.proxy is not None:
            origin = f"{origin} via {self.proxy}"
        name = readable(f"{self.scheme}-{self.host}-{self.port}", digest(origin, identity(self)))
        options: dict[str, Any] = {"name": name, **(shared or {})}
        driver = HTTPDriver(origin, self._new_conn, self._connect)
        self._shared = Pool(driver=driver, max_size=maxsize, reconnect_timeout=0.0, **options)

    def urlopen(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        """As urllib3's."""
        self._begun.tunnels = connection_requires_http_tunnel(self.proxy, self.proxy_config, parse_url(url).scheme)  # this thread's request, should it dial
        return super().urlopen(method, url, *args, **kwargs)  # type: ignore[misc]

    def _connect(self, conn: Any) -> None:
        """Connect it, and raise what urllib3 would: it connects later, with a request, and names a proxy's failure as such."""
        conn.timeout = getattr(self._begun, "connect_timeout", None) or Timeout.resolve_default_timeout(self.timeout.connect_timeout)
        try:
            try:
                if getattr(self._begun, "tunnels", self.proxy is not None and self.scheme == "https"):
                    self._prepare_proxy(conn)
                else:
                    conn.connect()
            except OSError as error:
                self._raise_timeout(err=error, url=self.host, timeout_value=conn.timeout)
                raise
        except (OSError, HTTPException, HTTPError, CertificateError) as error:
            if conn.proxy is None or conn.has_connected_to_proxy:
                raise
            said = SSLError(error) if isinstance(error, (ssl.SSLError, CertificateError)) else error
            raise _wrap_proxy_error(said, conn.proxy.scheme) from said

    def _get_timeout(self, timeout: Any) -> Timeout:
        found: Timeout = super()._get_timeout(timeout)  # type: ignore[misc]
        self._begun.connect_timeout = Timeout.resolve_default_timeout(found.clone().connect_timeout)  # of this thread's request, should it dial
        return found

    def _get_conn(self, timeout: float | None = None) -> Any:
        """Raises EmptyPoolError if none is free within ``timeout`` seconds (None: with ``block`` for ever, without it 30 s), and what connecting raises."""
        if timeout is None:
            timeout = FOREVER if self.block else WAIT
        try:
            conn = self._shared.getconn(timeout)
        except PoolClosed:
            raise ClosedPoolError(self, "Pool is closed.") from None  # type: ignore[arg-type]
        except (PoolTimeout, TooManyWaiting) as error:
            raise EmptyPoolError(self, str(error)) from error  # type: ignore[arg-type]
        except DialFailed as error:
            raise (error.__cause__ or self._failed_elsewhere(error)) from None
        conn.lender = self._shared
        return conn

    def _failed_elsewhere(self, error: DialFailed) -> Exception:
        """What to raise if it was another process that could not connect, a moment ago."""
        said = NewConnectionError(self._new_conn(), str(error))
        return said if self.proxy is None else _wrap_proxy_error(said, self.proxy.scheme)

    def _put_conn(self, conn: Any) -> None:
        if conn is None or conn.lender is None:
            return  # it was closed, and given back then
        conn.lender = None
        try:
            self._shared.putconn(conn)
        except Error:
            conn.close()  # the pool was closed meanwhile, or this is a forked child

    def close(self) -> None:
        """This process lets go; connections that other processes share live on."""
        self._shared.close()
        super().close()  # type: ignore[misc]

    @property
    def shared_pool(self) -> Pool:
        """The ``mppool.Pool`` underneath: ``get_stats()``, ``resize()``, ``drain()``."""
        return self._shared


def identity(pool: Any) -> list[tuple[str, str]]:
    """What makes connections of two pools not interchangeable, beside their place."""
    said = {**pool.conn_kw, **{name: getattr(pool, name, None) for name in ("ca_certs", "cert_file", "cert_reqs", "assert_hostname", "assert_fingerprint")}}
    return sorted((name, str(value)) for name, value in said.items() if isinstance(value, (str, int, bool, bytes, type(None))) and name != "blocksize")


class HTTPConnectionPool(_Shared, urllib3.HTTPConnectionPool):
    """``urllib3.HTTPConnectionPool`` over a pool of all worker processes.

    ``maxsize`` is the strict cap of connections to this origin, of all workers together; there are no connections beyond it, so
    without ``block`` a request waits too, 30 s at most. ``shared`` are options of ``mppool.Pool``: broker, autostart, max_idle, ...
    """

    ConnectionCls = HTTPConnection


class HTTPSConnectionPool(_Shared, urllib3.HTTPSConnectionPool):
    """As HTTPConnectionPool. TLS connections stay with the process that made them: capped over all, closed when another process is in need."""

    ConnectionCls = HTTPSConnection


class _Manager:
    """A pool manager whose pools are ours."""

    pool_classes_by_scheme: dict[str, Any]

    def __init__(self, *args: Any, shared: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("maxsize", 10)
        super().__init__(*args, **kwargs)
        self.pool_classes_by_scheme = {"http": partial(HTTPConnectionPool, shared=shared), "https": partial(HTTPSConnectionPool, shared=shared)}


class PoolManager(_Manager, urllib3.PoolManager):
    """In the place of ``urllib3.PoolManager``. There is one pool for each origin (scheme, host and port), which all worker processes share.

    ``maxsize`` (default 10; urllib3's is 1) is the strict cap for each origin, of all workers together. ``shared`` are options of ``mppool.Pool``:
    ``{"broker": path, "autostart": True, "max_idle": 60}``.

    What differs from urllib3's:

    - There are no connections beyond ``maxsize``. A request that finds none free waits, also without ``block``: then for at most 30 s, after which
      EmptyPoolError is raised.
    - https connections are resident: they stay with the process that made them. They count in the same cap.
    - ``clear()`` lets this process go; connections that other processes may use stay open.
    """


class ProxyManager(_Manager, urllib3.ProxyManager):
    """In the place of ``urllib3.ProxyManager``; see PoolManager. Connections to the proxy are shared for http; tunnels for https are resident."""
