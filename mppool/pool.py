"""``Pool``: what a worker's code uses. The common case in plain code; everything unusual is a story, told here by blocking."""

from __future__ import annotations

import time
from collections.abc import Callable
from time import monotonic_ns
from types import TracebackType
from typing import Any, TypeVar

from mppool import claims
from mppool.checkout import checkout
from mppool.dialing import prewarm
from mppool.drivers.base import DriverBase
from mppool.drivers.closeable import CloseableDriver
from mppool.drivers.raw import RawDriver
from mppool.errors import Error, OptionError, PoolTimeout
from mppool.kernel import link
from mppool.launch import ensure_broker
from mppool.options import Target, check_timeout
from mppool.permits import check_max_size
from mppool.returning import after_return, drain, put_down, resize
from mppool.shell import Shell, understood
from mppool.states import State
from mppool.story import Attach, Call, Close, Dial, Ended, Pause, Receive, Request, Story, Tidy, Transfer
from mppool.table import H_FLAGS, W_ATTENTION
from mppool.worker import Hands, Worker

__all__ = ["Lease", "Pool"]

IDLE, IN_USE = int(State.IDLE), int(State.IN_USE)  # plain numbers: the fast path pays for an enum's
T = TypeVar("T")


class Pool(Shell):
    """One pool of connections, shared by every process of this user that declares the same name.

    ``target`` is "tcp://host:port", ("host", port) or "unix:///path"; such a pool lends ``socket.socket`` objects. ``dial=`` takes a
    function that makes anything with ``close()``: those sessions stay in the process that made them, capped over all.
    ``driver=`` takes a driver (see mppool.drivers.base). ``name`` defaults to what the target says.

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
        driver: DriverBase | None = None,
        broker: str | None = None,
        autostart: bool = False,
        **options: Any,
    ) -> None:
        if sum(given is not None for given in (dial, driver)) + (target is not None and driver is None) != 1:
            raise OptionError(f"target={target!r}, dial={dial!r}, driver={driver!r}: expected a target, or dial=, or driver=")
        if dial is not None:
            if not callable(dial):
                raise OptionError(f"dial={dial!r}: expected a function without arguments")
            driver = CloseableDriver(dial)
        super().__init__(target, max_size=max_size, name=name, driver=driver, broker=broker, autostart=autostart, **options)

    def _driver_for(self, target: Target) -> DriverBase:
        return RawDriver(target, self.options.connect_timeout)

    # Sessions.

    def getconn(self, timeout: float | None = None) -> Any:
        """Lend a session; ``putconn`` gives it back. ``timeout`` in seconds, default: the pool's.

        Raises PoolTimeout, TooManyWaiting, DialFailed, BrokerUnavailable or PoolClosed; then nothing is lent.
        """
        worker = self._worker
        if worker is None or not worker.guard[0]:
            worker = self._enter()
        if timeout is not None:
            timeout = check_timeout(timeout, 0)
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
                    elif (uses == entry.uses + 1 or (worker.takes_foreign and words[worker.generation_at + slot.k] == entry.generation)) and not entry.poll(0):
                        now = monotonic_ns()
                        if now < words[slot.expires_at]:
                            entry.uses = uses
                            worker.mem[slot.state_at] = IN_USE
                            words[slot.since_at] = now
                            conn = entry.conn
                            worker.leases[id(conn)] = ready
                            return conn
            hands = Hands(worker, ready[1] if ready is not None else None)
            conn = perform(worker, checkout(hands, self.options.timeout if timeout is None else timeout, ready[0] if ready is not None else None))
            hands.done()
            return conn
        except BaseException as error:
            with understood(worker):
                self._unwind_checkout(worker, error, hands, ready)
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
                perform(worker, put_down(hands, lane, entry, discarded=entry.end_loan() or discard))
                hands.done()
        except BaseException as error:
            with understood(worker):
                self._unwind_return(worker, error, hands, conn, ready)
                raise
        if words[W_ATTENTION] and (worker.table.halves[H_FLAGS] or worker.owes or not (worker.comes_right_back(entry) or worker.look())):
            self._tell(worker, after_return)
        if worker is self._leaving:
            self._leave_if_done(worker)

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
        """This process uses the pool no more: idle sessions go on in others, and so does what is still lent once it is returned.

        Threads that wait for a session get PoolClosed, within a second. Does not end the pool for other workers. May be repeated.
        """
        self._close()

    def resize(self, max_size: int, *, min_size: int | None = None) -> None:
        """Change the cap, for all workers, at once. Sessions above it are closed as they come back, or by the broker when idle.

        ``min_size``, if given, is changed, too: ``max_idle`` leaves so many. Raises OptionError.
        """
        worker = self._enter()
        check_max_size(worker.table, max_size, min_size)
        self._tell(worker, lambda hands: resize(hands, max_size, min_size))

    def drain(self) -> None:
        """Replace all sessions, of all workers: idle ones are closed at once or when they are next met, lent ones at their return."""
        self._tell(self._enter(), drain)

    def __enter__(self) -> Pool:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self) -> Worker:
        worker = self._worker
        if worker is not None and worker.guard[0]:
            return worker
        if self.autostart and not self._closed:
            ensure_broker(self.broker)
        worker = self._attached()
        if self.options.min_size:
            self._tell(worker, prewarm)
        return worker


class Lease:
    """A session for a ``with`` block. A subclass may say what an error means; where there is none, it costs nothing."""

    __slots__ = ("_block", "_conn", "_pool", "_timeout", "_worker")

    def __init__(self, pool: Pool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> Any:
        conn = None
        pool = self._pool
        try:
            conn = self._conn = pool.getconn(self._timeout)
            worker = self._worker = pool._worker or pool._leaving
            # A signal handler's exception can end a block before the first line of __exit__; see Worker.tidy.
            entry = worker.leases[id(conn)][0]  # type: ignore[union-attr]
            self._block = entry.block = [entry.uses]
            return conn
        except BaseException as error:
            if conn is not None:
                pool.putconn(conn, discard=True)
            self._failed(error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        conn = self._conn
        if kind is None:
            try:
                self._pool.putconn(conn)
                return
            except Error:
                if self._worker is not None and self._worker.guard[0]:
                    raise
        elif self._worker is not None and self._worker.guard[0] and id(conn) in self._worker.leases:
            self._pool.putconn(conn, discard=self._spoils(error))
        # Else it was given back within the block, before the exception, or forked inside the block: then the lease is the parent's.

    def _failed(self, error: BaseException) -> None:
        """Nothing was lent, because of this; may raise another error in its place."""

    def _spoils(self, error: BaseException | None) -> bool:
        """Does this error, which left the block, make the session unfit for others?"""
        return True


def perform(worker: Worker, story: Story[T]) -> T:
    """Tell a story with blocking I/O: do what it asks for, send it the answer or throw in what was raised."""
    answer: Any = None
    try:
        request = story.send(None)
        while True:
            try:
                answer = receive(request) if type(request) is Receive else do(worker, request)
            except BaseException as error:
                request = story.throw(error)
            else:
                request = story.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def do(worker: Worker, request: Request) -> Any:
    if isinstance(request, Transfer):
        return worker.driver.transferred(request.session)
    if isinstance(request, Receive):
        return receive(request)
    if isinstance(request, Pause):
        return time.sleep(request.seconds)
    if isinstance(request, Dial):
        return worker.driver.dial()
    if isinstance(request, Attach):
        return worker.driver.attach(request.fd, request.baggage)
    if isinstance(request, Tidy):
        return worker.driver.tidy(request.session)
    if isinstance(request, Call):
        return request.function(request.session)
    if isinstance(request, Close):
        return worker.driver.close(request.session)
    return ended(request)


def receive(request: Receive) -> Any:
    line, until = request.line, request.until
    while line.poll(max(0.0, until - time.monotonic()) * 1000):
        answer = line.receive()
        if answer is not None:
            return answer
    return None


def ended(request: Ended) -> bool:
    until = time.monotonic() + request.seconds
    while not link.has_ended(request.sock):
        left = until - time.monotonic()
        if left <= 0:
            return False
        link.wait_readable(request.sock.fileno(), left)
    return True
