"""What ``Pool`` and ``AsyncPool`` have in common: options, this process's part in the pool, its end, and what interruptions leave.

Nothing here waits for a server or a broker: pool.py and aio.py tell the stories, one by blocking, the other by awaiting.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mppool.drivers.base import DriverBase
from mppool.errors import Error, OptionError, PoolClosed
from mppool.kernel.locks import close_in_child
from mppool.kernel.runtime import socket_path
from mppool.options import Options, Target, check_name, default_name, parse_target
from mppool.snapshot import snapshot
from mppool.stray import let_go, settle_strays
from mppool.worker import Hands, Ready, Worker, never

__all__ = ["Shell", "understood"]

_pools: weakref.WeakSet[Shell] = weakref.WeakSet()
_parts: dict[Worker, weakref.ref[Shell]] = {}  # what this process has of which pool; a pool may be forgotten without ``close()``


class Shell:
    """The options of a pool, and what this process has of it. Users have ``Pool`` and ``AsyncPool``."""

    def __init__(
        self,
        target: object = None,
        *,
        max_size: int = 4,
        name: str | None = None,
        driver: DriverBase | None = None,
        broker: str | None = None,
        autostart: bool = False,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - Options.names())
        if unknown:
            raise OptionError(f"{unknown[0]}={options[unknown[0]]!r}: there is no such option; there are {', '.join(sorted(Options.names()))}")
        self.options = Options(max_size=max_size, **options)
        if driver is not None:
            if not callable(getattr(driver, "dial", None)) or not callable(getattr(driver, "key", None)):
                raise OptionError(f"driver={driver!r}: expected a driver, see mppool.drivers.base.DriverBase")
            self._driver, self.target = driver, str(target) if target is not None else ""
        else:
            where = parse_target(target)
            self._driver, self.target = self._driver_for(where), str(where)
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

    def _driver_for(self, target: Target) -> DriverBase:
        """What a pool that was given a target only lends."""
        raise NotImplementedError

    # Looking at it.

    def get_stats(self) -> dict[str, Any]:
        """What the pool is doing, over all workers: see ``mppool.snapshot.snapshot``. Counters never go back."""
        worker = self._attached()
        return snapshot(worker.table, worker.lock, worker.row)

    def _lends(self, conn: Any) -> bool:
        """Is it lent, in this process, just now?"""
        worker = self._worker or self._leaving
        return worker is not None and bool(worker.guard[0]) and id(conn) in worker.leases

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        kind, worker = type(self).__name__, self._worker
        if worker is None or worker.closed or not worker.guard[0]:
            return f"<{kind} {self.name!r} {'closed' if self._closed else 'not open'}>"
        stats = snapshot(worker.table)
        return (
            f"<{kind} {self.name!r} {len(worker.leases)} in use, {len(worker.idle)} idle, {len(worker.waiting)} waiting"
            f" | host {stats['in_use']} in use, {stats['idle']} idle, {stats['size']}/{stats['max_size']}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawned processes get the options, and open the pool by its name."""
        return _rebuild, (type(self), self.name, self.target, self._driver, self.options, self.broker, self.autostart)

    # This process.

    def _attached(self) -> Worker:
        """This process's part in the pool, made at its first use. Raises PoolClosed, ConfigMismatch, BrokerUnavailable."""
        with self._door():
            if self._closed:
                raise PoolClosed(f"pool {self.name!r} is closed")
            worker = self._worker
            if worker is not None and not worker.guard[0]:
                worker.forked()  # by C code that ran no hooks
                worker = self._worker = None
            leave_forgotten()
            return worker or self._attach()

    def _attach(self) -> Worker:
        made: list[Worker] = []
        try:
            made.extend(map(Worker, (self.name,), (self.target,), (self._driver,), (self.options,), (self.broker,)))  # in one step: it holds a row
            made[0].autostart = self.autostart
            _parts[made[0]] = weakref.ref(self)
            self._worker = made[0]
            return made[0]
        except BaseException:
            if made and self._worker is None:
                made[0].leave()
                _parts.pop(made[0], None)
            raise

    def _door(self) -> threading.Lock:
        """The lock, for one thread at a time, as soon as it is free: gevent may have come after it was made, and waiting in it would stop all greenlets."""
        while self._opening.locked():
            time.sleep(0.001)
        return self._opening

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

    def _unwind_checkout(self, worker: Worker, error: BaseException, hands: Hands | None, ready: Ready | None) -> None:
        with understood(worker):
            self._unwind(worker, error, hands)
            if hands is None and ready is not None:
                worker.interrupted(*ready)
            self._leave_if_done(worker)

    def _unwind_return(self, worker: Worker, error: BaseException, hands: Hands | None, conn: Any, ready: Ready | None) -> None:
        with understood(worker):
            if hands is None and ready is None:
                ready = worker.leases.pop(id(conn), None)
            self._unwind(worker, error, hands)
            if hands is None and ready is not None and ready not in worker.idle:
                worker.settle(ready[1])
            self._leave_if_done(worker)

    def _not_lent(self, conn: Any) -> Error:
        return Error(f"{conn!r} is not lent by pool {self.name!r} in this process: returned already, or lent before a fork or by another pool")

    # The end.

    def _close(self) -> None:
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

    def _leave_if_done(self, worker: Worker) -> None:
        """After ``close()``: whoever brings back the last lease, or stops waiting, in whatever thread, leaves."""
        if worker is self._leaving and worker.is_quiet():
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        worker.leave()
        _parts.pop(worker, None)
        self._leaving = None

    def _after_fork(self) -> None:
        self._opening = threading.Lock()
        for worker in (self._worker, self._leaving):
            if worker is not None:
                worker.forked()
        self._worker = self._leaving = None


@contextmanager
def understood(worker: Worker) -> Iterator[None]:
    """What Python says of words that make no sense becomes what mppool says of a damaged table."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, Error):
            raise
        raise worker.table.damaged(f"{type(error).__name__}: {error}") from error


def _rebuild(kind: type[Shell], name: str, target: str, driver: DriverBase, options: Options, broker: str, autostart: bool) -> Shell:
    pool = kind(target or None, driver=driver, name=name, max_size=options.max_size, broker=broker, autostart=autostart)
    pool.options = options
    return pool


def leave_forgotten() -> None:
    """What this process has of pools that nobody has any more. (Not at the moment they are forgotten: that may be anywhere.)"""
    for worker, pool in list(_parts.items()):
        if pool() is None and _parts.pop(worker, None) is not None and worker.guard[0]:
            worker.leave()


def _leave_all() -> None:
    """At the interpreter's exit: what is still lent ends with the process."""
    for pool in list(_pools):
        pool._close()
        if pool._leaving is not None and pool._leaving.guard[0]:
            pool._leave(pool._leaving)
    leave_forgotten()


def _forked() -> None:
    for pool in list(_pools):
        pool._after_fork()
    for worker in _parts:
        if not worker.closed:
            worker.forked()
    _parts.clear()
    close_in_child()


atexit.register(_leave_all)
os.register_at_fork(after_in_child=_forked)
