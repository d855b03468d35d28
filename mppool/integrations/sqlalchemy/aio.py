"""``AsyncSharedPool``: the same for ``create_async_engine``. SQLAlchemy runs its pools in greenlets, in which waiting is a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from mppool.aio import AsyncPool
from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.integrations.sqlalchemy.sessions import LOGIN, Record, Session, SessionDriver, asking, said_at_once
from mppool.integrations.sqlalchemy.shared import SharedPool
from mppool.states import Residence

__all__ = ["AsyncSharedPool"]


class AsyncSessionDriver(SessionDriver, AsyncDriverBase):
    """The DBAPI connection is SQLAlchemy's adapter here; the client has to do with what is inside of it."""

    def inside(self, connection: Any) -> Any:
        return self.owner._dialect.get_driver_connection(connection)

    async def outside(self, raw: Any) -> Any:
        """An adapter for a connection that is there already."""

        async def there(*_: Any, **__: Any) -> Any:
            return raw

        dbapi: Any = self.owner._dialect.loaded_dbapi  # type: ignore[union-attr]
        return await greenlet_spawn(dbapi.connect, async_creator_fn=there)

    def connect(self, client: DriverBase, dbapi_connect: Callable[..., Any]) -> Any:
        async def dial(*_: Any, **__: Any) -> Any:
            return await client.dial()

        return dbapi_connect(async_creator_fn=dial)

    async def dial(self) -> Session:
        session, dial = self.beginning()
        with said_at_once(), asking(dial):
            connection = await greenlet_spawn(self.owner.create, session.record)
        return self.made(session, dial, connection)

    def fileno(self, session: Session) -> int:
        raw = self.inside(session.connection)
        sock = getattr(getattr(raw, "_transport", None), "get_extra_info", lambda _: None)("socket")  # asyncpg's
        return session.client.fileno(raw if sock is None else sock)

    def residence(self, session: Session) -> Residence:
        return session.client.residence(self.inside(session.connection))

    def detach(self, session: Session) -> bytes:
        return LOGIN.pack(session.login) + session.client.detach(self.inside(session.connection))

    def farewell(self, session: Session) -> bytes:
        return session.client.farewell(self.inside(session.connection))

    async def attach(self, fd: int, baggage: bytes) -> Session:
        [login] = LOGIN.unpack_from(baggage)
        client = self.adopter()
        return self.adopted(client, await self.outside(client.attach(fd, baggage[LOGIN.size :])), login)

    def is_clean(self, session: Session) -> bool:
        if session.loose is not None:
            return False
        if session.client is not self.resident:
            return session.client.is_clean(self.inside(session.connection))
        tidied, session.tidied = session.tidied or session.plain, False
        return tidied

    async def tidy(self, session: Session) -> None:
        session.tidied = True
        if session.client is not self.resident:
            await session.client.tidy(self.inside(session.connection))
            if session.record is not None:
                await self.renew(session, session.record)

    async def transferred(self, session: Session) -> None:
        record = session.record
        if self.on_transfer != "trust" and record is not None and record.dbapi_connection is not None:
            await self.renew(session, record)
        await session.client.transferred(self.inside(session.connection))

    async def renew(self, session: Session, record: Record) -> None:
        client: Any = session.client
        raw = self.inside(session.connection)
        self.gone(session)
        session.connection, session.settled = await self.outside(client.renewed(raw)), False
        session.record = Record(self.owner, session)
        self.known[id(session.connection)] = session

    async def reset(self, session: Session) -> None:
        await session.client.reset(self.inside(session.connection))

    async def ping(self, session: Session) -> None:
        await session.client.ping(self.inside(session.connection))

    async def close(self, session: Session) -> None:
        connection = session.at_hand()
        self.gone(session)
        if connection is None:
            return
        if session.client is self.resident:
            await greenlet_spawn(self.owner.end, connection, terminate=session.terminate)
        else:
            await session.client.close(self.inside(connection))

    def abort(self, session: Session) -> None:
        connection = session.at_hand()
        self.gone(session)
        if connection is not None:
            session.client.abort(self.inside(connection))


class AsyncSharedPool(SharedPool):
    """SharedPool for asynchronous engines: ``create_async_engine(url, poolclass=AsyncSharedPool, pool_size=20)``.

    With psycopg sessions move between processes, also to and from synchronous engines with the same ``pool_name``; with any other driver they stay
    where they were made, and are counted. Everything else is as SharedPool says. One event loop at a time, as with SQLAlchemy's own
    pool: ``await engine.dispose()`` before the loop ends. A connection that is forgotten, not closed, is closed by the garbage collector.

    ``drain`` and ``resize`` wait, so they are called as ``await greenlet_spawn(engine.pool.drain)``.
    """

    _is_asyncio = True
    _pool_class = AsyncPool
    _driver_class = AsyncSessionDriver

    def _take(self, shared: Any) -> Session:
        return await_only(shared.getconn())  # type: ignore[no-any-return]

    def _give(self, session: Session, *, discard: bool) -> None:
        if in_greenlet():
            await_only(session.pool.putconn(session, discard=discard))
        else:
            session.pool._drop(session)  # the garbage collector's: nothing can be awaited

    def _detached(self, record: Record, session: Session) -> None:
        """By the garbage collector, as SQLAlchemy does with what was forgotten: it ends here. By the user: it counts until it is closed."""
        record.session = session.record = None
        if not in_greenlet():
            self._give(session, discard=True)

    def _let_go(self, shared: Any, drain: bool) -> None:
        if not in_greenlet():
            shared._close()
            return
        if drain:
            await_only(shared.drain())
        await_only(shared.close())

    def drain(self) -> None:
        await_only(self.shared().drain())

    def resize(self, max_size: int) -> None:
        await_only(self.shared().resize(max_size))
