"""PyMySQL against a real MariaDB: sessions move, nothing of a user's goes with them, and the server counts."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pymysql
import pytest
from pymysql.cursors import SSCursor

import mppool
from mppool.drivers.pymysql import PyMySQLDriver
from mppool.integrations.pymysql import ConnectionPool
from mppool.states import Residence
from mppool.testing import check_driver
from tests.helpers.mariadb import MariaDB, mariadb, needs_mariadb, sessions_of
from tests.helpers.processes import BrokerProcess, Child, broker_process, eventually, fork
from tests.helpers.storm import Ask, Peak, Storm

pytestmark = needs_mariadb


@pytest.fixture(scope="module")
def database() -> Iterator[MariaDB]:
    with mariadb() as server:
        server.ask("create table shop.items (id int auto_increment primary key, name varchar(40)) engine=innodb")
        server.ask("create table shop.there select 'there' as a")
        yield server


@pytest.fixture
def broker(socket_path: str) -> Iterator[BrokerProcess]:
    with broker_process(socket_path) as it:
        yield it


def pool_on(server: MariaDB, broker: BrokerProcess, **options: Any) -> ConnectionPool:
    return ConnectionPool(**{**server.login, "broker": broker.path, "max_size": 1, **options})


def rows(conn: Any, statement: str, *args: Any) -> Any:
    with conn.cursor() as cursor:
        cursor.execute(statement, args or None)
        return cursor.fetchall()


def seen(conn: Any, statement: str) -> list[list[str]]:
    """Rows, or the error, as they go through a pipe."""
    try:
        return [[str(value) for value in row] for row in rows(conn, statement)]
    except pymysql.err.OperationalError as error:
        return [[str(error)]]


def ident(conn: Any) -> int:
    return int(rows(conn, "select connection_id()")[0][0])


def pinned(pool: mppool.Pool) -> Callable[[Child], None]:
    """A child that does what it is told with a session that it borrows for it: statements, each a list of statement and arguments; tells the last rows."""

    def work(child: Child) -> None:
        while True:
            statements = child.hear()
            if statements is None:
                pool.close()
                return
            conn = pool.getconn()
            answer: Any = None
            try:
                for statement in statements:
                    answer = seen(conn, statement)
            finally:
                pool.putconn(conn)
            child.tell(answer)

    return work


@contextlib.contextmanager
def neighbour(pool: mppool.Pool) -> Iterator[Callable[..., Any]]:
    """Another process with the same pool: ``tell(statement, ...)`` has it do them in one lease."""
    with fork(pinned(pool)) as (child,):

        def tell(*statements: str) -> Any:
            child.tell(list(statements))
            return child.hear()

        yield tell
        child.tell(None)
        child.result()


# Moving.


def test_a_session_moves_without_a_login(database: MariaDB, broker: BrokerProcess) -> None:
    """Two processes take turns with one connection: the server sees one, with one id, over all moves."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool), neighbour(pool) as tell:
        before = int(database.ask("show status like 'Connections'")[0][1])
        with pool.connection() as conn:
            first = ident(conn)
        for _ in range(20):
            assert tell("select connection_id()") == [[str(first)]]
            with pool.connection() as conn:
                assert ident(conn) == first
        made = int(database.ask("show status like 'Connections'")[0][1]) - before
        assert made == 2  # ours, and the one that asks


def test_an_attached_session_looks_like_a_dialed_one(database: MariaDB) -> None:
    """What PyMySQL tells of a session is the same in the process that dialed it and in one that attached it; the password is nowhere."""
    driver = PyMySQLDriver(**database.login)
    dialed = driver.dial()
    baggage = driver.detach(dialed)
    attached = driver.attach(driver.fileno(dialed), baggage)
    try:
        for tell in ("thread_id", "get_server_info", "get_proto_info", "get_host_info", "character_set_name", "get_autocommit"):
            assert getattr(attached, tell)() == getattr(dialed, tell)()
        for name in ("server_capabilities", "server_language", "server_charset", "server_status", "user", "db", "client_flag", "sql_mode", "init_command"):
            assert getattr(attached, name) == getattr(dialed, name), name
        assert len(baggage) < 200
        assert b"secret" not in baggage
        assert "secret" not in driver.key()
        assert not os.get_blocking(driver.fileno(attached))
    finally:
        driver.abort(attached)
        driver.close(dialed)


def test_a_big_result_is_read_through_an_attached_session(database: MariaDB) -> None:
    """Megabytes, and packets of more than 64 KiB, go both ways."""
    driver = PyMySQLDriver(**database.login)
    dialed = driver.dial()
    attached = driver.attach(driver.fileno(dialed), driver.detach(dialed))
    try:
        text = "x" * 3_000_000
        assert rows(attached, "select %s", text) == ((text,),)
        assert len(rows(attached, "select seq, repeat('y', 100) from seq_1_to_20000")) == 20000
        assert not driver.is_clean(attached)
        driver.tidy(attached)
        assert driver.is_clean(attached)
    finally:
        driver.abort(attached)
        driver.close(dialed)


@pytest.mark.parametrize("how", ["by default", "asked for"])
def test_tls_stays_with_its_process(database: MariaDB, broker: BrokerProcess, how: str) -> None:
    """Over TLS, which PyMySQL 1.2 speaks by default if the server offers it, a session is resident, and the cap holds for it, too."""
    if how == "by default" and not hasattr(pymysql.Connection(defer_connect=True), "_ssl_required"):
        pytest.skip("this PyMySQL speaks TLS only when asked to")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    pool = pool_on(database, broker, ssl_disabled=None, ssl=context if how == "asked for" else None)
    with contextlib.closing(pool), neighbour(pool) as tell:
        with pool.connection() as conn:
            assert rows(conn, "show status like 'Ssl_cipher'")[0][1]
            assert pool._driver.residence(conn) is Residence.tls
            first = ident(conn)
        with pool.connection() as conn:
            assert ident(conn) == first
        assert tell("select connection_id()") != [[str(first)]]
        with database.root() as root, root.cursor() as cursor:
            eventually(lambda: len(sessions_of(cursor)) == 1)  # off the list a moment after its end


def test_a_unix_socket_is_a_server_too(database: MariaDB, broker: BrokerProcess) -> None:
    """Sessions over the server's Unix socket move as those over TCP do."""
    pool = ConnectionPool(unix_socket=database.socket, user="root", ssl_disabled=True, broker=broker.path, max_size=1)
    with contextlib.closing(pool), neighbour(pool) as tell:
        with pool.connection() as conn:
            first = ident(conn)
        assert tell("select connection_id()") == [[str(first)]]


# What does not travel.

KINDS: dict[str, tuple[str, str]] = {  # how to leave something, and how to see it
    "user variable": ("set @left = 1", "select @left"),
    "temporary table": ("create temporary table there select 'temporary' as a", "select a from there"),
    "named lock": ("select get_lock('left', 0)", "select is_used_lock('left')"),
    "table lock": ("lock tables items write", "select a from there"),
    "sql_mode": ("set sql_mode = 'ANSI'", "select @@sql_mode"),
    "isolation": ("set session transaction isolation level serializable", "select @@tx_isolation"),
    "autocommit": ("set autocommit = 1", "select @@autocommit"),
    "character set": ("set names latin1", "select @@character_set_client, @@character_set_results, @@collation_connection"),
    "time zone": ("set time_zone = '+03:00'", "select @@time_zone"),
    "database": ("use other", "select database()"),
    "open transaction": ("insert into items (name) values ('uncommitted')", "select * from items where name = 'uncommitted'"),
    "last insert id": ("insert into items (name) values ('undone')", "select last_insert_id()"),
    "limit": ("set max_statement_time = 7", "select @@max_statement_time"),
}
STAYS = {"open transaction", "autocommit"}  # under trust; everything else travels


@pytest.fixture(scope="module")
def fresh(database: MariaDB) -> dict[str, Any]:
    """What a session of a new connection shows."""
    with contextlib.closing(pymysql.connect(**database.login)) as conn:
        return {kind: seen(conn, look) for kind, (_, look) in KINDS.items()}


@pytest.mark.parametrize("policy", ["reset", "always"])
def test_nothing_travels(database: MariaDB, broker: BrokerProcess, fresh: dict[str, Any], policy: str) -> None:
    """Whatever a user leaves in a session, the next process finds it as a new connection is; and it is still the same connection."""
    pool = pool_on(database, broker, on_transfer=policy)
    with contextlib.closing(pool), neighbour(pool) as tell:
        first = tell("select connection_id()")
        for kind, (leave, look) in KINDS.items():
            tell(leave)
            with pool.connection() as conn:
                assert seen(conn, look) == fresh[kind], kind
                assert conn.encoding == "utf8"
        assert tell("select connection_id()") == first


def test_prepared_statements_do_not_travel(database: MariaDB, broker: BrokerProcess) -> None:
    """A name that one process has prepared is free in the next."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool), neighbour(pool) as tell:
        tell("prepare left_over from 'select 1'")
        with pool.connection() as conn, pytest.raises(pymysql.err.OperationalError, match="Unknown prepared statement"):
            rows(conn, "execute left_over")


def test_under_always_nothing_stays_in_a_process_either(database: MariaDB, broker: BrokerProcess, fresh: dict[str, Any]) -> None:
    """The next user in the same process finds a fresh session, too."""
    pool = pool_on(database, broker, on_transfer="always")
    with contextlib.closing(pool):
        for kind, (leave, look) in KINDS.items():
            with pool.connection() as conn:
                rows(conn, leave)
                conn.rollback()
            with pool.connection() as conn:
                assert seen(conn, look) == fresh[kind], kind


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_under_trust_what_is_said_to_leak_leaks(database: MariaDB, broker: BrokerProcess, fresh: dict[str, Any], kind: str) -> None:
    """Under trust session state travels, but for open transactions, and for settings that the server's status tells of."""
    pool = pool_on(database, broker, on_transfer="trust")
    leave, look = KINDS[kind]
    with contextlib.closing(pool), neighbour(pool) as tell:
        tell(leave)
        with pool.connection() as conn:
            found = seen(conn, look)
        assert (found == fresh[kind]) == (kind in STAYS)


def test_what_the_login_made_is_made_again(database: MariaDB, broker: BrokerProcess) -> None:
    """Character set, collation, sql_mode, autocommit, database and init_command of the arguments hold after every move."""
    arguments = {
        "charset": "latin1",
        "collation": "latin1_german1_ci",
        "sql_mode": "ANSI,NO_BACKSLASH_ESCAPES",
        "autocommit": True,
        "init_command": "set @greeting = 'hello', autocommit = 0",
    }
    look = "select @@character_set_client, @@collation_connection, @@sql_mode, @@autocommit, database(), @greeting"
    with contextlib.closing(pymysql.connect(**{**database.login, **arguments})) as conn:
        expected = rows(conn, look)
    pool = pool_on(database, broker, **arguments)
    with contextlib.closing(pool), neighbour(pool) as tell:
        for leave in ("select 1", "set sql_mode = '', autocommit = 0, @greeting = 'bye'", "set names utf8mb4", "use other"):
            tell(leave)
            with pool.connection() as conn:
                assert rows(conn, look) == expected
                assert rows(conn, "select %s", "back\\slash 'n quote") == (("back\\slash 'n quote",),)


def test_a_session_without_a_database_does_not_get_one(database: MariaDB, broker: BrokerProcess) -> None:
    """No command leaves a database: such a session is closed, and the next process gets a new one."""
    pool = pool_on(database, broker, database=None)
    with contextlib.closing(pool), neighbour(pool) as tell:
        tell("use other")
        with pool.connection() as conn:
            assert rows(conn, "select database()") == ((None,),)
        assert pool.get_stats()["closed"] == {"reset_failed": 1}


# What may be lent again.


def test_a_snapshot_is_not_lent_on(database: MariaDB, broker: BrokerProcess) -> None:
    """A SELECT begins a transaction where autocommit is off, of which PyMySQL is not told: the next user still sees what is committed since."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool):
        conn = pool.getconn()
        count = rows(conn, "select count(*) from items")[0][0]
        assert not conn.server_status & 1
        pool.putconn(conn)
        database.ask("insert into shop.items (name) values ('later')")
        with pool.connection() as conn:
            assert rows(conn, "select count(*) from items")[0][0] == count + 1


def test_a_plain_return_costs_no_round_trip(database: MariaDB, broker: BrokerProcess) -> None:
    """With autocommit, and in one process, lending and returning say nothing to the server."""
    pool = pool_on(database, broker, autocommit=True)
    with contextlib.closing(pool), database.root() as root, root.cursor() as cursor:
        with pool.connection() as conn:
            mine = ident(conn)
        cursor.execute("select query_id from information_schema.processlist where id = %s", (mine,))
        before = cursor.fetchall()
        for _ in range(10):
            with pool.connection():
                pass
        cursor.execute("select query_id from information_schema.processlist where id = %s", (mine,))
        assert cursor.fetchall() == before


def test_a_rest_of_results_is_read_or_the_session_is_closed(database: MariaDB, broker: BrokerProcess) -> None:
    """Further results of a procedure are read away at return; an unbuffered result, which may be endless, closes the session."""
    database.ask("create or replace procedure shop.two() begin select 1; select 2; end")
    pool = pool_on(database, broker)
    with contextlib.closing(pool):
        conn = pool.getconn()
        first = ident(conn)
        conn.cursor().callproc("two")
        pool.putconn(conn)
        conn = pool.getconn()
        assert ident(conn) == first
        cursor = conn.cursor(SSCursor)
        cursor.execute("select seq from seq_1_to_100000")
        assert cursor.fetchone() == (1,)
        pool.putconn(conn)
        cursor.close()
        with pool.connection() as conn:
            assert ident(conn) != first
        assert pool.get_stats()["closed"] == {"reset_failed": 1}


class Interrupted(BaseException):
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyMySQL's results cannot be interrupted in their constructor
def test_an_answer_that_is_still_to_come_is_nobody_elses(database: MariaDB, broker: BrokerProcess) -> None:
    """A signal ends the wait for an answer; the session is given back as if nothing was: it is closed, whoever catches what."""
    pool = pool_on(database, broker)

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with contextlib.closing(pool):
            for delay in (0.0002, 0.002, 0.02):
                conn = pool.getconn()
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    for n in range(10000):
                        rows(conn, "select %s, sleep(0.001)", n)
                    raise AssertionError("not interrupted")
                except Interrupted:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    pool.putconn(conn)
                for n in range(3):
                    with pool.connection() as conn:
                        assert rows(conn, "select %s", f"mine {n}") == ((f"mine {n}",),)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_timeout_of_pymysqls_closes_the_session(database: MariaDB, broker: BrokerProcess) -> None:
    """With ``read_timeout`` a slow statement fails as in PyMySQL, and its late answer reaches nobody."""
    pool = pool_on(database, broker, read_timeout=0.2)
    with contextlib.closing(pool):
        with pytest.raises(pymysql.err.OperationalError, match="Lost connection"), pool.connection() as conn:
            rows(conn, "select sleep(1)")
        with pool.connection() as conn:
            assert rows(conn, "select 'mine'") == (("mine",),)


def test_a_lent_connection_does_not_connect_by_itself(database: MariaDB, broker: BrokerProcess) -> None:
    """``ping(reconnect=True)`` after the server ended the session would be a connection outside the cap."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        conn = pool.getconn()
        database.ask(f"kill {ident(conn)}")
        with pytest.raises(pymysql.err.OperationalError, match="give it back"):
            conn.ping(reconnect=True)
        pool.putconn(conn)
        with pool.connection() as conn:
            conn.ping(reconnect=True)


# The server ends sessions.


def test_killed_and_timed_out_sessions_are_not_lent(database: MariaDB, broker: BrokerProcess) -> None:
    """KILL CONNECTION and wait_timeout end an idle session: the next checkout dials, and its user notices nothing."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool), database.root() as root, root.cursor() as cursor:
        with pool.connection() as conn:
            first = ident(conn)
        cursor.execute(f"kill connection {first}")
        eventually(lambda: first not in sessions_of(cursor))
        with pool.connection() as conn:
            second = ident(conn)
            rows(conn, "set wait_timeout = 1")
        assert second != first
        eventually(lambda: second not in sessions_of(cursor))
        with pool.connection() as conn:
            assert ident(conn) not in (first, second)
        assert pool.get_stats()["size"] == 1


def test_a_restart_of_the_server_is_survived(database: MariaDB, broker: BrokerProcess) -> None:
    """Sessions of before are closed, new ones dialed; checkouts meanwhile wait."""
    pool = pool_on(database, broker, max_size=2, timeout=30)
    with contextlib.closing(pool), neighbour(pool) as tell:
        tell("select 1")
        held = pool.getconn()
        database.stop()
        with pytest.raises(pymysql.err.OperationalError):
            rows(held, "select 1")
        pool.putconn(held)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(tell("select 'after'")))
        thread.start()
        database.start()
        thread.join(30)
        assert found == [[["after"]]]
        with pool.connection() as conn:
            assert rows(conn, "select 'here'") == (("here",),)


@pytest.mark.parametrize(("wrong", "said"), [({"password": "wrong"}, "Access denied"), ({"database": "nowhere"}, "nowhere")])
def test_a_login_that_will_never_work_fails_at_once(database: MariaDB, broker: BrokerProcess, wrong: dict[str, Any], said: str) -> None:
    """Wrong password, unknown database: DialFailed without waiting for ``timeout``, without the password, and nothing is held."""
    pool = pool_on(database, broker, timeout=60, **wrong)
    with contextlib.closing(pool):
        began = time.monotonic()
        with pytest.raises(mppool.DialFailed, match=said) as failure:
            pool.getconn()
        assert failure.value.permanent
        assert isinstance(failure.value, pymysql.err.OperationalError)
        assert failure.value.args[0] in (1044, 1045, 1049)
        assert time.monotonic() - began < 30
        assert "wrong" not in str(failure.value).replace(said, "")
        assert pool.get_stats()["size"] == 0


def test_arguments_that_pymysql_does_not_take_are_refused_at_once() -> None:
    """At construction, by name, without I/O."""
    for arguments in ({"hostname": "x"}, {"charset": "klingon"}, {"port": "3306"}, {"compress": True}, {"on_transfer": "maybe"}):
        with pytest.raises(mppool.OptionError):
            ConnectionPool(**arguments)


def test_logins_and_options_make_pools(database: MariaDB) -> None:
    """Who says the same shares a pool; another user, database, charset or policy is another pool. The name shows no secret."""
    login = database.login
    name = ConnectionPool(**login).name
    assert ConnectionPool(**{**login, "password": "other", "read_timeout": 3, "cursorclass": SSCursor}).name == name
    for other in (
        {"user": "other"},
        {"database": "other"},
        {"charset": "latin1"},
        {"on_transfer": "trust"},
        {"autocommit": True},
        {"init_command": "set @a=1"},
    ):
        assert ConnectionPool(**{**login, **other}).name != name


# What users know from elsewhere.


def test_a_block_is_a_transaction(database: MariaDB, broker: BrokerProcess) -> None:
    """``connection()`` commits at the end of its block and rolls back after an exception, keeping the session, as psycopg_pool does."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool):
        with pool.connection() as conn:
            first = ident(conn)
            rows(conn, "insert into items (name) values ('kept')")
        with pytest.raises(pymysql.err.IntegrityError), pool.connection() as conn:  # noqa: PT012 (the block is what is tested)
            rows(conn, "insert into items (name) values ('undone')")
            rows(conn, "insert into items (id) values (1), (1)")
        with pool.connection() as conn:
            assert ident(conn) == first
            assert rows(conn, "select name from items where name in ('kept', 'undone')") == (("kept",),)


def test_connect_is_given_back_by_close(database: MariaDB, broker: BrokerProcess) -> None:
    """``connect()`` is for code that closes what it opens: closing gives back, once; what was not committed is undone; use after that fails."""
    pool = pool_on(database, broker)
    with contextlib.closing(pool):
        conn = pool.connect()
        first = ident(conn)
        rows(conn, "insert into items (name) values ('never')")
        assert conn.open
        conn.close()
        assert not conn.open
        with pytest.raises(pymysql.err.InterfaceError):
            conn.cursor()
        with pytest.raises(pymysql.err.Error, match="Already closed"):
            conn.close()
        with pool.connect() as conn:
            assert ident(conn) == first
            assert rows(conn, "select * from items where name = 'never'") == ()
            conn.autocommit_mode = True
        pool.connect()  # forgotten: closed, and its permit is there again
        with pool.connect(timeout=10) as conn:
            assert ident(conn) != first


def test_spawned_workers_get_the_pool_by_its_arguments(database: MariaDB) -> None:
    """A pool is pickled as what it was made with."""
    pool = ConnectionPool(**database.login, max_size=3, on_transfer="trust")
    again = pickle.loads(pickle.dumps(pool))
    assert (again.name, again.options, again._driver.key()) == (pool.name, pool.options, pool._driver.key())


def test_a_forked_child_says_nothing_on_its_parents_sessions(database: MariaDB, broker: BrokerProcess) -> None:
    """A child that ends, with everything collected, ends none of its parent's sessions, lent or idle, not even one with a result half read."""
    pool = pool_on(database, broker, max_size=2)
    with contextlib.closing(pool):
        with pool.connection() as conn:
            ident(conn)
        lent = pool.getconn()
        other = pool.getconn()
        cursor = other.cursor(SSCursor)
        cursor.execute("select seq from seq_1_to_100000")
        first = ident(lent)
        pid = os.fork()
        if pid == 0:
            try:
                lent.close()
                cursor.close()
                other.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert ident(lent) == first
        assert len(cursor.fetchall()) == 100000
        cursor.close()
        pool.putconn(lent)
        pool.putconn(other)


# Storms.


def asks(pool: ConnectionPool) -> Callable[[], Ask]:
    def begin() -> Ask:
        def one(nonce: str) -> None:
            with pool.connection(timeout=20) as conn:
                found = rows(conn, "select %s, @left, @@autocommit, database()", nonce)
                assert found == ((nonce, None, 0, "shop"),), found
                if random.random() < 0.3:
                    rows(conn, "insert into items (name) values (%s)", nonce)
                if random.random() < 0.1:
                    conn.rollback()
                if random.random() < 0.05:
                    rows(conn, "set @left = 1, autocommit = 1")
                    conn.autocommit(False)
                    rows(conn, "set @left = null")

        return one

    return begin


@pytest.mark.storm
def test_a_storm_of_workers(database: MariaDB, broker: BrokerProcess, request: pytest.FixtureRequest) -> None:
    """12 workers on a cap of 3, killed all the time: the server never has more sessions, no reply is crossed, connections are made for kills only."""
    cap, seconds = 3, float(request.config.getoption("--storm-seconds"))
    pool = pool_on(database, broker, max_size=cap)
    with contextlib.closing(pool), database.root() as root, root.cursor() as cursor, Storm(asks(pool), 12) as storm:
        before = int(database.ask("show status like 'Connections'")[0][1])
        with Peak(lambda: len(sessions_of(cursor))) as calm:
            storm.run(seconds / 8, kill_every=None)
        with Peak(lambda: len(sessions_of(cursor))) as peak:
            storm.run(seconds / 2, kill_every=0.1)
        made = int(database.ask("show status like 'Connections'")[0][1]) - before - 1
        storm.end()
        stats = pool.get_stats()
        print(f"\nkills {storm.kills}, peak {calm.most} and {peak.most} of {cap} in {calm.samples} and {peak.samples} looks")
        print(f"connections made {made}, requests {storm.requests}, closed {stats['closed']}")
        assert storm.failures == []
        assert storm.requests > 100
        assert calm.most == cap
        assert peak.most <= cap + 1  # the server takes a killed worker's session off its list a moment after it has closed the connection
        assert made <= cap + storm.kills
        with contextlib.ExitStack() as whole:
            for _ in range(cap):
                ident(whole.enter_context(pool.connection(timeout=20)))


@pytest.mark.parametrize("policy", ["reset", "always"])
def test_the_driver_keeps_its_promises(database: MariaDB, policy: str) -> None:
    """The pool's own checks, with every kind of state that is tried above."""

    def an_answer_that_is_not_read(conn: Any) -> None:
        conn._write_bytes(b"\x09\0\0\0\x03select 7")

    def an_unbuffered_result(conn: Any) -> None:
        conn.kept = conn.cursor(SSCursor)  # else it is collected, and reads its rest then
        conn.kept.execute("select seq from seq_1_to_100000")

    ways = {kind: lambda conn, leave=leave: rows(conn, leave) for kind, (leave, _) in KINDS.items()}
    report = check_driver(
        PyMySQLDriver(**database.login, on_transfer=policy),
        identity=ident,
        ask=lambda conn, nonce: rows(conn, "select %s", nonce)[0][0],
        look=lambda conn: [seen(conn, look) for _, look in KINDS.values()],
        dirty={**ways, "an answer that is not read": an_answer_that_is_not_read, "an unbuffered result": an_unbuffered_result},
        secrets=["secret"],
        unreachable=PyMySQLDriver(**{**database.login, "port": 1}),
        timeout=40,
        only=[] if policy == "reset" else ["clean_after_use", "moves", "dirt", "forked"],
    )
    print(report)
    assert not report.skipped
