"""Scribbled tables: three workers use a pool of two, with a broker or without, while somebody writes into its shared memory.

What must hold: a call of the public API returns in time, with a session or with one of mppool's own errors; a session that was
lent is one connection, for one holder at a time; no process crashes, the broker lives on, and its other pools notice nothing.

Out of reach, and allowed here. More connections than ``max_size`` where the damage says so itself: the cap is a word like any other,
and which slot is in use (state, permit, generation) is known from the table alone. A session that is closed under its holder: damage
that takes the proof of ownership away is repaired by closing. A pool that serves nobody any more: refusing is a repair, too; it
ends with its processes. A file that is shrunk while it is mapped: the kernel kills whoever touches what is gone (SIGBUS).
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator

import mppool
from mppool.errors import Error
from mppool.inspect import find_pool, open_pools
from mppool.kernel.locks import LockFile
from mppool.kernel.runtime import pool_id
from mppool.table import W_BEAT, W_MAX_SIZE, Table, creation_lock, is_in_use, lock_path, open_table, remove_names
from tests.fuzz.damage import Damage, inflict
from tests.fuzz.rig import Bystanders, LoggedBroker, Places, Violation, rss, wait_for
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge, judge

__all__ = ["MOMENTS", "Bench", "bench"]

MOMENTS = ("before_attach", "idle", "in_use")
CAP = 2
TIMEOUT = 0.3  # seconds, of a checkout
LATE = 8.0  # seconds after which a call that should have taken TIMEOUT is a finding


class Bench:
    """A broker with one innocent pool, and a server; rounds of damage to other pools of the same broker."""

    def __init__(self, path: str, broker: LoggedBroker, innocent: Bystanders) -> None:
        self.path = path
        self.broker = broker
        self.allowed = CAP
        self.innocent = innocent
        self.places = Places()
        self.beat = look_at(pool_id(path, "innocent"))
        self.rounds = 0
        self.over_cap = 0
        self.outcomes: Counter[str] = Counter()
        self.rss = rss(broker.pid)

    def round(self, damages: list[Damage], moment: str, with_broker: bool = True) -> None:
        """Raises Violation."""
        self.rounds += 1
        name = f"t{self.rounds}"
        path = self.path if with_broker else f"{self.path}.none"
        ident = pool_id(path, name)
        self.places = Places()
        try:
            with judge() as server, fork(*[self.worker(server, path, name)] * 3) as children:
                self.play(children, damages, moment, ident, path, name)
                if server.counts()["peak"] > self.allowed:
                    self.over_cap += 1
        finally:
            self.clean(ident)
        self.check(with_broker)

    def play(self, children: list[Child], damages: list[Damage], moment: str, ident: str, path: str, name: str) -> None:
        one, *others = children
        tell(one, "use", 3)
        hear(one)
        truth = look_at(ident)
        assert truth is not None, "the first worker failed in an undamaged pool"
        if moment == "before_attach":
            self.scribble(truth, damages)
            for child in (*others, one):
                tell(child, "use", 6)
            for child in children:
                hear(child)
        else:
            for child in others:
                tell(child, "use", 3)
                hear(child)
            if moment == "in_use":
                for child in children:
                    tell(child, "use", 12)
                time.sleep(0.01)
            self.scribble(truth, damages)
            if moment == "in_use":
                for child in children:
                    hear(child)
        for child in children:
            tell(child, "use", 8)
        self.look_from_outside(path, name)
        for child in children:
            hear(child)
        truth.close()
        for child in children:
            tell(child, "close", 0)
        for child in children:
            self.outcomes.update(finish(child))

    def scribble(self, truth: Table, damages: list[Damage]) -> None:
        for damage in damages:
            inflict(truth, damage)
        cap = truth.words[W_MAX_SIZE]
        self.allowed = cap if CAP < cap <= truth.slots else CAP

    def look_from_outside(self, path: str, name: str) -> None:
        """What `mppool status` and `mppool resize` do; they may refuse, in mppool's own words."""
        pools, _ = open_pools(path)
        for pool in pools:
            with contextlib.suppress(Error):
                pool.snapshot()
            pool.lock.close()
        with contextlib.suppress(Error):
            pool = find_pool(path, name)  # type: ignore[assignment]
            if pool is not None:
                with contextlib.closing(pool.lock):
                    if self.rounds % 4 == 0:
                        pool.resize(CAP)

    def worker(self, server: Judge, path: str, name: str) -> Callable[[Child], dict[str, int]]:
        """Does what it is told; tells what went wrong. Public calls only."""
        pool = mppool.Pool(server.address, max_size=CAP, name=name, broker=path, max_idle=0.3, close_timeout=0.3)

        def work(child: Child) -> dict[str, int]:
            outcomes: Counter[str] = Counter()
            wrong: list[str] = []
            silence()
            while True:
                faulthandler.dump_traceback_later(25, file=2)
                what, count = child.hear(60)
                failures = 0
                for n in range(count):
                    failures += attempt("request", functools.partial(self.request, pool, n), outcomes, wrong) != "ok"
                    if failures > 2:  # it refuses; that takes time
                        break
                if what == "close":
                    attempt("repr", lambda: repr(pool), outcomes, wrong)
                    attempt("stats", pool.get_stats, outcomes, wrong)
                    attempt("close", pool.close, outcomes, wrong)
                child.tell({"wrong": wrong[:3]})
                if what == "close":
                    return outcomes

        return work

    def request(self, pool: mppool.Pool, n: int) -> None:
        """Lends a session and looks whether anybody else has the same connection."""
        sock = pool.getconn(timeout=TIMEOUT)
        try:
            sock.settimeout(5)
            self.places.talk(sock, f"{os.getpid()}-{n}")
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise AssertionError("no reply: somebody else may have it") from error
            raise Error(f"closed under its holder: {error}") from error
        finally:
            pool.putconn(sock, discard=n % 5 == 4)

    def clean(self, ident: str) -> None:
        """Names are the broker's to remove, unless it gave the pool up."""
        with contextlib.suppress(FileNotFoundError), creation_lock(ident, create=False) as lock:
            if not is_in_use(lock):
                remove_names(ident)
                os.unlink(lock.path)
            lock.close()

    def check(self, with_broker: bool) -> None:
        if self.broker.process.poll() is not None:
            raise Violation(f"the broker has died: {self.broker.said()}")
        if rss(self.broker.pid) > self.rss + 96 * 1024:
            raise Violation(f"the broker grew from {self.rss} KiB to {rss(self.broker.pid)} KiB")
        if self.beat is not None:
            now = time.monotonic_ns()
            eventually(lambda: self.beat.words[W_BEAT] > now, timeout=15, what="the broker still serves other pools")  # type: ignore[union-attr]
        before = self.innocent.requests
        eventually(lambda: self.innocent.requests > before or self.innocent.failures, timeout=30, what="the innocent pool gets on")
        if self.innocent.failures:
            raise Violation("a bystander of another pool failed")


def tell(child: Child, what: str, count: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        child.tell([what, count])


def hear(child: Child) -> None:
    """Raises Violation if the worker crashed, hangs, or found what must not be."""
    try:
        told = child.hear(30)
    except EOFError:
        raise Violation(f"a worker crashed, wait status {child.wait()}") from None
    except TimeoutError:
        raise Violation("a worker hangs") from None
    if told["wrong"]:
        raise Violation("\n".join(told["wrong"]))


def finish(child: Child) -> dict[str, int]:
    hear(child)
    outcomes: dict[str, int] = child.result(30)
    return outcomes


def look_at(ident: str) -> Table | None:
    lock = LockFile(lock_path(ident), create=False)
    try:
        return open_table(ident, lock)
    finally:
        lock.close()


def attempt(what: str, call: Callable[[], object], outcomes: Counter[str], wrong: list[str]) -> str:
    began = time.monotonic()
    try:
        call()
        outcome = "ok"
    except Error as error:
        outcome = type(error).__name__
    except BaseException:
        outcome = "wrong"
        wrong.append(f"{what}:\n{traceback.format_exc()}")
    if time.monotonic() - began > LATE:
        wrong.append(f"{what} took {time.monotonic() - began:.1f} s ({outcome})")
    outcomes[outcome] += 1
    return outcome


def silence() -> None:
    import logging

    logging.disable()


@contextlib.contextmanager
def bench(path: str) -> Iterator[Bench]:
    with judge() as far:
        broker = LoggedBroker(path)
        try:
            innocent = Bystanders(mppool.Pool(far.address, max_size=2, name="innocent", broker=path, max_idle=1.0), 1)
            with fork(*innocent.works()) as children:
                eventually(lambda: innocent.requests > 5)
                yield Bench(path, broker, innocent)
                innocent.words[innocent.stop_at] = 1
                for child in children:
                    wait_for(child)
        finally:
            try:
                broker.stop()
            except subprocess.TimeoutExpired:
                raise Violation("the broker does not end when it is told to") from None
            finally:
                remove_given_up(path)


def remove_given_up(path: str) -> None:
    """Pools that the broker gave up are nobody's; `mppool gc` would remove them."""
    from mppool.inspect import idents

    for place in (path, f"{path}.none"):
        for ident in idents(pool_id(place, "x").rpartition("-")[0]):
            with contextlib.suppress(FileNotFoundError), creation_lock(ident, create=False) as lock:
                remove_names(ident)
                os.unlink(lock.path)
                lock.close()
