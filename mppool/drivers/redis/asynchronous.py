"""``AsyncRedisDriver``, for asyncio."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import Any

import redis
import redis.asyncio

from mppool.drivers.base import AsyncDriverBase
from mppool.drivers.dialer import adopt
from mppool.drivers.redis.connections import until_ended
from mppool.drivers.redis.login import greeted, prepare_parser
from mppool.drivers.redis.sessions import Sessions
from mppool.drivers.streams import Tap, drop, fileno

__all__ = ["AsyncRedisDriver"]


class AsyncRedisDriver(Sessions, AsyncDriverBase):
    """As RedisDriver, for ``redis.asyncio``: lends connections of ``connection_class``; on asyncio and uvloop."""

    plain = redis.asyncio.Connection

    async def dial(self) -> Any:
        session = self.login.make()
        try:
            await session.connect()
        except GeneratorExit:
            session._shut_down()
            self.abort(session)
            raise
        except BaseException as error:
            await self._end(session)
            if isinstance(error, redis.RedisError):
                raise self.failed(error) from error
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
        own, commands = session.redis_connect_func, self.login.commands(session)
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
            await self._end(session)
        else:
            self.abort(session)

    async def _end(self, session: Any) -> None:
        """One permit, one connection: it goes back when the server has seen the end, too."""
        session._shut_down()
        try:
            if session._old is not None:
                await until_ended(session._old)
        finally:
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
