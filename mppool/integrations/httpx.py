"""httpx: transports whose connections all worker processes of the host share.

    import httpx
    from mppool.integrations.httpx import HTTPTransport

    client = httpx.Client(transport=HTTPTransport(max_connections=8))

At most eight connections to each origin are open, of all workers together.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

try:
    import httpcore
    import httpx
except ImportError as error:
    raise ImportError("mppool needs httpx for this: pip install 'mppool[httpx]'") from error

from mppool.aio import AsyncPool
from mppool.drivers.httpcore import AsyncHttpcoreDriver, HttpcoreDriver, Session, connect_within
from mppool.errors import DialFailed, Error, PoolTimeout, TooManyWaiting
from mppool.integrations.names import digest, readable
from mppool.pool import Pool

__all__ = ["AsyncHTTPTransport", "HTTPTransport"]

NAMES = [name for name in httpcore.__all__ if isinstance(getattr(httpcore, name), type) and issubclass(getattr(httpcore, name), Exception)]
PORTS = {"http": 80, "https": 443}


@contextmanager
def understood() -> Iterator[None]:
    """httpcore's exceptions, and ours, become httpx's: the same names."""
    try:
        yield
    except (PoolTimeout, TooManyWaiting) as error:
        raise httpx.PoolTimeout(str(error)) from error
    except DialFailed as error:
        causes = (error.__cause__, error.__cause__ and error.__cause__.__cause__)  # of a handshake, of a connection
        late = any(isinstance(cause, (TimeoutError, asyncio.TimeoutError)) for cause in causes)
        raise (httpx.ConnectTimeout if late else httpx.ConnectError)(str(error)) from error
    except Exception as error:
        for kind in type(error).__mro__:
            if kind.__module__.startswith("httpcore") and kind.__name__ in NAMES and hasattr(httpx, kind.__name__):
                raise getattr(httpx, kind.__name__)(str(error)) from error
        raise


class _Transport:
    """What both transports are told: a pool for each origin, made at its first request."""

    def __init__(self, *, max_connections: int = 10, connect_timeout: float = 5.0, verify: Any = True, **options: Any) -> None:
        self._options: dict[str, Any] = {"max_size": max_connections, "reconnect_timeout": 0.0, **options}
        self._connect_timeout = connect_timeout
        self._verify = verify
        self._pools: dict[str, Any] = {}

    def pools(self) -> dict[str, Any]:
        """The pool of each origin that was asked so far: ``get_stats()``, ``resize()``, ``drain()``."""
        return dict(self._pools)

    def _pool(self, request: httpx.Request) -> Any:
        url = request.url
        if url.scheme not in PORTS:
            raise httpx.UnsupportedProtocol(f"Request URL has an unsupported protocol {url.scheme!r}.")
        origin = httpcore.Origin(url.raw_scheme, url.raw_host, url.port or PORTS[url.scheme])
        pool = self._pools.get(str(origin))
        if pool is None:
            context = self._context if url.scheme == "https" else None
            made = self._make(origin, context, **{"name": readable(str(origin), digest(str(origin), trust_of(context) if context else "")), **self._options})
            pool = self._pools.setdefault(str(origin), made)  # if another thread was faster, ours is forgotten: it has done nothing yet
        return pool

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return self._verify if isinstance(self._verify, ssl.SSLContext) else httpx.create_ssl_context(self._verify)

    def _make(self, origin: httpcore.Origin, context: ssl.SSLContext | None, **options: Any) -> Any:
        raise NotImplementedError


def trust_of(context: ssl.SSLContext) -> str:
    """What it demands of a server, the same in every process: a worker that nobody can please is no trouble to others."""
    authorities = sorted(context.get_ca_certs(binary_form=True))
    demands = (context.verify_mode, context.check_hostname, context.minimum_version, context.maximum_version, authorities)
    return digest(*demands)


def as_httpcore(request: httpx.Request) -> httpcore.Request:
    url = request.url
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    return httpcore.Request(request.method, target, headers=request.headers.raw, content=request.stream, extensions=request.extensions)


@contextmanager
def patience(request: httpx.Request) -> Iterator[float | None]:
    """While a connection is looked for: how many seconds the request waits for a free one (None: as the pool's ``timeout`` says), and for a new one."""
    timeout = request.extensions.get("timeout", {})
    pool, connect = timeout.get("pool"), timeout.get("connect")
    token = connect_within.set(math.inf if connect is None else float(connect))
    try:
        yield None if pool is None else float(pool)
    finally:
        connect_within.reset(token)


class HTTPTransport(_Transport, httpx.BaseTransport):
    """In the place of ``httpx.HTTPTransport``. There is one pool for each origin (scheme, host and port), which all worker processes share.

    ``max_connections`` (default 10) is the strict cap for each origin, of all workers together. ``verify`` is httpx's: True, False or an SSLContext.
    ``connect_timeout`` in seconds (default 5): a request's own holds if it is shorter. Further options are those of ``mppool.Pool``.

    What differs from ``httpx.HTTPTransport``:

    - HTTP/1.1 only; there is no ``http2``, ``retries``, ``cert``, ``uds``, ``local_address``, ``socket_options`` or ``limits``.
    - https connections are resident: they stay with the process that made them. They count in the same cap.
    - A request waits for a free connection for as long as httpx's ``pool`` timeout says, and then gets httpx.PoolTimeout.
    - A connection is closed if its response is closed before it was read to its end.
    - Proxies are not used: the environment's are ignored, and ``httpx.Client(proxy=...)`` makes connections outside of the pool.
    - ``close()`` lets this process go; connections that other processes may use stay open.
    """

    def _make(self, origin: httpcore.Origin, context: ssl.SSLContext | None, **options: Any) -> Pool:
        return Pool(driver=HttpcoreDriver(origin, self._connect_timeout, context), **options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        pool: Pool = self._pool(request)
        with understood():
            with patience(request) as seconds:
                session: Session = pool.getconn(seconds)
            try:
                response = session.connection.handle_request(as_httpcore(request))
            except BaseException:
                pool.putconn(session, discard=True)
                raise
        stream = Body(response.stream, pool, session)
        return httpx.Response(response.status, headers=response.headers, stream=stream, extensions=response.extensions)

    def close(self) -> None:
        """This process lets go; connections that other processes share live on."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class Body(httpx.SyncByteStream):
    """A response's body; the connection goes back when it is closed."""

    def __init__(self, stream: Any, pool: Pool, session: Session) -> None:
        self.stream = stream
        self.pool = pool
        self.session: Session | None = session

    def __iter__(self) -> Iterator[bytes]:
        with understood():
            yield from self.stream

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            try:
                self.stream.close()
            finally:
                with suppress(Error):  # forked in the middle of the response: it is the parent's
                    self.pool.putconn(session)


class AsyncHTTPTransport(_Transport, httpx.AsyncBaseTransport):
    """In the place of ``httpx.AsyncHTTPTransport``: as HTTPTransport, for asyncio."""

    def _make(self, origin: httpcore.Origin, context: ssl.SSLContext | None, **options: Any) -> AsyncPool:
        return AsyncPool(driver=AsyncHttpcoreDriver(origin, self._connect_timeout, context), **options)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        pool: AsyncPool = self._pool(request)
        with understood():
            with patience(request) as seconds:
                session: Session = await pool.getconn(seconds)
            try:
                response = await session.connection.handle_async_request(as_httpcore(request))
            except BaseException:
                await pool.putconn(session, discard=True)
                raise
        stream = AsyncBody(response.stream, pool, session)
        return httpx.Response(response.status, headers=response.headers, stream=stream, extensions=response.extensions)

    async def aclose(self) -> None:
        """This process lets go; connections that other processes share live on."""
        for pool in self._pools.values():
            await pool.close()
        self._pools.clear()


class AsyncBody(httpx.AsyncByteStream):
    """A response's body; the connection goes back when it is closed."""

    def __init__(self, stream: Any, pool: AsyncPool, session: Session) -> None:
        self.stream = stream
        self.pool = pool
        self.session: Session | None = session

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with understood():
            async for part in self.stream:
                yield part

    async def aclose(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            try:
                await self.stream.aclose()
            finally:
                with suppress(Error):
                    await self.pool.putconn(session)
