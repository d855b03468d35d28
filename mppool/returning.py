"""The way back: a lease ends, a session becomes idle again or is closed, a permit goes back."""

from __future__ import annotations

import logging
import socket
import time

from mppool import claims
from mppool.attached import Entry
from mppool.claims import Lane
from mppool.conversation import connect
from mppool.permits import SPIN, Section
from mppool.reclaim import free_slot
from mppool.states import CloseReason, State
from mppool.story import Call, Close, Ended, Pause, Story, Tidy
from mppool.table import DRAINED, H_FLAGS, R_CLOSED, SHRINKING, W_CLOSE_TIMEOUT, W_MIN_SIZE
from mppool.worker import Hands, Worker

__all__ = ["after_return", "dial_lock", "discard", "drain", "free", "put_down", "resize", "tell"]

log = logging.getLogger("mppool")


def put_down(hands: Hands, lane: Lane, entry: Entry, *, discarded: bool) -> Story[None]:
    """A session that ``lane`` holds. Clean: idle, for anybody. Else closed, with the reason; any doubt is one."""
    worker = hands.worker
    reason = CloseReason.discarded if discarded else (yield from why_not_reusable(worker, entry))
    if reason is not None:
        yield from discard(hands, lane, entry, reason)
        return
    worker.mem[entry.slot.state_at] = State.IDLE
    claims.release(worker.words, lane, entry.slot)
    worker.keep(entry, lane)


def why_not_reusable(worker: Worker, entry: Entry) -> Story[CloseReason | None]:
    driver = worker.driver
    try:
        if driver.tidies_always or not driver.is_clean(entry.conn):
            yield Tidy(entry.conn)
        if worker.options.reset is not None:
            yield Call(worker.options.reset, entry.conn)
    except Exception as error:
        tell(worker, CloseReason.reset_failed, error)
        return CloseReason.reset_failed
    if not driver.is_clean(entry.conn):
        return CloseReason.discarded
    if entry.sock is None and worker.must_queue():
        return CloseReason.evicted_for_other  # nobody can end it from outside, and somebody waits
    return None


def tell(worker: Worker, reason: CloseReason, error: Exception) -> None:
    """In the log, at debug level: the caller gets another session, and would never know what the driver or the user's function raised."""
    log.debug("%s session of pool %r is closed, %s: %s: %s", worker.driver.name, worker.table.text("name"), reason.name, type(error).__name__, error)


def after_return(hands: Hands) -> Story[None]:
    """A session became idle: somebody may be waiting for it, or the pool may have more than it should."""
    worker = hands.worker
    if worker.table.halves[H_FLAGS] & SHRINKING:
        yield from shed(hands)
    if (worker.owes or not worker.look()) and worker.must_queue():
        line = yield from connect(worker)
        if line is not None:
            worker.lines.append(line)
            worker.look()


def shed(hands: Hands) -> Story[None]:
    """Pay the debt of a shrink with our idle sessions. (Those of others go when they come back, or through the broker.)"""
    worker = hands.worker
    while worker.idle and worker.table.halves[H_FLAGS] & SHRINKING:
        yield from shed_newest(hands)


def shed_newest(hands: Hands) -> Story[None]:
    worker = hands.worker
    entry, lane = worker.idle.pop()
    hands.take(lane)
    if not hands.claim(lane, entry.slot):
        hands.give(lane)
    elif worker.attached(entry.slot.k) is not entry:
        claims.release(worker.words, lane, entry.slot)
        hands.give(lane)
    else:
        yield from discard(hands, lane, entry, CloseReason.drained)


def discard(hands: Hands, lane: Lane, entry: Entry, reason: CloseReason) -> Story[None]:
    """Close a session that we hold, and give its permit back when the server has ended it too, or ``close_timeout`` is over."""
    worker = hands.worker
    worker.table.move(entry.slot.k, State.CLOSING)
    try:
        entry.closed = True
        yield Close(entry.conn)
        if entry.sock is not None:
            entry.shutdown(socket.SHUT_WR)
            yield Ended(entry.sock, worker.words[W_CLOSE_TIMEOUT] / 1e9)
    finally:
        worker.sever(entry)
    yield from free(hands, lane, reason)


def free(hands: Hands, lane: Lane, reason: CloseReason | None) -> Story[None]:
    """The connection of the slot that ``lane`` holds is closed: permit, slot, token and lane go back."""
    worker = hands.worker
    slot = worker.slot(claims.named(worker.words[lane.at]))
    with (yield from dial_lock(worker, 1.0)) as inside:
        if inside:
            free_slot(worker.table, worker.permits, worker.row, slot.k)
            claims.release(worker.words, lane, slot)
    if inside:
        hands.give(lane)
    else:
        lane.owner = 0
        worker.unfinished.append(lane)  # somebody stopped holds the dial lock: when we next come by
    if reason is not None:
        worker.bump(R_CLOSED + reason)
    worker.look()


def resize(hands: Hands, max_size: int, min_size: int | None) -> Story[None]:
    """Change the cap, and how many idle sessions are kept, for all workers. Raises Error if a stopped process holds the dial lock; then nothing was changed."""
    worker = hands.worker
    with (yield from dial_lock(worker, 1.0)) as inside:
        if not inside:
            raise worker.permits.is_stuck(1.0)
        worker.permits.resize(max_size)
        if min_size is not None:
            worker.words[W_MIN_SIZE] = min_size
    worker.look()


def drain(hands: Hands) -> Story[None]:
    """The time of every session there is now is over: whoever meets one closes it, be it at a checkout, at its return or at the broker's next look."""
    worker = hands.worker
    with (yield from dial_lock(worker, 1.0)) as inside:
        if not inside:
            raise worker.permits.is_stuck(1.0)
        for k, state in enumerate(worker.table.states()):
            if state in (State.IDLE, State.IN_USE):
                worker.words[worker.table.expires + k] = DRAINED
    while worker.idle:
        yield from shed_newest(hands)


def dial_lock(worker: Worker, seconds: float) -> Story[Section]:
    """Try the dial lock for so long; ``with`` what is returned says if we are inside."""
    until = time.monotonic() + seconds
    while True:
        section = worker.permits.section()
        if section.inside or time.monotonic() >= until or worker.permits.is_ours():
            return section
        yield Pause(SPIN)
