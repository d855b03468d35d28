"""PostgreSQL from many worker processes: a connection each, PgBouncer, and ours, at equal numbers of server connections.

    scripts/bench postgres [--workers N] [--sessions N]... [--seconds S] [--rounds N] [--logins N] [--json]

Every worker is a process that runs one transaction after the other through psycopg: a *select* of one row by its key (autocommit), or a
*transaction* of an update, a select and an insert. *direct* keeps a connection a worker, and *psycopg_pool* a pool of one in each, so
they are there only where there are as many sessions as workers. PgBouncer pools transactions; its clients stay connected. Ours checks
out for each transaction, as does psycopg_pool, resetting (DISCARD ALL) sessions that another worker used, or trusting; where sessions
are few also with a longer ``turn``. Logins are by SCRAM. Rounds take the variants in turn; medians are shown.

CPU is that of workers and pooler (not the server's) for each transaction. All of it runs on one machine: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import psycopg
import psycopg_pool
from bench_servers import Skipped, broker, dies_with_parent, pgbouncer, postgres, private_directory

from mppool.integrations.psycopg import ConnectionPool

ROWS = 10_000
PASSWORD = "bench-secret"
LONG = 0.02  # seconds
AUTOCOMMIT = {"autocommit": True, "prepare_threshold": None}
Transact = Callable[[], None]


def select(conn: Any) -> None:
    conn.execute("select balance from accounts where id = %s", (random.randrange(ROWS),)).fetchone()


def transaction(conn: Any) -> None:
    account = random.randrange(ROWS)
    with conn.transaction():
        conn.execute("update accounts set balance = balance + 1 where id = %s", (account,))
        conn.execute("select balance from accounts where id = %s", (account,)).fetchone()
        conn.execute("insert into history (account, delta) values (%s, 1)", (account,))


WORKLOADS = {"select": select, "transaction": transaction}


def prepare(conninfo: str) -> None:
    with psycopg.connect(conninfo) as conn:
        conn.execute("create table accounts (id int primary key, balance int not null)")
        conn.execute("create table history (account int not null, delta int not null)")
        conn.execute("insert into accounts select n, 0 from generate_series(0, %s) n", (ROWS - 1,))


# What a worker does, in its own process.


def connected(conninfo: str, work: Callable[[Any], None]) -> Transact:
    conn = psycopg.connect(conninfo, autocommit=True, prepare_threshold=None)
    return lambda: work(conn)


def pooled(pool: Any, work: Callable[[Any], None]) -> Transact:
    def one() -> None:
        with pool.connection() as conn:
            work(conn)

    return one


def worker(begin: Callable[[], Transact], ready: int, go: int, out: int, seconds: float) -> None:
    transact = begin()
    for _ in range(20):
        transact()
    os.write(ready, b".")
    os.read(go, 1)
    waits, used, now = array("d"), time.process_time(), time.perf_counter()
    until = now + seconds
    while now < until:
        began = now
        transact()
        now = time.perf_counter()
        waits.append(now - began)
    os.write(out, array("d", [time.process_time() - used, len(waits)]).tobytes())
    data = waits.tobytes()
    while data:
        data = data[os.write(out, data) :]


def measure(begin: Callable[[], Transact], workers: int, seconds: float, poolers: list[int]) -> dict[str, float]:
    """Throughput, latencies and CPU of so many workers. ``poolers``: pids of processes in between, whose CPU counts."""
    ready_in, ready = os.pipe()
    go, go_out = os.pipe()
    children = []
    for _ in range(workers):
        result, out = os.pipe()
        set_up = dies_with_parent(signal.SIGKILL)
        pid = os.fork()
        if pid == 0:
            try:
                set_up()
                os.close(go_out)
                worker(begin, ready, go, out, seconds)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.close(out)
        children.append((pid, result))
    os.close(ready)
    os.close(go)
    try:
        for _ in range(workers):
            if not os.read(ready_in, 1):
                raise RuntimeError("a worker has failed")
        before = cpu_of(poolers)
        os.close(go_out)
        used, waits = 0.0, array("d")
        for _, result in children:
            with open(result, "rb", closefd=False) as file:
                data = file.read()
            if len(data) < 16:
                raise RuntimeError("a worker has failed")
            numbers = array("d", data)
            used += numbers[0]
            waits.extend(numbers[2:])
        used += cpu_of(poolers) - before
    finally:
        os.close(ready_in)
        for pid, result in children:
            os.close(result)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    ordered = sorted(waits)
    return {
        "tps": len(ordered) / seconds,
        "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
        "cpu_us": used / len(ordered) * 1e6,
    }


def cpu_of(pids: list[int]) -> float:
    found = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        found += times.user + times.system
    return found


# The variants.


@contextmanager
def variant(name: str, conninfo: str, sessions: int, work: Callable[[Any], None]) -> Iterator[tuple[Callable[[], Transact], list[int]]]:
    with ExitStack() as stack:
        if name == "direct":
            yield lambda: connected(conninfo, work), []
            return
        if name == "psycopg_pool":
            yield lambda: pooled(psycopg_pool.ConnectionPool(conninfo, kwargs=AUTOCOMMIT, min_size=1, max_size=1, open=True), work), []
            return
        directory = stack.enter_context(private_directory())
        if name == "pgbouncer":
            front, pid = stack.enter_context(pgbouncer(directory, conninfo, sessions))
            yield lambda: connected(front, work), [pid]
            return
        path = f"{directory}/broker.sock"
        pid = stack.enter_context(broker(path))
        policy, _, turn = name.removeprefix("mppool ").partition(", turn ")
        options: dict[str, Any] = {"kwargs": AUTOCOMMIT, "min_size": 0, "max_size": sessions, "max_dialing": 4, "broker": path}
        pool = ConnectionPool(conninfo, on_transfer=policy, turn=float(turn or 0.004), **options)
        yield lambda: pooled(pool, work), [pid]


def first_leases(conninfo: str, rounds: int) -> dict[str, float]:
    """Medians in microseconds, all measured in turn: a login; the first lease of a process, which has yet to get a line to the broker, of a live
    session that another dialed; its first lease of another such session, whose descriptor came along with the first one's; and the lease of
    one that it had before, and another process used since. What resetting adds is "reset" less "trust".
    """
    took: dict[str, list[float]] = {"login": []}
    with ExitStack() as stack:

        def opened(policy: str, broker: str) -> ConnectionPool:
            """One process's part in the pool, as far as the pool knows: it has a row, a line to the broker and descriptors of its own."""
            return stack.enter_context(ConnectionPool(conninfo, min_size=0, max_size=2, broker=broker, on_transfer=policy))

        parts = {}
        for policy in ("reset", "trust"):
            path = f"{stack.enter_context(private_directory())}/broker.sock"
            stack.enter_context(broker(path))
            parts[policy] = opened(policy, path), opened(policy, path), path
            for part in parts[policy][:2]:
                two_leases(part)
        for _ in range(rounds):
            began = time.perf_counter()
            conn = psycopg.connect(conninfo, autocommit=True)
            took["login"].append(time.perf_counter() - began)
            conn.close()
            time.sleep(0.01)  # the server takes its time to end that session: it would be measured with what comes next
            for policy, (home, other, path) in parts.items():
                fresh = opened(policy, path)
                for name, seconds in zip(("opening", "first"), two_leases(fresh), strict=True):
                    took.setdefault(f"{name}_{policy}", []).append(seconds)
                fresh.close()
                two_leases(home)
                took.setdefault(f"back_{policy}", []).append(two_leases(other)[1])
    return {f"{name}_us": statistics.median(times) * 1e6 for name, times in took.items()}


def two_leases(pool: ConnectionPool) -> tuple[float, float]:
    """Seconds for each of the two sessions there are."""
    pool.open()
    began = time.perf_counter()
    one = pool.getconn()
    between = time.perf_counter()
    other = pool.getconn()
    ended = time.perf_counter()
    pool.putconn(one)
    pool.putconn(other)
    return between - began, ended - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--sessions", type=int, action="append", help="server connections; default: as many as workers, and half as many")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logins", type=int, default=200, help="rounds of logins and leases in turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        with private_directory() as directory, postgres(directory, PASSWORD) as conninfo:
            prepare(conninfo)
            leases = first_leases(conninfo, options.logins)
            results = {
                (sessions, workload): compare(conninfo, sessions, workload, options)
                for sessions in options.sessions or [options.workers, max(1, options.workers // 2)]
                for workload in WORKLOADS
            }
    except Skipped as why:
        print(f"skipped: {why}")
        return
    if options.json:
        rows = [{"sessions": sessions, "workload": workload, "variants": found} for (sessions, workload), found in results.items()]
        print(json.dumps({"python": platform.python_version(), "cpus": os.cpu_count(), "workers": options.workers, "leases": leases, "results": rows}))
    else:
        show(leases, results, options)


def compare(conninfo: str, sessions: int, workload: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    names = ["pgbouncer", "mppool reset", "mppool trust"]
    if sessions >= options.workers:
        names[:0] = ["direct", "psycopg_pool"]
    else:
        names.append(f"mppool trust, turn {LONG}")
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in random.sample(names, len(names)):
            try:
                with variant(name, conninfo, sessions, WORKLOADS[workload]) as (begin, poolers):
                    measured[name].append(measure(begin, options.workers, options.seconds, poolers))
            except Skipped:
                continue
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in measured.items() if rows}


def show(leases: dict[str, float], results: dict[tuple[int, str], dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs; {options.workers} workers, {options.rounds} rounds of {options.seconds:g} s")
    login = leases["login_us"]
    print(f"\na login (SCRAM)                                {login:8.0f} us")
    for policy in ("reset", "trust"):
        opening, first, back = (leases[f"{which}_{policy}_us"] for which in ("opening", "first", "back"))
        print(f"first lease of a process, {policy:6}               {opening:8.0f} us  1/{login / opening:.0f}")
        print(f"first lease of another's session, {policy:6}       {first:8.0f} us  1/{login / first:.0f}")
        print(f"lease of a session that another used, {policy:6}   {back:8.0f} us  1/{login / back:.0f}")
    first, back = (leases[f"{which}_reset_us"] - leases[f"{which}_trust_us"] for which in ("first", "back"))
    print(f"what resetting adds to the one and the other    {first:8.0f} us, {back:.0f} us")
    for (sessions, workload), rows in results.items():
        print(f"\n{workload}, {sessions} sessions" + f"{'tps':>16}{'/ direct':>10}{'/ pgbouncer':>13}{'p50 us':>9}{'p99 us':>9}{'CPU us':>8}")
        for name, row in rows.items():
            to_direct = f"{row['tps'] / rows['direct']['tps']:.2f}" if "direct" in rows else "-"
            to_bouncer = f"{row['tps'] / rows['pgbouncer']['tps']:.2f}" if "pgbouncer" in rows else "-"
            print(f"  {name:26}{row['tps']:10.0f}{to_direct:>10}{to_bouncer:>13}{row['p50_us']:9.0f}{row['p99_us']:9.0f}{row['cpu_us']:8.0f}")


if __name__ == "__main__":
    main()
