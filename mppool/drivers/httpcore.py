"""HTTP/1.1 connections as httpcore has them, by its public API alone: an ``HTTP11Connection`` over a network stream of our own."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import httpcore

from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.drivers.dialer import FOREVER, Dialer, abandon, adopt
from mppool.drivers.streams import AsyncDialer, within
from mppool.errors import DialFailed
from mppool.options import Target
from mppool.states import Residence

__all__ = ["AsyncHttpcoreDriver", "HttpcoreDriver", "connect_within"]

T = TypeVar("T")

connect_within: ContextVar[float] = ContextVar("mppool_connect_within", default=math.inf)
"""Seconds that this thread's, or this task's, request gives a new connection; the driver's ``connect_timeout`` holds if that is less."""


class _Hurried:
    """Mixed into a dialer."""

    _connect_timeout: float

    @property
    def connect_timeout(self) -> float:
        return min(self._connect_timeout, connect_within.get())

    @connect_timeout.setter
    def connect_timeout(self, seconds: float) -> None:
        self._connect_timeout = seconds


class _Dialer(_Hurried, Dialer):
    pass


class _AsyncDialer(_Hurried, AsyncDialer):
    pass


class Stream(httpcore.NetworkStream):
    """A connection's socket, for httpcore. Owns it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._do(timeout, httpcore.ReadTimeout, httpcore.ReadError, self.sock.recv, max_bytes)  # type: ignore[no-any-return]

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            self._do(timeout, httpcore.WriteTimeout, httpcore.WriteError, self.sock.sendall, buffer)

    def _do(self, timeout: float | None, late: type[Exception], failed: type[Exception], call: Any, argument: Any) -> Any:
        try:
            self.sock.settimeout(FOREVER if timeout is None else timeout)
            return call(argument)
        except TimeoutError as error:
            raise late(str(error)) from error
        except OSError as error:
            raise failed(str(error)) from error

    def close(self) -> None:
        self.sock.close()

    def get_extra_info(self, info: str) -> Any:
        return extra_info(self.sock, info)


class AsyncStream(httpcore.AsyncNetworkStream):
    """Likewise, non-blocking. Reads when httpcore wants to, and else not."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return await within(timeout, self._receive(max_bytes))
        except asyncio.TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            if buffer:
                await within(timeout, self._send(buffer))
        except asyncio.TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def _receive(self, max_bytes: int) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, max_bytes)

    async def _send(self, buffer: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, buffer)

    async def aclose(self) -> None:
        self.sock.close()

    def get_extra_info(self, info: str) -> Any:
        return extra_info(self.sock, info)


class AsyncTLSStream(AsyncStream):
    """The same over TLS. What was not asked for stays in the kernel, where the pool sees it; asyncio's own would read it."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        super().__init__(sock)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)

    async def shake_hands(self) -> None:
        await self._do(self.tls.do_handshake)

    async def _receive(self, max_bytes: int) -> bytes:
        try:
            return await self._do(lambda: self.tls.read(max_bytes))
        except ssl.SSLZeroReturnError:
            return b""

    async def _send(self, buffer: bytes) -> None:
        await self._do(lambda: self.tls.write(buffer))

    async def _do(self, step: Callable[[], T]) -> T:
        """Take the step, as often as it wants more of the server's; send what comes of it."""
        while True:
            done: list[T] = []
            try:
                done.append(step())
            except ssl.SSLWantReadError:
                pass
            finally:
                if self.outgoing.pending:  # of a failed handshake: the alert
                    await super()._send(self.outgoing.read())
            if done:
                return done[0]
            data = await super()._receive(65536)
            if data:
                self.incoming.write(data)
            else:
                self.incoming.write_eof()

    def has_read_ahead(self) -> bool:
        return bool(self.incoming.pending or self.tls.pending())

    def get_extra_info(self, info: str) -> Any:
        return self.tls if info == "ssl_object" else super().get_extra_info(info)


def extra_info(sock: socket.socket, info: str) -> Any:
    if info == "ssl_object":
        return sock if isinstance(sock, ssl.SSLSocket) else None
    if info in ("socket", "client_addr", "server_addr"):
        return sock if info == "socket" else (sock.getsockname() if info == "client_addr" else sock.getpeername())
    return None


class Session:
    """What the pool lends: httpcore's connection, and the stream under it."""

    __slots__ = ("connection", "stream")

    def __init__(self, connection: Any, stream: Any) -> None:
        self.connection = connection
        self.stream = stream


class HttpcoreDriver(DriverBase):
    """Connections to one origin. With ``ssl_context`` they are TLS ones, which stay with the process that made them."""

    name = "http"

    def __init__(self, origin: httpcore.Origin, connect_timeout: float = 10.0, ssl_context: ssl.SSLContext | None = None) -> None:
        self.origin = origin
        self.ssl_context = ssl_context
        self.dialer = _Dialer(target_of(origin), connect_timeout)

    def key(self) -> str:
        return f"http/1 {self.origin}"[:255]

    def dial(self) -> Session:
        """Raises DialFailed, always permanent: a request that finds the server down says so at once."""
        try:
            sock = self.dialer.dial()
        except DialFailed as error:
            raise DialFailed(str(error), permanent=True) from error
        if self.ssl_context is not None:
            try:
                sock.settimeout(self.dialer.connect_timeout)
                sock = self.ssl_context.wrap_socket(sock, server_hostname=self.dialer.target.host, do_handshake_on_connect=False)
                sock.do_handshake()
                sock.settimeout(FOREVER)
            except BaseException as error:
                sock.close()
                if isinstance(error, OSError):
                    raise DialFailed(f"{self.origin}: {error}", permanent=True) from error
                raise
        return self._session(sock)

    def _session(self, sock: socket.socket) -> Session:
        stream = Stream(sock)
        return Session(httpcore.HTTP11Connection(self.origin, stream), stream)

    def fileno(self, session: Session) -> int:
        return int(session.stream.sock.fileno())

    def residence(self, session: Session) -> Residence:
        return Residence.tls if isinstance(session.stream.sock, ssl.SSLSocket) else Residence.moves

    def attach(self, fd: int, baggage: bytes) -> Session:
        return self._session(adopt(fd))

    def is_clean(self, session: Session) -> bool:
        """The last response was read to its end, and neither side said that it closes. Puts the timeout back."""
        if not is_at_rest(session.connection):
            return False
        session.stream.sock.settimeout(FOREVER)
        return True

    def close(self, session: Session) -> None:
        session.stream.close()

    def abort(self, session: Session) -> None:
        abandon(session.stream.sock)

    def forked(self) -> bool:
        return self.dialer.forked() and self.ssl_context is None


class AsyncHttpcoreDriver(AsyncDriverBase):
    """As HttpcoreDriver, for asyncio."""

    name = "http"

    def __init__(self, origin: httpcore.Origin, connect_timeout: float = 10.0, ssl_context: ssl.SSLContext | None = None) -> None:
        self.origin = origin
        self.ssl_context = ssl_context
        self.dialer = _AsyncDialer(target_of(origin), connect_timeout)

    def key(self) -> str:
        return f"http/1 {self.origin}"[:255]

    async def dial(self) -> Session:
        """Raises DialFailed, always permanent: a request that finds the server down says so at once."""
        try:
            sock = await self.dialer.connect()
        except DialFailed as error:
            raise DialFailed(str(error), permanent=True) from error
        if self.ssl_context is None:
            return self._session(AsyncStream(sock))
        try:
            stream = AsyncTLSStream(sock, self.ssl_context, self.dialer.target.host)
            await within(self.dialer.connect_timeout, stream.shake_hands())
        except BaseException as error:
            sock.close()
            if isinstance(error, (OSError, asyncio.TimeoutError)):
                raise DialFailed(f"{self.origin}: {error}", permanent=True) from error
            raise
        return self._session(stream)

    def _session(self, stream: AsyncStream) -> Session:
        return Session(httpcore.AsyncHTTP11Connection(self.origin, stream), stream)

    def fileno(self, session: Session) -> int:
        return int(session.stream.sock.fileno())

    def residence(self, session: Session) -> Residence:
        return Residence.tls if isinstance(session.stream, AsyncTLSStream) else Residence.moves

    def attach(self, fd: int, baggage: bytes) -> Session:
        sock = adopt(fd)
        sock.setblocking(False)
        return self._session(AsyncStream(sock))

    def is_clean(self, session: Session) -> bool:
        return is_at_rest(session.connection) and not (isinstance(session.stream, AsyncTLSStream) and session.stream.has_read_ahead())

    def close(self, session: Session) -> None:
        session.stream.sock.close()

    def abort(self, session: Session) -> None:
        abandon(session.stream.sock)

    def forked(self) -> bool:
        return self.dialer.forked()


def is_at_rest(connection: Any) -> bool:
    """Between two requests, or before the first: the public words for both are that it would take one. And nothing was read beyond the last reply."""
    if not connection.is_idle() and "NEW" not in connection.info():
        return False
    return not connection._h11_state.trailing_data[0]  # h11 would take it for the reply to the next request


def target_of(origin: httpcore.Origin) -> Target:
    return Target("tcp", origin.host.decode("ascii"), origin.port)
