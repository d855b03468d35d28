"""What psycopg_pool documents of its ConnectionPool, tried one by one on mppool.integrations.psycopg.ConnectionPool."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

import mppool
from mppool.integrations.psycopg import AsyncConnectionPool, ConnectFailed, ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from mppool.table import H_WAITERS
from tests.helpers.postgres import Database, Login, Postgres, needs_postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork

psycopg_pool = pytest.importorskip("psycopg_pool")
pytestmark = [needs_postgres, pytest.mark.xdist_group("postgres")]

Make = Callable[..., ConnectionPool]


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[Database]:
    it = Login(postgres_server)
    yield it
    it.drop()


@pytest.fixture
def make(database: Database, socket_path: str, broker: BrokerProcess) -> Iterator[Make]:
    pools: list[ConnectionPool] = []

    def make(**options: Any) -> ConnectionPool:
        given = {"conninfo": database.conninfo, "min_size": 0, "max_size": 1, "broker": socket_path, "name": f"pool-{len(pools)}", "timeout": 10.0, **options}
        pools.append(ConnectionPool(**given))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def one(conn: Any, sql: str, *parameters: Any) -> Any:
    return conn.execute(sql, parameters or None).fetchone()[0]


def pid_of(conn: Any) -> int:
    return int(one(conn, "select pg_backend_pid()"))


def test_the_arguments_are_psycopg_pools() -> None:
    """Every argument of theirs is one of ours, with the same default and as keyword-only."""
    for method in ("__init__", "connection", "getconn", "putconn", "open", "close", "wait", "resize", "check", "drain", "get_stats", "pop_stats"):
        theirs = inspect.signature(getattr(psycopg_pool.ConnectionPool, method)).parameters
        ours = inspect.signature(getattr(ConnectionPool, method)).parameters
        assert list(theirs) == [name for name in ours if name in theirs], method
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind, (method, name)
            if name != "connection_class":  # None is psycopg's own here: the docstring lists that
                assert ours[name].default == parameter.default, (method, name)


def test_annotations_say_what_is_lent() -> None:
    """``ConnectionPool[Connection[DictRow]]``, as the documentation writes it."""
    pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool[psycopg.Connection[DictRow]](open=False, name="typed")
    assert not pool.closed
    assert AsyncConnectionPool[psycopg.AsyncConnection[DictRow]] is not None


def test_a_block_commits_or_rolls_back(make: Make, database: Database) -> None:
    """``connection()``: commit at the end of the block, rollback after an exception; the connection is returned either way, and goes on."""
    pool = make()
    with pool.connection() as conn:
        backend = pid_of(conn)
        conn.execute("create table things (n int)")
        conn.execute("insert into things values (1)")

    def fail() -> None:
        with pool.connection() as conn:
            conn.execute("insert into things values (2)")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert database.ask("select n from things") == [(1,)]
    with pool.connection() as conn:
        assert pid_of(conn) == backend, "an exception of the user's costs no connection"


def test_a_failed_statement_costs_no_connection(make: Make, database: Database) -> None:
    """A database error in the block: rolled back, and the same session serves the next."""
    pool = make()

    def fail() -> None:
        with pool.connection() as conn:
            conn.execute("select 1/0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        fail()
    with pool.connection() as conn:
        assert one(conn, "select 1") == 1
    assert database.logins() == 1


def test_transaction_blocks_within_a_block(make: Make, database: Database) -> None:
    """``conn.transaction()`` within the block is one's own affair; with autocommit statements stand at once."""
    pool = make(kwargs={"autocommit": True})
    with pool.connection() as conn:
        conn.execute("create table things (n int)")
        with conn.transaction():
            conn.execute("insert into things values (1)")
            with conn.transaction(force_rollback=True):
                conn.execute("insert into things values (2)")
    assert database.ask("select n from things") == [(1,)]


def test_putconn_rolls_back(make: Make, database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """getconn() and putconn(): what was not committed is rolled back, with a warning, and the connection goes on."""
    pool = make()
    conn = pool.getconn()
    backend = pid_of(conn)
    conn.execute("create table things (n int)")
    with caplog.at_level(logging.WARNING, "mppool"):
        pool.putconn(conn)
    assert "rolling back returned connection" in caplog.text
    assert database.ask("select to_regclass('things')::text") == [(None,)]
    conn = pool.getconn()
    assert pid_of(conn) == backend
    with pytest.raises(psycopg.errors.UndefinedTable):
        conn.execute("select * from things")
    pool.putconn(conn)  # INERROR
    with pool.connection() as conn:
        assert pid_of(conn) == backend


def test_a_closed_connection_is_replaced(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """close() in the block ends the session; it is discarded with a warning, and the next user gets another."""
    pool = make()
    with caplog.at_level(logging.WARNING, "mppool"), pool.connection() as conn:
        backend = pid_of(conn)
        conn.close()
    assert "discarding closed connection" in caplog.text
    with pool.connection() as conn:
        assert pid_of(conn) != backend
    assert pool.get_stats()["returns_bad"] == 1


def test_after_its_return_a_connection_is_as_a_closed_one(make: Make) -> None:
    """Also for a cursor on the server that is read on: what it would read may be the answer to another worker. Lent again, it works again."""
    pool = make(kwargs={"autocommit": True})
    with pool.connection() as conn:
        backend = pid_of(conn)
        cursor = conn.cursor("held", withhold=True)
        cursor.execute("select generate_series(1, 10)")
        assert cursor.fetchone() == (1,)
    for use in (cursor.fetchone, lambda: one(conn, "select 1"), conn.rollback):
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            use()
    assert conn.closed
    with pool.connection() as conn:
        assert pid_of(conn) == backend
        assert cursor.fetchone() == (2,)
        cursor.close()


def test_close_returns(make: Make) -> None:
    """With close_returns=True, close() gives the connection back; repeated, and after the return, it does nothing."""
    pool = make(close_returns=True)
    conn = pool.getconn()
    backend = pid_of(conn)
    conn.close()
    conn.close()
    with pool.connection() as again:
        assert pid_of(again) == backend


def test_foreign_connections_are_refused(make: Make, database: Database) -> None:
    """putconn() of a connection of another pool, of none, or a second time: ValueError."""
    pool, other = make(), make()
    conn = other.getconn()
    with pytest.raises(ValueError, match="pool-1"):
        pool.putconn(conn)
    other.putconn(conn)
    with pytest.raises(ValueError, match="can't return"):
        other.putconn(conn)
    with psycopg.connect(database.conninfo) as plain, pytest.raises(ValueError, match="can't return"):
        pool.putconn(plain)


def test_timeouts(make: Make) -> None:
    """``timeout`` of the pool, and of a call: PoolTimeout, which is psycopg_pool's, psycopg's OperationalError, ours and TimeoutError."""
    pool = make(timeout=0.1)
    with pool.connection():
        began = time.monotonic()
        with pytest.raises(psycopg_pool.PoolTimeout):
            pool.getconn()
        with pytest.raises(PoolTimeout) as caught, pool.connection(timeout=0.5):
            pass
        assert time.monotonic() - began >= 0.6
        for kind in (psycopg.OperationalError, mppool.PoolTimeout, TimeoutError):
            assert isinstance(caught.value, kind)
    with pool.connection() as conn:
        assert one(conn, "select 1") == 1


def test_max_waiting(make: Make) -> None:
    """So many may wait; the next one gets TooManyRequests at once."""
    pool = make(max_waiting=1)
    with pool.connection():
        waiter = threading.Thread(target=lambda: pool.putconn(pool.getconn()))
        waiter.start()
        eventually(lambda: pool._pool._worker is not None and pool._pool._worker.table.halves[H_WAITERS] == 1)  # it is in the broker's queue
        with pytest.raises(TooManyRequests) as caught:
            pool.getconn()
        assert isinstance(caught.value, psycopg_pool.TooManyRequests)
    waiter.join()


def test_reset_is_called_at_each_return(make: Make) -> None:
    """``reset`` gets the connection after use; what it raises, or a transaction it leaves, costs the connection, not the user."""
    seen: list[str] = []

    def reset(conn: psycopg.Connection[Any]) -> None:
        what = one(conn, "select current_setting('app.do', true)")
        seen.append(what)
        if what == "raise":
            raise RuntimeError("not fit")
        if what != "leave open":
            conn.rollback()

    pool = make(reset=reset)
    backends = []
    for what in ("fine", "fine", "raise", "fine", "leave open", "fine"):
        with pool.connection() as conn:
            backends.append(pid_of(conn))
            conn.execute("select set_config('app.do', %s, false)", (what,))
    assert seen == ["fine", "fine", "raise", "fine", "leave open", "fine"]
    first, second, third, fourth, fifth, sixth = backends
    assert first == second == third != fourth == fifth != sixth


def test_configure_is_called_with_new_connections(make: Make) -> None:
    """``configure`` sees each new connection once here; if it leaves a transaction open, or raises, the connection is not used."""
    calls: list[int] = []

    def configure(conn: psycopg.Connection[Any]) -> None:
        calls.append(pid_of(conn))
        if len(calls) > 1:
            conn.commit()

    pool = make(configure=configure, reconnect_timeout=30)
    for _ in range(3):
        with pool.connection() as conn:
            backend = pid_of(conn)
    assert calls[-1] == backend
    assert len(calls) == 2  # the first was left in a transaction


def test_check_before_lending(make: Make, database: Database) -> None:
    """check=ConnectionPool.check_connection is asked before each lease; what fails it is closed, and the caller gets another."""
    asked: list[int] = []

    def check(conn: psycopg.Connection[Any]) -> None:
        asked.append(conn.info.backend_pid)
        ConnectionPool.check_connection(conn)
        if len(asked) == 1:
            raise psycopg.OperationalError("not fit")

    pool = make(check=check)
    backends = []
    for _ in range(3):
        with pool.connection() as conn:
            backends.append(pid_of(conn))
    assert backends[0] != backends[1] == backends[2]
    assert asked == [backends[0], backends[1]]  # not those that are just made
    assert pool.get_stats()["connections_lost"] == 1


@pytest.mark.parametrize("hook", ["configure", "check", "reset"])
@pytest.mark.parametrize("returns", [False, True], ids=["", "close_returns"])
def test_what_a_function_closes_is_not_lent(make: Make, database: Database, hook: str, returns: bool) -> None:
    """close() in configure, check or reset ends the session for good; the caller gets another."""
    closed: list[int] = []

    def close_the_first(conn: psycopg.Connection[Any]) -> None:
        if not closed:
            closed.append(conn.info.backend_pid)
            conn.close()

    pool = make(close_returns=returns, **{hook: close_the_first})
    for _ in range(3):
        with pool.connection() as conn:
            backend = pid_of(conn)
            assert backend not in closed or hook != "configure"
    assert closed
    assert backend not in closed
    eventually(lambda: [row["pid"] for row in database.backends()] == [backend])


def test_closing_in_check_what_another_process_used(make: Make, database: Database) -> None:
    """Also a session that was never lent here before."""
    seen: list[int] = []

    def check(conn: psycopg.Connection[Any]) -> None:
        seen.append(conn.info.backend_pid)
        conn.close()

    plain, pool = make(name="one"), make(name="one", check=check)

    def use(child: Child) -> None:
        with plain.connection() as conn:
            backend = pid_of(conn)
        child.tell(backend)
        child.hear()

    with fork(use) as (child,):
        foreign = child.hear()
        with pool.connection() as conn:
            assert pid_of(conn) != foreign
    assert seen == [foreign]
    assert database.logins() == 2


def test_check_connection(make: Make) -> None:
    """The static method: nothing for one that works, whatever its autocommit, OperationalError for one that does not."""
    pool = make(max_size=2)
    with pool.connection() as conn, pool.connection() as killer:
        for autocommit in (False, True):
            conn.autocommit = autocommit
            ConnectionPool.check_connection(conn)
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert conn.autocommit is autocommit
        backend = pid_of(conn)
        killer.execute("select pg_terminate_backend(%s, 5000)", (backend,))
        with pytest.raises(psycopg.OperationalError):
            ConnectionPool.check_connection(conn)


def test_check_of_the_whole_pool(make: Make, database: Database) -> None:
    """check() asks all idle connections, closes those that do not answer, and lends on the others."""
    pool = make(max_size=2)
    with pool.connection() as first, pool.connection() as second:
        backends = {pid_of(first), pid_of(second)}
    lost = min(backends)
    database.ask("select pg_terminate_backend(%s, 5000)", lost)
    pool.check()
    assert {row["pid"] for row in database.backends()} == backends - {lost}
    with pool.connection() as conn:
        assert pid_of(conn) in backends - {lost}


def test_an_interrupted_check_gives_everything_back(make: Make) -> None:
    """check() that ends by another exception than psycopg's (Ctrl-C, a time limit's) keeps no connection; the one in question is closed."""
    pool = make(max_size=2)
    with pool.connection() as first, pool.connection() as second:
        backends = {pid_of(first), pid_of(second)}

    def interrupted(conn: Any) -> None:
        raise KeyboardInterrupt

    pool.check_connection = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pool.check()
    with pool.connection(timeout=5) as first, pool.connection(timeout=5) as second:
        assert len(backends & {pid_of(first), pid_of(second)}) == 1


def test_min_size_is_there_after_open_and_wait(make: Make, database: Database) -> None:
    """open(wait=True) and wait() return when min_size connections are there; max_size=None means no more than these."""
    pool = make(min_size=2, max_size=None, open=False)
    assert database.count() == 0
    pool.open(wait=True)
    assert database.count() == 2
    pool.wait()
    assert (pool.min_size, pool.max_size) == (2, 2)
    pool.open()  # may be repeated


def test_open_at_once_and_in_a_block(make: Make, database: Database) -> None:
    """open=True connects in the constructor; ``with pool:`` opens and closes."""
    make(min_size=1, open=True)
    eventually(lambda: database.count() == 1)
    with make(min_size=1) as pool:
        assert not pool.closed
        with pool.connection() as conn:
            assert one(conn, "select 1") == 1
    assert pool.closed


def test_wait_for_a_server_that_is_not_there(make: Make) -> None:
    """wait(timeout) raises PoolTimeout."""
    pool = make(conninfo="host=127.0.0.1 port=1 user=x dbname=x", min_size=1)
    with pytest.raises(psycopg_pool.PoolTimeout):
        pool.wait(timeout=0.3)


def test_a_closed_pool(make: Make, database: Database) -> None:
    """After close(): PoolClosed; what was lent works on, and is rolled back at its return; those who wait get PoolClosed.

    psycopg_pool closes it then; here others may go on with it.
    """
    pool = make()
    conn = pool.getconn()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            pool.getconn()
        except BaseException as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    eventually(lambda: pool.get_stats()["requests_waiting"] == 1)
    pool.close()
    waiter.join()
    assert isinstance(raised[0], psycopg_pool.PoolClosed)
    assert isinstance(raised[0], psycopg.OperationalError)
    assert one(conn, "select 1") == 1
    pool.putconn(conn)
    assert [row["state"] for row in database.backends()] == ["idle"]
    with pytest.raises(PoolClosed):
        pool.getconn()
    pool.close()  # may be repeated


def test_resize(make: Make, database: Database) -> None:
    """resize(min_size, max_size): more at once, and fewer as connections come back."""
    pool = make()
    with pool.connection():
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.1)
        pool.resize(0, 2)
        with pool.connection():
            pass
    pool.resize(1)
    eventually(lambda: database.count() <= 1)
    stats = pool.get_stats()
    assert (stats["pool_min"], stats["pool_max"]) == (1, 1)
    assert (pool.min_size, pool.max_size) == (1, 1)
    pool.close()
    assert (pool.min_size, pool.max_size) == (0, 1), "as given"


def test_drain(make: Make) -> None:
    """drain(): idle connections are replaced, and one that is lent after its return."""
    pool = make(max_size=2)
    with pool.connection() as lent:
        with pool.connection() as conn:
            old = {pid_of(lent), pid_of(conn)}
        pool.drain()
    with pool.connection() as first, pool.connection() as second:
        assert not old & {pid_of(first), pid_of(second)}


def test_statistics(make: Make) -> None:
    """get_stats() has psycopg_pool's keys for what is known of all workers; pop_stats() counts anew."""
    pool = make(min_size=1, max_size=2)
    with pool.connection():
        with pool.connection(), pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.05)
        stats = pool.get_stats()
        expected = {"pool_min": 1, "pool_max": 2, "pool_size": 2, "pool_available": 1, "requests_waiting": 0, "requests_num": 2, "requests_errors": 1}
        assert {name: stats[name] for name in expected} == expected
        assert stats["connections_num"] == 2
    assert set(stats) <= set(documented_statistics())
    pool.pop_stats()
    with pool.connection():
        pass
    popped = pool.pop_stats()
    assert (popped["requests_num"], popped["requests_errors"], popped["pool_size"]) == (1, 0, 2)


def documented_statistics() -> list[str]:
    """From psycopg_pool's documentation, "Pool statistics"."""
    pool = "pool_min pool_max pool_size pool_available requests_waiting usage_ms requests_num requests_queued requests_wait_ms requests_errors"
    return f"{pool} returns_bad connections_num connections_ms connections_errors connections_lost".split()


def test_connection_class_kwargs_and_functions(make: Make, database: Database) -> None:
    """connection_class makes the connections, kwargs go to connect(); both conninfo and kwargs may be functions, asked at each connect."""

    class Mine(psycopg.Connection[Any]):
        pass

    asked: list[str] = []

    def conninfo() -> str:
        asked.append("conninfo")
        return database.conninfo

    pool = make(conninfo=conninfo, kwargs=lambda: {"application_name": "mine", "autocommit": True}, connection_class=Mine)
    with pool.connection() as conn:
        assert isinstance(conn, Mine)
        assert conn.autocommit
        assert one(conn, "select current_setting('application_name')") == "mine"
    assert asked


def test_names(make: Make) -> None:
    """A name is what you gave; without one it says where the pool leads, the same in every process (psycopg_pool numbers its pools)."""
    assert make(name="mine").name == "mine"
    first, second = make(name=None), make(name=None)
    assert first.name == second.name
    assert first.name.startswith("shared@127.0.0.1-")
    assert repr(first).startswith("<mppool.integrations.psycopg.ConnectionPool")


def test_reconnect_failed_is_told(make: Make) -> None:
    """When the server was down for reconnect_timeout, callers fail and reconnect_failed is called with the pool."""
    told: list[Any] = []
    pool = make(conninfo="host=127.0.0.1 port=1 user=x dbname=x", reconnect_timeout=0.2, reconnect_failed=told.append, timeout=5)
    with pytest.raises(ConnectFailed) as caught:
        pool.getconn()
    assert "Connection refused" in str(caught.value)
    assert told == [pool]


def test_max_lifetime_and_max_idle(make: Make, database: Database) -> None:
    """A connection that is too old is replaced; one that idles for too long is closed, down to min_size."""
    pool = make(max_lifetime=0.2)
    with pool.connection() as conn:
        backend = pid_of(conn)
        time.sleep(0.25)
    with pool.connection() as conn:
        assert pid_of(conn) != backend
    idle = make(max_idle=0.2, max_size=2, min_size=1)
    with idle.connection(), idle.connection():
        pass
    eventually(lambda: database.count() == 1, what="max_idle, down to min_size, and the old one")


def test_made_before_a_fork(make: Make, database: Database) -> None:
    """What psycopg_pool does not do: a pool that is open, with idle connections, works in a forked child, which shares them."""
    pool = make(max_size=2, min_size=2, open=True)
    with pool.connection() as conn:
        mine = pid_of(conn)

        def work(_: Child) -> list[Any]:
            with pool.connection() as conn:
                return [one(conn, "select 1"), pid_of(conn)]

        with fork(work) as (child,):
            answer, backend = child.result()
        assert answer == 1
        assert backend != mine
        assert one(conn, "select 2") == 2
    assert database.logins() == 2
