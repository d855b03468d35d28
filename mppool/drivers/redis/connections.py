"""What is other about redis-py's connections here: they count, and end one connection before they open another."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from inspect import iscoroutinefunction
from typing import Any

import redis
import redis.asyncio.connection

from mppool.drivers.dialer import adopt
from mppool.drivers.redis.commands import MARKS, SPOILT, mark
from mppool.drivers.streams import AsyncDialer, Tap, fileno, within
from mppool.kernel import link
from mppool.options import Target

__all__ = ["pooled", "until_ended", "wait_for_end"]

PATIENCE = 0.5  # seconds to wait for the server's end of a connection before another takes its place

BY_HOST = (redis.asyncio.connection.Connection._connect,)
BY_PATH = (redis.asyncio.connection.UnixDomainSocketConnection._connect,)


def pooled(connection_class: type[Any]) -> type[Any]:
    """The user's class, made ours."""
    mixin = AsyncPooled if iscoroutinefunction(connection_class.connect) else Pooled
    return type(f"Pooled{connection_class.__name__}", (mixin, connection_class), {})


class Counting:
    """What is other about a connection of ours."""

    own: Any = None  # its socket, or writer, as it was dialed or attached; None before
    owed = 0  # commands without a reply, as far as they went through here
    leaves = 0  # see above
    _should_reconnect: bool
    gone = False  # returned and closed, or left behind by a fork
    _old: socket.socket | None = None  # of the connection before, its sending side shut down

    def note(self, command: Sequence[Any]) -> None:
        self.owed += 1
        try:
            left, kept = MARKS[command[0]]
        except (KeyError, TypeError):
            left, kept = mark(command)
        self.leaves = (self.leaves | left) & kept

    def pack_commands(self, commands: Any) -> Any:
        commands = list(commands)
        for command in commands:
            self.note(command)
        return super().pack_commands(commands)  # type: ignore[misc]

    def settled(self, own: Any) -> None:
        """As dialed: nothing is owed, nothing is left."""
        self.own = own
        self.owed = self.leaves = 0

    def can_be_reset(self) -> bool:
        return not (self.owed or self.leaves & SPOILT or self._should_reconnect)

    def check_not_gone(self) -> None:
        if self.gone:
            raise redis.ConnectionError("this connection went back to its pool, or belongs to the process that this one was forked from")

    def forget_old(self) -> None:
        old, self._old = self._old, None
        if old is not None:
            old.close()


class Pooled(Counting):
    """Mixed into a class of ``redis.connection``."""

    _sock: Any
    pid: int

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        self.note(args)
        super().send_command(*args, **kwargs)  # type: ignore[misc]

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError:
            self.owed -= 1
            raise
        self.owed -= 1
        return response

    def _connect(self) -> Any:
        self.check_not_gone()
        if self._old is not None:  # one permit, one connection
            wait_for_end(self._old)
            self.forget_old()
        return super()._connect()  # type: ignore[misc]

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """As redis-py's; but the server's end of the connection can be seen, and waited for."""
        sock = self._sock
        if sock is not None and self.own is not None and self.pid == os.getpid():
            self._sock = None
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the server was faster
            self.forget_old()
            self._old = sock
        super().disconnect(*args, **kwargs)  # type: ignore[misc]


class AsyncPooled(Counting):
    """Mixed into a class of ``redis.asyncio.connection``."""

    _reader: Any
    _writer: Any
    _connection_arguments: Any
    on_connect: Any
    path: str
    socket_connect_timeout: float | None
    socket_keepalive: bool | None
    socket_keepalive_options: Any
    tap: Any = None  # turns reading off and on: a Tap, or the transport itself

    async def send_command(self, *args: Any, **kwargs: Any) -> None:
        self.note(args)
        await super().send_command(*args, **kwargs)  # type: ignore[misc]

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = await super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError:
            self.owed -= 1
            raise
        self.owed -= 1
        return response

    async def _connect(self) -> None:
        self.check_not_gone()
        if self._old is not None:
            await until_ended(self._old)
            self.forget_old()
        theirs = super()._connect  # type: ignore[misc]
        how = {} if theirs.__func__ in BY_PATH else self._connection_arguments()
        if theirs.__func__ in BY_PATH + BY_HOST and how.keys() <= {"host", "port", "ssl"}:
            await within(self.socket_connect_timeout, self._open(**how))
        else:  # in a way of the user's own
            await theirs()
            self.tap = self._writer.transport
        if theirs.__func__ in BY_PATH:
            await self.on_connect()

    async def _open(self, host: str = "", port: int = 0, ssl: Any = None) -> None:
        """As redis-py does; but it is our socket. What asyncio dials and gives up it closes later, when others may have the permit already."""
        dialer = AsyncDialer(Target("tcp", host, port) if host else Target("unix", self.path))
        dialer.give_up = self._leave
        sock = await dialer.first()
        try:
            if host:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(self.socket_keepalive))
                for option, value in self.socket_keepalive_options.items() if self.socket_keepalive else ():
                    sock.setsockopt(socket.SOL_TCP, option, value)
            ours = adopt(sock.fileno())
        except BaseException:
            self._leave(sock)
            raise
        try:
            if ssl is not None:
                self._reader, self._writer = await asyncio.open_connection(sock=sock, ssl=ssl, server_hostname=host)
            else:
                self.tap = adopt(sock.fileno(), Tap)
                sock.close()
                self._reader, self._writer = await self.tap.open()
        except BaseException:
            self._leave(ours)
            raise
        ours.close()
        if ssl is not None or not isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
            self.tap = self._writer.transport

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._shut_down()
        await super().disconnect(*args, **kwargs)  # type: ignore[misc]

    def _close(self) -> None:
        self._shut_down()
        super()._close()  # type: ignore[misc]

    def _shut_down(self) -> None:
        """Closing takes a turn of the loop, and would not end the connection if the pool has a duplicate."""
        if self._writer is None:
            return
        fd = fileno(self._writer.transport)
        if fd >= 0:
            self._leave(adopt(fd))

    def _leave(self, sock: socket.socket) -> None:
        """Shut it down, and keep it: whoever has the permit waits for the server's end of it."""
        self.forget_old()
        self._old = sock
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server was faster, or it was never connected


def wait_for_end(sock: socket.socket) -> None:
    until = time.monotonic() + PATIENCE
    while not link.has_ended(sock) and time.monotonic() < until:
        link.wait_readable(sock.fileno(), until - time.monotonic())


async def until_ended(sock: socket.socket) -> None:
    until = time.monotonic() + PATIENCE
    while not link.has_ended(sock) and time.monotonic() < until:
        await asyncio.sleep(0.001)
