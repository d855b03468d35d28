"""Twelve prefork workers, four connections to PostgreSQL: what pg_stat_activity shows while they work.

With any database that you may connect to, one command starts the broker and the workers:

    mppool run -- python examples/prefork_psycopg.py "host=127.0.0.1 dbname=app user=app password=secret sslmode=disable"

Without a connection string libpq's environment (``PGHOST``, ``PGDATABASE``, ...) says where to connect. Each worker makes one short
transaction after the other for three seconds. The exit code is 0 only if the server never had more than four of their
connections, and every worker had its share.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import MutableSequence

import psycopg

from mppool.integrations.psycopg import ConnectionPool

WORKERS, CAP, SECONDS = 12, 4, 3
ACTIVITY = "select pid, state, application_name from pg_stat_activity where usename = current_user and application_name like 'prefork%' order by pid"
forking = multiprocessing.get_context("fork")


def work(pool: ConnectionPool, number: int, done: MutableSequence[int]) -> None:
    """Transactions, which say in pg_stat_activity whose they are."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with pool.connection() as conn:  # commits at the end
            conn.execute("select set_config('application_name', %s, true)", (f"prefork worker {number}",))
            conn.execute("select pg_sleep(0.01)")
        done[number] += 1


def watch(conninfo: str, done: MutableSequence[int]) -> bool:
    """Look every few milliseconds, show what is there every second."""
    backends: set[int] = set()
    most, began, shown = 0, time.monotonic(), 0
    with psycopg.connect(conninfo, autocommit=True) as watcher:
        while (passed := time.monotonic() - began) < SECONDS:
            rows = watcher.execute(ACTIVITY).fetchall()
            most = max(most, len(rows))
            backends.update(pid for pid, _, _ in rows)
            if passed > shown + 0.5:
                shown += 1
                print(f"{sum(done)} transactions; in pg_stat_activity:", *(f"  {pid}  {state:20} {name}" for pid, state, name in rows), sep="\n", flush=True)
            time.sleep(0.005)
    print(f"{WORKERS} workers made {sum(done)} transactions, {min(done)} to {max(done)} each, on {len(backends)} backends, at most {most} at a time")
    return most <= CAP and min(done) > 0


def main() -> int:
    conninfo = " ".join(sys.argv[1:])
    pool = ConnectionPool(conninfo, min_size=0, max_size=CAP, kwargs={"application_name": "prefork"}, timeout=10)  # before the fork: nothing is open yet
    done = forking.Array("q", WORKERS, lock=False)
    workers = [forking.Process(target=work, args=(pool, number, done), daemon=True) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    well = watch(conninfo, done)
    for worker in workers:
        worker.join()
    return 0 if well and all(worker.exitcode == 0 for worker in workers) else 1


if __name__ == "__main__":
    sys.exit(main())
