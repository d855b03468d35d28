"""psycopg's AsyncConnection in event loops, on a real PostgreSQL: the same sessions, also between asyncio and blocking workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest

from mppool.drivers.psycopg import AsyncPsycopgDriver, PsycopgDriver
from mppool.integrations.psycopg import AsyncConnectionPool, ConnectFailed, ConnectionPool, PoolClosed, PoolTimeout
from tests.helpers.postgres import Database, Login, Postgres, needs_postgres
from tests.helpers.processes import BrokerProcess, fork
from tests.helpers.storm import Ask, Peak, Storm

uvloop = pytest.importorskip("uvloop")
pytestmark = [needs_postgres, pytest.mark.xdist_group("postgres")]


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[Database]:
    it = Login(postgres_server)
    yield it
    it.drop()


@pytest.fixture
def options(database: Database, socket_path: str, broker: BrokerProcess) -> dict[str, Any]:
    return {"conninfo": database.conninfo, "min_size": 0, "max_size": 1, "name": "pg", "broker": socket_path, "timeout": 20.0}


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine in a new loop of one kind."""

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        loop = uvloop.new_event_loop() if request.param == "uvloop" else asyncio.new_event_loop()
        try:
            return loop.run_until_complete(work)
        finally:
            loop.close()

    return run


async def one(conn: psycopg.AsyncConnection[Any], sql: str, *parameters: Any) -> Any:
    row = await (await conn.execute(sql, parameters or None)).fetchone()
    return row[0] if row is not None else None


def test_a_session_serves_loops_and_threads(options: dict[str, Any], database: Database, run: Any) -> None:
    """Dialed by a blocking worker, used in a loop of another process, with what it may not see reset, and back: one login."""
    pool = ConnectionPool(**options)
    with pool.connection() as conn:
        backend = conn.info.backend_pid
        conn.execute("select set_config('app.marker', 'theirs', false)")

    async def work() -> list[Any]:
        async with AsyncConnectionPool(**options) as pool:
            seen = []
            for _ in range(5):
                async with pool.connection() as conn:
                    seen.append([conn.info.backend_pid, await one(conn, "select coalesce(current_setting('app.marker', true), '')")])
            return seen

    with fork(lambda _: run(work())) as (child,):
        assert child.result() == [[backend, ""]] * 5
    with pool.connection() as conn:
        assert conn.info.backend_pid == backend
    pool.close()
    assert database.logins() == 1


def test_a_block_commits_or_rolls_back(options: dict[str, Any], database: Database, run: Any) -> None:
    """As psycopg_pool: commit at the end, rollback after an exception, and a cancelled task costs its session only."""

    async def work() -> None:
        async with AsyncConnectionPool(**options) as pool:
            async with pool.connection() as conn:
                await conn.execute("create table things (n int)")
                await conn.execute("insert into things values (1)")

            async def fail() -> None:
                async with pool.connection() as conn:
                    await conn.execute("insert into things values (2)")
                    raise KeyError("mine")

            with pytest.raises(KeyError):
                await fail()
            conn = await pool.getconn()
            await conn.execute("insert into things values (3)")
            await pool.putconn(conn)
            async with pool.connection() as conn:
                assert await one(conn, "select array_agg(n) from things") == [1]

    run(work())
    assert database.ask("select n from things") == [(1,)]


def test_timeouts_closed_pools_and_refusals(options: dict[str, Any], run: Any) -> None:
    """The same exceptions as the blocking pool's, all psycopg.OperationalError."""

    async def work() -> None:
        pool = AsyncConnectionPool(**options)
        async with pool, pool.connection():
            with pytest.raises(PoolTimeout):
                await pool.getconn(timeout=0.1)
        with pytest.raises(PoolClosed):
            await pool.getconn()
        wrong = AsyncConnectionPool(**{**options, "name": "wrong", "kwargs": {"password": "wrong"}})
        with pytest.raises(ConnectFailed):
            await wrong.getconn()
        await wrong.close()

    run(work())


def test_cancelling_a_task_cancels_its_statement(options: dict[str, Any], database: Database, run: Any) -> None:
    """psycopg cancels what runs when a task is cancelled; on an adopted session, too. The permit is there again."""
    first = ConnectionPool(**options)
    with first.connection():
        pass

    async def work() -> Any:
        async with AsyncConnectionPool(**options, kwargs={"autocommit": True}) as pool:

            async def sleep() -> None:
                async with pool.connection() as conn:
                    await conn.execute("select pg_sleep(60)")

            task = asyncio.create_task(sleep())
            while not any(row["state"] == "active" for row in database.backends()):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with pool.connection() as conn:
                return await one(conn, "select 1")

    with fork(lambda _: run(work())) as (child,):
        assert child.result() == 1
    first.close()
    assert not any(row["state"] == "active" for row in database.backends())


def test_cancel_safe_on_an_adopted_session(database: Database, run: Any) -> None:
    """``await conn.cancel_safe()`` goes to the real server."""
    dialer = PsycopgDriver(database.conninfo)
    dialed = dialer.dial()

    async def work() -> None:
        driver = AsyncPsycopgDriver(database.conninfo)
        conn = driver.attach(dialed.fileno(), dialer.detach(dialed))
        await conn.set_autocommit(True)
        task = asyncio.create_task(conn.execute("select pg_sleep(60)"))
        await asyncio.sleep(0.2)
        await conn.cancel_safe()
        with pytest.raises(psycopg.errors.QueryCanceled):
            await task
        assert await one(conn, "select 1") == 1
        driver.abort(conn)

    run(work())
    dialer.close(dialed)


def test_dialing_does_not_stop_the_loop(database: Database, run: Any) -> None:
    """While a server lets a login wait, other tasks go on."""

    async def work() -> int:
        port = silent.getsockname()[1]
        driver = AsyncPsycopgDriver(f"host=127.0.0.1 port={port} user=x dbname=x connect_timeout=30")
        dialing = asyncio.create_task(driver.dial())
        turns = 0
        for _ in range(20):
            await asyncio.sleep(0.005)
            turns += 1
        assert not dialing.done()
        dialing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialing
        return turns

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert run(work()) == 20


def test_hooks_may_be_coroutines(options: dict[str, Any], run: Any) -> None:
    """configure, reset and check are awaited."""
    calls: list[str] = []

    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        calls.append("configure")
        await conn.set_autocommit(True)

    async def reset(conn: psycopg.AsyncConnection[Any]) -> None:
        calls.append("reset")
        await conn.execute("select 1")

    async def check(conn: psycopg.AsyncConnection[Any]) -> None:
        calls.append("check")
        await AsyncConnectionPool.check_connection(conn)

    async def work() -> None:
        async with AsyncConnectionPool(**options, configure=configure, reset=reset, check=check) as pool:
            for _ in range(2):
                async with pool.connection() as conn:
                    assert conn.autocommit

    run(work())
    assert calls == ["configure", "reset", "check", "reset"]


@pytest.mark.parametrize("hook", ["configure", "check", "reset"])
def test_what_a_function_closes_is_not_lent(options: dict[str, Any], run: Any, hook: str) -> None:
    """close() in configure, check or reset ends the session for good; the caller gets another."""
    closed: list[int] = []

    async def close_the_first(conn: psycopg.AsyncConnection[Any]) -> None:
        if not closed:
            closed.append(conn.info.backend_pid)
            await conn.close()

    async def work() -> int:
        async with AsyncConnectionPool(**{**options, hook: close_the_first}) as pool:
            for _ in range(3):
                async with pool.connection() as conn:
                    backend = int(await one(conn, "select pg_backend_pid()"))
            return backend

    assert run(work()) not in closed
    assert closed


@pytest.mark.storm
def test_workers_of_both_kinds_share_the_cap(options: dict[str, Any], database: Database, request: pytest.FixtureRequest) -> None:
    """Loops and blocking workers on three sessions, some of them killed: never more backends, nothing foreign seen."""
    options["max_size"] = 3

    def begin() -> Ask:
        me = str(os.getpid())
        marker = "select coalesce(current_setting('app.marker', true), '')"
        if os.getpid() % 2:
            pool = ConnectionPool(**options)

            def ask(nonce: str) -> None:
                with pool.connection() as conn:
                    row = conn.execute(marker).fetchone()
                    assert row is not None
                    assert row[0] in ("", me)
                    conn.execute("select set_config('app.marker', %s, false)", (me,))
                    assert conn.execute("select %s::text", (nonce,)).fetchone() == (nonce,)

            return ask
        loop = asyncio.new_event_loop()
        shared = AsyncConnectionPool(**options)

        async def answer(nonce: str) -> None:
            async with shared.connection() as conn:
                assert await one(conn, marker) in ("", me)
                await conn.execute("select set_config('app.marker', %s, false)", (me,))
                assert await one(conn, "select %s::text", nonce) == nonce

        async def three(nonce: str) -> None:
            await asyncio.gather(*(answer(f"{nonce}-{n}") for n in range(3)))

        return lambda nonce: loop.run_until_complete(three(nonce))

    goal = int(25 * request.config.getoption("--storm-seconds"))
    with Peak(database.count) as peak, Storm(begin, 6) as storm:
        while storm.requests < goal:
            storm.run(0.5, kill_every=0.2)
        storm.end()
    print(f"\n{storm.requests} requests, {storm.kills} kills, {database.logins()} logins, peak {peak.most}")
    assert storm.failures == []
    assert peak.most <= 3


def test_a_cancelled_check_gives_everything_back(options: dict[str, Any], run: Any) -> None:
    """check() that is cancelled while it asks a connection keeps none of them; the one in question is closed."""

    async def work() -> int:
        asked, never = asyncio.Event(), asyncio.Event()

        async def slow(conn: Any) -> None:
            asked.set()
            await never.wait()

        async with AsyncConnectionPool(**{**options, "max_size": 2}) as pool:
            async with pool.connection() as first, pool.connection() as second:
                backends = {first.info.backend_pid, second.info.backend_pid}
            pool.check_connection = slow  # type: ignore[method-assign]
            checking = asyncio.ensure_future(pool.check())
            await asked.wait()
            checking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await checking
            async with pool.connection(timeout=5) as first, pool.connection(timeout=5) as second:
                return len(backends & {first.info.backend_pid, second.info.backend_pid})

    assert run(work()) == 1
