"""What the dead held, and how it comes back. Used by the broker, and without one by a worker in need.

Only the holder of the broker lock reclaims, so there is never more than one. A row is dead when its byte in the lock file
is free; it is freed (its pid word becomes 0, the last write of all) when no lane of it names a slot any more. Closing
a dead holder's session goes: shut down, generation, shared flag, permit, FREE, token, the dead lanes. Whoever
finds any prefix of that done does it again from the start.

What somebody alive may still have is never counted as closed. A session that never left its *home*, the process that
dialed it, died with it. One that was shared (``spread``) goes only through a process that has a duplicate to shut down.
"""

from __future__ import annotations

from collections.abc import Callable

from mppool import claims
from mppool.claims import Evidence, Slot
from mppool.kernel.locks import LockFile
from mppool.permits import Permits
from mppool.states import CloseReason, State
from mppool.table import BROKER, R_ATTACHED, R_CLAIMED, R_CLOSED, R_PID, R_WAITING, NoRow, Row, Table, row_is_alive

__all__ = ["PAUSE", "Reclaimer", "free_slot", "take_row"]

PAUSE = 0.002  # seconds between the two looks: far longer than any processor holds a store back


def free_slot(table: Table, permits: Permits, row: Row, k: int) -> None:
    """Inside the dial lock, by whoever holds slot k or convicted its holder: its connection is closed, the slot is free.

    The token is given next, by the caller, whose ``row`` counts. May be repeated from any point.
    """
    words = table.words
    if table.state(k) is not State.FREE:
        table.move(k, State.CLOSING)
    words[table.generation + k] += 1
    words[table.uses + k] += 1  # so that unchanged uses mean the same session, too
    words[row.at + R_CLAIMED] += 1
    words[table.shared_flag + k] = words[table.spread + k] = words[table.expires + k] = words[table.socket + k] = words[table.residence + k] = 0
    if words[table.permit + k]:
        permits.give(k)
    table.move(k, State.FREE)
    words[table.home + k] = 0


class Reclaimer:
    """Finds and settles the dead rows of one pool. The caller holds the pool's broker lock throughout."""

    def __init__(self, table: Table, lock: LockFile, permits: Permits, row: Row, slot: Callable[[int], Slot]) -> None:
        self.table = table
        self.lock = lock
        self.permits = permits
        self.row = row
        self.slot = slot

    def dead_rows(self) -> set[int]:
        return {row for row in self.table.taken_rows() if row != self.row.index and not row_is_alive(self.lock, row)}

    def suspects(self, dead: set[int]) -> list[Evidence]:
        """First look. ``PAUSE`` seconds later ask ``convicted`` about what it returns."""
        alive, orphaned = claims.scan(self.table, dead)
        for k, state in enumerate(self.table.states()):
            if state != State.FREE and k not in alive:
                orphaned.setdefault(k, ())  # idle, or taken although nobody's lane says so: a lane was overwritten
        found = (claims.suspect(self.table, self.slot(k), lanes, alive) for k, lanes in orphaned.items() if k < self.table.slots)
        return [evidence for evidence in found if evidence is not None]

    def convicted(self, evidence: list[Evidence], dead: set[int]) -> list[Evidence]:
        """Second look: the slots whose token died with its taker."""
        alive, _ = claims.scan(self.table, dead)
        return [case for case in evidence if claims.convict(self.table, self.slot(case.k), case, alive)]

    def bury(self, case: Evidence) -> None:
        """Inside the dial lock: the session's connection is closed everywhere; the slot goes back."""
        free_slot(self.table, self.permits, self.row, case.k)
        self.count(CloseReason.owner_died)
        claims.give_token(self.table, self.slot(case.k), case.lanes)

    def left_at_home(self, dead: set[int]) -> list[int]:
        """IDLE sessions that never left a process which is dead now. The caller claims before it buries."""
        return left_at_home(self.table, dead)

    def free_rows(self, dead: set[int]) -> list[int]:
        return free_rows(self.table, dead)

    def count(self, reason: CloseReason) -> None:
        self.table.words[self.row.at + R_CLOSED + reason] += 1


def left_at_home(table: Table, dead: set[int]) -> list[int]:
    homes = {table.home_of(row) for row in dead}
    home, spread, generation = table.array(table.home), table.array(table.spread), table.array(table.generation)
    return [k for k in table.find_all(State.IDLE) if home[k] in homes and spread[k] != generation[k] + 1]


def free_rows(table: Table, dead: set[int]) -> list[int]:
    """Free the dead rows that no lane and no session needs any more; which ones. By the holder of the broker lock."""
    freed = []
    for row in sorted(dead):
        if table.names_nothing(row) and not left_at_home(table, {row}):
            at = table.row_at(row)
            table.words[at + R_WAITING] = table.words[at + R_ATTACHED] = 0
            table.words[at + R_PID] = 0
            freed.append(row)
    return freed


def take_row(table: Table, lock: LockFile, pid: int) -> Row:
    """A row for a process that comes, under the creation lock. Where dead ones have all of them, and nobody is in need, it frees some itself.

    Raises NoRow if none is to be had.
    """
    try:
        return Row(table, lock, pid)
    except NoRow:
        if not lock.take(BROKER):
            raise
        try:
            free_rows(table, {row for row in table.taken_rows() if not row_is_alive(lock, row)})
        finally:
            lock.give(BROKER)
        return Row(table, lock, pid)
