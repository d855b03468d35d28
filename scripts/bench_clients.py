"""By client: what does adopting a session cost beside a login, and a checkout of ours beside the client's own pool? In one run.

    scripts/bench clients [--rounds N] [--number N] [--json]

*login*: a new connection, the login, the client's object, and its end. *adopt*: a session that another process used becomes ours: the object
is made (once a process and session), and where that is the policy the session is reset. *checkout* takes the one idle session and
gives it back; *with command* does one round trip in between. Theirs is the client's own pool; PyMySQL has none: there it is SQLAlchemy's
QueuePool, told not to roll back, which is a round trip that ours saves as well (autocommit).

Every round measures everything, in an order of its own: compare the ratios, not the microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import repeat
from time import perf_counter_ns
from typing import Any

from bench_checkout import Measure, block, made_or_skipped, pair, positive
from bench_servers import broker, mariadb, memcached, private_directory

Measures = dict[str, Measure]
Clients = dict[str, Callable[[], AbstractContextManager[Measures]]]
RARE = ("login", "adopt")  # done a tenth as often
RATIOS = {"adopt": "login", "checkout": "theirs", "with command": "theirs with command"}


def calls(function: Callable[[], Any]) -> Measure:
    def measure(number: int) -> int:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            function()
        return perf_counter_ns() - began

    return measure


@contextlib.contextmanager
def pymysql() -> Iterator[Measures]:
    from pymysql import connect
    from sqlalchemy.pool import QueuePool

    from mppool.integrations.pymysql import ConnectionPool

    with ExitStack() as stack:
        directory = stack.enter_context(private_directory())
        port = stack.enter_context(mariadb(directory))
        stack.enter_context(broker(f"{directory}/broker.sock"))
        login: dict[str, Any] = {"host": "127.0.0.1", "port": port, "user": "root", "database": "mysql", "autocommit": True, "ssl_disabled": True}
        pool = stack.enter_context(ConnectionPool(**login, broker=f"{directory}/broker.sock"))
        creator: Any = lambda: connect(**login)  # noqa: E731 (for its type)
        theirs = QueuePool(creator, pool_size=4, reset_on_return=None)
        stack.callback(theirs.dispose)
        driver = pool._driver
        session = driver.dial()
        stack.callback(driver.close, session)
        fd, baggage = driver.fileno(session), driver.detach(session)

        def adopt() -> None:
            attached = driver.attach(fd, baggage)
            driver.transferred(attached)
            driver.abort(attached)

        def ask(conn: Any) -> None:
            with conn.cursor() as cursor:
                cursor.execute("select 1")

        def ours_asking() -> None:
            conn = pool.getconn()
            ask(conn)
            pool.putconn(conn)

        def theirs_asking() -> None:
            conn = theirs.connect()
            ask(conn)
            conn.close()

        yield {
            "login": calls(lambda: connect(**login).close()),
            "adopt": calls(adopt),
            "checkout": pair(pool.getconn, pool.putconn),
            "theirs": pair(theirs.connect, lambda conn: conn.close()),
            "with command": calls(ours_asking),
            "theirs with command": calls(theirs_asking),
        }


@contextlib.contextmanager
def pymemcache() -> Iterator[Measures]:
    from pymemcache import Client, PooledClient

    from mppool.integrations.pymemcache import PooledClient as Ours

    with ExitStack() as stack:
        directory = stack.enter_context(private_directory())
        port = stack.enter_context(memcached())
        stack.enter_context(broker(f"{directory}/broker.sock"))
        ours = Ours(("127.0.0.1", port), max_pool_size=4, pool_broker=f"{directory}/broker.sock")
        stack.callback(ours.pool.close)
        theirs = PooledClient(("127.0.0.1", port), max_pool_size=4)
        stack.callback(theirs.close)
        driver = ours.pool._driver
        session = driver.dial()
        stack.callback(driver.close, session)
        fd = driver.fileno(session)

        def login() -> None:
            client = Client(("127.0.0.1", port))
            client._connect()
            client.close()

        ours.set("key", "value", noreply=False)
        yield {
            "login": calls(login),
            "adopt": calls(lambda: driver.abort(driver.attach(fd, b""))),
            "checkout": block(ours.client_pool.get_and_release),
            "theirs": block(theirs.client_pool.get_and_release),
            "with command": calls(lambda: ours.get("key")),
            "theirs with command": calls(lambda: theirs.get("key")),
        }


CLIENTS: Clients = {"PyMySQL": pymysql, "pymemcache": pymemcache}


def measured(clients: Clients, rounds: int, number: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Microseconds and ratios by client, and why others were skipped."""
    with ExitStack() as stack:
        made: dict[str, Any] = {name: made_or_skipped(stack, client) for name, client in clients.items()}  # type: ignore[arg-type]
        skipped = {name: it for name, it in made.items() if isinstance(it, str)}
        todo = [(name, what, measure) for name, it in made.items() if name not in skipped for what, measure in it.items()]
        times: dict[tuple[str, str], list[float]] = {(name, what): [] for name, what, _ in todo}
        for _, _, measure in todo:
            measure(2)
        for _ in range(rounds):
            for name, what, measure in random.sample(todo, len(todo)):
                times_ = number if what not in RARE else max(1, number // 10)
                times[name, what].append(measure(times_) / times_ / 1000)
    rows: dict[str, dict[str, Any]] = {}
    for (name, what), values in times.items():
        rows.setdefault(name, {})[what] = statistics.median(values)
    for row in rows.values():
        row["ratios"] = {what: row[what] / row[other] for what, other in RATIOS.items() if what in row and other in row}
    return rows, skipped


COLUMNS = ("login", "adopt", "/ login", "checkout", "theirs", "/ theirs", "with command", "theirs", "/ theirs")


def render(result: dict[str, Any]) -> Iterator[str]:
    yield f"Python {result['python']}, {result['cpus']} CPUs; medians of {result['rounds']} rounds of {result['number']}, in us"
    yield f"{'':14}" + "".join(f"{column:>14}" for column in COLUMNS)
    for name, row in result["clients"].items():
        shown = [row["login"]]
        for what, other in RATIOS.items():
            shown += [row.get(what), row["ratios"].get(what)] if what == "adopt" else [row.get(what), row.get(other), row["ratios"].get(what)]
        yield f"{name:14}" + "".join(f"{'-' if value is None else f'{value:.2f}':>14}" for value in shown)
    for name, reason in result["skipped"].items():
        yield f"{name:14} skipped: {reason}"


def run(name: str, clients: Clients, doc: str | None) -> None:
    """The command ``scripts/bench NAME`` over these clients; ``doc``'s first line describes it."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=doc.partition("\n")[0] if doc else None)
    parser.add_argument("--rounds", type=positive, default=50)
    parser.add_argument("--number", type=positive, default=500, help="checkouts of each in a round (500); a tenth as many logins")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows, skipped = measured(clients, options.rounds, options.number)
    result = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
        "number": options.number,
        "clients": rows,
        "skipped": skipped,
    }
    print(json.dumps(result, indent=2) if options.json else "\n".join(render(result)))


if __name__ == "__main__":
    run("clients", CLIENTS, __doc__)
