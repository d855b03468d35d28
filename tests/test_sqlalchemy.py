"""What SQLAlchemy's documentation says of pools, tried on SharedPool, over sqlite3, whose connections stay in their process."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, create_pool_from_url, engine_from_config, event, exc, text

import mppool
from mppool.integrations.sqlalchemy import SharedPool
from tests.helpers.processes import BrokerProcess, Child, eventually, fork

EVENTS = ("connect", "first_connect", "checkout", "checkin", "reset", "invalidate", "soft_invalidate", "close", "detach", "close_detached")

Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path, socket_path: str) -> Iterator[Make]:
    """Engines over one database file, disposed of afterwards."""
    made: list[Engine] = []

    def engine(**options: Any) -> Engine:
        options = {"pool_size": 2, "pool_timeout": 0.2, "pool_broker": socket_path, **options}
        made.append(create_engine(f"sqlite:///{tmp_path}/db", poolclass=SharedPool, **options))
        return made[-1]

    yield engine
    for it in made:
        it.dispose()


def heard(engine: Engine) -> list[str]:
    """The names of the pool's events, as they come."""
    said: list[str] = []

    def listen(name: str) -> None:
        event.listen(engine, name, lambda *_: said.append(name))

    for name in EVENTS:
        listen(name)
    return said


def counts(engine: Engine) -> tuple[int, int]:
    """Checked out, and idle, of all processes."""
    pool = engine.pool
    assert isinstance(pool, SharedPool)
    return pool.checkedout(), pool.checkedin()


def shared(engine: Engine) -> SharedPool:
    assert isinstance(engine.pool, SharedPool)
    return engine.pool


def driver_of(connection: Any) -> Any:
    return connection.connection.driver_connection


def test_events_are_fired_as_documented(make: Make) -> None:
    """A new connection, then the same one again; an error in between changes nothing."""
    engine = make()
    said = heard(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
        with pytest.raises(exc.OperationalError):
            connection.execute(text("select nothing from nowhere"))
    assert said == ["first_connect", "connect", "checkout", "reset", "checkin"]
    said.clear()
    with engine.connect():
        pass
    assert said == ["checkout", "reset", "checkin"]


def test_a_checkout_times_out_with_sqlalchemys_error(make: Make) -> None:
    """``pool_timeout``: exc.TimeoutError with the code that SQLAlchemy documents, and the numbers that an operator needs."""
    engine = make(pool_size=1)
    with engine.connect(), pytest.raises(exc.TimeoutError) as raised:
        engine.connect()
    assert raised.value.code == "3o7r"
    assert "max_size=1, in_use=1" in str(raised.value)
    with engine.connect():
        pass


def test_pool_size_and_overflow_are_the_cap_of_all_processes(make: Make) -> None:
    """Two in this process, one in a child: the fourth has to wait, wherever it is."""
    engine = make(pool_size=2, max_overflow=1)
    with engine.connect(), engine.connect():

        def work(child: Child) -> list[str]:
            with engine.connect():
                child.tell()
                child.hear()
                try:
                    engine.connect()
                except exc.TimeoutError as error:
                    return [error.code or ""]
            return []

        with fork(work) as [child]:
            child.hear()
            with pytest.raises(exc.TimeoutError):
                engine.connect()
            child.tell()
            assert child.result() == ["3o7r"]


@pytest.mark.parametrize("options", [{"pool_size": 0}, {"max_overflow": -1}])
def test_no_limit_is_refused(make: Make, options: dict[str, int]) -> None:
    """QueuePool's ways to say "any number" are an error here, said at once."""
    with pytest.raises(exc.ArgumentError, match="strict cap"):
        make(**options)


def test_unknown_options_are_refused(make: Make) -> None:
    """By create_engine, as always; in ``pool_options``, by name, at the first use."""
    with pytest.raises(TypeError, match="pool_siz"):
        make(pool_siz=3)
    with pytest.raises(mppool.OptionError, match="max_wait"):
        make(pool_options={"max_wait": 3}).connect()


def test_an_invalidated_connection_is_closed_and_replaced(make: Make) -> None:
    """``Connection.invalidate()``: closed at once, and the Connection goes on with another; its place in the cap is free."""
    engine = make(pool_size=1)
    said = heard(engine)
    with engine.connect() as connection:
        first = driver_of(connection)
        connection.invalidate()
        assert connection.invalidated
        assert said[-3:] == ["invalidate", "close", "checkin"]
        assert counts(engine) == (0, 0)
        assert connection.scalar(text("select 1")) == 1
        assert driver_of(connection) is not first


def test_a_softly_invalidated_connection_is_replaced_after_its_return(make: Make) -> None:
    """``invalidate(soft=True)``: usable until it is returned, then gone."""
    engine = make()
    said = heard(engine)
    with engine.connect() as connection:
        first = driver_of(connection)
        connection.connection.invalidate(soft=True)
        assert connection.scalar(text("select 1")) == 1
    assert "soft_invalidate" in said
    assert said[-1] == "close"
    with engine.connect() as connection:
        assert driver_of(connection) is not first


def test_info_lasts_as_long_as_the_connection(make: Make) -> None:
    """``Connection.info`` is kept over returns, and empty for the one that replaces it."""
    engine = make(pool_size=1)
    with engine.connect() as connection:
        connection.info["mine"] = 1
    with engine.connect() as connection:
        assert connection.info == {"mine": 1}
        connection.invalidate()
        connection.execute(text("select 1"))
        assert connection.info == {}


def test_a_detached_connection_counts_until_it_is_closed(make: Make) -> None:
    """``Connection.detach()``: no longer the pool's, and still one of the cap."""
    engine = make(pool_size=1)
    said = heard(engine)
    connection = engine.connect()
    connection.detach()
    connection.info["mine"] = 1
    assert "detach" in said
    assert connection.scalar(text("select 1")) == 1
    with pytest.raises(exc.TimeoutError):
        engine.connect()
    connection.close()
    assert said[-1] == "close_detached"
    with engine.connect() as connection:
        assert connection.info == {}


def test_a_listener_can_refuse_a_connection_at_checkout(make: Make) -> None:
    """exc.DisconnectionError in "checkout": the connection is closed, and another one is tried."""
    engine = make(pool_size=1)
    refused: list[Any] = []

    @event.listens_for(engine, "checkout")
    def checkout(connection: Any, record: Any, proxy: Any) -> None:
        if not refused:
            refused.append(connection)
            raise exc.DisconnectionError("not this one")

    with engine.connect() as connection:
        assert driver_of(connection) is not refused[0]
        assert counts(engine) == (1, 0)


def test_a_connect_listener_that_fails_leaves_nothing(make: Make) -> None:
    """Its exception is raised, the connection is closed, its place is free."""
    engine = make(pool_size=1)
    fails = [True]

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        if fails:
            raise ZeroDivisionError(fails.pop())

    with pytest.raises(ZeroDivisionError):
        engine.connect()
    assert counts(engine) == (0, 0)
    with engine.connect():
        assert counts(engine) == (1, 0)


def test_do_connect_listeners_may_change_what_is_connected_with(make: Make, tmp_path: Path) -> None:
    """Their changes hold for the connection, and for what the pool is called."""
    engine = make()

    @event.listens_for(engine, "do_connect")
    def do_connect(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[0] = str(tmp_path / "other")

    with engine.connect() as connection:
        connection.execute(text("create table t (x int)"))
        assert (tmp_path / "other").exists()
        assert "other" in shared(engine).get_stats()["name"]


def test_creators_and_listeners_that_connect_themselves_need_a_name(make: Make, tmp_path: Path) -> None:
    """Nobody knows where they lead: without ``pool_name`` it is an error that says so, with it they work."""
    import sqlite3

    def creator() -> sqlite3.Connection:
        return sqlite3.connect(tmp_path / "own", check_same_thread=False)

    with pytest.raises(exc.ArgumentError, match="pool_name="):
        make(creator=creator).connect()
    listened = make()
    event.listen(listened, "do_connect", lambda *_: creator())
    with pytest.raises(exc.ArgumentError, match="pool_name="):
        listened.connect()
    listened = make(pool_name="listened")
    event.listen(listened, "do_connect", lambda *_: creator())
    for engine in (make(creator=creator, pool_name="own"), listened):
        with engine.connect() as connection:
            assert connection.scalar(text("select file from pragma_database_list")).endswith("/own")


def test_a_failing_dbapi_is_sqlalchemys_operational_error_at_once(tmp_path: Path, socket_path: str) -> None:
    """The database cannot be reached: no waiting, the DBAPI's own error as its cause, and everything as before once it can be."""
    directory = tmp_path / "later"
    engine = create_engine(f"sqlite:///{directory}/db", poolclass=SharedPool, pool_broker=socket_path, pool_timeout=20)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(exc.OperationalError, match="unable to open"):
            engine.connect()
    assert time.monotonic() - began < 10
    directory.mkdir()
    eventually(lambda: connects(engine))
    engine.dispose()


def connects(engine: Engine) -> bool:
    try:
        engine.connect().close()
    except exc.OperationalError:
        return False
    return True


def test_recycled_connections_are_replaced(make: Make) -> None:
    """``pool_recycle``: what is older is closed at checkout, with the events of a close and of a new connection."""
    engine = make(pool_recycle=0.05)
    said = heard(engine)
    with engine.connect() as connection:
        first = driver_of(connection)
    time.sleep(0.06)
    with engine.connect() as connection:
        assert driver_of(connection) is not first
    assert said.count("connect") == 2
    assert said.count("close") == 1


def test_pre_ping_replaces_what_does_not_answer(make: Make) -> None:
    """``pool_pre_ping``: a broken connection is never seen by the user, and everything as old as it is distrusted."""
    engine = make(pool_pre_ping=True)
    with engine.connect() as one, engine.connect() as other:
        broken, older = driver_of(one), driver_of(other)
    broken.close()
    with engine.connect() as one, engine.connect() as other:
        assert one.scalar(text("select 1")) == other.scalar(text("select 1")) == 1
        assert broken not in (driver_of(one), driver_of(other))
        assert older not in (driver_of(one), driver_of(other)) or driver_of(one) is older


@pytest.mark.parametrize(("style", "kept"), [("rollback", 0), ("commit", 1), (None, 0)])
def test_reset_on_return(make: Make, style: str | None, kept: int) -> None:
    """What was left open is rolled back, or committed; with None it is the listener's, and here nobody's."""
    engine = make(pool_reset_on_return=style)
    with engine.begin() as connection:
        connection.execute(text("create table if not exists t (x int)"))
    raw = engine.raw_connection()
    raw.cursor().execute("insert into t values (1)")
    raw.close()
    if style is not None:
        with engine.connect() as connection:
            assert connection.scalar(text("select count(*) from t")) == kept
    else:
        other = engine.raw_connection()
        assert other.dbapi_connection.in_transaction  # type: ignore[union-attr]
        other.close()


def test_an_isolation_level_for_one_connection_is_put_back(make: Make) -> None:
    """``execution_options(isolation_level=...)`` holds until the return."""
    engine = make(pool_size=1)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        assert driver_of(connection).isolation_level is None
    with engine.connect() as connection:
        assert driver_of(connection).isolation_level == ""


def test_a_forgotten_connection_comes_back(make: Make) -> None:
    """Garbage collection returns it, as with QueuePool; also out of a reference cycle."""
    engine = make(pool_size=1)
    connection = engine.connect()
    cycle: list[Any] = [connection]
    cycle.append(cycle)
    del connection, cycle
    gc.collect()
    with engine.connect():
        assert counts(engine) == (1, 0)


def test_dispose_closes_and_begins_anew(make: Make) -> None:
    """``Engine.dispose()``: what is idle is closed; what is checked out works on, and is closed at its return."""
    engine = make()
    said = heard(engine)
    kept = engine.connect()
    with engine.connect():
        pass
    engine.dispose()
    assert said.count("close") == 1
    assert kept.scalar(text("select 1")) == 1
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    kept.close()
    assert said.count("close") == 2
    assert counts(engine) == (0, 1)


def test_a_disposed_pool_can_be_used_again(make: Make) -> None:
    """``Pool.dispose()`` without ``recreate()``, as QueuePool allows."""
    engine = make()
    pool = engine.pool
    with engine.connect():
        pass
    pool.dispose()
    pool.connect().close()
    assert counts(engine) == (0, 1)


def test_dispose_without_closing_keeps_the_connections(make: Make) -> None:
    """``dispose(close=False)`` in the same process: nothing is closed, nothing is lost, nothing is counted twice."""
    engine = make()
    said = heard(engine)
    with engine.connect() as kept:
        with engine.connect():
            pass
        engine.dispose(close=False)
        assert "close" not in said
        with engine.connect() as connection:
            assert connection.scalar(text("select 1")) == 1
            assert counts(engine) == (2, 0)
        assert kept.scalar(text("select 1")) == 1
    assert counts(engine) == (0, 2)


@pytest.mark.parametrize("dispose", [False, True])
def test_a_forked_engine_works(make: Make, dispose: bool) -> None:
    """Used before the fork, used after it, in both: the parent's connections are left alone, with ``dispose(close=False)`` or without."""
    engine = make(pool_size=4)
    with engine.connect() as connection:
        connection.execute(text("select 1"))

        def work(child: Child) -> int:
            if dispose:
                engine.dispose(close=False)
            gc.collect()
            with engine.connect() as mine:
                assert driver_of(mine) is not driver_of(connection)
                return int(mine.scalar(text("select 2")))

        with fork(work) as [child]:
            assert child.result() == 2
        assert connection.scalar(text("select 3")) == 3


def test_threads_share_a_pool(make: Make) -> None:
    """Eight threads over two connections: everybody is served, never more than two."""
    engine = make(pool_timeout=20)
    done: list[int] = []

    def work() -> None:
        for _ in range(50):
            with engine.connect() as connection:
                done.append(connection.scalar(text("select 1")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 400
    assert shared(engine).get_stats()["dials"] <= 2


def test_status_speaks_of_all_processes(make: Make) -> None:
    """``Pool.status()``, ``size()``, ``checkedin()``, ``checkedout()``, ``overflow()``, ``timeout()``: QueuePool's, host-wide."""
    engine = make(pool_size=3, max_overflow=1)
    pool = shared(engine)
    assert pool.status() == "Pool size: 4  Connections in pool: 0 Current Overflow: 0 Current Checked out connections: 0"
    assert (pool.size(), pool.overflow(), pool.timeout()) == (4, 0, 0.2)
    with engine.connect():

        def work(child: Child) -> None:
            with engine.connect():
                child.tell()
                child.hear()

        with fork(work) as [child]:
            child.hear()
            assert pool.status().startswith("Pool size: 4  Connections in pool: 0 Current Overflow: 0 Current Checked out connections: 2 (")
            child.tell()
            child.result()


def test_resize_and_drain(make: Make) -> None:
    """The cap can be changed, and all connections replaced, from any engine."""
    engine = make(pool_size=1)
    with engine.connect() as connection:
        first = driver_of(connection)
        shared(engine).resize(2)
        with engine.connect():
            assert shared(engine).size() == 2
    shared(engine).drain()
    with engine.connect() as connection:
        assert driver_of(connection) is not first


def test_one_name_is_one_pool_and_one_meaning(make: Make, tmp_path: Path, socket_path: str) -> None:
    """Engines of one ``pool_name`` share the cap; one that leads elsewhere is refused."""
    one, other = make(pool_size=1, pool_name="db"), make(pool_size=1, pool_name="db")
    with one.connect(), pytest.raises(exc.TimeoutError):
        other.connect()
    elsewhere = create_engine(f"sqlite:///{tmp_path}/elsewhere", poolclass=SharedPool, pool_name="db", pool_broker=socket_path)
    with one.connect(), pytest.raises(mppool.ConfigMismatch):
        elsewhere.connect()


def test_engine_from_config_and_pool_from_url(tmp_path: Path, socket_path: str) -> None:
    """Options from a configuration file, and a pool without an engine."""
    url = f"sqlite:///{tmp_path}/db"
    config = {"sqlalchemy.url": url, "sqlalchemy.pool_size": "3", "sqlalchemy.pool_broker": socket_path, "sqlalchemy.pool_autostart": "false"}
    engine = engine_from_config(config, poolclass=SharedPool)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    assert shared(engine).size() == 3
    engine.dispose()
    pool = create_pool_from_url(url, poolclass=SharedPool, pool_broker=socket_path)
    raw = pool.connect()
    raw.cursor().execute("select 1")
    raw.close()
    pool.dispose()


def test_echo_pool_logs_as_it_does(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """``echo_pool="debug"`` and ``pool_logging_name``: the lines that QueuePool writes."""
    with caplog.at_level(logging.DEBUG, logger="sqlalchemy.pool"):
        engine = make(echo_pool="debug", pool_logging_name="mine")
        with engine.connect() as connection:
            connection.invalidate()
        engine.dispose()
    said = "\n".join(record.getMessage() for record in caplog.records)
    for line in ("Created new connection", "checked out from pool", "Invalidate connection", "Hard-closing connection", "Pool disposed", "Pool recreating"):
        assert line in said
    assert all(record.name.endswith(".mine") for record in caplog.records if record.name.startswith("sqlalchemy.pool"))


def test_resident_connections_make_room_for_others(make: Make, broker: BrokerProcess) -> None:
    """A process that sits on idle connections gives them up as it comes by when another is in need."""
    engine = make(pool_size=1, pool_timeout=10)
    with engine.connect():
        pass

    def work(child: Child) -> int:
        with engine.connect() as connection:
            return int(connection.scalar(text("select 1")))

    with fork(work) as [child]:
        result: list[int] = []
        waiter = threading.Thread(target=lambda: result.append(child.result()))
        waiter.start()
        while not result:
            with engine.connect():
                os.sched_yield()
            time.sleep(0.01)
        waiter.join()
        assert result == [1]
