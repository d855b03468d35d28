"""SQLAlchemy over real servers: sessions move between workers under psycopg, pg8000 and PyMySQL, and the server is the judge."""

from __future__ import annotations

import gc
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, exc, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from mppool.integrations.sqlalchemy import SharedPool
from tests.helpers.mariadb import mariadb, needs_mariadb, sessions_of
from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.storm import Ask, Peak, Storm

POSTGRES = [pytest.param("psycopg", marks=needs_postgres), pytest.param("pg8000", marks=needs_postgres)]


class Site:
    """A database of a test's own, engines for it, and what its server says of them."""

    def __init__(self, driver: str, url: str, ask: Callable[..., Any], count: Callable[[], int]) -> None:
        self.driver = driver
        self.url = url
        self.ask = ask
        self.count = count  # of the engines' sessions
        self.who = text("select connection_id()" if driver == "pymysql" else "select pg_backend_pid()")
        self.made: list[Engine] = []

    def engine(self, **options: Any) -> Engine:
        made = create_engine(self.url, poolclass=SharedPool, **{"pool_size": 1, "pool_timeout": 10, **options})
        self.made.append(made)
        return made

    def pid(self, engine: Engine) -> int:
        """The server's own number of the session that is checked out."""
        with engine.connect() as connection:
            return int(connection.scalar(self.who))


@pytest.fixture(params=POSTGRES)
def postgres_site(request: pytest.FixtureRequest, database: Database, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("MPPOOL_BROKER", broker.path)
    site = Site(request.param, url_of(request.param, database), database.ask, database.count)
    site.database = database  # type: ignore[attr-defined]
    yield site
    for engine in site.made:
        engine.dispose()


def url_of(driver: str, database: Database) -> str:
    return f"postgresql+{driver}://{database.user}:{database.password}@127.0.0.1:{database.port}/{database.name}"


@pytest.fixture(scope="module")
def maria() -> Iterator[Any]:
    with mariadb() as it:
        yield it


MYSQL = pytest.param("pymysql", marks=needs_mariadb)


@pytest.fixture(params=[*POSTGRES, MYSQL])
def site(request: pytest.FixtureRequest, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site_over(request, broker, monkeypatch)


@pytest.fixture(params=[POSTGRES[0], MYSQL])
def either(request: pytest.FixtureRequest, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """For what does not depend on the client."""
    yield from site_over(request, broker, monkeypatch)


def site_over(request: pytest.FixtureRequest, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("MPPOOL_BROKER", broker.path)
    if request.param == "pymysql":
        server = request.getfixturevalue("maria")
        root = server.root()
        login = server.login
        url = f"mysql+pymysql://{login['user']}:{login['password']}@127.0.0.1:{server.port}/{login['database']}?ssl_disabled=true"
        made = Site("pymysql", url, server.ask, lambda: len(sessions_of(root.cursor())))
    else:
        database = request.getfixturevalue("database")
        made = Site(request.param, url_of(request.param, database), database.ask, database.count)
    yield made
    for engine in made.made:
        engine.dispose()


def in_another(work: Callable[[], Any]) -> Any:
    """What it returns in another process, which has ended then."""
    with fork(lambda _: work()) as [child]:
        return child.result()


def turns(engine: Engine, *works: Callable[[Any], Any]) -> list[Any]:
    """Each in a process of its own, which lives on, one after the other, on the engine's only session."""

    def worker(work: Callable[[Any], Any]) -> Callable[[Child], Any]:
        def run(child: Child) -> None:
            while child.hear():
                with engine.connect() as connection:
                    result = work(connection)
                    connection.commit()
                child.tell(result)

        return run

    with fork(*(worker(work) for work in works)) as children:
        results = []
        for child in children:
            child.tell(True)
            results.append(child.hear())
        return results


def test_one_session_serves_all_workers(site: Site) -> None:
    """Made in one process, adopted in others, and again in the first: one login, one backend, "connect" in each process."""
    engine = site.engine()
    said: list[str] = []
    for name in ("connect", "close"):
        event.listen(engine, name, lambda *_, name=name: said.append(name))
    first = site.pid(engine)

    def other() -> tuple[int, list[str]]:
        said.clear()
        return site.pid(engine), said

    for _ in range(3):
        assert in_another(other) == [first, ["connect"]]
    assert site.count() == 1
    assert site.pid(engine) == first
    assert said == ["connect", "close", "connect"]  # adopted is new: the older DBAPI connection was let go of
    assert engine.pool.get_stats()["dials"] == 1  # type: ignore[attr-defined]


LEFT = {
    "select set_config('app.mine', 'left', false)": "select coalesce(current_setting('app.mine', true), '')",  # a name that was ever set stays known, and empty
    "create temporary table mine (x int)": "select to_regclass('pg_temp.mine')::text",
    "select pg_advisory_lock(7)": "select count(*) from pg_locks where locktype = 'advisory'",
    "listen mine": "select count(*) from pg_listening_channels()",
    "prepare mine as select 1": "select count(*) from pg_prepared_statements where name = 'mine'",
    "set statement_timeout = 77": "select current_setting('statement_timeout')",
    "set session characteristics as transaction read only": "select current_setting('default_transaction_read_only')",
}


def test_nothing_of_another_worker_is_seen(postgres_site: Site) -> None:
    """Settings, temporary tables, locks, LISTEN, prepared statements: none of it travels with the session."""
    engine = postgres_site.engine()

    def look(connection: Any) -> list[Any]:
        return [connection.scalar(postgres_site.who), *(connection.scalar(text(question)) for question in LEFT.values())]

    def leave(connection: Any) -> Any:
        for statement in LEFT:
            connection.execute(text(statement))
            connection.commit()
        return look(connection)

    before, left, after = turns(engine, look, leave, look)
    assert before[0] == left[0] == after[0]
    assert left[1:] == ["left", "mine", 1, 1, 1, "77ms", "on"]
    assert after == before


def test_what_connect_listeners_set_is_set_wherever_the_session_goes(site: Site) -> None:
    """In the process that adopts it, and again in the first when it comes back."""
    engine = site.engine()
    asked = text("select @mine" if site.driver == "pymysql" else "select current_setting('app.mine')")

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("set @mine = 'here'" if site.driver == "pymysql" else "set app.mine = 'here'")
        cursor.close()
        connection.commit()

    def ask(engine: Engine = engine) -> Any:
        with engine.connect() as connection:
            return connection.scalar(asked)

    assert [ask(), in_another(ask), ask(), in_another(ask), ask()] == ["here"] * 5


def test_pre_ping_pings_what_was_adopted(either: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An adopted connection is not one that logged in just now; neither is one that comes back."""
    engine = either.engine(pool_pre_ping=True, echo_pool="debug")

    def pings() -> int:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="sqlalchemy.pool"):
            either.pid(engine)
        return sum("pre-ping on connection" in record.getMessage() for record in caplog.records)

    assert pings() == 0
    assert in_another(pings) == 1
    assert pings() == 1


def test_a_session_that_died_is_not_seen_by_anybody(either: Site) -> None:
    """The server ends it while it is idle: the next checkout finds out, without a ping."""
    engine = either.engine()
    first = either.pid(engine)
    either.ask(f"kill {first}" if either.driver == "pymysql" else f"select pg_terminate_backend({first})")
    eventually(lambda: either.count() == 0)
    assert in_another(lambda: either.pid(engine)) != first
    assert either.count() == 1


def test_recycling_counts_from_the_login(either: Site) -> None:
    """A session that is old enough is replaced, by whichever process meets it, also if that has only just adopted it."""
    engine = either.engine(pool_recycle=0.5)
    first = either.pid(engine)
    began = time.monotonic()
    while time.monotonic() - began < 0.52:
        last = in_another(lambda: either.pid(engine))
    assert in_another(lambda: either.pid(engine)) != first
    assert last is not None
    assert either.count() == 1


def test_a_broken_connection_is_replaced_and_those_as_old_are_distrusted(either: Site) -> None:
    """The server ends it while it is lent: exc.OperationalError or so once, then all is well, and the idle ones were replaced, too."""
    engine = either.engine(pool_size=2)
    with engine.connect() as one, engine.connect() as other:
        pids = [int(it.scalar(either.who)) for it in (one, other)]
    with engine.connect() as connection:
        mine = int(connection.scalar(either.who))
        either.ask(f"kill {mine}" if either.driver == "pymysql" else f"select pg_terminate_backend({mine})")
        eventually(lambda: either.count() == 1)
        with pytest.raises(exc.DBAPIError) as raised:
            connection.execute(text("select 1"))
        assert raised.value.connection_invalidated
        connection.rollback()
        assert int(connection.scalar(either.who)) not in pids
    assert eventually(lambda: either.count() == 1)


def test_sql_errors_cost_no_session(either: Site) -> None:
    """Syntax, constraints, divisions: reported, rolled back, and the session goes on."""
    engine = either.engine()
    first = either.pid(engine)
    for statement in ("select nothing from nowhere", "selct 1"):
        with engine.connect() as connection, pytest.raises(exc.ProgrammingError):
            connection.execute(text(statement))
    assert either.pid(engine) == first
    assert in_another(lambda: either.pid(engine)) == first


@pytest.mark.parametrize("postgres_site", POSTGRES[:1], indirect=True)
def test_a_result_that_is_read_on_after_the_return_takes_nobodys_answers(postgres_site: Site) -> None:
    """With psycopg: to a cursor on the server, and to whoever kept the DBAPI connection, it is closed. Lent again, it works again."""
    engine = postgres_site.engine()
    with engine.connect() as connection:
        rows = connection.execution_options(stream_results=True, max_row_buffer=5).execute(text("select generate_series(1, 1000)"))
        rows.fetchone()
        raw: Any = connection.connection.driver_connection
    for read in (rows.fetchall, lambda: raw.execute("select 1")):
        with pytest.raises((exc.OperationalError, psycopg.OperationalError), match="the connection is closed"):
            read()
    with engine.connect() as connection:
        again: Any = connection.connection.driver_connection
        assert again is raw, "not the same connection: nothing was tried"
        assert raw.execute("select 1").fetchone() == (1,)


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
def test_a_detached_session_counts_until_it_is_closed_or_forgotten(site: Site) -> None:
    """For all processes. It is closed by ``close()``, or when nobody has it any more."""
    engine = site.engine(pool_timeout=0.2)

    def refused() -> str:
        try:
            site.pid(engine)
        except exc.TimeoutError as error:
            return error.code or ""
        return ""

    for forget in (False, True):
        connection = engine.connect()
        connection.detach()
        assert connection.scalar(site.who) is not None
        connection.rollback()
        assert in_another(refused) == "3o7r"
        assert site.count() == 1
        if not forget:
            connection.close()
        del connection
        gc.collect()
        eventually(lambda: site.count() == 0)
        assert in_another(refused) == ""


def test_autocommit_engines_stay_so(site: Site) -> None:
    """``isolation_level="AUTOCOMMIT"`` holds in each process, at every checkout, before and after the session was elsewhere; it costs no login."""
    engine = site.engine(isolation_level="AUTOCOMMIT")
    table = f"auto_{site.driver}"
    with engine.connect() as connection:
        connection.execute(text(f"drop table if exists {table}"))
        connection.execute(text(f"create table {table} (x int)"))

    def insert() -> int:
        with engine.connect() as connection:
            connection.execute(text(f"insert into {table} values (1)"))
            return int(connection.scalar(site.who))

    pids = {insert(), insert(), in_another(insert), insert(), in_another(insert)}
    assert len(pids) == 1
    with engine.connect() as connection:
        assert connection.scalar(text(f"select count(*) from {table}")) == 5


def test_an_isolation_level_of_one_checkout_does_not_travel(either: Site) -> None:
    """Neither to the next checkout here nor to another process."""
    engine = either.engine()
    before = in_another(lambda: level(engine))

    with engine.connect() as connection:
        connection.execution_options(isolation_level="SERIALIZABLE")
        assert connection.get_isolation_level() == "SERIALIZABLE"
    assert [level(engine), in_another(lambda: level(engine)), level(engine)] == [before] * 3


def level(engine: Engine) -> str:
    with engine.connect() as connection:
        return connection.get_isolation_level()


def test_a_wrong_password_is_said_at_once(either: Site) -> None:
    """The DBAPI's own error, wrapped as SQLAlchemy does; no waiting for the pool's time-out."""
    scheme, _, rest = either.url.partition("://")
    login, _, where = rest.partition("@")
    engine = create_engine(f"{scheme}://{login.partition(':')[0]}:wrong@{where}", poolclass=SharedPool, pool_name="wrong", pool_timeout=30)
    began = time.monotonic()
    with pytest.raises(exc.DBAPIError):
        engine.connect()
    assert time.monotonic() - began < 20
    engine.dispose()


def test_trust_leaves_the_session_as_it_was(postgres_site: Site) -> None:
    """``pool_on_transfer="trust"``: no reset, so settings of other workers are met; a connection this process knows is the same object again."""
    engine = postgres_site.engine(pool_on_transfer="trust")
    connects: list[Any] = []
    event.listen(engine, "connect", lambda connection, _: connects.append(connection))
    asked = text("select current_setting('app.mine', true)")
    with engine.connect() as connection:
        assert connection.scalar(asked) is None

    def leave() -> None:
        with engine.connect() as connection:
            connection.execute(text("set app.mine = 'left'"))
            connection.commit()

    in_another(leave)
    with engine.connect() as connection:
        assert connection.scalar(asked) == "left"
    assert len(connects) == 1


def test_always_leaves_nothing_for_anybody(postgres_site: Site) -> None:
    """``pool_on_transfer="always"``: reset at every return, so that not even the next request in this process meets anything; "connect" each time."""
    engine = postgres_site.engine(pool_on_transfer="always")
    connects: list[Any] = []

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connects.append(record)
        cursor = connection.cursor()
        cursor.execute("set app.listener = 'here'")
        cursor.close()
        connection.commit()

    for _ in range(3):
        with engine.connect() as connection:
            seen = connection.execute(text("select coalesce(current_setting('app.mine', true), ''), current_setting('app.listener')")).one()
            assert tuple(seen) == ("", "here")
            connection.execute(text("set app.mine = 'left'"))
            connection.commit()
    assert len(connects) == 3
    assert postgres_site.count() == 1


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[int]


def test_orm_sessions_work_as_ever(postgres_site: Site) -> None:
    """Flush, rollback, commit, streaming, in several processes over one session."""
    engine = postgres_site.engine()
    Base.metadata.create_all(engine)

    def add() -> int:
        with Session(engine) as session:
            session.add(Thing(owner=os.getpid()))
            session.flush()
            session.rollback()
            session.add_all(Thing(owner=os.getpid()) for _ in range(3))
            session.commit()
            return len(session.scalars(select(Thing).where(Thing.owner == os.getpid())).all())

    assert [add(), in_another(add), in_another(add), add()] == [3, 3, 3, 6]
    with engine.connect() as connection:
        rows = connection.execution_options(stream_results=True, max_row_buffer=2).execute(select(Thing.id))
        assert len(rows.fetchmany(5)) == 5
        rows.close()
    with engine.connect() as connection:
        assert len(connection.execute(select(Thing.id)).all()) == 12


def asks(engine: Engine, who: Any) -> Callable[[], Ask]:
    """A transaction whose setting and table must be nobody else's."""

    def begin() -> Ask:
        def one(nonce: str) -> None:
            with engine.begin() as connection:
                seen = connection.scalar(text("select current_setting('app.nonce', true)"))
                assert not seen or seen.startswith(nonce.partition("-")[0] + "-"), f"{nonce} sees {seen}"
                connection.execute(text("select set_config('app.nonce', :nonce, false)"), {"nonce": nonce})
                assert connection.scalar(text("select :nonce || ''"), {"nonce": nonce}) == nonce
                if random.random() < 0.3:
                    connection.execute(text("create temporary table if not exists t (x text) on commit drop"))

        return one

    return begin


@pytest.mark.storm
def test_a_storm_of_workers(postgres_site: Site, request: pytest.FixtureRequest) -> None:
    """Twelve workers on four sessions, killed all the time: never a fifth backend, no setting of another worker, everybody served, the cap whole after."""
    cap, seconds = 4, min(float(request.config.getoption("--storm-seconds")), 30.0) / 3
    engine = postgres_site.engine(pool_size=cap, pool_timeout=20)
    database: Database = postgres_site.database  # type: ignore[attr-defined]
    with Storm(asks(engine, postgres_site.who), 12) as storm, Peak(postgres_site.count) as peak:
        storm.run(seconds, kill_every=0.15)
        storm.end()
    assert storm.failures == []
    assert storm.requests > 20
    assert peak.most <= cap
    assert peak.samples > 3
    logins = database.logins()
    print(f"\n{postgres_site.driver}: {storm.requests} transactions, {storm.kills} kills, {logins} logins, at most {peak.most} backends")
    assert logins <= cap + storm.kills + 12  # whose end is a kill, too
    connections = [engine.connect() for _ in range(cap)]
    for connection in connections:
        assert connection.scalar(text("select 1")) == 1
        connection.close()
