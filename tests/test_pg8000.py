"""pg8000 against a real PostgreSQL: what a driver promises, what does not travel, what is closed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pg8000.dbapi
import pg8000.native
import pytest

import mppool
from mppool.drivers.pg8000 import Pg8000Driver
from mppool.testing import check_driver
from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork

pytestmark = needs_postgres


def driver_for(where: Database, **options: Any) -> Pg8000Driver:
    login = {"user": where.user, "password": where.password, "database": where.name, "host": "127.0.0.1", "port": where.port}
    return Pg8000Driver(**{**login, **options})


def ask(session: Any, sql: str) -> Any:
    return session.execute_simple(sql).rows[0][0]


def run(session: Any, *statements: str) -> None:
    for statement in statements:
        session.execute_simple(statement)


def look(session: Any) -> list[Any]:
    return [
        session.autocommit,
        ask(session, "select coalesce(current_setting('app.mine', true), '')"),
        ask(session, "select to_regclass('pg_temp.mine')::text"),
        ask(session, "select count(*) from pg_locks where locktype = 'advisory'"),
        ask(session, "select count(*) from pg_listening_channels()"),
        ask(session, "select count(*) from pg_prepared_statements"),
        ask(session, "show statement_timeout"),
        ask(session, "show default_transaction_isolation"),
    ]


@pytest.fixture
def pool(database: Database, broker: BrokerProcess) -> Iterator[mppool.Pool]:
    with mppool.Pool(driver=driver_for(database), name="pg8000", max_size=1, timeout=5, broker=broker.path) as it:
        yield it


def test_it_keeps_what_drivers_promise(database: Database) -> None:
    """The kit for authors of drivers tries every promise, each in a process of its own."""
    check_driver(
        driver_for(database, ssl_context=False),
        identity=lambda session: ask(session, "select pg_backend_pid()"),
        ask=lambda session, nonce: ask(session, f"select '{nonce}'"),
        look=look,
        dirty={
            "a setting": lambda session: run(session, "set app.mine = 'left'"),
            "a transaction": lambda session: run(session, "begin", "select 1"),
            "a transaction that pg8000 began": lambda session: session.cursor().execute("select 1") and None,
            "a temporary table": lambda session: run(session, "create temporary table mine (x int)"),
            "an advisory lock": lambda session: run(session, "select pg_advisory_lock(7)"),
            "LISTEN": lambda session: run(session, "listen mine"),
            "a prepared statement": lambda session: run(session, "prepare mine as select 1"),
            "autocommit": lambda session: setattr(session, "autocommit", True),
            "an isolation level": lambda session: run(session, "set session characteristics as transaction isolation level serializable"),
        },
        secrets=[database.password],
        unreachable=driver_for(database, port=1, ssl_context=False),
    )


@pytest.mark.parametrize("kind", [pg8000.dbapi.Connection, pg8000.native.Connection], ids=["dbapi", "native"])
def test_pg8000s_own_interface_works_on_what_was_adopted(database: Database, broker: BrokerProcess, kind: type) -> None:
    """Queries, parameters, errors, megabytes, prepared statements, in two processes on one session."""
    pool = mppool.Pool(driver=driver_for(database, connection_class=kind), name="kinds", max_size=1, timeout=5, broker=broker.path)

    def work() -> int:
        with pool.connection() as session:
            if kind is pg8000.native.Connection:
                assert session.run("select cast(:x as integer)", x=4) == [[4]]
                statement = session.prepare("select cast(:x as integer)")
                assert statement.run(x=5) == [[5]]
                assert len(session.run("select repeat('x', 1000000)")[0][0]) == 1_000_000
                with pytest.raises(pg8000.native.DatabaseError):
                    session.run("selct")
            else:
                cursor = session.cursor()
                cursor.execute("select %s::text, %s::int", ("a", 4))
                assert cursor.fetchone() == ["a", 4]
                cursor.execute("select repeat('x', 1000000)")
                assert len(cursor.fetchone()[0]) == 1_000_000
                with pytest.raises(pg8000.dbapi.DatabaseError):
                    cursor.execute("selct")
                session.rollback()
            return int(ask(session, "select pg_backend_pid()"))

    try:
        first = work()
        with fork(lambda _: work()) as [child]:
            assert child.result() == first
        assert work() == first
        assert database.logins() == 1
    finally:
        pool.close()


def test_an_open_transaction_is_rolled_back_at_return(pool: mppool.Pool, database: Database) -> None:
    """Also a failed one; the session goes on."""
    database.ask(f"create table t (x int); grant all on t to {database.user}")
    with pool.connection() as session:
        cursor = session.cursor()
        cursor.execute("insert into t values (1)")
    with pool.connection() as session:
        cursor = session.cursor()
        cursor.execute("select count(*) from t")
        assert cursor.fetchone() == [0]
        with pytest.raises(pg8000.dbapi.DatabaseError):
            cursor.execute("selct")
    with pool.connection() as session:
        assert ask(session, "select 1") == 1
    assert database.logins() == 1


def test_an_interrupted_reply_closes_the_session(pool: mppool.Pool, database: Database) -> None:
    """An exception in the middle of a read: nobody ever gets the rest of the answer."""

    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, handler)
    session = pool.getconn()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop):
            session.execute_simple("select 'late' from pg_sleep(0.5)")
    finally:
        signal.signal(signal.SIGALRM, before)
    pool.putconn(session)
    with pool.connection() as session:
        assert ask(session, "select 'mine'") == "mine"
    assert database.logins() == 2


def test_a_closed_session_is_replaced(pool: mppool.Pool, database: Database) -> None:
    """Whoever calls ``close()`` himself ends it for everybody, and the pool knows."""
    session = pool.getconn()
    session.close()
    pool.putconn(session)
    with pool.connection() as session:
        assert ask(session, "select 1") == 1
    eventually(lambda: database.count() == 1)


def test_a_killed_workers_query_is_cancelled(database: Database, broker: BrokerProcess) -> None:
    """With the key of the session's greeting: the server does not work on for nobody, and the next in line is served."""
    pool = mppool.Pool(driver=driver_for(database), name="killed", max_size=1, timeout=10, broker=broker.path)

    def work(child: Child) -> None:
        with pool.connection() as session:
            child.tell()
            session.execute_simple("select pg_sleep(30)")

    with fork(work) as [child]:
        child.hear()
        eventually(lambda: any("pg_sleep" in backend["query"] and backend["state"] == "active" for backend in database.backends()))
        child.kill()
        began = time.monotonic()
        with pool.connection() as session:
            assert ask(session, "select 1") == 1
        assert time.monotonic() - began < 8
        assert database.count() == 1
    pool.close()


def test_reset_always_and_trust(database: Database, broker: BrokerProcess) -> None:
    """ "always" forgets at every return, "trust" never: what was left is met, in this process and in others."""
    for on_transfer, expected in (("always", ["", ""]), ("trust", ["left", "left"]), ("reset", ["left", ""])):
        pool = mppool.Pool(driver=driver_for(database, on_transfer=on_transfer), name=on_transfer, max_size=1, timeout=5, broker=broker.path)

        def look_here(pool: mppool.Pool = pool) -> str:
            with pool.connection() as session:
                return str(ask(session, "select coalesce(current_setting('app.mine', true), '')"))

        with pool.connection() as session:
            run(session, "set app.mine = 'left'")
        here = look_here()

        def look_there(_: Child, look_here: Callable[[], str] = look_here) -> str:
            return look_here()

        with fork(look_there) as [child]:
            assert [here, child.result()] == expected
        pool.close()


def test_threads_share_it(database: Database, broker: BrokerProcess) -> None:
    """Six threads on two sessions, each with replies of its own."""
    pool = mppool.Pool(driver=driver_for(database), name="threads", max_size=2, timeout=20, broker=broker.path)
    wrong: list[str] = []

    def work(number: int) -> None:
        for n in range(40):
            with pool.connection() as session:
                if ask(session, f"select '{number}-{n}'") != f"{number}-{n}":
                    wrong.append(f"{number}-{n}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert database.logins() == 2
    pool.close()


def test_wrong_logins_are_permanent(database: Database, socket_path: str) -> None:
    """A wrong password, no such database: waiting does not help, and no password is in what is said."""
    for options in ({"password": "wrong-secret"}, {"database": "nowhere"}):
        pool = mppool.Pool(driver=driver_for(database, **options), name="wrong", broker=socket_path)
        with pytest.raises(mppool.DialFailed) as raised:
            pool.getconn()
        assert raised.value.permanent
        assert "wrong-secret" not in str(raised.value)
        pool.close()
