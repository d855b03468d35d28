"""A new session: a permit first, then the connection, then a duplicate for the broker.

The permit is taken inside the dial lock together with a slot in state DIALING, so a dialer that dies leaves no doubt
about what it held. The connection itself is made outside the lock.
"""

from __future__ import annotations

import os
import random
import time

from mppool import claims
from mppool.attached import Entry
from mppool.claims import Lane
from mppool.conversation import share
from mppool.errors import DialFailed, Error
from mppool.returning import dial_lock, discard, free, put_down
from mppool.states import CloseReason, State
from mppool.story import Call, Close, Dial, Story
from mppool.table import R_DIAL_FAILURES, R_DIALS, W_FAILURES, W_MAX_LIFETIME, W_MIN_SIZE
from mppool.worker import Hands, Worker

__all__ = ["open_session", "prewarm"]

PATIENCE = 0.05  # seconds to try the dial lock for; then the caller waits in line, with its own deadline


def open_session(hands: Hands) -> Story[tuple[Lane, Entry] | None]:
    """Dial, if a permit is free and it is our time to. None if it is not, or if the server could not be reached now.

    Raises DialFailed if waiting will not help.
    """
    worker = hands.worker
    lane = yield from take_permit(hands)
    if lane is None:
        return None
    k = claims.named(worker.words[lane.at])
    conn = entry = None
    try:
        hands.dialing = True
        conn = yield Dial()
        entry = worker.attach(k, conn)
        hands.dialing = False
        if entry.sock is not None:
            worker.words[worker.table.socket + k] = os.fstat(entry.sock.fileno()).st_ino
        worker.words[worker.table.residence + k] = entry.residence
        if worker.options.configure is not None:
            yield Call(worker.options.configure, conn)
    except Exception as error:
        worker.bump(R_DIAL_FAILURES)
        if entry is not None:
            yield from discard(hands, lane, entry, CloseReason.discarded)
        else:
            if conn is not None:
                yield Close(conn)
            hands.dialing = False
            yield from free(hands, lane, None)
        yield from report(worker, error)
        if entry is not None:
            raise DialFailed(f"configure={worker.options.configure!r}: {type(error).__name__}: {error}") from error
        if getattr(error, "permanent", False) or (isinstance(error, Error) and not isinstance(error, DialFailed)):
            raise
        return None
    lifetime = worker.words[W_MAX_LIFETIME] * random.uniform(0.9, 1.0)
    worker.words[worker.table.expires + k] = time.monotonic_ns() + int(lifetime)
    worker.table.move(k, State.IN_USE)
    worker.bump(R_DIALS)
    if worker.words[W_FAILURES]:
        yield from report(worker, None)
    yield from share(worker, entry)
    return lane, entry


def take_permit(hands: Hands) -> Story[Lane | None]:
    """Inside the dial lock: a unit of the cap becomes the permit of a free slot, which the lane returned holds, DIALING."""
    worker = hands.worker
    if not worker.permits.may_dial():
        return None
    with (yield from dial_lock(worker, PATIENCE)) as inside:
        return claim_free_slot(hands) if inside and worker.permits.may_dial() else None


def claim_free_slot(hands: Hands) -> Lane | None:
    """Inside the dial lock, where FREE slots stay free; but somebody may just be finding out that his session ended."""
    worker = hands.worker
    table, words = worker.table, worker.words
    lane = hands.take()
    k = table.find(State.FREE)
    while k >= 0:
        slot = worker.slot(k)
        if hands.claim(lane, slot):
            if not words[table.permit + k] and worker.permits.take(k):
                words[table.home + k] = worker.row.home
                table.move(k, State.DIALING)
                return lane
            claims.release(words, lane, slot)
            break
        k = table.find(State.FREE, k + 1)
    hands.give(lane)
    return None


def report(worker: Worker, error: Exception | None) -> Story[None]:
    """Tell all workers how a dial went."""
    with (yield from dial_lock(worker, PATIENCE)) as inside:
        if not inside:
            return
        if error is None:
            worker.permits.dial_succeeded()
        else:
            worker.permits.dial_failed(str(error) or type(error).__name__)
    worker.look()


def prewarm(hands: Hands) -> Story[None]:
    """Dial until ``min_size`` sessions are there, all workers together; stops quietly if the server cannot be reached."""
    worker = hands.worker
    while worker.permits.held() < worker.words[W_MIN_SIZE]:
        held = yield from open_session(hands)
        if held is None:
            return
        lane, entry = held
        yield from put_down(hands, lane, entry, discarded=False)
