"""Permits and the dial lock: how many connections there may be, and who may open the next.

Theory of operation. Invariant, whenever the dial lock is free:

    units of the cap semaphore + permits held by slots + debt of a shrink  =  max_size
    where  units = max(0, max_size - held)   and   debt = max(0, held - max_size)

Everything that changes the number of connections (dial, close, resize) does so inside the dial lock: a lock of this process
outside, the kernel's byte lock inside. The kernel frees it when its holder dies, at whatever step; so whoever enters
counts the permits and puts the semaphore right first. (Taking a unit and then recording it, without this, lost all of
4 permits within 707 SIGKILLs.) A permit goes back only after its connection was closed.

The dial lock is only ever tried. Sections are microseconds long, so whoever finds it taken pauses and tries again; a
holder that was stopped (SIGSTOP) delays dials and closes, not checkouts.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from mppool.errors import Error, OptionError
from mppool.kernel.locks import LockFile
from mppool.kernel.semaphores import BusyError
from mppool.states import State
from mppool.table import (
    DIAL,
    H_FLAGS,
    SHRINKING,
    W_DOWN_SINCE,
    W_FAILURES,
    W_MAX_DIALING,
    W_MAX_SIZE,
    W_REPAIRS,
    W_RETRY_AT,
    Table,
)

__all__ = ["Permits"]

SPIN = 0.0002  # seconds between two tries at the dial lock; its sections take microseconds
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds, of the breaker


class Permits:
    """The cap of one pool, as this process sees it."""

    def __init__(self, table: Table, lock: LockFile) -> None:
        self.table = table
        self.words = table.words
        self.lock = lock
        self.cap = table.open_cap()
        self.door = threading.RLock()  # guards ``holder``, for a moment; a signal handler may come back in
        self.holder: weakref.ref[Section] | None = None

    # The dial lock.

    def section(self) -> Section:
        """One try at the dial lock: ``with permits.section() as inside:``, and ``inside`` says if it succeeded."""
        section = Section(self)
        section.enter()
        return section

    @contextmanager
    def entered(self, timeout: float = 1.0) -> Iterator[None]:
        """Inside the dial lock. Raises Error if a stopped process holds it for longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            with self.section() as inside:
                if inside:
                    yield
                    return
            if time.monotonic() > deadline:
                raise self.is_stuck(timeout)
            time.sleep(SPIN)

    def is_stuck(self, seconds: float) -> Error:
        return Error(f"the dial lock of pool {self.table.text('name')!r} is held for {seconds:g} s (a stopped process?)")

    def let_go(self) -> None:
        """After an interruption: if it hit the end of a section, the lock is held for nobody."""
        with self.door:
            if self.holder is not None and self.holder() is None:
                self.lock.give(DIAL)
                self.holder = None

    def is_ours(self) -> bool:
        """Is this very thread inside, below us? Then we are in a signal handler, and waiting for it would be for ever."""
        holder = self.holder() if self.holder is not None else None
        return holder is not None and holder.thread == threading.get_ident()

    # Inside it.

    def held(self) -> int:
        return self.table.slots - self.table.array(self.table.permit).count(0)

    def settle(self) -> bool:
        """Make the semaphore say what the slots hold. True if it did not: somebody died, or was interrupted, half-way."""
        held, max_size = self.held(), min(self.words[W_MAX_SIZE], self.table.slots)
        units, have = max(0, max_size - held), self.cap.value
        for _ in range(have, units):
            self.cap.release()
        for _ in range(units, have):
            self.cap.acquire(0)
        flags = SHRINKING if held > max_size else 0
        if self.table.halves[H_FLAGS] != flags:
            self.table.halves[H_FLAGS] = flags
        return bool(have != units)

    def take(self, k: int) -> bool:
        """One unit becomes the permit of slot k, if there is one."""
        try:
            self.cap.acquire(0)
        except BusyError:
            return False
        self.words[self.table.permit + k] = 1
        return True

    def give(self, k: int) -> None:
        """The permit of slot k, whose connection is closed, goes back (or pays the debt of a shrink)."""
        self.words[self.table.permit + k] = 0
        self.settle()

    def resize(self, max_size: int) -> None:
        """A shrink takes what units there are; the rest is a debt that sessions pay as they come back."""
        check_max_size(self.table, max_size)
        self.words[W_MAX_SIZE] = max_size
        self.settle()

    # May anybody dial now? A breaker shared by all workers: after failures one at a time tries, at growing distances.

    def dialing(self) -> int:
        return self.table.states().count(State.DIALING)

    def may_dial(self) -> bool:
        """Is there a unit, a place among those who dial, and no pause after failures? Outside the lock the answer is a hint."""
        return self.room_to_dial() > 0

    def room_to_dial(self) -> int:
        """How many may begin to dial now. By the slots, not by the semaphore: a resize may have died before it gave the units."""
        words = self.words
        units = max(0, words[W_MAX_SIZE] - self.held())
        if words[W_FAILURES]:
            return min(units, 1) if time.monotonic_ns() >= words[W_RETRY_AT] and not self.dialing() else 0
        return min(units, words[W_MAX_DIALING] - self.dialing()) if units else 0

    def dial_succeeded(self) -> None:
        if self.words[W_FAILURES]:
            self.words[W_FAILURES] = 0
            self.words[W_DOWN_SINCE] = 0

    def dial_failed(self, why: str) -> None:
        words = self.words
        failures = min(words[W_FAILURES], 20)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**failures) * random.uniform(0.5, 1.0)
        now = time.monotonic_ns()
        words[W_RETRY_AT] = now + int(pause * 1e9)
        if not words[W_DOWN_SINCE]:
            words[W_DOWN_SINCE] = now
        self.table.write_text("dial_error", why)
        words[W_FAILURES] = failures + 1


class Section:
    """One try at the dial lock, and the way out of it. Inside, the equation holds.

    Which section of this process is inside is a weak reference: one whose end was interrupted is gone, see ``Permits.let_go``.
    """

    __slots__ = ("__weakref__", "_permits", "inside", "thread")

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self.inside = False
        self.thread = threading.get_ident()

    def enter(self) -> None:
        permits = self._permits
        try:
            with permits.door:
                if permits.holder is not None and permits.holder() is not None:
                    return
                permits.holder = weakref.ref(self)
            if permits.lock.take(DIAL):
                if permits.settle():
                    permits.words[W_REPAIRS] += 1
                self.inside = True
            else:
                self.leave()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        permits = self._permits
        if permits.holder is not None and permits.holder() is self:
            permits.lock.give(DIAL)
            permits.holder = None

    def __enter__(self) -> bool:
        return self.inside

    def __exit__(self, *_: object) -> None:
        self.leave()


def check_max_size(table: Table, max_size: object, min_size: object = None) -> None:
    """Raises OptionError if the pool cannot be of these sizes."""
    if min_size is not None and (not isinstance(min_size, int) or isinstance(min_size, bool) or not isinstance(max_size, int) or not 0 <= min_size <= max_size):
        raise OptionError(f"min_size={min_size!r}: expected a whole number from 0 to max_size={max_size!r}")
    if not isinstance(max_size, int) or isinstance(max_size, bool) or not 1 <= max_size <= table.slots:
        raise OptionError(
            f"max_size={max_size!r}: expected a whole number from 1 to {table.slots}, the room in this pool's table (four times its first max_size)"
        )
