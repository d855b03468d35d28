"""redis-py on its own pool and on ours: a checkout, a session from another process beside a login, and GET. One run, one Redis.

    scripts/bench redis [--rounds N] [--number N] [--json]

Every round measures everything in an order of its own: compare the ratios, not the microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from time import perf_counter_ns
from typing import Any

import redis
import redis.asyncio
import uvloop
from bench_servers import broker, private_directory
from bench_servers import redis as redis_server

from mppool.drivers.redis import RedisDriver
from mppool.integrations.redis import BlockingConnectionPool, ConnectionPool
from mppool.integrations.redis.asyncio import ConnectionPool as AsyncConnectionPool

Measure = Callable[[int], float]  # so many times; microseconds each


def repeated(action: Callable[[], object]) -> Measure:
    def measure(number: int) -> float:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            action()
        return (perf_counter_ns() - began) / number / 1000

    return measure


def awaited(loop: asyncio.AbstractEventLoop, action: Callable[[], Any]) -> Measure:
    async def measure(number: int) -> float:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            await action()
        return (perf_counter_ns() - began) / number / 1000

    return lambda number: loop.run_until_complete(measure(number))


def handing(pool: Any) -> Callable[[], Any]:
    async def hand() -> None:
        await pool.release(await pool.get_connection())

    return hand


class Adoption:
    """A session of another process's, made one of ours, with the reset and without; and a connection with a login."""

    def __init__(self, driver: RedisDriver) -> None:
        self.driver = driver
        self.lender = driver.dial()

    def adopt(self) -> None:
        self.driver.abort(self.driver.attach(self.lender._sock.fileno(), b""))

    def adopt_and_reset(self) -> None:
        session = self.driver.attach(self.lender._sock.fileno(), b"")
        self.driver.transferred(session)
        self.driver.abort(session)

    def login(self) -> None:
        self.driver.close(self.driver.dial())


def fresh(url: str) -> Callable[[], None]:
    pool = redis.ConnectionPool.from_url(url)

    def connect() -> None:
        connection: Any = pool.make_connection()
        pool._created_connections = 0
        connection.connect()
        connection.disconnect()

    return connect


def measures(stack: ExitStack) -> dict[str, Measure]:
    directory = stack.enter_context(private_directory())
    port = stack.enter_context(redis_server(directory))
    path = f"{directory}/broker.sock"
    stack.enter_context(broker(path))
    admin = redis.Redis(port=port)
    admin.config_set("requirepass", "bench")
    url = f"redis://:bench@127.0.0.1:{port}/1"
    theirs = redis.ConnectionPool.from_url(url)
    ours = {kind.__name__: kind.from_url(url, max_connections=4, broker=path, name=kind.__name__) for kind in (ConnectionPool, BlockingConnectionPool)}
    adoption = Adoption(RedisDriver(port=port, password="bench", db=1))
    found = {
        "redis-py get_connection+release": repeated(lambda: theirs.release(theirs.get_connection())),
        **{f"{name} get_connection+release": repeated(lambda pool=pool: pool.release(pool.get_connection())) for name, pool in ours.items()},  # type: ignore[misc]
        "redis-py GET": repeated(partial(redis.Redis(connection_pool=theirs).get, "a")),
        "ConnectionPool GET": repeated(partial(redis.Redis(connection_pool=ours["ConnectionPool"]).get, "a")),
        "redis-py connect+login": repeated(fresh(url)),
        "dial (connect+login)": repeated(adoption.login),
        "adopt": repeated(adoption.adopt),
        "adopt+reset": repeated(adoption.adopt_and_reset),
    }
    for kind, loop in (("asyncio", asyncio.new_event_loop()), ("uvloop", uvloop.new_event_loop())):
        own = redis.asyncio.ConnectionPool.from_url(url)
        shared = AsyncConnectionPool.from_url(url, max_connections=4, broker=path, name=f"bench-{kind}")
        for name, pool in ((f"redis.asyncio on {kind}", own), (f"ours on {kind}", shared)):
            found[f"{name} get_connection+release"] = awaited(loop, handing(pool))
            found[f"{name} GET"] = awaited(loop, partial(redis.asyncio.Redis(connection_pool=pool).get, "a"))
        stack.callback(loop.close)
        stack.callback(loop.run_until_complete, own.aclose())
        stack.callback(loop.run_until_complete, shared.aclose())
    for mine in (theirs, *ours.values()):
        stack.callback(mine.close)
    stack.callback(adoption.driver.close, adoption.lender)
    return found


RATIOS = {
    "checkout, ours to redis-py's": ("ConnectionPool get_connection+release", "redis-py get_connection+release"),
    "checkout, blocking, ours to redis-py's": ("BlockingConnectionPool get_connection+release", "redis-py get_connection+release"),
    "GET, ours to redis-py's": ("ConnectionPool GET", "redis-py GET"),
    "login to adopt": ("redis-py connect+login", "adopt"),
    "login to adopt+reset": ("redis-py connect+login", "adopt+reset"),
    **{f"{what} on {kind}, ours to redis-py's": (f"ours on {kind} {of}", f"redis.asyncio on {kind} {of}")
       for kind in ("asyncio", "uvloop") for what, of in (("checkout", "get_connection+release"), ("GET", "GET"))},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--number", type=int, default=1000, help="checkouts a round; a fifth as many of what talks to the server")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        found = measures(stack)
        times: dict[str, list[float]] = {name: [] for name in found}
        for measure in found.values():
            measure(20)
        for _ in range(options.rounds):
            for name in random.sample(list(found), len(found)):
                times[name].append(found[name](options.number if "release" in name else max(1, options.number // 5)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[a] / medians[b] for name, (a, b) in RATIOS.items()}
    if options.json:
        print(json.dumps({"median_us": medians, "ratios": ratios}))
        return
    for name, value in medians.items():
        print(f"{name:50} {value:9.2f} us")
    for name, value in ratios.items():
        print(f"{name:50} {value:9.2f}")


if __name__ == "__main__":
    main()
