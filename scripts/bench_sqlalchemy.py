"""What does ``engine.connect()`` cost with SharedPool, and with SQLAlchemy's QueuePool, over the same drivers and one PostgreSQL?

    scripts/bench sqlalchemy [--rounds N] [--number N] [--json]

Every round measures every engine, in an order of its own: compare the ratios, not the microseconds. *idle here*: the connection
is idle in this process, nothing is sent. *select 1*: with a query and the rollback. *foreign*: another process used the session
last, so it is reset (``DISCARD ALL``), adopted anew, and the "connect" event fired. *login*: a new connection.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import random
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import repeat
from time import perf_counter_ns
from typing import Any

from bench_servers import Skipped, broker, postgres, private_directory
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool, QueuePool

from mppool.integrations.sqlalchemy import SharedPool

DRIVERS = ("psycopg", "pg8000", "psycopg2")
SELECT = text("select 1")


def timed(number: int, once: Callable[[], Any]) -> float:
    """Microseconds for each."""
    began = perf_counter_ns()
    for _ in repeat(None, number):
        once()
    return (perf_counter_ns() - began) / number / 1000


def connect(engine: Engine) -> None:
    engine.connect().close()


def select(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(SELECT).scalar()


class Other:
    """Another process with the same engine, which uses the session when it is told to."""

    def __init__(self, engine: Engine) -> None:
        from_us, to_other = os.pipe()
        from_other, to_us = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(to_other)
            try:
                while os.read(from_us, 1):
                    select(engine)
                    os.write(to_us, b".")
            finally:
                os._exit(0)
        os.close(from_us)
        os.close(to_us)
        self.order, self.answer = to_other, from_other

    def use(self) -> None:
        os.write(self.order, b".")
        os.read(self.answer, 1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.order)
        os.close(self.answer)


def foreign(engine: Engine, other: Other, number: int) -> list[float]:
    """Each checkout after the other process has had the only session."""
    times = []
    for _ in range(number):
        other.use()
        began = perf_counter_ns()
        connection = engine.connect()
        times.append((perf_counter_ns() - began) / 1000)
        connection.close()
    return times


@contextlib.contextmanager
def engines(directory: str, info: dict[str, str]) -> Iterator[dict[str, Engine]]:
    made: dict[str, Engine] = {}
    for driver in DRIVERS:
        with contextlib.suppress(ImportError):
            url = f"postgresql+{driver}://{info['user']}@{info['host']}:{info['port']}/{info['dbname']}"
            made[f"{driver} SharedPool"] = create_engine(url, poolclass=SharedPool, pool_size=1, pool_broker=f"{directory}/broker.sock")
            made[f"{driver} QueuePool"] = create_engine(url, poolclass=QueuePool, pool_size=1)
            made[f"{driver} NullPool"] = create_engine(url, poolclass=NullPool)
    try:
        yield made
    finally:
        for engine in made.values():
            engine.dispose()


def measure(rounds: int, number: int) -> dict[str, dict[str, float]]:
    """Medians, in microseconds, by engine and case."""
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        data, directory = stack.enter_context(private_directory()), stack.enter_context(private_directory())
        info = dict(part.split("=") for part in stack.enter_context(postgres(data)).split())
        stack.enter_context(broker(f"{directory}/broker.sock"))
        made = stack.enter_context(engines(directory, info))
        for engine in made.values():
            select(engine)
        moving = [name for name in made if name.endswith("SharedPool") and made[name].dialect.driver != "psycopg2"]
        others = {name: Other(made[name]) for name in moving}
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            for name in random.sample(list(made), len(made)):
                engine, cases = made[name], found.setdefault(name, {})
                if name.endswith("NullPool"):
                    cases.setdefault("login", []).append(timed(max(1, number // 100), functools.partial(connect, engine)))
                    continue
                select(engine)
                cases.setdefault("idle here", []).append(timed(number, functools.partial(connect, engine)))
                cases.setdefault("select 1", []).append(timed(max(1, number // 10), functools.partial(select, engine)))
                if name in others:
                    cases.setdefault("foreign", []).extend(foreign(engine, others[name], max(1, number // 20)))
        gc.enable()
        for other in others.values():
            other.end()
    return {name: {case: statistics.median(times) for case, times in cases.items()} for name, cases in found.items()}


def render(result: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"{'':24}{'idle here':>12}{'select 1':>12}{'foreign':>12}{'login':>12}   (us, medians)"
    for name, cases in result.items():
        yield f"{name:24}" + "".join(f"{cases[case]:12.1f}" if case in cases else f"{'-':>12}" for case in ("idle here", "select 1", "foreign", "login"))
    for driver in DRIVERS:
        ours, queue, none = (result.get(f"{driver} {pool}") for pool in ("SharedPool", "QueuePool", "NullPool"))
        if ours and queue and none:
            ratios = [f"idle here {ours['idle here'] / queue['idle here']:.2f}", f"select 1 {ours['select 1'] / queue['select 1']:.2f} of QueuePool's"]
            if "foreign" in ours:
                ratios.append(f"a foreign session is {none['login'] / ours['foreign']:.0f}x cheaper than a login")
            yield f"{driver}: {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench sqlalchemy", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--number", type=int, default=1000, help="checkouts of each engine in a round (1000)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    try:
        result = measure(options.rounds, options.number)
    except Skipped as reason:
        sys.exit(f"skipped: {reason}")
    print(json.dumps(result, indent=2) if options.json else "\n".join(render(result)))


if __name__ == "__main__":
    main()
