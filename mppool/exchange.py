"""The broker's brain, without I/O: who waits, who may dial, what is to be evicted. Time and facts are arguments."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from mppool.states import CloseReason, State
from mppool.table import DRAINED

__all__ = ["Facts", "Queue", "plan_evictions", "why_expired"]

W = TypeVar("W")


class Queue(Generic[W]):
    """Who waits, first come first served. A waiter whose turn came to nothing may come back to the front."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # 0: none
        self._waiters: deque[W] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, waiter: W, *, front: bool) -> bool:
        """False: too many wait already. Coming back to the front is never refused."""
        if front:
            self._waiters.appendleft(waiter)
            return True
        if self.limit and len(self._waiters) >= self.limit:
            return False
        self._waiters.append(waiter)
        return True

    def head(self) -> W:
        return self._waiters[0]

    def behind(self) -> list[W]:
        """Those who wait behind the first, in order."""
        return list(self._waiters)[1:]

    def serve(self) -> W:
        return self._waiters.popleft()

    def strike(self, waiter: W) -> bool:
        """False: it was not waiting (any more)."""
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return False
        return True


class Facts(NamedTuple):
    """What an eviction is decided on; arrays have an item a slot, times are nanoseconds of one clock.

    ``unused_since`` is when a look first found the session as it is now: no process writes down when it returns one.
    """

    now: int
    states: Sequence[int]
    unused_since: Sequence[int]
    expires: Sequence[int]
    size: int  # permits held, sessions that are CLOSING among them
    max_size: int
    min_size: int
    max_idle: int


def why_expired(expires: int) -> CloseReason:
    """Why a session whose time is over is closed, by its word in the table."""
    return CloseReason.drained if expires == DRAINED else CloseReason.too_old


def plan_evictions(facts: Facts) -> list[tuple[int, CloseReason]]:
    """Which idle sessions are to be closed, and why: those past their time; those above the cap; the longest idle above ``min_size``."""
    idle = [k for k, state in enumerate(facts.states) if state == State.IDLE]
    plan = [(k, why_expired(facts.expires[k])) for k in idle if 0 < facts.expires[k] < facts.now]
    gone = {k for k, _ in plan}
    size = facts.size - len(plan) - sum(state == State.CLOSING for state in facts.states)
    for k in sorted((k for k in idle if k not in gone), key=lambda k: facts.unused_since[k]):
        if size > facts.max_size:
            plan.append((k, CloseReason.drained))
        elif size > facts.min_size and facts.now - facts.unused_since[k] > facts.max_idle:
            plan.append((k, CloseReason.idle_too_long))
        else:
            break
        size -= 1
    return plan
