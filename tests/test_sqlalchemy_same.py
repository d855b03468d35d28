"""What SQLAlchemy documents of pools, tried on QueuePool and on SharedPool: the same is seen, but where the list says what differs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import Engine, create_engine, event, exc, text
from sqlalchemy.pool import QueuePool

from mppool.integrations.sqlalchemy import SharedPool
from tests.helpers.processes import BrokerProcess

EVENTS = ("first_connect", "connect", "checkout", "checkin", "reset", "invalidate", "soft_invalidate", "detach", "close", "close_detached")


def one(connection: Any) -> Any:
    return connection.execute(text("select 1")).scalar()


def seen(engine: Engine) -> list[str]:
    names: list[str] = []
    for name in EVENTS:
        event.listen(engine, name, lambda *_, name=name: names.append(name))
    return names


def events_of_two_checkouts(engine: Engine) -> Any:
    names = seen(engine)
    for _ in range(2):
        with engine.connect() as connection:
            one(connection)
    return names


def events_of_an_error(engine: Engine) -> Any:
    names = seen(engine)
    with engine.connect() as connection, pytest.raises(exc.OperationalError):
        connection.execute(text("select nonsense"))
    return names


def events_of_invalidation(engine: Engine) -> Any:
    names = seen(engine)
    with engine.connect() as connection:
        connection.invalidate()
        connection.rollback()
        one(connection)
    return names


def events_of_soft_invalidation(engine: Engine) -> Any:
    names = seen(engine)
    fairy = engine.raw_connection()
    fairy.invalidate(soft=True)
    fairy.close()
    engine.raw_connection().close()
    return names


def events_of_detaching(engine: Engine) -> Any:
    names = seen(engine)
    with engine.connect() as connection:
        connection.detach()
        one(connection)
    return names


def events_of_disposal(engine: Engine) -> Any:
    names = seen(engine)
    with engine.connect() as connection:
        one(connection)
    engine.dispose()
    with engine.connect() as connection:
        one(connection)
    return names


def a_refused_checkout(engine: Engine) -> Any:
    names, refused = seen(engine), list[int]()

    @event.listens_for(engine, "checkout")
    def refuse(*_: Any) -> None:
        if not refused:
            refused.append(1)
            raise exc.DisconnectionError

    with engine.connect() as connection:
        return one(connection), names


def info(engine: Engine) -> Any:
    found = []
    for _ in range(2):
        with engine.connect() as connection:
            found.append(dict(connection.info))
            connection.info["mine"] = True
    with engine.connect() as connection:
        connection.invalidate()
        connection.rollback()
        found.append(dict(connection.info))
    return found


def record_info(engine: Engine) -> Any:
    """Of the record: kept when its connection is replaced."""
    found = []
    for _ in range(2):
        fairy = engine.raw_connection()
        found.append(dict(fairy.record_info or {}))
        assert fairy.record_info is not None
        fairy.record_info["mine"] = True
        fairy.invalidate()
    return found


def what_reset_is_told(engine: Engine) -> Any:
    told = []
    event.listen(engine, "reset", lambda _, __, state: told.append((state.transaction_was_reset, state.terminate_only, state.asyncio_safe)))
    with engine.connect() as connection:
        one(connection)
    engine.raw_connection().close()
    return told


def a_forgotten_connection(engine: Engine) -> Any:
    names = seen(engine)
    engine.raw_connection()
    gc.collect()
    with engine.connect() as connection:
        return one(connection), names


def a_checkout_beyond_the_size(engine: Engine) -> Any:
    with engine.connect(), engine.connect(), pytest.raises(exc.TimeoutError) as caught:
        engine.connect()
    return caught.value.code


def the_one_given_back_last(engine: Engine) -> Any:
    """With ``pool_use_lifo`` off, QueuePool lends the one that was given back first."""
    first, second = engine.raw_connection(), engine.raw_connection()
    one_of_them = first.dbapi_connection
    first.close()
    second.close()
    with engine.connect() as connection:
        return connection.connection.dbapi_connection is one_of_them


def pool_itself(engine: Engine) -> Any:
    fairy = engine.pool.connect()
    found = [fairy.is_valid, fairy.is_detached, fairy.driver_connection is fairy.dbapi_connection]
    fairy.close()
    return [*found, fairy.is_valid]


def numbers(engine: Engine) -> Any:
    pool: Any = engine.pool
    with engine.connect() as connection:
        one(connection)
        return pool.size(), pool.checkedin(), pool.checkedout(), pool.timeout()


def overflow(engine: Engine) -> Any:
    return engine.pool.overflow()  # type: ignore[attr-defined]


SAME = [
    events_of_two_checkouts, events_of_an_error, events_of_invalidation, events_of_soft_invalidation, events_of_detaching, events_of_disposal,
    a_refused_checkout, info, what_reset_is_told, a_forgotten_connection, a_checkout_beyond_the_size, pool_itself, numbers,
]  # fmt: skip
DIFFERENT = [record_info, the_one_given_back_last, overflow]  # as SharedPool's docstring says


def both(tried: Callable[[Engine], Any], tmp_path: Path, broker: BrokerProcess) -> list[Any]:
    found = []
    for pool, options in ((QueuePool, {"max_overflow": 0}), (SharedPool, {"pool_broker": broker.path})):
        engine = create_engine(f"sqlite:///{tmp_path / 'file'}", poolclass=pool, pool_size=2, pool_timeout=1, **options)
        try:
            found.append(tried(engine))
        finally:
            gc.collect()
            engine.dispose()
    return found


@pytest.mark.parametrize("tried", SAME, ids=lambda tried: tried.__name__)
def test_the_same_is_seen(tried: Callable[[Engine], Any], tmp_path: Path, broker: BrokerProcess) -> None:
    theirs, ours = both(tried, tmp_path, broker)
    assert ours == theirs


@pytest.mark.parametrize("tried", DIFFERENT, ids=lambda tried: tried.__name__)
def test_what_differs_still_does(tried: Callable[[Engine], Any], tmp_path: Path, broker: BrokerProcess) -> None:
    """Or the docstring is to be changed."""
    theirs, ours = both(tried, tmp_path, broker)
    assert ours != theirs
