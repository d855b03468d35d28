"""Raw sockets and streams for asyncio, and what every driver of asyncio transports needs: to stop reading, and to let go silently."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from mppool.drivers.base import AsyncDriverBase
from mppool.drivers.dialer import Dialer, abandon, addresses, adopt, dial_failed, prepare
from mppool.options import Target
from mppool.states import Residence

__all__ = ["AsyncDialer", "AsyncRawDriver", "StreamDriver", "Streams", "Tap", "drop", "within"]

T = TypeVar("T")
WARY = 16  # returns

if sys.version_info >= (3, 11):

    async def within(seconds: float | None, what: Awaitable[T]) -> T:
        """Await it, so many seconds at most. Raises asyncio.TimeoutError. (``asyncio.wait_for`` may swallow a cancellation that comes late.)"""
        async with asyncio.timeout(seconds):
            return await what

else:

    async def within(seconds: float | None, what: Awaitable[T]) -> T:
        """Await it, so many seconds at most. Raises asyncio.TimeoutError."""
        return await asyncio.wait_for(what, seconds)


class AsyncDialer(Dialer):
    """As Dialer, without blocking; host names are looked up by the loop."""

    give_up: Callable[[socket.socket], object] = staticmethod(socket.socket.close)
    """What becomes of a socket whose connection was not to be."""

    async def connect(self) -> socket.socket:
        """A connected, non-blocking socket. Raises DialFailed; permanent if the host name does not exist."""
        try:
            return await within(self.connect_timeout, self.first())
        except asyncio.TimeoutError:
            raise dial_failed(self.target, TimeoutError(f"no connection within connect_timeout={self.connect_timeout:g} s")) from None
        except (OSError, UnicodeError) as error:
            raise dial_failed(self.target, error) from error

    async def first(self) -> socket.socket:
        """A connection to the first address that answers, however long it takes. Raises OSError."""
        failure: OSError | None = None
        for family, address in await self._addresses():
            try:
                return await self._try(family, address)
            except OSError as error:
                failure = error
        raise failure or OSError(f"no address for {self.target.host!r}")

    async def _addresses(self) -> list[tuple[int, Any]]:
        host, port = self.target.host, self.target.port
        if self.target.kind == "unix":
            return [(socket.AF_UNIX, host)]
        if host.replace(".", "").isdigit() or ":" in host:
            return addresses(host, port)  # as given: nothing to look up
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]

    async def _try(self, family: int, address: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        self.remember(sock)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            prepare(sock)
        except BaseException:
            self.give_up(sock)
            raise
        return sock


class AsyncRawDriver(AsyncDriverBase):
    """Lends non-blocking sockets, for ``loop.sock_recv``, ``loop.sock_sendall`` and their like."""

    name = "raw"

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.dialer = AsyncDialer(target, connect_timeout)

    def key(self) -> str:
        return "raw/1"

    async def dial(self) -> socket.socket:
        return await self.dialer.connect()

    def fileno(self, session: socket.socket) -> int:
        return session.fileno()

    def residence(self, session: socket.socket) -> Residence:
        return Residence.moves

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        sock = adopt(fd)
        sock.setblocking(False)
        return sock

    def is_clean(self, session: socket.socket) -> bool:
        """Not closed, no ``makefile()`` left that may have read ahead, no reader left in the loop. Puts the mode back."""
        fd = session.fileno()
        if fd < 0 or session._io_refs:  # type: ignore[attr-defined]
            return False
        if session.timeout != 0.0:
            session.setblocking(False)
        if unwatched(fd):
            abandon(session)  # asked again, it is unfit still
            return False
        return True

    def close(self, session: socket.socket) -> None:
        session.close()

    def abort(self, session: socket.socket) -> None:
        abandon(session)

    def forked(self) -> bool:
        return self.dialer.forked()


def unwatched(fd: int) -> bool:
    """Make the running loop watch a descriptor no more. Did it? It would be told of every reply that others get; was a call of it given up half-way, too.

    Raises RuntimeError if a transport has it.
    """
    loop: Any = asyncio.get_running_loop()
    try:
        if fd not in loop._selector._fd_to_key and fd not in loop._transports:
            return False  # by asyncio's own books, which are read in a tenth of the time
    except AttributeError:
        pass  # another loop's
    reads, writes = loop.remove_reader(fd), loop.remove_writer(fd)
    return bool(reads or writes)


class Tap(socket.socket):
    """A transport's socket, which can be turned off: then nothing is read from it. The calls are named as the transport's own.

    While it is off the loop goes on watching, as a rule: to end that at each return, and begin again, costs more than all else of
    both. What then arrives is for somebody else, and ends it; for some returns after that it is ended at once.
    """

    transport: Any = None
    off = False
    used = False  # has the transport read through here? Those of uvloop never do
    wary = 0  # at so many returns the loop stops watching at once

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Streams over this socket, which are its end, too; so is an exception."""
        try:
            self.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=self)
        except BaseException:
            abandon(self)
            raise
        self.transport = writer.transport
        return reader, writer

    def recv(self, *args: Any) -> bytes:
        if self.off:
            self.transport.pause_reading()
            self.wary = WARY
            raise BlockingIOError
        self.used = True
        return super().recv(*args)

    def pause_reading(self) -> None:
        self.off = True
        if self.wary or not self.used:
            self.transport.pause_reading()
            self.wary = max(0, self.wary - 1)

    def resume_reading(self) -> None:
        self.off = False
        if not self.transport.is_reading():
            self.transport.resume_reading()


class Streams(NamedTuple("Streams", [("reader", asyncio.StreamReader), ("writer", asyncio.StreamWriter)])):
    """What a pool with ``streams=True`` lends: ``reader, writer = conn``."""

    tap: Tap


class StreamDriver(AsyncDriverBase):
    """Lends ``(StreamReader, StreamWriter)``. A reader that has read ahead, or a writer that has yet to write, makes a session unfit for others."""

    name = "raw"

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.dialer = AsyncDialer(target, connect_timeout)

    def key(self) -> str:
        return "raw/1"

    async def dial(self) -> Streams:
        with await self.dialer.connect() as sock:
            return await self.attach(sock.fileno(), b"")

    def fileno(self, session: Streams) -> int:
        return fileno(session.writer.transport)

    def residence(self, session: Streams) -> Residence:
        return Residence.moves

    async def attach(self, fd: int, baggage: bytes) -> Streams:
        tap = adopt(fd, Tap)
        streams = Streams(*await tap.open())
        streams.tap = tap
        return streams

    def is_clean(self, session: Streams) -> bool:
        transport: Any = session.writer.transport
        if transport.is_closing():
            return False
        session.tap.pause_reading()  # first: what comes after this line stays in the kernel
        reader: Any = session.reader
        return not (reader._buffer or reader.at_eof() or reader.exception() or transport.get_write_buffer_size())

    def resume(self, session: Streams) -> None:
        if not session.writer.transport.is_closing():
            session.tap.resume_reading()

    def close(self, session: Streams) -> None:
        session.writer.close()

    def abort(self, session: Streams) -> None:
        drop(session.writer.transport)

    def forked(self) -> bool:
        return self.dialer.forked()


def fileno(transport: asyncio.BaseTransport) -> int:
    """The transport's descriptor, -1 if it is closed."""
    sock = transport.get_extra_info("socket")
    return sock.fileno() if sock is not None else -1


def drop(transport: asyncio.BaseTransport) -> None:
    """Let go of a transport's connection without a word to the server; others may go on with theirs.

    Where its loop does not run (in a forked child, whose epoll is the parent's, or after the loop's end) the loop is not touched:
    the descriptor becomes a dead socket's, which the transport may close when it likes.
    """
    here = running()
    if here is not None and getattr(transport, "_loop", here) is here:  # (uvloop's transports do not tell)
        transport.abort()  # type: ignore[attr-defined]
        return
    fd = fileno(transport)
    if fd >= 0:
        with socket.socket() as dead:
            os.dup2(dead.fileno(), fd, inheritable=False)
        own: Any = getattr(transport, "_sock", None)
        if own is not None:  # asyncio's transports: closed, as far as they can tell; else they warn of it
            own.close()
            vars(transport).update(_sock=None, _closing=True)


def running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
