"""What is other about psycopg's connection objects here: how they connect, close and cancel.

libpq does not know where the server really is, so cancelling is ours.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psycopg
from psycopg import pq

from mppool.drivers.postgres import cancel_request
from mppool.drivers.psycopg.connecting import Login, movable_gen
from mppool.drivers.psycopg.conninfo import UNCHECKED
from mppool.drivers.psycopg.libpq import Waits, bury, in_time
from mppool.drivers.streams import within
from mppool.states import Residence

__all__ = ["CANCELING", "cancel", "cancel_async", "end", "movable"]

CANCELING = 0.5  # seconds that cancelling a statement may take when its session is closed


@cache
def movable(base: type[Any]) -> type[Any]:
    """The user's connection class, able to move."""
    kind = AsyncMovableConnection if issubclass(base, psycopg.AsyncConnection) else MovableConnection
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__doc__": base.__doc__, "_do": base.wait})


class Info(psycopg.ConnectionInfo):
    """Where the server really is, which libpq does not know."""

    def __init__(self, pgconn: pq.abc.PGconn, login: Login) -> None:
        super().__init__(pgconn)
        self._login = login

    @property
    def host(self) -> str:
        return self._login.host

    @property
    def hostaddr(self) -> str:
        return str(self._login.address[0]) if isinstance(self._login.address, tuple) else ""

    @property
    def port(self) -> int:
        address = self._login.address
        return int(address[1]) if isinstance(address, tuple) else int(address.rpartition(".")[2])

    def get_parameters(self) -> dict[str, str]:
        """As psycopg's own, with which one could connect again; ``dsn`` is made of it."""
        place = {"host": self.host, "hostaddr": self.hostaddr, "port": str(self.port)}
        told = {name: value for name, value in super().get_parameters().items() if name not in place and name not in UNCHECKED}
        return {**told, **{name: value for name, value in place.items() if value}}


class Movable:
    """What is other about a connection of ours: how it connects, and how it cancels."""

    _mppool = Login()
    _adopted = False  # and not yet configured in this process
    _made: dict[str, Any]  # attributes, when it was made and not yet configured
    _reported: list[bytes | None]  # settings that libpq was told of, when it was configured
    _pool: Any = None  # that has lent it
    pgconn: pq.abc.PGconn
    _should_cancel: Callable[[], bool]

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **options: Any) -> Waits[Any]:
        making = movable_gen(cls, super()._connect_gen, conninfo, options)  # type: ignore[misc]
        return in_time(making, options["timeout"]) if options.get("timeout") else making

    def __del__(self, *_: Any) -> None:
        """Forgotten, not closed: others may have the session. (libpq's own end would say goodbye on it.)"""
        if self._mppool.residence is Residence.moves:
            bury(self.pgconn)

    def __repr__(self) -> str:
        said = super().__repr__()
        if self._mppool.residence is not Residence.moves:
            return said
        return re.sub(r"host=@mppool-\S+ port=1\b", f"host={self.info.host} port={self.info.port}", said, count=1)

    @property
    def info(self) -> psycopg.ConnectionInfo:
        moved = self._mppool.residence is Residence.moves
        return Info(self.pgconn, self._mppool) if moved else super().info  # type: ignore[misc]

    def cancel(self) -> None:
        """Cancel the current operation on the connection."""
        if self._mppool.residence is not Residence.moves:
            super().cancel()  # type: ignore[misc]
        elif self._may_cancel():
            cancel(self._mppool, None)

    @property
    def closed(self) -> bool:
        """Also after its return."""
        return super().closed or not (self._pool is None or self._pool.lends(self))  # type: ignore[misc]

    def wait(self, *arguments: Any, **options: Any) -> Any:
        """As psycopg's own, which whatever speaks to the server comes by. Not after the return: a cursor that is read on would take another's answers."""
        pool = self._pool
        if pool is not None and not pool.lends(self):
            raise psycopg.OperationalError("the connection is closed")
        return self._do(*arguments, **options)

    _do: Callable[..., Any]
    """psycopg's own ``wait``, for the pool, while nobody has it."""

    def _may_cancel(self) -> bool:
        """Not after its return: what the session does then is somebody else's."""
        return not self.closed and self._should_cancel()


class MovableConnection(Movable):
    def close(self) -> None:
        """End the session; after it was returned, nothing: it may be somebody else's by now."""
        pool = self._pool
        if pool is None or self.closed:
            super().close()  # type: ignore[misc]
        elif pool.lends(self):
            if pool.close_returns:
                pool.putconn(self)
            else:
                end(self)

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the current operation on the connection, within ``timeout`` seconds."""
        if self._mppool.residence is not Residence.moves:
            super().cancel_safe(timeout=timeout)  # type: ignore[misc]
        elif self._may_cancel():
            cancel(self._mppool, timeout or None)


class AsyncMovableConnection(Movable):
    async def close(self) -> None:
        """End the session; after it was returned, nothing: it may be somebody else's by now."""
        pool = self._pool
        if pool is None or self.closed:
            await super().close()  # type: ignore[misc]
        elif pool.lends(self):
            if pool.close_returns:
                await pool.putconn(self)
            else:
                end(self)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel the current operation on the connection, within ``timeout`` seconds."""
        if self._mppool.residence is not Residence.moves:
            await super().cancel_safe(timeout=timeout)  # type: ignore[misc]
        elif self._may_cancel():
            await cancel_async(self._mppool, timeout or None)


def end(session: Any) -> None:
    """Say goodbye to the server."""
    session._closed = True
    session.pgconn.finish()


def cancel(login: Login, timeout: float | None) -> None:
    """Ask the server to cancel what that session does, and wait until it has been asked. Raises CancellationTimeout, OperationalError."""
    with cancelling(), socket.socket(login.family, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(login.address)
        sock.sendall(cancel_request(login.greeting))
        sock.recv(1)


async def cancel_async(login: Login, timeout: float | None) -> None:
    """The same in an event loop."""
    loop = asyncio.get_running_loop()

    async def ask() -> None:
        with socket.socket(login.family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, login.address)
            await loop.sock_sendall(sock, cancel_request(login.greeting))
            await loop.sock_recv(sock, 1)

    with cancelling():
        await within(timeout, ask())


@contextmanager
def cancelling() -> Iterator[None]:
    """In psycopg's words."""
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError):  # two things before Python 3.11
        raise psycopg.errors.CancellationTimeout("cancellation timeout expired") from None
    except OSError as error:
        raise psycopg.OperationalError(f"couldn't send cancellation: {error}") from error
