"""What does a checkout and its return cost when nobody else wants the session? Ours, beside other pools, in one run.

    scripts/bench checkout [--rounds N] [--number N] [--json]

Every round measures every pool, in an order of its own, so that a noisy moment of the machine hits all alike: compare the ratios,
not the microseconds. Each pool has one idle session, connected to a real server where the pool looks at its sockets.
What cannot be measured here is said to be skipped, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import queue
import random
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import repeat
from time import perf_counter_ns
from typing import Any

from bench_servers import Skipped, broker, postgres, private_directory, redis, silent_server

import mppool

LIFO, PSYCOPG = "queue.LifoQueue get+put", "psycopg_pool connection()"
Measure = Callable[[int], int]  # so many checkouts and returns; nanoseconds
HEAVY = ("click", "rich", "json", "asyncio", "psutil", "multiprocessing", "subprocess", "ssl", "http", "email", "inspect", "dataclasses")


def pair(get: Callable[[], Any], put: Callable[[Any], Any]) -> Measure:
    """Two calls: one takes, one gives back."""

    def measure(number: int) -> int:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            put(get())
        return perf_counter_ns() - began

    return measure


def block(connection: Callable[[], AbstractContextManager[Any]]) -> Measure:
    """A ``with`` block with nothing in it."""

    def measure(number: int) -> int:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            with connection():
                pass
        return perf_counter_ns() - began

    return measure


# One context manager for each pool. Imports are inside, so that a pool that is not installed is skipped, and the others are not.


@contextlib.contextmanager
def shared_pool(with_broker: bool) -> Iterator[mppool.Pool]:
    """One of ours with one idle session. Fails if more than that one was ever dialed: then something else was measured."""
    with ExitStack() as stack:
        path = f"{stack.enter_context(private_directory())}/broker.sock"
        port = stack.enter_context(silent_server())
        if with_broker:
            stack.enter_context(broker(path))
        pool = stack.enter_context(mppool.Pool(("127.0.0.1", port), max_size=4, broker=path))
        yield pool
        stats = pool.get_stats()
        assert stats["dials"] == 1, f"{stats['dials']} dials, expected 1: {stats}"


@contextlib.contextmanager
def ours(with_broker: bool, as_block: bool) -> Iterator[Measure]:
    with shared_pool(with_broker) as pool:
        yield block(pool.connection) if as_block else pair(pool.getconn, pool.putconn)


@contextlib.contextmanager
def lifo_queue() -> Iterator[Measure]:
    pool: queue.LifoQueue[object] = queue.LifoQueue(4)
    pool.put(object())
    yield pair(pool.get, pool.put)


@contextlib.contextmanager
def pymemcache_pool(as_block: bool) -> Iterator[Measure]:
    from pymemcache.client.base import PooledClient  # type: ignore[import-untyped, unused-ignore]

    with silent_server() as port:
        pool = PooledClient(("127.0.0.1", port), max_pool_size=4).client_pool
        yield block(pool.get_and_release) if as_block else pair(pool.get, pool.release)


@contextlib.contextmanager
def urllib3_pool() -> Iterator[Measure]:
    from urllib3 import HTTPConnectionPool

    with silent_server() as port:
        pool = HTTPConnectionPool("127.0.0.1", port, maxsize=4)
        connection = pool._get_conn()
        connection.connect()
        pool._put_conn(connection)
        yield pair(pool._get_conn, pool._put_conn)
        pool.close()


@contextlib.contextmanager
def redis_pool() -> Iterator[Measure]:
    from redis import ConnectionPool

    with private_directory() as directory, redis(directory) as port:
        pool = ConnectionPool(host="127.0.0.1", port=port, max_connections=4)
        yield pair(pool.get_connection, pool.release)
        pool.disconnect()


@contextlib.contextmanager
def psycopg_pools() -> Iterator[Measure]:
    from psycopg_pool import ConnectionPool

    with private_directory() as directory, postgres(directory) as conninfo, ConnectionPool(conninfo, min_size=1, max_size=4, open=True) as pool:
        pool.wait(20)
        yield block(pool.connection)


@contextlib.contextmanager
def sqlalchemy_pool() -> Iterator[Measure]:
    from sqlalchemy.pool import QueuePool

    def creator() -> Any:
        return sqlite3.connect(":memory:", check_same_thread=False)

    pool = QueuePool(creator, pool_size=4)
    yield pair(pool.connect, lambda connection: connection.close())
    pool.dispose()


POOLS: dict[str, Callable[[], AbstractContextManager[Measure]]] = {
    "mppool getconn+putconn": functools.partial(ours, True, False),
    "mppool getconn+putconn, no broker": functools.partial(ours, False, False),
    "mppool connection()": functools.partial(ours, True, True),
    LIFO: lifo_queue,
    "pymemcache get+release": functools.partial(pymemcache_pool, False),
    "pymemcache get_and_release()": functools.partial(pymemcache_pool, True),
    "urllib3 _get_conn+_put_conn": urllib3_pool,
    "redis-py get_connection+release": redis_pool,
    PSYCOPG: psycopg_pools,
    "SQLAlchemy QueuePool (sqlite)": sqlalchemy_pool,
}


def checkouts(rounds: int, number: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Microseconds by pool, and why others were skipped."""
    with ExitStack() as stack:
        made = {name: made_or_skipped(stack, pool) for name, pool in POOLS.items()}
        measures = {name: it for name, it in made.items() if not isinstance(it, str)}
        skipped = {name: it for name, it in made.items() if isinstance(it, str)}
        times: dict[str, list[float]] = {name: [] for name in measures}
        for measure in measures.values():
            measure(number)  # dials, and warms up
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for name in random.sample(list(measures), len(measures)):
                    times[name].append(measures[name](number) / number / 1000)
        finally:
            gc.enable()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "median_us": medians[name],
            "min_us": min(values),
            "to_lifo": medians[name] / medians[LIFO],
            **({"to_psycopg": medians[name] / medians[PSYCOPG]} if PSYCOPG in medians else {}),
        }
        for name, values in times.items()
    }, skipped


def made_or_skipped(stack: ExitStack, pool: Callable[[], AbstractContextManager[Measure]]) -> Measure | str:
    """The pool, ready to be measured, or why it cannot be."""
    try:
        return stack.enter_context(pool())
    except ImportError as error:
        return f"{error.name} is not installed"
    except Skipped as error:
        return str(error)


def imports(runs: int) -> dict[str, Any]:
    """How long ``import mppool`` takes in a fresh interpreter, and which larger modules come with it."""
    code = (
        "import sys, time; before = set(sys.modules); began = time.perf_counter(); import mppool; took = time.perf_counter() - began;"
        f"new = set(sys.modules) - before; print(took * 1000, len(new), *(name for name in {HEAVY} if name in new))"
    )
    lines = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() for _ in range(runs)]
    times = [float(line[0]) for line in lines]
    return {"median_ms": statistics.median(times), "min_ms": min(times), "runs": runs, "modules": int(lines[0][1]), "larger": lines[0][2:]}


def render(result: dict[str, Any]) -> Iterator[str]:
    yield f"Python {result['python']}, {result['cpus']} CPUs; {result['rounds']} rounds of {result['number']} checkouts and returns"
    yield f"{'':36}{'median us':>10}{'min us':>8}{'/ LifoQueue':>13}{'/ psycopg_pool':>16}"
    for name, row in result["checkouts"].items():
        to_psycopg = f"{row['to_psycopg']:.2f}" if "to_psycopg" in row else "-"
        yield f"{name:36}{row['median_us']:10.2f}{row['min_us']:8.2f}{row['to_lifo']:13.2f}{to_psycopg:>16}"
    for name, reason in result["skipped"].items():
        yield f"{name:36}  skipped: {reason}"
    it = result["import"]
    larger = ", ".join(it["larger"]) or "none"
    yield f"import mppool: {it['median_ms']:.1f} ms (min {it['min_ms']:.1f}, {it['runs']} runs), {it['modules']} modules; larger ones among them: {larger}"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench checkout", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=positive, default=100)
    parser.add_argument("--number", type=positive, default=1000, help="checkouts of each pool in a round (1000)")
    parser.add_argument("--imports", type=positive, default=11, help="how often to import mppool in a fresh interpreter (11)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows, skipped = checkouts(options.rounds, options.number)
    result = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
        "number": options.number,
        "checkouts": rows,
        "skipped": skipped,
        "import": imports(options.imports),
    }
    print(json.dumps(result, indent=2) if options.json else "\n".join(render(result)))


if __name__ == "__main__":
    main()
