"""The workers of a scene: processes that lease and return on order, and are struck while they do."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import mppool
from tests.crash.tracing import KINDS, Thrown, Trigger, raised_at, throw
from tests.helpers.processes import Child
from tests.helpers.server import ask

__all__ = ["CAP", "DEADLINE", "Peer", "Worker", "descriptors"]

CAP = 2
DEADLINE = 15.0  # seconds within which everything must be back, on a machine that does much else, too

PoolMaker = Callable[..., mppool.Pool]


class Worker:
    """What happens in the process. ``lent`` is what it holds; operations may keep another pool in ``other``."""

    def __init__(self, make_pool: PoolMaker, trigger: Trigger) -> None:
        self.make_pool = make_pool
        self.trigger = trigger
        self.pool = make_pool()
        self.other: mppool.Pool | None = None
        self.lent: list[Any] = []
        self.numbers = itertools.count()
        self.waiter: threading.Thread | None = None
        self.waited: list[Any] = []

    # Orders of the director, and what operations are made of.

    def lease(self, count: int = 1, timeout: float = DEADLINE) -> None:
        for _ in range(count):
            self.lent.append(self.pool.getconn(timeout))

    def give_back(self, discard: bool = False) -> None:
        while self.lent:
            self.pool.putconn(self.lent[-1], discard=discard)
            self.lent.pop()  # after: what is thrown in between loses nothing

    def give_back_after_a_strike(self) -> None:
        """The same; the last one may have been given back already."""
        while self.lent:
            with contextlib.suppress(mppool.Error):
                self.pool.putconn(self.lent[-1])
            self.lent.pop()

    def wait_in_vain(self) -> None:
        with contextlib.suppress(mppool.PoolTimeout):
            self.lent.append(self.pool.getconn(0.02))

    def spoil_one(self) -> None:
        """The server ends a session that is idle here."""
        self.lease()
        self.lent[0].sendall(b"!close\n")
        self.give_back()

    def give_up_waiting(self) -> None:
        """A signal handler's exception ends a wait; the broker has not been heard since."""
        signal.signal(signal.SIGALRM, throw)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            self.lease()
        except Thrown:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def has_no_wait_to_settle(self) -> bool:
        """Each wait first reads the answers to earlier ones that an exception ended."""
        self.wait_in_vain()
        return self.pool._worker is None or not self.pool._worker.abandoned

    def give_back_one(self) -> None:
        self.pool.putconn(self.lent.pop())

    def nonce(self) -> str:
        return f"{os.getpid()}-{next(self.numbers)}"

    def ask_all(self) -> None:
        """Every session held answers, each on a connection of its own."""
        for sock in self.lent:
            sock.settimeout(DEADLINE)
        numbers = [ask(sock, self.nonce()) for sock in self.lent]
        assert len(set(numbers)) == len(numbers), f"two sessions on one connection: {numbers}"

    def use(self) -> None:
        """Whatever there is."""
        with contextlib.suppress(mppool.PoolTimeout):
            self.lease(timeout=0.1)
            self.ask_all()
            self.give_back()

    def hold(self, count: int) -> None:
        self.lease(count)
        self.ask_all()

    def begin_wait(self) -> None:
        """Another thread waits for a session."""

        def wait() -> None:
            try:
                self.waited.append(self.pool.getconn(DEADLINE))
            except mppool.Error as error:
                self.waited.append(error)

        self.waiter = threading.Thread(target=wait)
        self.waiter.start()

    def end_wait(self) -> None:
        """It must have got one."""
        if self.waiter is not None:
            self.waiter.join()
            self.waiter = None
            (got,) = self.waited
            self.waited.clear()
            if isinstance(got, BaseException):
                raise got
            self.lent.append(got)
            self.ask_all()

    def resize(self, max_size: int) -> None:
        self.pool.resize(max_size)

    def visit(self, name: str) -> None:
        """Lease the whole of another pool, and close it."""
        with self.make_pool(name=name) as pool:
            socks = [pool.getconn(DEADLINE) for _ in range(CAP)]
            for sock in socks:
                ask(sock, self.nonce())
                pool.putconn(sock, discard=True)

    def close(self) -> None:
        self.end_other()
        self.give_back()
        self.pool.close()

    def end_other(self) -> None:
        other, self.other = self.other, None
        if other is not None:
            other.close()

    def stray_descriptors(self) -> dict[str, str]:
        """Descriptors of this process that its sessions and links do not explain, and what each is."""
        gc.collect()
        found = descriptors()
        part = self.pool._worker
        owned: list[Any] = []
        if part is not None:
            owned += [line.sock for line in [*part.lines, *(line for line, _ in part.abandoned)]]
            for entry in part.entries.values():
                owned += [entry.sock, entry.conn]
        explained = {str(sock.fileno()) for sock in owned if sock is not None}
        return {fd: what for fd, what in found.items() if fd not in explained}

    def twice(self) -> list[str]:
        """Lanes and links that are in two places: two conversations would use one."""
        part = self.pool._worker
        if part is None:
            return []
        pairs = [*part.idle, *part.leases.values(), *part.abandoned]
        lanes = Counter(f"lane {lane.index}" for lane in [*part.lanes, *part.unfinished, *part.limbo, *(lane for _, lane in pairs)])
        lines = Counter(f"link {line.sock.fileno()}" for line in [*part.lines, *(line for line, _ in part.abandoned)])
        return [what for what, count in (lanes + lines).items() if count > 1]

    def links(self) -> int:
        """To the broker. As many are kept as were ever in use at once."""
        part = self.pool._worker
        return len(part.lines) + len(part.abandoned) if part is not None else 0

    def state(self) -> str:
        """What this process knows of its lanes and sessions: for the report of a loss."""
        part = self.pool._worker
        if part is None:
            return "not attached"
        words = [(at, part.words[part.row.lanes_at + at]) for at in range(part.table.lanes) if part.words[part.row.lanes_at + at]]
        held = [f"lane {at} says slot {word >> 3} kind {word & 7}" for at, word in words]
        free = f"{len(part.lanes) + len(part.idle) + len(part.leases)} of {part.table.lanes} lanes accounted for"
        return ", ".join([*held, f"{len(part.leases)} leases, {len(part.limbo)} limbo, {len(part.unfinished)} unfinished", free])

    def attempt(self, run: Callable[[Worker], None], kind: str, opcodes: bool) -> str:
        """Run an operation, traced; the trigger is armed already. Where the exception came out, "" if it ran through."""
        came_out = ""
        signal.signal(signal.SIGUSR1, throw)
        try:
            try:
                self.trigger.install(KINDS[kind], opcodes)
                run(self)
            finally:
                sys.settrace(None)
        except Thrown as error:
            came_out = raised_at(error.__traceback__) or "the operation's end"
        except mppool.PoolTimeout:
            pass  # some are there to run into it
        finally:
            self.trigger.disarm()
        return came_out


def descriptors(pid: int | str = "self") -> dict[str, str]:
    """The open descriptors of a process, and what each is."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them; or closed meanwhile
            found[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


class Peer:
    """The director's side of a worker process."""

    def __init__(self, make_pool: PoolMaker, operation: Any = None) -> None:
        self.trigger = Trigger()
        self._child = Child(lambda child: serve(child, Worker(make_pool, self.trigger), operation))
        self.pid = self._child.pid

    def send(self, order: str, *args: Any) -> None:
        self._child.tell([order, *args])

    def answer(self, timeout: float = 4 * DEADLINE) -> Any:
        """AssertionError if the order failed, EOFError if the process was killed."""
        return self._child.hear(timeout)[0]

    def do(self, order: str, *args: Any) -> Any:
        self.send(order, *args)
        return self.answer()

    def has_spoken(self) -> bool:
        """Has it answered, or died?"""
        return bool(self._child._buffer or select.select([self._child._in], [], [], 0)[0])

    def end(self) -> None:
        self._child.end()


def serve(child: Child, worker: Worker, operation: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # so that collecting is quick
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError):
        while True:
            order, *args = child.hear(timeout=3600)
            try:
                child.tell([obey(worker, operation, order, args)])
            except Exception as error:
                raise AssertionError(f"{order} {args}: {error!r} ({worker.state()})") from error


def obey(worker: Worker, operation: Any, order: str, args: list[Any]) -> Any:
    if order == "prepare":
        return operation.prepare(worker)
    if order == "run":
        return worker.attempt(operation.run, *args)
    if order == "recover":
        return operation.recover(worker)
    return getattr(worker, order)(*args)
