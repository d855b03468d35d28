"""``AsyncPool``: the same pool for asyncio. Stories are told here by awaiting; no thread, no executor.

A pool may be used by ``Pool`` in some places and by ``AsyncPool`` in others, also in one process: each is a part of its own.
A session is lent while its driver reads from it; before it goes back, reading stops, so that what arrives next stays in
the kernel, for whoever has the session then.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from inspect import isawaitable
from time import monotonic_ns
from types import TracebackType
from typing import Any, TypeVar

from mppool import claims
from mppool.attached import Entry
from mppool.checkout import checkout, timed_out
from mppool.dialing import prewarm
from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.drivers.streams import AsyncRawDriver, StreamDriver
from mppool.errors import Error, OptionError, PoolTimeout, TooManyWaiting
from mppool.kernel import link
from mppool.launch import ensure_broker
from mppool.options import Target, check_timeout
from mppool.permits import check_max_size
from mppool.returning import after_return, drain, put_down, resize
from mppool.shell import Shell, understood
from mppool.snapshot import waiting
from mppool.states import State
from mppool.story import Attach, Call, Close, Dial, Ended, Pause, Receive, Request, Story, Tidy, Transfer
from mppool.table import H_FLAGS, R_REJECTED, R_TIMEOUTS, W_ATTENTION, W_MAX_WAITING
from mppool.worker import Hands, Ready, Worker

__all__ = ["AsyncLease", "AsyncPool"]

IDLE, IN_USE = int(State.IDLE), int(State.IN_USE)
T = TypeVar("T")


class AsyncPool(Shell):
    """One pool of connections, shared by every process of this user that declares the same name; for asyncio, also on uvloop.

    ``target`` is "tcp://host:port", ("host", port) or "unix:///path"; such a pool lends non-blocking ``socket.socket`` objects for
    ``loop.sock_recv`` and its like, or with ``streams=True`` pairs ``(StreamReader, StreamWriter)``. ``driver=`` takes an asynchronous
    driver (see mppool.drivers.base). Everything else is as for ``Pool``: options, names, errors; hooks may be ``async def``.

    One event loop at a time: a pool that was used in a loop that is closed now begins anew in the next one. Cancelling a task, wherever
    it is, leaks nothing; a session that was in use is closed then, as after any other exception.
    """

    def __init__(
        self,
        target: object = None,
        *,
        max_size: int = 4,
        name: str | None = None,
        streams: bool = False,
        driver: DriverBase | None = None,
        broker: str | None = None,
        autostart: bool = False,
        **options: Any,
    ) -> None:
        if driver is None and target is None:
            raise OptionError("target=None, driver=None: expected a target, or driver=")
        if driver is not None and not isinstance(driver, AsyncDriverBase):
            raise OptionError(f"driver={driver!r}: expected an asynchronous driver, see mppool.drivers.base.AsyncDriverBase")
        if options.get("debug"):
            raise OptionError("debug=True: AsyncPool has no such mode")
        self._streams = streams
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = Gate(0)  # made with what this process has of the pool
        super().__init__(target, max_size=max_size, name=name, driver=driver, broker=broker, autostart=autostart, **options)

    def _driver_for(self, target: Target) -> DriverBase:
        return (StreamDriver if self._streams else AsyncRawDriver)(target, self.options.connect_timeout)

    # Sessions.

    async def getconn(self, timeout: float | None = None) -> Any:
        """Lend a session; ``putconn`` gives it back. ``timeout`` in seconds, default: the pool's.

        Raises PoolTimeout, TooManyWaiting, DialFailed, BrokerUnavailable or PoolClosed; then, and if it is cancelled, nothing is lent.
        """
        worker = self._worker
        if worker is None or not worker.guard[0] or self._loop is not asyncio.get_running_loop():
            worker = await self._enter()
        if timeout is not None:
            check_timeout(timeout, 0)
        taken: list[Ready] = []
        hands = None
        try:
            conn = lend_ready(worker, taken)
            if conn is None:
                entry, lane = taken[0] if taken else (None, None)
                hands = Hands(worker, lane)
                conn = await self._lend(hands, check_timeout(timeout, self.options.timeout), entry)
                hands.done()
            worker.driver.resume(conn)  # type: ignore[attr-defined]
            return conn
        except BaseException as error:
            with understood(worker):
                self._unwind_checkout(worker, error, hands, taken[0] if taken else None)
                raise

    async def _lend(self, hands: Hands, timeout: float, found: Entry | None) -> Any:
        """The story of a checkout. Only so many of this process's tasks are in one at a time; the others queue here, in order."""
        worker, gate, began = hands.worker, self._gate, time.monotonic()
        if found is not None:  # never waits with a session in hand
            return await perform(worker, checkout(hands, timeout, found))
        if gate.is_busy():
            limit = worker.words[W_MAX_WAITING]
            if limit and waiting(worker.table) >= limit:
                worker.bump(R_REJECTED)
                raise TooManyWaiting(f"max_waiting={limit}: so many callers wait already")
            worker.note_waiting(hands, True)
        try:
            if not await gate.enter(timeout):
                worker.bump(R_TIMEOUTS)
                raise timed_out(worker, timeout)
        finally:
            worker.note_waiting(hands, False)
        try:
            return await perform(worker, checkout(hands, max(0.0, timeout - (time.monotonic() - began)), found))
        finally:
            gate.leave()

    async def putconn(self, conn: Any, *, discard: bool = False) -> None:
        """Give a lent session back; with ``discard`` it is closed, as it is if this is cancelled. Raises Error if it is not lent (any more)."""
        worker, ready = self._take_back(conn)
        hands = None
        try:
            if not discard and worker.returns_plainly(conn):
                give(worker, ready)
            else:
                hands = Hands(worker, ready[1])
                await perform(worker, put_down(hands, ready[1], ready[0], discarded=discard))
                hands.done()
        except BaseException as error:
            with understood(worker):
                self._unwind_return(worker, error, hands, conn, ready)
                raise
        if worker.words[W_ATTENTION] and (worker.table.halves[H_FLAGS] or worker.owes or not (worker.comes_right_back(ready[0]) or worker.look())):
            await self._tell(worker, after_return)
        if worker is self._leaving:
            self._leave_if_done(worker)

    def _take_back(self, conn: Any) -> tuple[Worker, Ready]:
        worker = self._worker or self._leaving
        ready = worker.leases.pop(id(conn), None) if worker is not None and worker.guard[0] else None
        if worker is None or ready is None:
            raise self._not_lent(conn)
        return worker, ready

    def _drop(self, conn: Any) -> None:
        """End a lease at once, where nothing can be awaited any more: its session is closed."""
        worker, (_, lane) = self._take_back(conn)
        Hands(worker, lane).settle()
        self._leave_if_done(worker)

    def connection(self, timeout: float | None = None) -> AsyncLease:
        """``async with pool.connection() as conn:`` lends a session for the block; an exception in it, or a cancellation, discards the session."""
        return AsyncLease(self, timeout)

    async def _tell(self, worker: Worker, story: Callable[[Hands], Story[None]]) -> None:
        """Tell a story that lends nothing."""
        hands = None
        try:
            hands = Hands(worker)
            await perform(worker, story(hands))
            hands.done()
        except BaseException as error:
            with understood(worker):
                self._unwind(worker, error, hands)
                raise

    # The pool.

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Attach this process to the pool and dial until ``min_size`` sessions are there. Done by the first use, too.

        With ``wait`` it is an error (PoolTimeout) if they cannot be had within ``timeout`` seconds.
        """
        until = time.monotonic() + check_timeout(timeout, self.options.timeout)
        worker = await self._enter()
        while wait and worker.permits.held() < self.options.min_size:
            if time.monotonic() > until:
                raise PoolTimeout(f"pool {self.name!r}: min_size={self.options.min_size} sessions were not to be had within {timeout:g} s")
            await self._tell(worker, prewarm)
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """This process uses the pool no more: idle sessions go on in others, and so does what is still lent once it is returned.

        Tasks that wait for a session get PoolClosed, within a second. Does not end the pool for other workers. May be repeated.
        """
        self._close()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def resize(self, max_size: int, *, min_size: int | None = None) -> None:
        """Change the cap, for all workers, at once. Sessions above it are closed as they come back, or by the broker when idle.

        ``min_size``, if given, is changed, too: ``max_idle`` leaves so many. Raises OptionError.
        """
        worker = await self._enter()
        check_max_size(worker.table, max_size, min_size)
        await self._tell(worker, lambda hands: resize(hands, max_size, min_size))

    async def drain(self) -> None:
        """Replace all sessions, of all workers: idle ones are closed at once or when they are next met, lent ones after their return."""
        await self._tell(await self._enter(), drain)

    async def __aenter__(self) -> AsyncPool:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _enter(self) -> Worker:
        loop = asyncio.get_running_loop()
        if self.autostart and not self._closed and self._worker is None:
            await asyncio.to_thread(ensure_broker, self.broker)
        worker = self._worker
        if worker is not None and worker.guard[0] and self._loop is not loop:
            self._leave_loop(worker)
        if self._worker is not None and self._worker.guard[0]:
            return self._worker
        worker = self._attached()
        self._loop = loop
        self._gate = Gate(worker.table.lanes // 4)
        if self.options.min_size:
            await self._tell(worker, prewarm)
        return worker

    def _after_fork(self) -> None:
        asyncio._set_running_loop(None)  # a child that was forked inside of a loop must not touch it: its epoll is the parent's
        super()._after_fork()

    def _leave_loop(self, worker: Worker) -> None:
        """What this process has of the pool belongs to a loop that is closed: nobody can return what was lent there."""
        if self._loop is not None and not self._loop.is_closed():
            raise Error(f"pool {self.name!r} is in use in another event loop, which is not closed; make a pool for each loop")
        for _, lane in list(worker.leases.values()):
            worker.settle(lane)
        for hands in worker.told():
            hands.settle()
        self._worker = None
        self._leave(worker)


class Gate:
    """Lets ``room`` tasks in at a time, in the order in which they came."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.queue: deque[asyncio.Future[bool]] = deque()

    def is_busy(self) -> bool:
        return bool(self.queue) or not self.room

    async def enter(self, seconds: float) -> bool:
        """Whoever is let in calls ``leave``. False: not within so many seconds."""
        if not self.is_busy():
            self.room -= 1
            return True
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self.queue.append(turn)
        timer = loop.call_later(seconds, wake, turn, False)
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.result():
                self.leave()  # it was let in at the moment it was cancelled
            raise
        finally:
            timer.cancel()

    def leave(self) -> None:
        while self.queue:
            turn = self.queue.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        self.room += 1


class AsyncLease:
    """A session for an ``async with`` block."""

    __slots__ = ("_conn", "_pool", "_timeout", "_worker")

    def __init__(self, pool: AsyncPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    async def __aenter__(self) -> Any:
        conn = self._conn = await self._pool.getconn(self._timeout)
        self._worker = self._pool._worker or self._pool._leaving
        return conn

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        worker, conn = self._worker, self._conn
        if worker is None or not worker.guard[0]:
            return  # forked inside the block: the lease is the parent's
        if kind is GeneratorExit:
            if id(conn) in worker.leases:
                self._pool._drop(conn)
        elif kind is None or id(conn) in worker.leases:  # else it was given back within the block, before the exception
            await self._pool.putconn(conn, discard=kind is not None)


# The common case, as in pool.py, where a function's call would be a tenth of it.


def lend_ready(worker: Worker, taken: list[Ready]) -> Any:
    """Lend the session this process used last, if it is idle and fit and nobody waits; else None.

    What it takes is in ``taken`` (empty before): there an interruption finds it, and there a session that is odd is left, held.
    """
    words = worker.words
    if words[W_ATTENTION] and not worker.may_overtake():
        return None
    try:
        taken.append(worker.ready.pop())
    except IndexError:
        return None  # no idle session here
    ready = taken[0]
    entry, lane = ready
    slot = entry.slot
    uses = claims.claim(words, lane, slot)
    if not uses:
        taken.clear()
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
    return None


def give(worker: Worker, ready: Ready) -> None:
    """Give a clean session back."""
    entry, lane = ready
    worker.mem[entry.slot.state_at] = IDLE
    claims.release(worker.words, lane, entry.slot)
    worker.idle.append(ready)


# Stories.


async def perform(worker: Worker, story: Story[T]) -> T:
    """Tell a story by awaiting: do what it asks for, send it the answer or throw in what was raised, a cancellation among it."""
    answer: Any = None
    try:
        request = story.send(None)
        while True:
            try:
                answer = await do(worker, request)
            except BaseException as error:
                request = story.throw(error)
            else:
                request = story.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def do(worker: Worker, request: Request) -> Any:
    driver: Any = worker.driver
    if isinstance(request, Receive):
        return await receive(request)
    if isinstance(request, Pause):
        return await asyncio.sleep(request.seconds)
    if isinstance(request, Ended):
        return await ended(request)
    answer: Any
    if isinstance(request, Dial):
        answer = driver.dial()
    elif isinstance(request, Attach):
        answer = driver.attach(request.fd, request.baggage)
    elif isinstance(request, Close):
        answer = driver.close(request.session)
    else:
        driver.resume(request.session)
        if isinstance(request, Call):
            answer = request.function(request.session)
        elif isinstance(request, Tidy):
            answer = driver.tidy(request.session)
        else:
            assert isinstance(request, Transfer)
            answer = driver.transferred(request.session)
    return await answer if isawaitable(answer) else answer


async def receive(request: Receive) -> Any:
    while True:
        answer = request.line.receive()
        if answer is not None:
            return answer
        left = request.until - time.monotonic()
        if left <= 0:
            return None
        await readable(request.line.sock.fileno(), left)


async def ended(request: Ended) -> bool:
    until = time.monotonic() + request.seconds
    while not link.has_ended(request.sock):
        left = until - time.monotonic()
        if left <= 0:
            return False
        await readable(request.sock.fileno(), left)
    return True


async def readable(fd: int, seconds: float) -> None:
    """Wait for bytes, the end or an error on a descriptor of the pool's own, so long at most."""
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[bool] = loop.create_future()
    timer = loop.call_later(min(seconds, 86400.0), wake, woken, False)
    loop.add_reader(fd, wake, woken, True)
    try:
        await woken
    finally:
        loop.remove_reader(fd)
        timer.cancel()


def wake(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)
