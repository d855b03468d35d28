"""``RedisDriver``, which blocks."""

from __future__ import annotations

from typing import Any

import redis

from mppool.drivers.base import DriverBase
from mppool.drivers.dialer import FOREVER, abandon, adopt
from mppool.drivers.redis.connections import wait_for_end
from mppool.drivers.redis.login import greeted, prepare_parser
from mppool.drivers.redis.sessions import Sessions

__all__ = ["RedisDriver"]


class RedisDriver(Sessions, DriverBase):
    """Lends connected ``redis.Connection`` objects of ``connection_class``, made with ``connection_kwargs`` as by redis-py's pool.

    ``on_transfer``: "reset" sends RESET and the login, in one round trip, when a session comes from another process; "trust" nothing.
    DialFailed, with redis-py's error as its cause, ends a checkout at once: the connection has its own ``retry``.
    """

    plain = redis.Connection

    def _make(self) -> Any:
        session = self.login.make()
        if session.socket_timeout is None:
            session.socket_timeout = FOREVER  # without one it would be blocking in the kernel, for every process that has it
        return session

    def dial(self) -> Any:
        session = self._make()
        try:
            session.connect()
        except BaseException as error:
            self.abort(session)
            if isinstance(error, redis.RedisError):
                raise self.failed(error) from error
            raise
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
        own, commands = session.redis_connect_func, self.login.commands(session)
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
