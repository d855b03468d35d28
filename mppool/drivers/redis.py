"""redis-py: live Redis connections move. ``RedisDriver`` lends ``redis.Connection`` objects, ``AsyncRedisDriver`` those of ``redis.asyncio``.

A connection of ours is redis-py's own, of whatever class the user names, that also keeps count: of commands without a reply
(who was interrupted half-way leaves some), and of commands that leave something behind in the server's session (SELECT,
WATCH, SUBSCRIBE, ...). What has either is not lent on as it is. It may reconnect while it is lent, as redis-py does after
errors, under the same permit; the new connection ends with the lease.

A process that gets a session it does not know, or that others used since, sends RESET and the login in one write, unless the
policy is "trust". RESET came with Redis 6.2.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from inspect import iscoroutinefunction
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection

from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.drivers.dialer import FOREVER, abandon, adopt
from mppool.drivers.streams import Tap, drop, fileno
from mppool.errors import DialFailed, OptionError
from mppool.kernel import link
from mppool.options import Target
from mppool.states import Residence

__all__ = ["AsyncRedisDriver", "RedisDriver"]

PATIENCE = 0.5  # seconds to wait for the server's end of a connection before another takes its place

# What a command leaves in the server's session until some other command: a transaction, watched keys, what RESET undoes,
# and what nothing does (RESET keeps NO-EVICT in Redis 7.0).
MULTI, WATCH, OTHER, SPOILT = 1, 2, 4, 8
LEAVES = {
    "MULTI": MULTI,
    "WATCH": WATCH,
    **dict.fromkeys(("SELECT", "AUTH", "HELLO", "RESET", "CLIENT", "READONLY", "READWRITE", "ASKING"), OTHER),
    **dict.fromkeys(("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"), OTHER),
    **dict.fromkeys(("MONITOR", "SYNC", "PSYNC", "REPLCONF", "QUIT"), SPOILT),
    **dict.fromkeys(("ID", "INFO", "LIST", "GETNAME", "KILL", "UNBLOCK", "PAUSE", "UNPAUSE", "GETREDIR", "TRACKINGINFO", "HELP"), 0),  # CLIENT ...
    **dict.fromkeys(("NO-EVICT", "NO-TOUCH", "REPLY"), SPOILT),  # likewise
}
ENDS = {"EXEC": MULTI | WATCH, "DISCARD": MULTI | WATCH, "UNWATCH": WATCH}

_marks: dict[Any, tuple[int, int]] = {}  # by a command's name as redis-py gives it: what it leaves, and all but what it ends


def mark(command: Sequence[Any]) -> tuple[int, int]:
    """What a command leaves behind, and what it does not end. Its name may be of two words."""
    name = command[0]
    words = text_of(name).split() or [""]
    if words == ["CLIENT"]:
        return LEAVES.get(text_of(command[1]), OTHER) if len(command) > 1 else OTHER, -1
    found = LEAVES.get(words[1], OTHER) if words[0] == "CLIENT" else LEAVES.get(words[0], 0), ~ENDS.get(words[0], 0)
    if len(_marks) < 4096 and isinstance(name, (str, bytes)):
        _marks[name] = found
    return found


def text_of(word: Any) -> str:
    return (bytes(word).decode("latin-1") if isinstance(word, (bytes, bytearray, memoryview)) else str(word)).upper()


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
            left, kept = _marks[command[0]]
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
        await super()._connect()  # type: ignore[misc]
        transport = self.tap = self._writer.transport
        if transport.get_extra_info("ssl_object") is None and isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
            self.tap = adopt(fileno(transport), Tap)
            drop(transport)  # now: it takes a turn of the loop
            self._reader, self._writer = await self.tap.open()

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._shut_down()
        await super().disconnect(*args, **kwargs)  # type: ignore[misc]

    def _close(self) -> None:
        self._shut_down()
        super()._close()  # type: ignore[misc]

    def _shut_down(self) -> None:
        """The pool has a duplicate of the connection: closing ours alone would not end it."""
        if self._writer is None or self.own is None:
            return
        fd = fileno(self._writer.transport)
        if fd >= 0:
            self.forget_old()
            self._old = adopt(fd)
            try:
                self._old.shutdown(socket.SHUT_WR)
            except OSError:
                pass


def wait_for_end(sock: socket.socket) -> None:
    until = time.monotonic() + PATIENCE
    while not link.has_ended(sock) and time.monotonic() < until:
        link.wait_readable(sock.fileno(), until - time.monotonic())


async def until_ended(sock: socket.socket) -> None:
    until = time.monotonic() + PATIENCE
    while not link.has_ended(sock) and time.monotonic() < until:
        await asyncio.sleep(0.001)


class Login:
    """Where a server is and who one is there, from what redis-py's connections are told."""

    def __init__(self, connection_class: Any, kwargs: Mapping[str, Any], on_transfer: str) -> None:
        if on_transfer not in ("reset", "trust"):
            raise OptionError(f'on_transfer={on_transfer!r}: expected "reset" or "trust"')
        self.connection_class = connection_class
        self.kwargs = dict(kwargs)
        self.on_transfer = on_transfer
        self.is_tls = issubclass(connection_class, (redis.SSLConnection, AsyncSSLConnection))
        path = self.kwargs.get("path")
        self.target = Target("unix", path) if path else Target("tcp", self.kwargs.get("host", "localhost"), int(self.kwargs.get("port", 6379)))
        self.db = int(self.kwargs.get("db") or 0)

    def digest(self) -> str:
        """Of everything that the server knows a session by. What only the client minds (decoding, timeouts, retries) is not in it."""
        kwargs, provider = self.kwargs, self.kwargs.get("credential_provider")
        who = [kwargs.get("username"), kwargs.get("password"), kwargs.get("client_name"), type(provider).__qualname__ if provider is not None else None]
        how = [kwargs.get("protocol"), self.is_tls, kwargs.get("redis_connect_func") is not None]
        return hashlib.blake2b(json.dumps([str(self.target), self.db, who, how], default=str).encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def pooled(self) -> type[Any]:
        """The user's class, made ours."""
        mixin = AsyncPooled if iscoroutinefunction(self.connection_class.connect) else Pooled
        return type(f"Pooled{self.connection_class.__name__}", (mixin, self.connection_class), {})

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """What every new connection would look up in the metadata of installed packages, ten times slower than attaching."""
        if {"driver_info", "lib_name", "lib_version"} & self.kwargs.keys():
            return {}
        try:
            from redis.driver_info import DriverInfo
        except ImportError:  # before redis-py 7
            return {}
        return {"driver_info": DriverInfo()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("pooled", "defaults")}

    def make(self) -> Any:
        """A connection object that is not connected."""
        return self.pooled(**self.defaults, **self.kwargs)

    def commands(self, session: Any) -> list[tuple[Any, ...]]:
        """RESET and the login again."""
        provider = session.credential_provider
        if provider is not None:
            login = tuple(provider.get_credentials())
        elif session.username or session.password:
            login = (session.username, session.password) if session.username else (session.password or "",)
        else:
            login = ()
        commands: list[tuple[Any, ...]] = [("RESET",)]
        if is_resp3(session):
            full = ("default", *login) if len(login) == 1 else login
            commands.append(("HELLO", 3, *(("AUTH", *full) if full else ())))
        elif login:
            commands.append(("AUTH", *login))
        if session.client_name:
            commands.append(("CLIENT", "SETNAME", session.client_name))
        if session.db:
            commands.append(("SELECT", session.db))
        return commands


def is_resp3(session: Any) -> bool:
    return str(session.protocol) == "3"


def greeted(session: Any, replies: list[Any]) -> None:
    """The login's replies have come; what redis-py keeps of a connection is as after a login."""
    if is_resp3(session):
        session.handshake_metadata = replies[1]
    forget = getattr(session, "_reset_himport_state", None)
    if forget is not None:
        forget()


def prepare_parser(session: Any) -> None:
    """As redis-py does at a login, but without one."""
    if is_resp3(session):
        from redis._parsers import _AsyncRESP2Parser, _AsyncRESP3Parser, _RESP2Parser, _RESP3Parser

        for old, new in ((_RESP2Parser, _RESP3Parser), (_AsyncRESP2Parser, _AsyncRESP3Parser)):
            if isinstance(session._parser, old) and not isinstance(session._parser, new):
                session.set_parser(new)
    session._parser.on_connect(session)


def dial_failed(login: Login, error: Exception) -> DialFailed:
    """Redis-py has tried as often as its ``retry`` says: the caller is told at once, as by redis-py."""
    return DialFailed(f"target={str(login.target)!r}: {type(error).__name__}: {error}", permanent=True)


class _Common:
    """What both drivers say of a session."""

    name = "redis"
    login: Login

    def key(self) -> str:
        return f"redis/1/{self.login.target}/{self.login.db}/{self.login.digest()}"

    def residence(self, session: Any) -> Residence:
        return Residence.tls if self.login.is_tls else Residence.moves


class RedisDriver(_Common, DriverBase):
    """Lends connected ``redis.Connection`` objects of ``connection_class``, made with ``connection_kwargs`` as by redis-py's pool.

    ``on_transfer``: "reset" sends RESET and the login, in one round trip, when a session comes from another process; "trust" nothing.
    DialFailed, with redis-py's error as its cause, ends a checkout at once: the connection has its own ``retry``.
    """

    def __init__(self, connection_class: Any = redis.Connection, on_transfer: str = "reset", **connection_kwargs: Any) -> None:
        self.login = Login(connection_class, connection_kwargs, on_transfer)
        self.minds_transfer = on_transfer == "reset"

    def _make(self) -> Any:
        session = self.login.make()
        if session.socket_timeout is None:
            session.socket_timeout = FOREVER  # without one it would be blocking in the kernel, for every process that has it
        return session

    def dial(self) -> Any:
        session = self._make()
        try:
            session.connect()
        except redis.RedisError as error:
            raise dial_failed(self.login, error) from error
        session.settled(session._sock)
        return session

    def fileno(self, session: Any) -> int:
        return session._sock.fileno() if session._sock is not None else -1

    def attach(self, fd: int, baggage: bytes) -> Any:
        session = self._make()
        sock = adopt(fd)
        try:
            sock.settimeout(session.socket_timeout)
            session._sock = sock
            prepare_parser(session)
        except BaseException:
            session._sock = None
            abandon(sock)
            raise
        session.settled(sock)
        return session

    def is_clean(self, session: Any) -> bool:
        return not (session.owed or session.leaves) and session._sock is session.own and not session._should_reconnect and not has_read_ahead(session._parser)

    def tidy(self, session: Any) -> None:
        """What the user left in the server's session is undone by a reset. What else is wrong stays so: the session is closed."""
        if session.can_be_reset() and session._sock is session.own and not has_read_ahead(session._parser):
            self.reset(session)

    def transferred(self, session: Any) -> None:
        self.reset(session)

    def reset(self, session: Any) -> None:
        """RESET and the login again, in one round trip."""
        own = session.redis_connect_func
        commands = self.login.commands(session) if own is None else [("RESET",)]
        session.send_packed_command(session.pack_commands(commands), check_health=False)
        replies = [session.read_response() for _ in commands]
        if own is None:
            greeted(session, replies)
        else:
            own(session)
        if session._sock is not session.own:
            raise redis.ConnectionError("reconnected meanwhile")
        session.settled(session._sock)

    def ping(self, session: Any) -> None:
        session.send_command("PING", check_health=False)
        session.read_response()

    def close(self, session: Any) -> None:
        sock = session._sock
        if sock is not None and sock is not session.own and session.own is not None:
            session.disconnect()  # the pool has no duplicate of this one: nobody else waits for its end
            wait_for_end(session._old)
        self.abort(session)

    def abort(self, session: Any) -> None:
        session.gone = True
        sock, session._sock = session._sock, None
        if sock is not None:
            abandon(sock)
        old, session._old = session._old, None
        if old is not None:
            abandon(old)
        session._parser.on_disconnect()


def has_read_ahead(parser: Any) -> bool:
    """Has redis-py taken more from the socket than it has given to anybody?"""
    reader = getattr(parser, "_reader", None)  # hiredis's
    if reader is not None:
        return bool(reader.has_data())
    buffer = parser._buffer
    return buffer is None or bool(buffer.unread_bytes())


class AsyncRedisDriver(_Common, AsyncDriverBase):
    """As RedisDriver, for ``redis.asyncio``: lends connections of ``connection_class``; on asyncio and uvloop."""

    def __init__(self, connection_class: Any = redis.asyncio.Connection, on_transfer: str = "reset", **connection_kwargs: Any) -> None:
        self.login = Login(connection_class, connection_kwargs, on_transfer)
        self.minds_transfer = on_transfer == "reset"

    async def dial(self) -> Any:
        session = self.login.make()
        try:
            await session.connect()
        except redis.RedisError as error:
            raise dial_failed(self.login, error) from error
        except BaseException:
            self.abort(session)
            raise
        session.settled(session._writer)
        return session

    def fileno(self, session: Any) -> int:
        return fileno(session._writer.transport) if session._writer is not None else -1

    async def attach(self, fd: int, baggage: bytes) -> Any:
        session = self.login.make()
        session.tap = adopt(fd, Tap)
        session._reader, session._writer = await session.tap.open()
        prepare_parser(session)
        session.settled(session._writer)
        return session

    def is_clean(self, session: Any) -> bool:
        writer = session._writer
        if writer is None or writer is not session.own or writer.transport.is_closing():
            return False
        session.tap.pause_reading()  # first: what comes after this line stays in the kernel
        if session.owed or session.leaves or session._should_reconnect:
            return False
        return not (has_read(session._reader) or has_parsed_part(session._parser) or writer.transport.get_write_buffer_size())

    def resume(self, session: Any) -> None:
        writer = session._writer
        if writer is not None and not writer.transport.is_closing():
            session.tap.resume_reading()

    async def tidy(self, session: Any) -> None:
        if session.can_be_reset() and session._writer is session.own and not has_parsed_part(session._parser):
            await self.reset(session)

    async def transferred(self, session: Any) -> None:
        await self.reset(session)

    async def reset(self, session: Any) -> None:
        own = session.redis_connect_func
        commands = self.login.commands(session) if own is None else [("RESET",)]
        await session.send_packed_command(session.pack_commands(commands), check_health=False)
        replies = [await session.read_response() for _ in commands]
        if own is None:
            greeted(session, replies)
        elif iscoroutinefunction(own):
            await own(session)
        else:
            own(session)
        if session._writer is not session.own:
            raise redis.ConnectionError("reconnected meanwhile")
        session.settled(session._writer)

    async def ping(self, session: Any) -> None:
        await session.send_command("PING", check_health=False)
        await session.read_response()

    async def close(self, session: Any) -> None:
        writer = session._writer
        if writer is not None and writer is not session.own and session.own is not None:
            session._shut_down()
            try:
                await until_ended(session._old)
            finally:
                self.abort(session)
            return
        self.abort(session)

    def abort(self, session: Any) -> None:
        session.gone = True
        writer, session._writer, session._reader = session._writer, None, None
        if writer is not None:
            drop(writer.transport)
        session.forget_old()
        session._parser.on_disconnect()


def has_read(reader: Any) -> bool:
    return bool(reader._buffer or reader.at_eof() or reader.exception())


def has_parsed_part(parser: Any) -> bool:
    reader = getattr(parser, "_reader", None)
    return bool(reader.has_data()) if reader is not None else bool(parser._buffer or parser._chunks)
