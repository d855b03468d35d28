"""Without a broker: a process in need takes back what the dead hold, itself."""

from __future__ import annotations

import socket
import time

from mppool import claims
from mppool.attached import Entry
from mppool.kernel.farewell import Farewell
from mppool.reclaim import PAUSE
from mppool.returning import free
from mppool.states import CloseReason, State
from mppool.story import Ended, Pause, Story
from mppool.table import W_CLOSE_TIMEOUT
from mppool.worker import Hands

__all__ = ["reclaim"]


def reclaim(hands: Hands) -> Story[None]:
    """As the broker would, under the broker's lock; if another process is at it already, it is left to that one.

    What nobody here has a duplicate of, but others may have, stays counted until one of them comes by.
    """
    worker = hands.worker
    reclaimer = worker.reclaimer
    dead = reclaimer.dead_rows()
    if not (dead or claims.scan(worker.table, dead)[1]):
        return
    try:
        if not hands.may_reclaim():
            return
        dead = reclaimer.dead_rows()  # anew: a row that was dead a moment ago may have been freed, and be somebody else's
        suspects = reclaimer.suspects(dead)
        if suspects:
            yield Pause(PAUSE)
        convicted = reclaimer.convicted(suspects, dead)
        yield from end_sessions(hands, [entry for entry in (worker.attached(case.k) for case in convicted) if entry is not None])
        for case in convicted:
            if worker.attached(case.k) is None and worker.words[worker.table.spread + case.k] == worker.words[worker.generation_at + case.k] + 1:
                continue
            with worker.permits.section() as inside:
                if inside:
                    reclaimer.bury(case)
            worker.attached(case.k)  # which lets go of what has ended
        for k in reclaimer.left_at_home(dead):
            yield from bury_unshared(hands, k)
        reclaimer.free_rows(dead)
    finally:
        hands.stop_reclaiming()


def end_sessions(hands: Hands, entries: list[Entry]) -> Story[None]:
    """Sessions that dead processes held end, at the server, too, or ``close_timeout`` is over; all of them at once."""
    worker = hands.worker
    farewells = []
    until = time.monotonic() + worker.words[W_CLOSE_TIMEOUT] / 1e9
    for entry in entries:
        word = worker.driver.farewell(entry.conn)
        if word and entry.sock is not None:
            farewells.append(Farewell(entry.sock, word, until))  # first: a connection that has ended does not know its other end
        entry.shutdown(socket.SHUT_WR)
    try:
        while farewells:
            farewells = [farewell for farewell in farewells if not farewell.is_said()]
            yield Pause(0.0005)
        for entry in entries:
            if entry.sock is not None:
                yield Ended(entry.sock, max(0.0, until - time.monotonic()))
    finally:
        for farewell in farewells:
            farewell.close()
        for entry in entries:
            entry.shutdown(socket.SHUT_RDWR)


def bury_unshared(hands: Hands, k: int) -> Story[None]:
    """An idle session that died with the process that had it: only its place in the table is left."""
    worker = hands.worker
    home = worker.words[worker.table.home + k]
    lane, slot = hands.take(), worker.slot(k)
    if not hands.claim(lane, slot):
        hands.give(lane)
    elif worker.table.state(k) is State.IDLE and worker.words[worker.table.home + k] == home:
        worker.table.move(k, State.CLOSING)
        yield from free(hands, lane, CloseReason.owner_died)
    else:
        claims.release(worker.words, lane, slot)
        hands.give(lane)
