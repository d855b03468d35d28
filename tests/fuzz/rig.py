"""Who must not notice: a real broker, real servers, and bystanders that make requests all the while. Plus rows to do harm from.

A bystander is a process of its own that only uses ``Pool``. It writes what it finds into anonymous shared memory, which outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

import psutil

import mppool
from mppool import claims
from mppool.claims import Lane, Slot, named
from mppool.keeper import keeper_path
from mppool.kernel.locks import LockFile
from mppool.kernel.runtime import pool_id
from mppool.states import State
from mppool.table import BROKER, Row, Table, creation_lock, lock_path, open_table
from mppool.wire import Kind, Message, encode
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge, ask, judge

__all__ = ["Ground", "LoggedBroker", "Places", "Rig", "Seat", "Violation", "descriptors", "rig", "rss"]

CAP = 3
PLACES = 1 << 12  # more than there are connections at a time
PATIENCE = 20.0  # seconds a bystander waits for a session: nothing below may take it as long


class Violation(AssertionError):
    """Something happened that must not."""


class LoggedBroker(BrokerProcess):
    """What it says goes to a file: it has a lot to say about garbage."""

    log: IO[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self.log is None:
            self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as we live)
        ours = os.dup(2)
        try:
            os.dup2(self.log.fileno(), 2)
            return super()._start()
        finally:
            os.dup2(ours, 2)
            os.close(ours)

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            if self.log is not None:
                self.log.close()

    def said(self) -> str:
        assert self.log is not None
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if " cut: " not in line)[-3000:]


class Places:
    """Who has which connection just now, by the number that the server gave it: in shared memory, so that two holders meet."""

    def __init__(self) -> None:
        self.holders = memoryview(mmap.mmap(-1, 8 * PLACES)).cast("Q")

    def talk(self, sock: Any, nonce: str) -> None:
        """Two requests, and between them nobody else may have the connection. AssertionError if somebody has."""
        me = os.getpid() << 8 | random.getrandbits(8)
        at = ask(sock, nonce) % PLACES
        if self.holders[at]:
            raise AssertionError(f"a shared socket: {self.holders[at] >> 8} has connection {at}, too")
        self.holders[at] = me
        try:
            if ask(sock, nonce, 1) % PLACES != at or self.holders[at] != me:
                raise AssertionError(f"a shared socket: {self.holders[at] >> 8} got connection {at}, too")
        finally:
            self.holders[at] = 0


class Bystanders:
    """Some processes that use one pool as it is meant, and what they found: requests made, failures, the longest request."""

    REQUESTS, FAILURES, SLOWEST_US = range(3)

    def __init__(self, pool: mppool.Pool, count: int) -> None:
        self.pool = pool
        self.places = Places()
        self.words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.stop_at = 3 * count
        self.count = count

    def works(self) -> list[Callable[[Child], None]]:
        return [functools.partial(self.work, at=3 * n) for n in range(self.count)]

    def work(self, child: Child, at: int) -> None:
        words, pool, dice, n = self.words, self.pool, random.Random(at), 0
        while not words[self.stop_at]:
            n += 1
            began = time.monotonic()
            try:
                self.request(dice, f"{os.getpid()}-{n}")
                words[at + self.REQUESTS] += 1
            except BaseException:
                words[at + self.FAILURES] += 1
                if words[at + self.FAILURES] <= 5:
                    child.tell(traceback.format_exc())
            words[at + self.SLOWEST_US] = max(words[at + self.SLOWEST_US], int(1e6 * (time.monotonic() - began)))
            time.sleep(dice.choice((0.0005, 0.001, 0.004)))
        pool.close()

    def request(self, dice: random.Random, nonce: str) -> None:
        """One in thirty sessions is closed afterwards, so that slots and generations keep moving."""
        sock = self.pool.getconn(timeout=PATIENCE)
        discard = True
        try:
            self.places.talk(sock, nonce)
            discard = dice.random() < 1 / 30
        finally:
            self.pool.putconn(sock, discard=discard)

    def sum(self, field: int) -> int:
        return sum(self.words[field : self.stop_at : 3])

    @property
    def requests(self) -> int:
        return self.sum(self.REQUESTS)

    @property
    def failures(self) -> int:
        return self.sum(self.FAILURES)

    @property
    def slowest(self) -> float:
        """Seconds."""
        return max(self.words[self.SLOWEST_US : self.stop_at : 3]) / 1e6


class Ground:
    """One pool seen from outside, as somebody of the same user can: its table, and rows to take."""

    def __init__(self, path: str, name: str, port: int) -> None:
        self.ident = pool_id(path, name)
        self.port = port
        self.lock = LockFile(lock_path(self.ident), create=False)  # to look at others' locks; none is ever taken through it
        table = open_table(self.ident, self.lock)
        assert table is not None
        self.table: Table = table
        self.slots: dict[int, Slot] = {}
        self.seats: list[Seat] = []

    def slot(self, k: int) -> Slot:
        if k not in self.slots:
            self.slots[k] = Slot(self.table, k)
        return self.slots[k]

    def generations(self) -> list[int]:
        return self.table.array(self.table.generation)

    def check_tokens(self) -> None:
        """At most one unit in a token, at most one live lane that holds a slot. What looks wrong is looked at again: others go on meanwhile."""
        wrong = self.doubtful()
        for _ in range(50):
            if not wrong:
                return
            time.sleep(0.002)
            wrong &= self.doubtful()
        raise Violation(f"slots with two holders, or two units: {sorted(wrong)}")

    def doubtful(self) -> set[tuple[int, int]]:
        """Slots (with their uses) that more than one live lane holds, or whose token has more than one unit."""
        holders: dict[int, int] = {}
        for row in self.table.taken_rows():
            if self.lock.is_held(16 + row):
                for word in self.table.lanes_of(row):
                    if word & 7 in (claims.HELD, claims.GRANTED):
                        holders[word >> 3] = holders.get(word >> 3, 0) + 1
        uses = self.table.array(self.table.uses)
        found = {(k, uses[k]) for k, count in holders.items() if count > 1 and k < self.table.slots}
        return found | {(k, 0) for k in range(self.table.slots) if self.table.state(k) is not State.FREE and self.slot(k).token.value > 1}

    def lost(self) -> list[int]:
        """Slots whose token is gone although nobody, dead or alive, names them."""
        named_somewhere = {named(word) for row in self.table.taken_rows() for word in self.table.lanes_of(row) if word}
        used = [k for k in range(self.table.slots) if self.table.state(k) is not State.FREE or k in self.slots]
        return [k for k in used if not self.slot(k).token.value and k not in named_somewhere]

    def close(self) -> None:
        """May be repeated."""
        for seat in self.seats:
            seat.die()
        self.table.close()
        self.lock.close()


class Seat:
    """A row, taken as a worker takes it, through a lock file of its own: alive until ``die``, in whatever process."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        with creation_lock(ground.ident, create=False) as self.lock:
            self.row = Row(ground.table, self.lock, os.getpid())
        ground.seats.append(self)

    @property
    def alive(self) -> bool:
        return self.lock.fd >= 0

    def hello(self) -> bytes:
        return encode(Message(Kind.HELLO, self.row.index, self.row.incarnation, body=self.ground.ident.encode()))

    def lanes(self) -> list[int]:
        return self.ground.table.lanes_of(self.row.index)

    def free_lane(self) -> int:
        return self.lanes().index(0)

    def sweep(self) -> None:
        """Give back what was granted to us, as a worker that has no use for it does."""
        for index, word in enumerate(self.lanes()):
            if word & 7 == claims.GRANTED:
                self.accept(index)
                self.release(index)

    def accept(self, index: int) -> int:
        """The slot that was granted to this lane is ours."""
        lane = Lane(self.row, index)
        k = named(self.ground.table.words[lane.at])
        claims.accept(self.ground.table.words, lane, self.ground.slot(k))
        return k

    def claim(self, k: int, index: int) -> bool:
        """With this lane, if somebody left slot k idle."""
        table, lane, slot = self.ground.table, Lane(self.row, index), self.ground.slot(k)
        if not claims.claim(table.words, lane, slot):
            return False
        if table.state(k) is State.IDLE:
            table.mem[slot.state_at] = State.IN_USE
            return True
        claims.release(table.words, lane, slot)
        return False

    def release(self, index: int) -> None:
        lane = Lane(self.row, index)
        slot = self.ground.slot(named(self.ground.table.words[lane.at]))
        self.ground.table.mem[slot.state_at] = State.IDLE
        claims.release(self.ground.table.words, lane, slot)

    def die(self) -> None:
        """As by SIGKILL: the lock is gone, everything else stays as it is."""
        self.lock.close()


class Rig:
    """A broker with two pools, each with a server and bystanders; ``ground`` is the pool that harm is done to, or from."""

    def __init__(self, path: str, broker: LoggedBroker, servers: list[Judge], bystanders: list[Bystanders], children: list[Child], fresh: int) -> None:
        self.path = path
        self.broker = broker
        self.pid = broker.pid
        self.servers = servers
        self.bystanders = bystanders
        self.children = children
        self.fresh = fresh  # descriptors of a broker that has no pool
        self.ground = Ground(path, "near", servers[0].port)
        self.rss = rss(self.pid)

    @property
    def requests(self) -> int:
        return sum(some.requests for some in self.bystanders)

    @property
    def failures(self) -> int:
        return sum(some.failures for some in self.bystanders)

    @property
    def slowest(self) -> float:
        return max(some.slowest for some in self.bystanders)

    def deaths(self) -> int:
        return int(self.broker.process.poll() is not None)

    def check(self) -> None:
        """What must hold at any moment. Raises Violation."""
        if self.deaths():
            raise Violation(f"the broker has died, exit code {self.broker.process.returncode}: {self.broker.said()}")
        if self.failures:
            raise Violation("a bystander failed:\n" + "\n".join([*self.complaints(), self.broker.said()]))
        for server in self.servers:
            peak = server.counts()["peak"]
            if peak > CAP:
                raise Violation(f"{peak} connections, max_size is {CAP}")
        if rss(self.pid) > self.rss + 64 * 1024:
            raise Violation(f"the broker grew from {self.rss} KiB to {rss(self.pid)} KiB")
        self.ground.check_tokens()

    def complaints(self) -> list[str]:
        found = []
        for child in self.children:
            with contextlib.suppress(TimeoutError, EOFError, AssertionError):
                while True:
                    found.append(str(child.hear(timeout=0)))
        return found

    def check_rest(self) -> None:
        """When whoever did harm is gone: his rows are free, nothing is lost, and the bystanders get on."""
        ground = self.ground
        table, before = ground.table, self.requests

        def settled() -> bool:
            rows = [row for row in table.taken_rows() if not ground.lock.is_held(16 + row)]
            return not rows and not ground.lost()

        try:
            eventually(settled, timeout=15)
        except AssertionError:
            rows = [row for row in table.taken_rows() if not ground.lock.is_held(16 + row)]
            raise Violation(
                f"15 s later: dead rows {rows}, their lanes {[list(filter(None, table.lanes_of(row))) for row in rows]}, slots lost {ground.lost()}"
            ) from None
        eventually(lambda: self.requests > before + 20 or self.failures, timeout=PATIENCE + 10, what="bystanders get on")
        self.check()

    def restart_broker(self) -> None:
        """SIGKILL; another takes over from keeper and table."""
        self.broker.restart()
        self.pid = self.broker.pid
        eventually(lambda: self.ground.lock.is_held(BROKER), what="the next broker adopts the pool")
        self.rss = rss(self.pid)

    def end_bystanders(self) -> None:
        for some in self.bystanders:
            some.words[some.stop_at] = 1
        for child in self.children:
            wait_for(child)

    def leaked(self) -> int:
        """After ``end_bystanders``: what the broker has open beyond what it had before there was any pool."""
        self.ground.close()
        with contextlib.suppress(AssertionError):
            eventually(lambda: descriptors(self.pid) <= self.fresh, timeout=10)
        return descriptors(self.pid) - self.fresh


def wait_for(child: Child) -> None:
    """Until it has ended by itself; what it still tells is of no interest."""
    with contextlib.suppress(EOFError, AssertionError):
        while True:
            child.hear(PATIENCE + 10)
    child.wait()


@contextlib.contextmanager
def rig(path: str, *, pause_sessions: float = 1.0) -> Iterator[Rig]:
    """``near`` is used by more bystanders than it has sessions, ``far`` by one. Sessions end soon after their last use, so that pools do, too."""
    with judge() as one, judge() as two:
        broker = LoggedBroker(path)
        try:
            eventually(lambda: keeper_pid(path))
            fresh = descriptors(broker.pid)
            options: dict[str, Any] = {"max_size": CAP, "max_idle": pause_sessions, "broker": path, "close_timeout": 2.0}
            near, far = mppool.Pool(one.address, name="near", **options), mppool.Pool(two.address, name="far", **options)
            bystanders = [Bystanders(near, 4), Bystanders(far, 1)]
            with fork(*[work for some in bystanders for work in some.works()]) as children:
                for some in bystanders:
                    eventually(lambda some=some: all(some.words[3 * n] > 5 for n in range(some.count)), what="the bystanders begin")  # type: ignore[misc]
                it = Rig(path, broker, [one, two], bystanders, children, fresh)
                try:
                    yield it
                finally:
                    it.ground.close()
        finally:
            broker.stop()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss(pid: int) -> int:
    """KiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def keeper_pid(path: str) -> int:
    """The newest keeper of this socket, 0 if there is none."""
    processes = [process for process in psutil.process_iter(["cmdline", "status", "create_time"]) if keeper_path(path) in (process.info["cmdline"] or [])]
    alive = [(process.info["create_time"], process.pid) for process in processes if process.info["status"] != psutil.STATUS_ZOMBIE]
    return max(alive)[1] if alive else 0
