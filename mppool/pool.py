"""``Pool``: what a worker's code uses. The common case in plain code; everything unusual is a story told elsewhere."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic_ns
from types import TracebackType
from typing import Any, TypeVar

from mppool import claims
from mppool.attached import Entry
from mppool.checkout import checkout
from mppool.claims import Lane
from mppool.dialing import prewarm
from mppool.drivers.base import Driver
from mppool.drivers.closeable import CloseableDriver
from mppool.drivers.raw import RawDriver
from mppool.errors import Error, OptionError, PoolClosed, PoolTimeout
from mppool.kernel import link
from mppool.kernel.locks import close_in_child
from mppool.kernel.runtime import socket_path
from mppool.launch import ensure_broker
from mppool.options import Options, check_name, check_timeout, default_name, parse_target
from mppool.permits import check_max_size
from mppool.returning import after_return, put_down
from mppool.snapshot import snapshot
from mppool.states import State
from mppool.story import Attach, Call, Close, Dial, Ended, Pause, Receive, Request, Story
from mppool.stray import let_go, settle_strays
from mppool.table import H_FLAGS, W_ATTENTION
from mppool.worker import Hands, Worker, never

__all__ = ["Lease", "Pool"]

IDLE, IN_USE = int(State.IDLE), int(State.IN_USE)  # plain numbers: the fast path pays for an enum's
T = TypeVar("T")
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """One pool of connections, shared by every process of this user that declares the same name.

    ``target`` is "tcp://host:port", ("host", port) or "unix:///path"; such a pool lends ``socket.socket`` objects. ``dial=`` takes a
    function that makes anything with ``close()``: those sessions stay in the process that made them, capped over all.
    ``driver=`` takes a Driver (see mppool.drivers.base). ``name`` defaults to what the target says.

    The constructor does no I/O; ``open()``, ``with pool:`` or the first use does, in each process anew: a pool made
    before a fork works in every child. Threads may share a pool. The other options are those of ``Options``; ``max_size`` and
    the other numbers of the whole pool are those of whoever created it, and a worker that declares another value is warned.

    Raises OptionError (a ValueError) that names the option and the value.
    """

    def __init__(
        self,
        target: object = None,
        *,
        max_size: int = 4,
        name: str | None = None,
        dial: Callable[[], Any] | None = None,
        driver: Driver | None = None,
        broker: str | None = None,
        autostart: bool = False,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - Options.names())
        if unknown:
            raise OptionError(f"{unknown[0]}={options[unknown[0]]!r}: there is no such option; there are {', '.join(sorted(Options.names()))}")
        self.options = Options(max_size=max_size, **options)
        if sum(given is not None for given in (dial, driver)) + (target is not None and driver is None) != 1:
            raise OptionError(f"target={target!r}, dial={dial!r}, driver={driver!r}: expected a target, or dial=, or driver=")
        if driver is not None:
            if not callable(getattr(driver, "dial", None)) or not callable(getattr(driver, "key", None)):
                raise OptionError(f"driver={driver!r}: expected a driver, see mppool.drivers.base.Driver")
            self._driver, self.target = driver, str(target) if target is not None else ""
        elif dial is not None:
            if not callable(dial):
                raise OptionError(f"dial={dial!r}: expected a function without arguments")
            self._driver, self.target = CloseableDriver(dial), ""
        else:
            where = parse_target(target)
            self._driver, self.target = RawDriver(where, self.options.connect_timeout), str(where)
            name = name if name is not None else default_name(where)
        if name is None:
            raise OptionError("name=None: a pool without a target needs a name; workers that give the same share it")
        self.name = check_name(name)
        self.broker = socket_path(broker)
        self.autostart = bool(autostart)
        self._worker: Worker | None = None
        self._leaving: Worker | None = None  # closed, but some sessions are still lent
        self._opening = threading.Lock()
        self._closed = False
        _pools.add(self)

    # Sessions.

    def getconn(self, timeout: float | None = None) -> Any:
        """Lend a session; ``putconn`` gives it back. ``timeout`` in seconds, default: the pool's.

        Raises PoolTimeout, TooManyWaiting, DialFailed, BrokerUnavailable or PoolClosed; then nothing is lent.
        """
        worker = self._worker
        if worker is None or not worker.guard[0]:
            worker = self._enter()
        if timeout is not None:
            check_timeout(timeout, 0)
        words = worker.words
        ready = hands = None
        try:
            if not words[W_ATTENTION] or worker.may_overtake():
                try:
                    ready = worker.ready.pop()
                except IndexError:
                    pass  # no idle session here
                else:
                    entry, lane = ready
                    slot = entry.slot
                    uses = claims.claim(words, lane, slot)
                    if not uses:
                        ready = None
                        worker.lanes.append(lane)
                    elif (uses == entry.uses + 1 or words[worker.generation_at + slot.k] == entry.generation) and not entry.poll(0):
                        now = monotonic_ns()
                        if now < words[slot.expires_at]:
                            entry.uses = uses
                            worker.mem[slot.state_at] = IN_USE
                            words[slot.since_at] = now
                            conn = entry.conn
                            worker.leases[id(conn)] = ready
                            return conn
            hands = Hands(worker, ready[1] if ready is not None else None)
            conn = perform(worker, checkout(hands, check_timeout(timeout, self.options.timeout), ready[0] if ready is not None else None))
            hands.done()
            return conn
        except BaseException as error:
            with understood(worker):
                self._unwind(worker, error, hands)
                if hands is None and ready is not None:
                    worker.interrupted(*ready)
                self._leave_if_done(worker)
                raise

    def putconn(self, conn: Any, *, discard: bool = False) -> None:
        """Give a lent session back; with ``discard`` it is closed. Raises Error if it is not lent (any more)."""
        worker = self._worker or self._leaving
        if worker is None or not worker.guard[0]:
            raise self._not_lent(conn)
        ready = hands = None
        words = worker.words
        try:
            ready = worker.leases.pop(id(conn), None)
            if ready is None:
                raise self._not_lent(conn)
            entry, lane = ready
            if worker.returns_plainly(conn) and not discard:
                worker.mem[entry.slot.state_at] = IDLE
                claims.release(words, lane, entry.slot)
                worker.idle.append(ready)
                ready = None
            else:
                hands = Hands(worker, lane)
                ready = None
                self._put_slowly(hands, entry, lane, discard)
                hands.done()
        except BaseException as error:
            with understood(worker):
                if hands is None and ready is None:
                    ready = worker.leases.pop(id(conn), None)
                self._unwind(worker, error, hands)
                if hands is None and ready is not None and ready not in worker.idle:
                    worker.settle(ready[1])
                self._leave_if_done(worker)
                raise
        if words[W_ATTENTION] and (worker.table.halves[H_FLAGS] or worker.owes or not worker.look()):
            self._tell(worker, after_return)
        if worker is self._leaving:
            self._leave_if_done(worker)

    def _put_slowly(self, hands: Hands, entry: Entry, lane: Lane, discard: bool) -> None:
        if entry.lent is not entry.conn:  # debug: the user's duplicate ends with the lease
            discard = discard or entry.lent.fileno() < 0
            entry.lent.close()
            entry.lent = entry.conn
        perform(hands.worker, put_down(hands, lane, entry, discarded=discard))

    def _tell(self, worker: Worker, story: Callable[[Hands], Story[None]]) -> None:
        """Tell a story that lends nothing."""
        hands = None
        try:
            hands = Hands(worker)
            perform(worker, story(hands))
            hands.done()
        except BaseException as error:
            with understood(worker):
                self._unwind(worker, error, hands)
                raise

    def _unwind(self, worker: Worker, error: BaseException, hands: Hands | None) -> None:
        """After an exception: what the story holds is settled, and if a signal handler threw it, whatever lies between two hands."""
        interrupted = not isinstance(error, Error)
        if interrupted:
            let_go(error)
        if hands is not None:
            hands.settle()
        if interrupted:
            worker.permits.let_go()
            settle_strays(worker)
            worker.finish()

    def _not_lent(self, conn: Any) -> Error:
        return Error(f"{conn!r} is not lent by pool {self.name!r} in this process: returned already, or lent before a fork or by another pool")

    def connection(self, timeout: float | None = None) -> Lease:
        """``with pool.connection() as conn:`` lends a session for the block; an exception in it discards the session."""
        return Lease(self, timeout)

    # The pool.

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Attach this process to the pool and dial until ``min_size`` sessions are there. Done by the first use, too.

        With ``wait`` it is an error (PoolTimeout) if they cannot be had within ``timeout`` seconds.
        """
        timeout = check_timeout(timeout, self.options.timeout)
        worker = self._enter()
        if wait:
            until = time.monotonic() + timeout
            while worker.permits.held() < self.options.min_size:
                if time.monotonic() > until:
                    raise PoolTimeout(f"pool {self.name!r}: min_size={self.options.min_size} sessions were not to be had within {timeout:g} s")
                self._tell(worker, prewarm)
                time.sleep(0.01)

    def close(self) -> None:
        """This process uses the pool no more: idle sessions go on in others, and what is still lent is closed at its return.

        Threads that wait for a session get PoolClosed, within a second. Does not end the pool for other workers. May be repeated.
        """
        with self._door():
            self._closed = True
            self._leaving, self._worker = self._worker or self._leaving, None
        worker = self._leaving
        if worker is not None and worker.guard[0]:
            worker.returns_plainly = never
            worker.closing = True
            with understood(worker):
                settle_strays(worker)
                self._leave_if_done(worker)

    def resize(self, max_size: int) -> None:
        """Change the cap, for all workers, at once. Sessions above it are closed as they come back, or by the broker when idle."""
        worker = self._enter()
        check_max_size(worker.table, max_size)
        try:
            with worker.permits.entered():
                worker.permits.resize(max_size)
        except BaseException as error:
            self._unwind(worker, error, None)
            raise
        worker.look()

    def get_stats(self) -> dict[str, Any]:
        """What the pool is doing, over all workers: see ``mppool.snapshot.snapshot``. Counters never go back."""
        worker = self._enter()
        return snapshot(worker.table, worker.lock, worker.row)

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Pool:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        worker = self._worker
        if worker is None or worker.closed or not worker.guard[0]:
            return f"<Pool {self.name!r} {'closed' if self._closed else 'not open'}>"
        stats = snapshot(worker.table)
        return (
            f"<Pool {self.name!r} {len(worker.leases)} in use, {len(worker.idle)} idle, {len(worker.waiting)} waiting"
            f" | host {stats['in_use']} in use, {stats['idle']} idle, {stats['size']}/{stats['max_size']}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawned processes get the options, and open the pool by its name."""
        return _rebuild, (self.name, self.target, self._driver, self.options, self.broker, self.autostart)

    # This process.

    def _enter(self) -> Worker:
        """This process's part in the pool, made at its first use."""
        with self._door():
            if self._closed:
                raise PoolClosed(f"pool {self.name!r} is closed")
            worker = self._worker
            if worker is not None and not worker.guard[0]:
                worker.forked()  # by C code that ran no hooks
                worker = self._worker = None
            if worker is None:
                if self.autostart:
                    ensure_broker(self.broker)
                worker = self._attach()
            else:
                return worker
        if self.options.min_size:
            self._tell(worker, prewarm)
        return worker

    def _attach(self) -> Worker:
        made: list[Worker] = []
        try:
            made.extend(map(Worker, (self.name,), (self.target,), (self._driver,), (self.options,), (self.broker,)))  # in one step: it holds a row
            self._worker = made[0]
            return made[0]
        except BaseException:
            if made and self._worker is None:
                made[0].leave()
            raise

    def _door(self) -> threading.Lock:
        """The lock, for one thread at a time, as soon as it is free: gevent may have come after it was made, and waiting in it would stop all greenlets."""
        while self._opening.locked():
            time.sleep(0.001)
        return self._opening

    def _leave_if_done(self, worker: Worker) -> None:
        """After ``close()``: whoever brings back the last lease, or stops waiting, in whatever thread, leaves."""
        if worker is self._leaving and worker.is_quiet():
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        worker.leave()
        self._leaving = None

    def _after_fork(self) -> None:
        self._opening = threading.Lock()
        for worker in (self._worker, self._leaving):
            if worker is not None:
                worker.forked()
        self._worker = self._leaving = None


class Lease:
    """A session for a ``with`` block."""

    __slots__ = ("__weakref__", "_conn", "_pool", "_timeout", "_worker")

    def __init__(self, pool: Pool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> Any:
        conn = None
        try:
            conn = self._conn = self._pool.getconn(self._timeout)
            worker = self._worker = self._pool._worker or self._pool._leaving
            # A signal handler's exception can end a block before the first line of __exit__; see Worker.tidy.
            worker.blocks[id(conn)] = weakref.ref(self), worker.leases[id(conn)][0].uses  # type: ignore[union-attr]
            return conn
        except BaseException:
            if conn is not None:
                self._pool.putconn(conn, discard=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        worker, conn = self._worker, self._conn
        if worker is None or not worker.guard[0]:
            return  # forked inside the block: the lease is the parent's
        if kind is None or id(conn) in worker.leases:  # else it was given back within the block, before the exception
            self._pool.putconn(conn, discard=kind is not None)
        worker.blocks.pop(id(conn), None)


@contextmanager
def understood(worker: Worker) -> Iterator[None]:
    """What Python says of words that make no sense becomes what mppool says of a damaged table."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, Error):
            raise
        raise worker.table.damaged(f"{type(error).__name__}: {error}") from error


def perform(worker: Worker, story: Story[T]) -> T:
    """Tell a story with blocking I/O: do what it asks for, send it the answer or throw in what was raised."""
    answer: Any = None
    try:
        request = story.send(None)
        while True:
            try:
                answer = do(worker, request)
            except BaseException as error:
                request = story.throw(error)
            else:
                request = story.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def do(worker: Worker, request: Request) -> Any:
    if isinstance(request, Receive):
        return receive(request)
    if isinstance(request, Pause):
        return time.sleep(request.seconds)
    if isinstance(request, Dial):
        return worker.driver.dial()
    if isinstance(request, Attach):
        return worker.driver.attach(request.fd, request.baggage)
    if isinstance(request, Call):
        return request.function(request.session)
    if isinstance(request, Close):
        return worker.driver.close(request.session)
    return ended(request)


def receive(request: Receive) -> Any:
    while True:
        answer = request.line.receive()
        if answer is not None:
            return answer
        left = request.until - time.monotonic()
        if left <= 0:
            return None
        link.wait_readable(request.line.sock.fileno(), left)


def ended(request: Ended) -> bool:
    until = time.monotonic() + request.seconds
    while not link.has_ended(request.sock):
        left = until - time.monotonic()
        if left <= 0:
            return False
        link.wait_readable(request.sock.fileno(), left)
    return True


def _rebuild(name: str, target: str, driver: Driver, options: Options, broker: str, autostart: bool) -> Pool:
    pool = Pool(target or None, driver=driver, name=name, max_size=options.max_size, broker=broker, autostart=autostart)
    pool.options = options
    return pool


def _leave_all() -> None:
    """At the interpreter's exit: what is still lent ends with the process."""
    for pool in list(_pools):
        pool.close()
        if pool._leaving is not None and pool._leaving.guard[0]:
            pool._leave(pool._leaving)


def _forked() -> None:
    for pool in list(_pools):
        pool._after_fork()
    close_in_child()


atexit.register(_leave_all)
os.register_at_fork(after_in_child=_forked)
