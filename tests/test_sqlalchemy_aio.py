"""Asynchronous engines: create_async_engine(..., poolclass=AsyncSharedPool), over psycopg (moving) and asyncpg (resident)."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from mppool.integrations.sqlalchemy import AsyncSharedPool, SharedPool
from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import BrokerProcess, eventually, fork

# asyncpg leaves what it was opening when a task gave up to the garbage collector, which comes by in some later test.
pytestmark = [
    needs_postgres,
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

WHO = text("select pg_backend_pid()")
DRIVERS = [
    "psycopg",
    pytest.param("asyncpg", marks=pytest.mark.skipif(importlib.util.find_spec("asyncpg") is None, reason="asyncpg is not installed")),
]


class Site:
    """Runs coroutine functions with an engine of their own, in a loop of their own."""

    def __init__(self, driver: str, database: Database, path: str) -> None:
        self.database = database
        self.url = f"postgresql+{driver}://{database.user}:{database.password}@127.0.0.1:{database.port}/{database.name}"
        self.path = path

    def engine(self, **options: Any) -> AsyncEngine:
        return create_async_engine(self.url, poolclass=AsyncSharedPool, **{"pool_size": 1, "pool_timeout": 10, "pool_broker": self.path, **options})

    def run(self, work: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> Any:
        async def main() -> Any:
            engine = self.engine(**options)
            try:
                return await work(engine)
            finally:
                await engine.dispose()

        return asyncio.run(main())


@pytest.fixture(params=DRIVERS)
def site(request: pytest.FixtureRequest, database: Database, broker: BrokerProcess) -> Site:
    return Site(request.param, database, broker.path)


@pytest.fixture
def moving(database: Database, broker: BrokerProcess) -> Site:
    return Site("psycopg", database, broker.path)


async def pid(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(WHO)).scalar_one())


def test_tasks_share_what_there_is(site: Site) -> None:
    """Fifty tasks over two sessions: everybody has its own answer, never a third backend, transactions and errors as ever."""

    async def work(engine: AsyncEngine) -> int:
        async def ask(n: int) -> None:
            async with engine.begin() as connection:
                assert (await connection.execute(text("select cast(:n as text)"), {"n": str(n)})).scalar_one() == str(n)
            if n % 10 == 0:
                with pytest.raises(exc.DBAPIError):
                    async with engine.connect() as connection:
                        await connection.execute(text("select nothing from nowhere"))

        await asyncio.gather(*(ask(n) for n in range(50)))
        return site.database.count()

    assert site.run(work, pool_size=2) == 2
    assert site.database.logins() == 2


def test_a_checkout_times_out(site: Site) -> None:
    """exc.TimeoutError, with its code."""

    async def work(engine: AsyncEngine) -> str | None:
        async with engine.connect():
            with pytest.raises(exc.TimeoutError) as raised:
                await pid(engine)
        await pid(engine)
        return raised.value.code

    assert site.run(work, pool_timeout=0.2) == "3o7r"


def test_sessions_move_between_processes_and_loops(moving: Site) -> None:
    """One backend in two processes, three loops, and a synchronous engine of the same name: reset in between, "connect" fired in each."""

    async def work(engine: AsyncEngine) -> list[Any]:
        said: list[str] = []
        event.listen(engine.sync_engine, "connect", lambda *_: said.append("connect"))
        async with engine.connect() as connection:
            seen = (await connection.execute(text("select coalesce(current_setting('app.mine', true), '')"))).scalar_one()
            await connection.execute(text("set app.mine = 'left'"))
            await connection.commit()
        return [await pid(engine), seen, said]

    engine = create_engine(moving.url, poolclass=SharedPool, pool_size=1, pool_name="both", pool_broker=moving.path)
    with engine.connect() as plain:
        first = plain.scalar(WHO)
    for _ in range(2):
        assert moving.run(work, pool_name="both") == [first, "", ["connect"]]
        with fork(lambda _: moving.run(work, pool_name="both")) as [child]:
            assert child.result() == [first, "", ["connect"]]
    with engine.connect() as plain:
        assert plain.scalar(WHO) == first
    engine.dispose()
    assert moving.database.logins() == 1


def test_a_session_that_comes_back_is_a_new_connection(moving: Site) -> None:
    """In one loop, while another process has it in between."""

    async def work(engine: AsyncEngine) -> tuple[int, list[str]]:
        said: list[str] = []
        event.listen(engine.sync_engine, "connect", lambda *_: said.append("connect"))
        event.listen(engine.sync_engine, "close", lambda *_: said.append("close"))
        before = await pid(engine)
        with fork(lambda _: moving.run(pid)) as [child]:
            assert child.result() == before
        assert await pid(engine) == before
        return before, said

    assert moving.run(work)[1][:3] == ["connect", "close", "connect"]


def test_pre_ping_invalidate_and_a_dead_server_side(site: Site) -> None:
    """``pool_pre_ping`` and ``invalidate`` replace a connection; one that was ended from outside is not seen by anybody."""

    async def work(engine: AsyncEngine) -> list[int]:
        pids = [await pid(engine)]
        async with engine.connect() as connection:
            await connection.invalidate()
            pids.append(int((await connection.execute(WHO)).scalar_one()))
        site.database.ask("select pg_terminate_backend(%s)", pids[-1])
        eventually(lambda: site.database.count() == 0)
        pids.append(await pid(engine))
        return pids

    assert len(set(site.run(work, pool_pre_ping=True))) == 3


def test_a_cancelled_task_leaks_nothing(site: Site) -> None:
    """In the middle of a query: the session is closed, its place is free, nobody reads the late answer."""

    async def work(engine: AsyncEngine) -> int:
        async def slow() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("select pg_sleep(10)"))

        for _ in range(3):
            task = asyncio.create_task(slow())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with engine.connect() as connection:
            return int((await connection.execute(text("select 7"))).scalar_one())

    assert site.run(work) == 7


@pytest.mark.filterwarnings("ignore:The garbage collector is trying:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed connection:ResourceWarning")
def test_a_forgotten_connection_is_closed(site: Site) -> None:
    """As SQLAlchemy does with asynchronous ones: the garbage collector closes it, and its place is free."""

    async def work(engine: AsyncEngine) -> int:
        connection = await engine.connect()
        await connection.execute(WHO)
        del connection
        gc.collect()
        await asyncio.sleep(0)
        return await pid(engine)

    assert site.run(work) > 0


def test_orm_sessions_work(moving: Site) -> None:
    """AsyncSession: begin, flush, rollback."""

    async def work(engine: AsyncEngine) -> int:
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(text("create table t (x int)"))
        async with AsyncSession(engine) as session:
            await session.execute(text("insert into t values (1)"))
            await session.rollback()
            return int((await session.execute(text("select count(*) from t"))).scalar_one())

    assert moving.run(work) == 0


def test_a_wrong_password_is_said_at_once(moving: Site) -> None:
    """exc.OperationalError with psycopg's reason."""
    moving.url = moving.url.replace(moving.database.password, "wrong")
    with pytest.raises(exc.OperationalError, match="password"):
        moving.run(pid, pool_name="wrong", pool_timeout=30)
