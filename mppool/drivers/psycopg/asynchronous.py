"""``AsyncPsycopgDriver``, for asyncio."""

from __future__ import annotations

from inspect import isawaitable
from typing import Any

import psycopg

from mppool.drivers.base import AsyncDriverBase
from mppool.drivers.psycopg.connections import CANCELING, cancel_async, end
from mppool.drivers.psycopg.sessions import Sessions, command

__all__ = ["AsyncPsycopgDriver"]


class AsyncPsycopgDriver(Sessions, AsyncDriverBase):
    """Lends ``psycopg.AsyncConnection`` objects; as PsycopgDriver. Nothing has to stop reading: psycopg watches a connection while it waits for it only."""

    plain = psycopg.AsyncConnection

    async def dial(self) -> Any:
        """Raises DialFailed, with psycopg's error as its cause."""
        conninfo, kwargs = self.arguments()
        try:
            conn = await self.cls.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise self.failed(error) from error
        try:
            self.note(conn)
            await self.set_up(conn)
        except BaseException:
            end(conn)
            raise
        return conn

    async def tidy(self, session: Any) -> None:
        if self.check_tidy(session):
            await session._do(session._rollback_gen())
        if self.must_reset(session):
            await self.reset(session)

    async def transferred(self, session: Any) -> None:
        if self.begins_anew(session):
            await self.reset(session)
        else:
            self.forget(session)
            if self.must_deallocate(session):
                await session._do(command(session.pgconn, b"DEALLOCATE ALL"))
        session._adopted = False

    async def set_up(self, session: Any) -> None:
        """Call the user's ``configure``. Raises what it raises, ProgrammingError if it leaves a transaction open."""
        if self.configure is not None:
            said = self.configure(session)
            if isawaitable(said):
                await said
            self.was_set_up(session)

    async def reset(self, session: Any) -> None:
        await session._do(command(session.pgconn, b"DISCARD ALL"))
        self.was_discarded(session)
        await self.set_up(session)

    async def ping(self, session: Any) -> None:
        await session._do(command(session.pgconn, b""))

    async def close(self, session: Any) -> None:
        if self.must_cancel(session):
            try:
                await cancel_async(session._mppool, CANCELING)
            except psycopg.Error:
                pass  # it finds out by itself, later
        end(session)
