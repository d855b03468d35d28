"""What becomes of the sessions when many workers want few? Ours with a broker, and a semaphore over the same slots, in turn.

    scripts/bench saturated [--workers N] [--cap N] [--hold-ms MS]... [--seconds S] [--rounds N] [--json]

Each worker is a process that takes a session, holds it for so long, gives it back, and wants the next one at once. A lease
is the time from the return of ``getconn`` to the call of ``putconn``; *utilisation* is the sum of all leases over cap x time. Waits are
those of all checkouts, also of those that waited for nothing.

The semaphore (``multiprocessing.Semaphore`` over the cap, one lock for each slot) wakes somebody and lets anybody barge in. It uses the sessions
best, for whoever runs takes the next one without a pause; what that costs are the longest waits, and how unequally the workers are served.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import struct
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from time import monotonic_ns
from typing import Any, Protocol

from bench_servers import Skipped, broker, dies_with_parent, private_directory, silent_server

import mppool

WARM_UP = 0.3  # seconds between the last worker's first checkout and the beginning of what counts


class Sessions(Protocol):
    """What the workers compete for."""

    def getconn(self) -> Any: ...
    def putconn(self, conn: Any) -> None: ...


class Slots:
    """The baseline: connections that all workers inherit, a semaphore that counts the free ones, and a lock for each."""

    def __init__(self, port: int, cap: int) -> None:
        context = multiprocessing.get_context("fork")  # its semaphores have no names that could be left over
        self.sessions = [socket.create_connection(("127.0.0.1", port)) for _ in range(cap)]
        self.free = context.Semaphore(cap)
        self.locks = [context.Lock() for _ in range(cap)]

    def getconn(self) -> int:
        self.free.acquire()
        while True:  # at least one of them is free: the semaphore says so
            for k, lock in enumerate(self.locks):
                if lock.acquire(block=False):
                    return k

    def putconn(self, conn: int) -> None:
        self.locks[conn].release()
        self.free.release()

    def close(self) -> None:
        for session in self.sessions:
            session.close()


@contextlib.contextmanager
def shared_pool(cap: int) -> Iterator[Sessions]:
    with private_directory() as directory, silent_server() as port, broker(f"{directory}/broker.sock"):
        with mppool.Pool(("127.0.0.1", port), max_size=cap, broker=f"{directory}/broker.sock") as pool:
            yield pool
            stats = pool.get_stats()
        assert stats["dials"] <= cap, f"{stats['dials']} dials, for a cap of {cap}: {stats}"


@contextlib.contextmanager
def semaphore(cap: int) -> Iterator[Sessions]:
    with silent_server() as port, contextlib.closing(Slots(port, cap)) as slots:
        yield slots


CONTENDERS: dict[str, Callable[[int], AbstractContextManager[Sessions]]] = {"mppool": shared_pool, "semaphore": semaphore}


def work(sessions: Sessions, hold: float, ready: int, window: int) -> tuple[int, array[int]]:
    """A worker's life: the sum of its leases within the window, and its waits, all in nanoseconds."""
    sessions.putconn(sessions.getconn())
    os.write(ready, b"r")
    begin, end = struct.unpack("=QQ", os.read(window, 16))
    leased, waits = 0, array("Q")
    while True:
        asked = monotonic_ns()
        conn = sessions.getconn()
        got = monotonic_ns()
        time.sleep(hold)
        done = monotonic_ns()
        sessions.putconn(conn)
        leased += max(0, min(done, end) - max(got, begin))
        if begin <= got < end:
            waits.append(got - asked)
        if done >= end:
            return leased, waits


def fork_worker(sessions: Sessions, hold: float, ready: int, window: int) -> tuple[int, int]:
    """A forked child that works: its pid, and where to read the result; it has ended when that ends."""
    result, theirs = os.pipe()
    dies = dies_with_parent(signal.SIGKILL)
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, result
    try:
        dies()
        leased, waits = work(sessions, hold, ready, window)
        with open(theirs, "wb") as pipe:
            pipe.write(struct.pack("=Q", leased) + waits.tobytes())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os.write(ready, b"x")
        os._exit(1)
    os._exit(0)


def measure(contender: str, workers: int, cap: int, hold: float, seconds: float) -> dict[str, Any]:
    """One run of one contender. The workers begin together, and none outlives it."""
    ready, window = os.pipe(), os.pipe()
    children: dict[int, int] = {}
    with CONTENDERS[contender](cap) as sessions:
        try:
            for _ in range(workers):
                pid, result = fork_worker(sessions, hold, ready[1], window[0])
                children[pid] = result
            for _ in range(workers):
                if os.read(ready[0], 1) != b"r":
                    raise ChildProcessError("a worker failed")
            begin = monotonic_ns() + int(WARM_UP * 1e9)
            end = begin + int(seconds * 1e9)
            os.write(window[1], struct.pack("=QQ", begin, end) * workers)
            results = [read_all(result) for result in children.values()]
        finally:
            for pid, result in children.items():
                os.kill(pid, signal.SIGKILL)  # has ended, or is to
                os.waitpid(pid, 0)
                os.close(result)
            for fd in (*ready, *window):
                os.close(fd)
    return summary(results, cap, end - begin)


def read_all(fd: int) -> tuple[int, array[int]]:
    with open(fd, "rb", closefd=False) as pipe:
        data = pipe.read()
    if not data:
        raise ChildProcessError("a worker failed")
    waits = array("Q")
    waits.frombytes(data[8:])
    return struct.unpack_from("=Q", data)[0], waits


def summary(results: list[tuple[int, array[int]]], cap: int, elapsed: int) -> dict[str, Any]:
    waits = sorted(wait for _, some in results for wait in some)
    counts = [len(some) for _, some in results]

    def at(share: float) -> float:
        return waits[min(len(waits) - 1, int(share * len(waits)))] / 1e6 if waits else 0.0

    leased = sum(leased for leased, _ in results)
    return {
        "utilisation": leased / (cap * elapsed),
        "checkouts": len(waits),
        "per_second": len(waits) / elapsed * 1e9,
        "lease_ms": leased / max(1, len(waits)) / 1e6,
        "wait_p50_ms": at(0.5),
        "wait_p99_ms": at(0.99),
        "wait_max_ms": at(1.0),
        "min_per_worker": min(counts),
        "max_per_worker": max(counts),
    }


def render(result: dict[str, Any]) -> Iterator[str]:
    yield f"Python {result['python']}, {result['cpus']} CPUs; {result['workers']} workers, cap {result['cap']}, {result['seconds']:g} s each"
    yield f"{'hold':>7}  {'':10}{'in use':>7}{'per s':>8}{'lease ms':>10}{'wait p50':>10}{'p99':>8}{'max ms':>8}{'p99/p50':>9}{'per worker':>14}{'max/min':>9}"
    for run in result["runs"]:
        shares = f"{run['min_per_worker']}-{run['max_per_worker']}"
        spread = run["max_per_worker"] / max(1, run["min_per_worker"])
        ratio = f"{run['wait_p99_ms'] / run['wait_p50_ms']:.2f}" if run["wait_p50_ms"] > 0.01 else "-"
        yield (
            f"{run['hold_ms']:4g} ms  {run['contender']:10}{run['utilisation']:7.1%}{run['per_second']:8.0f}{run['lease_ms']:10.3f}"
            f"{run['wait_p50_ms']:10.2f}{run['wait_p99_ms']:8.2f}{run['wait_max_ms']:8.1f}{ratio:>9}{shares:>14}{spread:9.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench saturated", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--cap", type=int, default=4)
    parser.add_argument("--hold-ms", type=float, action="append", help="how long a session is held; may be repeated (1 and 0.2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each run counts (3)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each run is done, in turn (2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if min(options.workers, options.cap, options.rounds) < 1 or options.seconds <= 0:
        parser.error("--workers, --cap and --rounds must be 1 or more, --seconds more than 0")
    try:
        runs = [
            {"hold_ms": hold, "round": turn, "contender": contender, **measure(contender, options.workers, options.cap, hold / 1000, options.seconds)}
            for hold in options.hold_ms or [1.0, 0.2]
            for turn in range(options.rounds)
            for contender in CONTENDERS
        ]
    except Skipped as error:
        sys.exit(f"scripts/bench saturated: {error}")
    result = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "workers": options.workers,
        "cap": options.cap,
        "seconds": options.seconds,
        "runs": runs,
    }
    print(json.dumps(result, indent=2) if options.json else "\n".join(render(result)))


if __name__ == "__main__":
    main()
