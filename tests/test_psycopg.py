"""psycopg on a real PostgreSQL: its sessions move between processes, nothing travels with them, and the server is the judge."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.abc import AdaptContext
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

import mppool
from mppool.drivers.psycopg import PsycopgDriver, libpq
from mppool.integrations.psycopg import ConnectFailed, ConnectionPool, PoolTimeout
from mppool.states import Residence
from tests.helpers.postgres import Database, Login, Postgres, needs_postgres, postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.storm import Peak

pytestmark = [needs_postgres, pytest.mark.xdist_group("postgres")]

Make = Callable[..., ConnectionPool]


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[Database]:
    it = Login(postgres_server)
    yield it
    it.drop()


@pytest.fixture
def make(database: Database, socket_path: str, broker: BrokerProcess) -> Iterator[Make]:
    """Makes pools on the test's own database, and closes them."""
    pools: list[ConnectionPool] = []

    def make(**options: Any) -> ConnectionPool:
        given = {"conninfo": database.conninfo, "min_size": 0, "max_size": 1, "name": "pg", "broker": socket_path, "timeout": 20.0, **options}
        pools.append(ConnectionPool(**given))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def pid_of(conn: psycopg.Connection[Any]) -> int:
    return int(one(conn, "select pg_backend_pid()"))


def one(conn: psycopg.Connection[Any], sql: str, *parameters: Any) -> Any:
    row = conn.execute(sql, parameters or None).fetchone()
    return row[0] if row is not None else None


def autocommit(**more: Any) -> dict[str, Any]:
    return {"autocommit": True, **more}


# Moving.


def test_one_session_serves_all_processes(make: Make, database: Database) -> None:
    """Two processes in turn, 100 times: the same backend all the way, and one login."""
    pool = make()
    with pool.connection() as conn:
        backend = pid_of(conn)

    def work(child: Child) -> None:
        for _ in range(50):
            child.hear()
            with pool.connection() as conn:
                child.tell(pid_of(conn))

    with fork(work) as (child,):
        for _ in range(50):
            child.tell("go")
            assert child.hear() == backend
            with pool.connection() as conn:
                assert pid_of(conn) == backend
    assert database.logins() == 1
    assert [row["pid"] for row in database.backends()] == [backend]


def test_big_answers_copy_and_cursors_work_on_an_adopted_session(make: Make, database: Database) -> None:
    """A megabyte at once, COPY both ways, a server-side cursor, a pipeline: in a process that did not log in."""
    pool = make()
    with pool.connection() as conn:
        conn.execute("create table things (n int, t text)")

    def work(_: Child) -> None:
        with pool.connection() as conn:
            assert len(one(conn, "select repeat('x', 1000000)")) == 1000000
            with conn.cursor() as cursor:
                with cursor.copy("copy things from stdin") as copy:
                    for n in range(5000):
                        copy.write_row((n, "t" * 50))
                with cursor.copy("copy things to stdout") as copy:
                    assert sum(1 for _ in copy.rows()) == 5000
            with conn.cursor("named") as named:
                assert len(named.execute("select n from things").fetchmany(10)) == 10
            with conn.pipeline():
                first, second = conn.execute("select 1"), conn.execute("select 2")
            assert (first.fetchone(), second.fetchone()) == ((1,), (2,))

    with fork(work) as (child,):
        child.result()
    assert database.logins() == 1


def test_adopting_is_much_cheaper_than_logging_in(database: Database) -> None:
    """In the same run, in turn: a SCRAM login costs at least 15 times as much (alone on the machine it is above 30)."""
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    baggage = driver.detach(conn)
    logins, attaches = [], []
    for _ in range(15):
        began = time.perf_counter()
        psycopg.connect(database.conninfo).close()
        logins.append(time.perf_counter() - began)
        for _ in range(5):
            began = time.perf_counter()
            adopted = driver.attach(conn.fileno(), baggage)
            attaches.append(time.perf_counter() - began)
            driver.abort(adopted)
    assert one(conn, "select 1") == 1
    driver.close(conn)
    ratio = statistics.median(logins) / statistics.median(attaches)
    print(f"\nlogin {statistics.median(logins) * 1e6:.0f} us, adoption {statistics.median(attaches) * 1e6:.0f} us, ratio {ratio:.0f}")
    assert ratio > 15


@pytest.mark.parametrize("how", ["abort", "forgotten", "forked"])
def test_letting_go_says_nothing_to_the_server(database: Database, how: str) -> None:
    """Whatever becomes of one process's connection object, the session goes on for the others."""
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    held = [driver.attach(conn.fileno(), driver.detach(conn))]
    assert pid_of(held[0]) == pid_of(conn)
    conn.rollback()
    if how == "abort":
        driver.abort(held[0])
    elif how == "forked":
        with fork(lambda _: driver.abort(held[0])) as (child,):
            child.result()
        driver.abort(held[0])
    held.clear()
    gc.collect()
    assert one(conn, "select 1") == 1
    driver.close(conn)
    eventually(lambda: database.count() == 0, what="close() ended no backend")


def test_info_tells_where_the_server_is(make: Make, database: Database) -> None:
    """Host, port, database and user of an adopted connection are the server's, not those of what libpq was shown."""
    pool = make()
    with pool.connection():
        pass

    def work(_: Child) -> list[Any]:
        with pool.connection() as conn:
            return [conn.info.host, conn.info.port, conn.info.dbname, conn.info.user, conn.info.server_version > 0]

    with fork(work) as (child,):
        assert child.result() == ["127.0.0.1", database.port, database.name, database.user, True]


def test_one_can_connect_again_by_what_info_says(make: Make, database: Database) -> None:
    """info.dsn, with info.password, leads to the server and not into libpq's private socket; dialed and adopted connections say the same."""
    pool = make(kwargs={"application_name": "teller", "options": "-c app.marker=mine"})

    def work(_: Child | None = None) -> list[Any]:
        with pool.connection() as conn:
            assert f"host=127.0.0.1 port={database.port} user={database.user} database={database.name}" in repr(conn)
            with psycopg.connect(conn.info.dsn, password=conn.info.password) as again:
                assert one(again, "select current_setting('app.marker') || current_setting('application_name')") == "mineteller"
            return [pid_of(conn), conn.info.get_parameters()]

    found = work()
    with fork(work) as (child,):
        assert child.result() == found


def test_what_connect_was_told_holds_for_adopted_connections(make: Make) -> None:
    """autocommit, row_factory, cursor_factory, connection_class: as in the process that logged in."""

    class Mine(psycopg.Connection[Any]):
        def hello(self) -> str:
            return "hello"

    pool = make(connection_class=Mine, kwargs=autocommit(row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.ClientCursor, application_name="mine"))

    def look() -> list[Any]:
        with pool.connection() as conn:
            row = conn.execute("select current_setting('application_name') as name").fetchone()
            assert isinstance(conn.cursor(), psycopg.ClientCursor)
            return [conn.hello(), conn.autocommit, row["name"], isinstance(conn, Mine)]

    here = look()
    with fork(lambda _: look()) as (child,):
        assert child.result() == here == ["hello", True, "mine", True]


def test_threads_and_forks_log_in_beside_each_other(make: Make, database: Database) -> None:
    """Eight threads in each of two processes begin at the same moment: every one gets an answer to its own question."""
    pool = make(max_size=6)

    def work(_: Child | None = None) -> None:
        errors: list[BaseException] = []

        def ask(number: int) -> None:
            try:
                for n in range(20):
                    with pool.connection() as conn:
                        assert one(conn, "select %s::text", f"{os.getpid()}-{number}-{n}") == f"{os.getpid()}-{number}-{n}"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    with fork(work) as (child,), Peak(database.count) as peak:
        work()
        child.result()
    assert peak.most <= 6
    assert database.logins() <= 6


# What does not travel.

MARK = """
select set_config('app.marker', 'mine', false);
set search_path = pg_catalog;
set timezone = 'Asia/Tokyo';
set client_encoding = 'LATIN1';
set datestyle = 'German';
set statement_timeout = '33s';
set default_transaction_read_only = on;
set session characteristics as transaction isolation level serializable;
create temp table secret (t text);
select pg_advisory_lock(42);
prepare theirs as select 1;
listen news;
declare held cursor with hold for select 1;
"""
SEEN = {
    "setting": "select coalesce(current_setting('app.marker', true), '')",
    "table": "select coalesce(to_regclass('pg_temp.secret')::text, '')",
    "lock": "select count(*)::int from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    "statement": "select count(*)::int from pg_prepared_statements where name = 'theirs'",
    "channel": "select count(*)::int from pg_listening_channels()",
    "cursor": "select count(*)::int from pg_cursors where name = 'held'",
}
ALL_SETTINGS = "select name, setting from pg_settings where name not in ('application_name') order by name"


def marked_in_a_child(pool: ConnectionPool) -> int:
    """Another process leaves everything it can in the pool's only session, and is gone. Its backend."""

    def work(_: Child) -> int:
        conn = pool.getconn()
        backend = pid_of(conn)
        conn.pgconn.exec_(MARK.encode())
        pool.putconn(conn)
        return backend

    with fork(work) as (child,):
        return int(child.result())


@pytest.mark.parametrize("on_transfer", ["reset", "always"])
def test_nothing_travels(make: Make, database: Database, on_transfer: str) -> None:
    """Settings, temporary tables, locks, statements, channels, cursors of another process: the session is as one that has just logged in."""
    pool = make(kwargs=autocommit(), on_transfer=on_transfer)
    with pool.connection() as conn:
        assert one(conn, "select 'ä'") == "ä"
    backend = marked_in_a_child(pool)
    with pool.connection() as conn, psycopg.connect(database.conninfo) as fresh:
        assert pid_of(conn) == backend, "not the same session: nothing was tried"
        assert {name: one(conn, sql) for name, sql in SEEN.items()} == {name: one(fresh, sql) for name, sql in SEEN.items()}
        assert conn.execute(ALL_SETTINGS).fetchall() == fresh.execute(ALL_SETTINGS).fetchall()
        assert one(conn, "select 'ä'") == "ä"
        assert one(conn, "select now()").tzinfo == one(fresh, "select now()").tzinfo


@pytest.mark.parametrize("on_transfer", ["reset", "always"])
def test_what_was_made_of_a_connection_here_ends_with_its_reset(make: Make, on_transfer: str) -> None:
    """Loaders and dumpers, too, are as connect() made them, after another process had the session; under "always" after each return."""
    pool = make(kwargs={"context": adapting("int8")}, on_transfer=on_transfer)
    with pool.connection() as conn:
        backend = pid_of(conn)
        conn.adapters.register_loader("int4", TextLoader)
        conn.row_factory = dict_row
        assert conn.execute("select 1 as x").fetchone() == {"x": "1"}
    if on_transfer == "reset":
        marked_in_a_child(pool)
    with pool.connection() as conn:
        assert conn.execute("select 1::int4, 1::int8, pg_backend_pid()").fetchone() == (1, "1", backend)


def adapting(name: str) -> AdaptContext:
    """A context in which this type is read as text."""
    context = psycopg.Connection(psycopg.pq.PGconn.connect_start(b"host=/nowhere"))
    context.adapters.register_loader(name, TextLoader)
    return context


def test_always_leaves_nothing_for_the_same_process(make: Make) -> None:
    """on_transfer="always" resets at every return; "reset" leaves a process its own settings."""
    for on_transfer, seen in (("always", ""), ("reset", "mine")):
        pool = make(kwargs=autocommit(), on_transfer=on_transfer, name=on_transfer)
        with pool.connection() as conn:
            one(conn, "select set_config('app.marker', 'mine', false)")
        with pool.connection() as conn:
            assert one(conn, SEEN["setting"]) == seen


def test_under_trust_it_travels_as_documented(make: Make) -> None:
    """on_transfer="trust" resets nothing: what others left is met. This is what it is documented to leak."""
    pool = make(kwargs=autocommit(), on_transfer="trust")
    with pool.connection():
        pass

    def work(_: Child) -> None:
        with pool.connection() as conn:
            conn.execute("select set_config('app.marker', 'mine', false)")
            conn.execute("create temp table secret (t text)")
            conn.execute("select pg_advisory_lock(42)")
            conn.execute("prepare theirs as select 1")
            conn.execute("listen news")

    with fork(work) as (child,):
        child.result()
    with pool.connection() as conn:
        seen = {name: one(conn, sql) for name, sql in SEEN.items()}
    assert seen == {"setting": "mine", "table": "secret", "lock": 1, "statement": 1, "channel": 1, "cursor": 0}


def test_libpq_believes_no_settings_of_others(make: Make) -> None:
    """A process changes time zone and encoding, another resets them; when the first comes back, its libpq does not read by what it changed."""
    pool = make(kwargs=autocommit())
    with pool.connection() as conn:
        conn.execute("set timezone = 'Asia/Tokyo'")
        conn.execute("set client_encoding = 'LATIN1'")
        conn.execute("set datestyle = 'German'")

    def work(_: Child) -> str:
        with pool.connection() as conn:
            return str(one(conn, "show timezone"))

    with fork(work) as (child,):
        assert child.result() != "Asia/Tokyo"
    with pool.connection() as conn:
        assert one(conn, "select 'äöü€'") == "äöü€"
        assert one(conn, "select %s::text", "äöü€") == "äöü€"
        assert str(one(conn, "select now()").tzinfo) == one(conn, "show timezone")
        assert conn.info.timezone.key == one(conn, "show timezone")


def test_under_trust_a_client_reads_what_the_server_sends(make: Make) -> None:
    """The settings that change how a client reads (encoding, time zone, styles) are put back at the return, or bytes would be misread elsewhere."""
    pool = make(kwargs=autocommit(), on_transfer="trust")
    with pool.connection():
        pass

    def work(_: Child) -> None:
        with pool.connection() as conn:
            conn.execute("set client_encoding = 'LATIN1'")
            conn.execute("set timezone = 'Asia/Tokyo'")

    with fork(work) as (child,):
        child.result()
    with pool.connection() as conn:
        assert one(conn, "select 'äöü'") == "äöü"
        assert str(one(conn, "select now()").tzinfo) == one(conn, "show timezone")


@pytest.mark.parametrize("on_transfer", ["reset", "always", "trust"])
def test_prepared_statements_do_not_collide(make: Make, on_transfer: str) -> None:
    """Two processes prepare the same and other statements in one session, one of them rolls back: no name is taken, none is missing."""
    pool = make(kwargs={"prepare_threshold": 0}, on_transfer=on_transfer)

    def turn(number: int) -> None:
        for n in range(3):
            with pool.connection() as conn:
                assert one(conn, "select %s::int + 1", n) == n + 1
                assert one(conn, f"select %s::int + {number}", n) == n + number

    def work(child: Child) -> None:
        for _ in range(4):
            child.hear()
            turn(7)
            conn = pool.getconn()
            one(conn, "select %s::int + 1", 1)
            conn.rollback()  # which makes psycopg forget its statements, and deallocate all there are
            one(conn, "select %s::int + 1", 1)
            conn.commit()
            pool.putconn(conn)
            child.tell("done")

    turn(5)
    with fork(work) as (child,):
        for _ in range(4):
            child.tell("go")
            child.hear()
            turn(5)
    with pool.connection() as conn:
        assert one(conn, "select count(*) from pg_prepared_statements") <= 4, "they pile up"


def test_under_trust_who_asks_in_the_block_finds_no_name_taken(make: Make) -> None:
    """``conn.prepare_threshold`` set after the checkout, in two processes one after the other: the first one's statements are still there."""
    pool = make(kwargs=autocommit(), on_transfer="trust")

    def prepared(_: Child | None = None) -> int:
        with pool.connection() as conn:
            conn.prepare_threshold = 0
            assert one(conn, f"select %s::int + {os.getpid()}", 1) == 1 + os.getpid()
            return pid_of(conn)

    with pool.connection() as conn:
        backend = pid_of(conn)
    with fork(prepared) as (child,):
        assert child.result() == prepared() == backend


def test_statements_are_not_prepared_unless_asked(make: Make) -> None:
    """prepare_threshold is None by default; with a value, a process that keeps its session finds its statements again."""
    for kwargs, prepared in ((autocommit(), 0), (autocommit(prepare_threshold=0), 1)):
        pool = make(kwargs=kwargs, name=f"prepared-{prepared}")
        for _ in range(10):
            with pool.connection() as conn:
                one(conn, "select %s::int", 1)
        with pool.connection() as conn:
            found = conn.execute("select count(*) from pg_prepared_statements where statement like 'select $1::int'", prepare=False).fetchone()
            assert found == (prepared,)


def test_notifications_are_nobody_elses(make: Make, database: Database) -> None:
    """A notification that came in time is not met by the next user; one that comes while the session is idle ends it."""
    pool = make(kwargs=autocommit())
    with pool.connection() as conn:
        conn.execute("listen news")
        conn.execute("notify news, 'for me'")
        backend = pid_of(conn)
    with pool.connection() as conn:
        assert list(conn.notifies(timeout=0)) == []
        assert pid_of(conn) == backend
    database.ask("notify news, 'for nobody'")
    assert select.select([conn.pgconn.socket], [], [], 10)[0]
    with pool.connection() as conn:
        assert list(conn.notifies(timeout=0)) == []
        assert pid_of(conn) != backend


def test_configure_holds_everywhere(make: Make) -> None:
    """What ``configure`` sets is set in every process and after every reset, and its handlers are there once."""

    def configure(conn: psycopg.Connection[Any]) -> None:
        conn.add_notice_handler(print)
        conn.autocommit = True
        conn.execute("set timezone = 'Asia/Tokyo'")
        conn.execute("select set_config('app.configured', 'yes', false)")

    pool = make(configure=configure)

    def look() -> list[Any]:
        with pool.connection() as conn:
            seen = [conn.autocommit, one(conn, "select current_setting('app.configured', true)"), len(conn._notice_handlers)]
            assert str(one(conn, "select now()").tzinfo) == "Asia/Tokyo"
            conn.execute("select set_config('app.configured', 'no', false)")
            return seen

    def work(child: Child) -> None:
        for _ in range(3):
            child.hear()
            child.tell(look())

    assert look() == [True, "yes", 1]
    with fork(work) as (child,):
        for _ in range(3):
            child.tell("go")
            assert child.hear() == [True, "yes", 1]
            assert look() == [True, "yes", 1]


# Cancelling, and ends of all kinds.


def adopted(pool: ConnectionPool) -> None:
    """The pool's only session is one that this process did not dial."""

    def work(_: Child) -> None:
        with pool.connection():
            pass

    with fork(work) as (child,):
        child.result()


@pytest.mark.parametrize("how", ["cancel", "cancel_safe"])
def test_cancelling_works_on_adopted_sessions(make: Make, database: Database, how: str) -> None:
    """The request goes to the real server with the recorded key; the connection can be used afterwards."""
    pool = make(kwargs=autocommit())
    adopted(pool)
    with pool.connection() as conn:
        timer = threading.Timer(0.2, getattr(conn, how))
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            conn.execute("select pg_sleep(60)")
        timer.join()
        assert one(conn, "select 1") == 1
    assert database.logins() == 1


def test_cancelling_after_the_return_cancels_nobody(make: Make, database: Database) -> None:
    """A watchdog that comes too late: by then the session is in the middle of another process's statement."""
    pool = make(kwargs=autocommit())
    with pool.connection() as mine:
        pass

    def work(_: Child) -> Any:
        with pool.connection() as conn:
            return one(conn, "select 'done' from pg_advisory_lock(7)")

    with psycopg.connect(database.conninfo) as holder:
        holder.execute("select pg_advisory_xact_lock(7)")
        with fork(work) as (child,):
            eventually(lambda: database.ask("select 1 from pg_locks where locktype = 'advisory' and not granted"))
            mine.cancel()
            mine.cancel_safe()
            holder.commit()
            assert child.result() == "done"


def test_ctrl_c_cancels_the_statement(make: Make, database: Database) -> None:
    """SIGINT in the middle of a statement on an adopted session: KeyboardInterrupt, and the server works for nobody."""
    pool = make(kwargs=autocommit())
    adopted(pool)

    def work(child: Child) -> list[Any]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        conn = pool.getconn()
        child.tell("now")
        try:
            conn.execute("select pg_sleep(60)")
        except KeyboardInterrupt:
            after = one(conn, "select 1")
            pool.putconn(conn)
            return ["interrupted", after]
        return []

    with fork(work) as (child,):
        child.hear()
        eventually(lambda: any(row["state"] == "active" for row in database.backends()))
        os.kill(child.pid, signal.SIGINT)
        assert child.result() == ["interrupted", 1]
    assert all(row["state"] == "idle" for row in database.backends())
    assert database.logins() == 1


def test_a_session_returned_in_mid_statement_is_closed_and_the_server_stops(make: Make, database: Database) -> None:
    """putconn() of a connection that is still executing: the statement is cancelled, so that the server does not stand above the cap."""
    pool = make(kwargs=autocommit(), close_timeout=10)
    conn = pool.getconn()
    conn.pgconn.send_query(b"select pg_sleep(60)")
    with Peak(database.count) as peak:
        pool.putconn(conn)
        with pool.connection() as other:
            assert one(other, "select 1") == 1
    assert peak.most <= 1
    assert not any(row["state"] == "active" for row in database.backends())


def test_a_worker_killed_in_mid_statement_leaves_nothing_running(make: Make, database: Database) -> None:
    """SIGKILL while the server works: the statement is cancelled with the recorded key, and its permit serves the next."""
    pool = make(kwargs=autocommit())
    adopted(pool)

    def work(child: Child) -> None:
        with pool.connection() as conn:
            child.tell("now")
            conn.execute("select pg_sleep(60)")

    with fork(work) as (child,), Peak(database.count) as peak:
        child.hear()
        eventually(lambda: any(row["state"] == "active" for row in database.backends()))
        child.kill()
        with pool.connection(timeout=10) as conn:
            assert one(conn, "select 1") == 1
    assert peak.most <= 1
    assert not any(row["state"] == "active" for row in database.backends())


def test_a_session_that_the_server_ended_is_not_lent(make: Make, database: Database) -> None:
    """pg_terminate_backend of an idle session: the next user gets a new one, without an error."""
    pool = make()
    with pool.connection() as conn:
        backend = pid_of(conn)
    database.ask("select pg_terminate_backend(%s, 5000)", backend)
    with pool.connection() as conn:
        assert pid_of(conn) != backend
    assert database.logins() == 2


def test_a_session_that_has_just_ended_can_be_attached(database: Database) -> None:
    """It is for the pool to find that it has ended, and to dial anew: it does not look before it attaches."""
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    baggage = driver.detach(conn)
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        database.ask("select pg_terminate_backend(%s, 5000)", pid_of(conn))
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        adopted = driver.attach(sock.fileno(), baggage)
        assert select.select([driver.fileno(adopted)], [], [], 20)[0]
        driver.abort(adopted)
    driver.abort(conn)


def test_what_was_made_for_a_session_that_did_not_come_serves_the_next(database: Database) -> None:
    """libpq is started while the broker is asked. If nothing comes, that start is kept, once; a forked child closes it, and the end of the driver does."""
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    baggage = driver.detach(conn)
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        gc.collect()  # what earlier tests left is not to end in the middle of this one
        before = descriptors()
        for _ in range(3):
            driver.expect()
        kept = descriptors() - before
        assert len(kept) == 2

        def adopt_and_ask() -> int:
            adopted = driver.attach(sock.fileno(), baggage)
            try:
                return int(one(adopted, "select 1"))
            finally:
                driver.abort(adopted)

        def work(_: Child) -> list[int]:
            driver.forked()
            return [len(descriptors() & kept), adopt_and_ask()]

        with fork(work) as (child,):
            assert child.result() == [0, 1]
        assert descriptors() - before == kept
        assert adopt_and_ask() == 1
        assert descriptors() == before
        driver.expect()
        driver = PsycopgDriver(database.conninfo)
        gc.collect()
        assert descriptors() == before
    driver.close(conn)


STRUCK = """
import gc, itertools, os, signal, socket, sys
from mppool.drivers.postgres import READY, WELCOME
from mppool.drivers.psycopg import PsycopgDriver, libpq
from tests.crash.tracing import KINDS, Thrown, Trigger, throw

def opened():
    gc.collect()
    return len(os.listdir("/proc/self/fd")) - len(libpq._doors)

signal.signal(signal.SIGUSR1, throw)
driver, trigger = PsycopgDriver("host=127.0.0.1 port=1 user=u dbname=d"), Trigger()
ours, theirs = socket.socketpair()
driver.abort(driver.attach(ours.fileno(), b"\\0" + WELCOME + READY))
before, left = opened(), []
for at in itertools.count(1):
    trigger.arm(at)
    trigger.install(KINDS["signal"], opcodes=True)
    try:
        driver.expect()
        driver.abort(driver.attach(ours.fileno(), b"\\0" + WELCOME + READY))
        sys.settrace(None)
    except Thrown:
        sys.settrace(None)
    driver._expected.clear()
    if not trigger.where:
        break
    if opened() != before:
        left.append(trigger.where)
        before = opened()
assert at > 300, at
print(left)
"""


def test_what_a_signal_handler_throws_at_any_bytecode_of_an_attach_leaves_nothing_open() -> None:
    done = subprocess.run([sys.executable, "-c", STRUCK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=100, check=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("room", [0, 1, 64])
def test_threads_attach_at_once_and_fill_the_door(database: Database, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """What libpq connects to serves as many start-ups as may queue at it, then another takes its place, under whoever is about to use it."""
    monkeypatch.setattr(libpq.Door, "ROOM", room)
    monkeypatch.setattr(libpq, "TRIES", 100)
    libpq.shut(libpq.a_door())  # away with the one that has more room
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    baggage, backend = driver.detach(conn), pid_of(conn)
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        driver.abort(driver.attach(sock.fileno(), baggage))
        gc.collect()
        before = len(descriptors()) - len(libpq._doors)

        def attach_often(_: int) -> int:
            for _ in range(100):
                adopted = driver.attach(sock.fileno(), baggage)
                assert adopted.pgconn.backend_pid == backend  # (all of them have the same session: nobody asks)
                driver.abort(adopted)
            return 100

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(attach_often, range(8))) == 800
        gc.collect()
        assert len(descriptors()) - len(libpq._doors) == before
        adopted = driver.attach(sock.fileno(), baggage)
        assert one(adopted, "select 1") == 1
        driver.abort(adopted)
    driver.close(conn)


def test_a_stranger_at_the_door_is_told_nothing(database: Database) -> None:
    """The name that libpq connects to can be found by other users: they may fill it, and hear nothing; the next start-up goes to another."""
    driver = PsycopgDriver(database.conninfo)
    conn = driver.dial()
    baggage = driver.detach(conn)
    libpq.shut(libpq.a_door())  # away with the one that others queue at
    door = libpq.a_door()
    with ExitStack() as strangers, socket.socket(fileno=os.dup(conn.fileno())) as sock:
        queue = []
        for _ in range(door.ROOM + 2):
            stranger = strangers.enter_context(socket.socket(socket.AF_UNIX))
            stranger.setblocking(False)
            with suppress(BlockingIOError):
                stranger.connect(f"\0{door.host[1:]}/.s.PGSQL.1")
                queue.append(stranger)
        assert len(queue) == door.ROOM + 1
        adopted = driver.attach(sock.fileno(), baggage)
        assert one(adopted, "select 1") == 1
        driver.abort(adopted)
        assert libpq.a_door() is not door
        for stranger in queue:
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    driver.close(conn)


def descriptors() -> set[int]:
    """Of this process, those open now."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")}


class Refusing(PsycopgDriver):
    def transferred(self, session: Any) -> None:
        raise RuntimeError("not this one")


def test_a_transfer_that_fails_is_told_in_the_log(database: Database, broker: BrokerProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Its session is closed, the caller gets another; at debug level the log says of which driver, and why, and nothing of the greeting."""
    pool = mppool.Pool(driver=Refusing(database.conninfo, kwargs=autocommit()), name="refusing", max_size=1, timeout=20, broker=broker.path)

    def work(child: Child) -> None:
        with pool.connection() as conn:
            backend = pid_of(conn)
        child.tell(backend)
        child.hear()

    with fork(work) as (child,), caplog.at_level(logging.DEBUG, "mppool"):
        foreign = child.hear()
        with pool.connection() as conn:
            assert pid_of(conn) != foreign
            greeting = conn._mppool.greeting
    [record] = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert record.getMessage() == "postgres session of pool 'refusing' is closed, reset_failed: RuntimeError: not this one"
    assert not any(part in caplog.text for part in (repr(greeting), greeting.hex(), database.password))
    pool.close()


def test_idle_session_timeout_is_noticed(make: Make, database: Database) -> None:
    """The server ends sessions that idle: it says why before it closes, and that is no answer to anybody's question."""
    database.ask(f"alter role {database.user} set idle_session_timeout = '100ms'")
    pool = make()
    with pool.connection() as conn:
        backend = conn.info.backend_pid  # (asked, the server might have ended it before: the machine may be slow)
    eventually(lambda: database.count() == 0)
    database.ask(f"alter role {database.user} reset idle_session_timeout")
    with pool.connection() as conn:
        assert pid_of(conn) != backend


def test_a_restarted_server_is_found_again(make: Make, database: Database) -> None:
    """Idle sessions in two processes, then a restart: both go on with new ones."""
    pool = make(max_size=2)

    def work(child: Child) -> None:
        with pool.connection() as conn:
            child.tell(pid_of(conn))
        child.hear()
        with pool.connection() as conn:
            child.tell(one(conn, "select 1"))

    with fork(work) as (child,):
        child.hear()
        with pool.connection():
            pass
        database.server.restart()
        child.tell("go on")
        assert child.hear() == 1
        with pool.connection() as conn:
            assert one(conn, "select 1") == 1


def test_a_statement_that_meets_a_restart_fails_and_its_session_is_closed(make: Make, database: Database) -> None:
    """The user is told as by any psycopg connection; the next checkout has a new session."""
    pool = make(kwargs=autocommit())

    def meet_it() -> None:
        with pool.connection() as conn:
            database.ask("select pg_terminate_backend(%s, 5000)", pid_of(conn))
            conn.execute("select 1")

    with pytest.raises(psycopg.OperationalError):
        meet_it()
    with pool.connection() as conn:
        assert one(conn, "select 1") == 1


def test_a_limit_that_others_have_reached_is_waited_for(make: Make, database: Database) -> None:
    """Too many connections, by the server's own count: not for good. A timeout tells of it; when others leave, we get in."""
    database.ask(f"alter role {database.user} connection limit 1")
    other = psycopg.connect(database.conninfo)
    pool = make()
    with pytest.raises(PoolTimeout) as caught:
        pool.getconn(timeout=0.5)
    assert "too many connections" in str(caught.value.__cause__)
    other.close()
    with pool.connection(timeout=10) as conn:
        assert one(conn, "select 1") == 1


@pytest.mark.parametrize("wrong", ["password", "database", "role", "no password"])
def test_what_waiting_does_not_help_is_told_at_once(make: Make, database: Database, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong password, missing database or role: the server's own words, at once, and nothing of the password."""
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    instead = {"password": {"password": "wrong"}, "database": {"dbname": "nowhere"}, "role": {"user": "nobody"}, "no password": {"password": ""}}[wrong]
    pool = make(conninfo=psycopg.conninfo.make_conninfo(database.conninfo, **instead))
    with pytest.raises(ConnectFailed) as caught:
        pool.getconn()
    said = {"password": "authentication failed", "database": "does not exist", "role": "authentication failed", "no password": "no password supplied"}[wrong]
    assert said in str(caught.value)
    assert isinstance(caught.value, psycopg.OperationalError)
    assert database.password not in str(caught.value) + repr(caught.value.__cause__) + repr(pool)


# Where to, and how.


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
def test_plain_modes_move(database: Database, mode: str) -> None:
    """A server without TLS: every mode that does not insist makes sessions that move."""
    driver = PsycopgDriver(f"{database.conninfo} sslmode={mode}")
    conn = driver.dial()
    assert driver.residence(conn) is Residence.moves
    driver.close(conn)


def test_hosts_are_tried_in_order(database: Database) -> None:
    """One where nothing listens, then the right one; target_session_attrs is asked of the server."""
    conninfo = f"host=127.0.0.1,127.0.0.1 port=1,{database.port} dbname={database.name} user={database.user} password={database.password}"
    driver = PsycopgDriver(f"{conninfo} target_session_attrs=read-write")
    conn = driver.dial()
    again = driver.attach(conn.fileno(), driver.detach(conn))
    assert pid_of(again) == pid_of(conn)
    driver.abort(again)
    driver.close(conn)
    with pytest.raises(mppool.DialFailed):
        PsycopgDriver(f"{conninfo} target_session_attrs=standby").dial()


def test_environment_password_file_and_service_file(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq's own sources are its own: PG* variables, ~/.pgpass, pg_service.conf. All of these sessions move."""
    passfile, services = tmp_path / "pgpass", tmp_path / "services"
    passfile.write_text(f"127.0.0.1:{database.port}:*:{database.user}:{database.password}\n")
    passfile.chmod(0o600)
    services.write_text(f"[app]\nhost=127.0.0.1\nport={database.port}\nuser={database.user}\ndbname={database.name}\n")
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    drivers = [PsycopgDriver("service=app")]
    for name, value in (("PGHOST", "127.0.0.1"), ("PGPORT", database.port), ("PGUSER", database.user), ("PGDATABASE", database.name)):
        monkeypatch.setenv(name, str(value))
    drivers.append(PsycopgDriver(""))
    for driver in drivers:
        conn = driver.dial()
        assert driver.residence(conn) is Residence.moves
        again = driver.attach(conn.fileno(), driver.detach(conn))
        assert pid_of(again) == pid_of(conn)
        driver.abort(again)
        driver.close(conn)


def test_connect_timeout_holds(judge_that_is_deaf: int) -> None:
    """A server that accepts and says nothing: given up after connect_timeout (which is 2 s at the least, as libpq's)."""
    began = time.monotonic()
    with pytest.raises(mppool.DialFailed) as caught:
        PsycopgDriver(f"host=127.0.0.1 port={judge_that_is_deaf} user=x dbname=x connect_timeout=2").dial()
    assert "timeout" in str(caught.value)
    assert not caught.value.permanent
    assert 1.5 < time.monotonic() - began < 15


@pytest.fixture
def judge_that_is_deaf() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def encrypting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A server with TLS, and a Unix socket."""
    made = tmp_path_factory.mktemp("tls")
    key, certificate = made / "key", made / "certificate"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    directory = Path("/tmp") / f"mppool-test-{os.getpid()}"  # a socket's path must be short
    directory.mkdir()
    directory.chmod(0o777)
    try:
        with postgres(unix_socket_directories=str(directory)) as server:
            server.stop()
            for file in (key, certificate):
                shutil.copy(file, server.data)
                (server.data / file.name).chmod(0o600)
                if server.user is not None:
                    shutil.chown(server.data / file.name, server.user)
            server.options.update(ssl="on", ssl_key_file=str(server.data / "key"), ssl_cert_file=str(server.data / "certificate"))
            server.start()
            yield server
    finally:
        directory.rmdir()


def test_a_unix_socket_moves_and_cancels(encrypting: Postgres, socket_path: str, broker: BrokerProcess) -> None:
    """Over the server's Unix socket, whatever sslmode says: sessions move, and cancelling finds its way."""
    database = Login(encrypting)
    directory = encrypting.options["unix_socket_directories"]
    pool = ConnectionPool(f"{database.conninfo} host={directory} sslmode=prefer", min_size=0, max_size=1, broker=socket_path, kwargs=autocommit())
    adopted(pool)
    with pool.connection() as conn:
        assert conn.info.host == directory
        timer = threading.Timer(0.2, conn.cancel)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            conn.execute("select pg_sleep(60)")
        timer.join()
    pool.close()
    assert database.logins() == 1
    database.drop()


def shown(socket_path: str, *options: str) -> str:
    """What ``mppool status`` prints, on a wide terminal."""
    command = [sys.executable, "-m", "mppool", "status", "--socket", socket_path, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env={**os.environ, "COLUMNS": "250"}).stdout


def status(socket_path: str) -> dict[str, Any]:
    """Its one pool."""
    [pool] = json.loads(shown(socket_path, "--json"))["pools"]
    return dict(pool)


def test_over_tls_sessions_stay_and_are_given_up_for_others(encrypting: Postgres, socket_path: str, broker: BrokerProcess) -> None:
    """Where the server offers TLS: resident, said so, capped over all processes, never shared, and ended where another process is in need."""
    database = Login(encrypting)
    pool = ConnectionPool(database.conninfo, min_size=0, max_size=1, name="tls", broker=socket_path)

    def work(child: Child) -> None:
        child.hear()
        with pool.connection(timeout=10) as conn:
            child.tell([pid_of(conn), conn.pgconn.ssl_in_use])

    with fork(work) as (child,), Peak(database.count) as peak:
        with pool.connection() as conn:
            backend = pid_of(conn)
            assert conn.pgconn.ssl_in_use
        with pool.connection() as conn:
            assert pid_of(conn) == backend, "it serves its own process again and again"
        assert status(socket_path)["resident"] == {"tls": 1}
        assert re.search(r"│ +1 tls │", shown(socket_path))
        child.tell("go")
        other, encrypted = child.hear()
        assert other != backend
        assert encrypted
        assert status(socket_path)["resident"] == {"tls": 1}, "the other's, in place of ours"
    assert peak.most <= 1
    pool.close()
    database.drop()


@pytest.mark.parametrize(("mode", "residence"), [("disable", "moves"), ("allow", "moves"), ("prefer", "tls"), ("require", "tls")])
def test_where_the_server_offers_tls(encrypting: Postgres, mode: str, residence: str) -> None:
    """sslmode decides: only what is plain moves, and what is asked to be encrypted is."""
    database = Login(encrypting)
    driver = PsycopgDriver(f"{database.conninfo} sslmode={mode}")
    conn = driver.dial()
    assert driver.residence(conn) is Residence[residence]
    assert conn.pgconn.ssl_in_use is (residence == "tls")
    assert one(conn, "select 1") == 1
    driver.close(conn)
    database.drop()
