"""Checkout: how a caller gets a session.

In order: an idle session this process used last; any other idle one; a new one, if a permit is free; else wait one's
turn at the broker. Whoever finds others waiting queues behind them. Before anything is lent it is looked at: an idle
session with something to read has ended, or is dirty, and is closed.

This is the whole story. The common case, an idle session and nobody waiting, is told a second time in plain code in
pool.py, and comes here with what it holds as soon as anything is unusual.
"""

from __future__ import annotations

import random
import time
from typing import Any

from mppool import alone, claims
from mppool.attached import Entry
from mppool.claims import Lane
from mppool.conversation import attach, connect, fetch, settle_abandoned, wait_turn
from mppool.dialing import open_session
from mppool.errors import DialFailed, PoolClosed, PoolTimeout
from mppool.exchange import why_expired
from mppool.launch import start_again
from mppool.line import Descriptor
from mppool.returning import discard, tell
from mppool.snapshot import numbers
from mppool.states import CloseReason, State
from mppool.story import Call, Pause, Story, Transfer
from mppool.stray import settle_strays
from mppool.table import R_CLAIMED, R_TIMEOUTS, W_DOWN_SINCE, W_FAILURES, W_RECONNECT_TIMEOUT
from mppool.worker import Hands, Worker

__all__ = ["checkout", "timed_out"]

CALL_AFTER, CALL_AGAIN = 0.5, 5.0  # seconds without a broker until a waiter of a pool with autostart has one started, and between two tries of a process
FIRST_POLL, LAST_POLL = 0.001, 0.02  # seconds between two looks at the table while there is no broker

IDLE = int(State.IDLE)

Held = tuple[Lane, Entry]


def checkout(hands: Hands, timeout: float, found: Entry | None = None) -> Story[Any]:
    """Lend a session within ``timeout`` seconds. ``found``: one that the fast path has put into our hands, but found odd.

    Raises PoolTimeout, TooManyWaiting, DialFailed (the server is down for good), BrokerUnavailable (not ours), PoolClosed. Then, and
    whenever it is interrupted, nothing is lent, and nothing is held once the caller has settled ``hands``.
    """
    worker = hands.worker
    began = time.monotonic()
    try:
        if found is not None:
            lane = hands.taken[0]
            worker.bump(R_CLAIMED)
            if (yield from fit(hands, lane, found)):
                return worker.lend(lane, found)
        if worker.closing:
            raise closed(worker)
        worker.tidy()
        held = None if worker.must_queue() else (yield from seize(hands))
        if held is None:
            worker.note_waiting(hands, True)
            held = yield from wait(hands, began, timeout)
            worker.count_wait(hands, time.monotonic() - began)
            held[1].turn_ends = time.monotonic_ns() + worker.turn
        return worker.lend(*held)
    except BaseException as error:
        worker.note_waiting(hands, False)
        if isinstance(error, PoolTimeout):
            worker.bump(R_TIMEOUTS)
        raise


def seize(hands: Hands) -> Story[Held | None]:
    """What can be had at once: an idle session, or a new one."""
    return (yield from take_idle(hands)) or (yield from open_session(hands))


def wait(hands: Hands, began: float, timeout: float) -> Story[Held]:
    """Nothing was to be had at once: wait for our turn, with a broker in its queue, without one by looking again and again."""
    worker = hands.worker
    until = began + timeout
    pause = FIRST_POLL
    front = False
    if worker.resting() < worker.table.lanes:
        settle_strays(worker)
    if worker.idle and worker.has_endless:
        yield from give_up_idle(hands)
    while True:
        if worker.abandoned:
            settle_abandoned(hands)
        if time.monotonic() >= until:
            raise timed_out(worker, timeout)
        if worker.closing:
            raise closed(worker)
        if worker.words[W_DOWN_SINCE]:
            fail_if_down_for_good(worker)
        line = None
        crowded = is_crowded(worker)
        if not crowded:
            line = worker.line_at_hand()
            if line is None:
                line = yield from connect(worker)
                crowded = is_crowded(worker)  # anew: others may have come meanwhile
                if line is not None and crowded:
                    worker.lines.append(line)
                    line = None
                elif worker.autostart:
                    call_for_broker(worker, line is None)
        if line is None:
            if not (crowded and worker.must_queue()):
                yield from alone.reclaim(hands)
                held = yield from seize(hands)
                if held is not None:
                    return held
            yield Pause(max(0.0, min(pause * random.uniform(0.5, 1.0), until - time.monotonic())))
            pause = min(pause * 1.5, LAST_POLL)
            continue
        turn = yield from wait_turn(hands, line, until, front)
        front = turn.dial or turn.lane is not None  # whose turn came to nothing is still the first
        if turn.lane is not None:
            entry = yield from receive_grant(hands, turn.lane, turn.given, turn.body)
            if entry is None:
                front = False  # whatever keeps us from having it may last
                yield Pause(FIRST_POLL)
            elif (yield from fit(hands, turn.lane, entry)):
                return turn.lane, entry
        elif turn.dial:
            held = yield from open_session(hands)
            if held is not None:
                return held


def call_for_broker(worker: Worker, missing: bool) -> None:
    """Of a pool with autostart: have a broker started where none has been for a while. (One that is being replaced is away for some milliseconds.)"""
    now = time.monotonic()
    if not missing:
        worker.call_at = 0.0
    elif not worker.call_at:
        worker.call_at = now + CALL_AFTER
    elif now >= worker.call_at:
        worker.call_at = now + CALL_AGAIN
        start_again(worker.path)


def is_crowded(worker: Worker) -> bool:
    """Do so many wait here that claims need the rest of our lanes?"""
    return len(worker.lanes) < worker.table.slots // 2


def give_up_idle(hands: Hands) -> Story[None]:
    """Sessions that nobody can end from outside: with others waiting before us, our idle ones make room for them."""
    worker = hands.worker
    for entry, _ in list(worker.idle):
        if entry.sock is None and worker.must_queue():
            held = yield from take(hands, entry.slot.k)
            if held is not None:
                yield from discard(hands, *held, CloseReason.evicted_for_other)


def timed_out(worker: Worker, timeout: float) -> PoolTimeout:
    """What is raised when the time is over."""
    error = PoolTimeout(f"no session within {timeout:g} s ({numbers(worker.table)})")
    if worker.words[W_FAILURES]:
        error.__cause__ = DialFailed(worker.table.text("dial_error"))
    return error


def closed(worker: Worker) -> PoolClosed:
    return PoolClosed(f"pool {worker.table.text('name')!r} was closed meanwhile")


def fail_if_down_for_good(worker: Worker) -> None:
    """The server cannot be reached for ``reconnect_timeout``, and no session is left that somebody might return: fail at once."""
    since = worker.words[W_DOWN_SINCE]
    if since and time.monotonic_ns() - since > worker.words[W_RECONNECT_TIMEOUT] and not worker.permits.held():
        raise DialFailed(f"down for longer than reconnect_timeout: {worker.table.text('dial_error')}")


def take_idle(hands: Hands) -> Story[Held | None]:
    """Claim an idle session that is fit: our own newest first, then any in the table that we have or can get."""
    worker = hands.worker
    while worker.idle:
        try:
            entry, lane = worker.idle.pop()
        except IndexError:
            break  # another thread was faster
        worker.lanes.append(lane)
        if worker.entries.get(entry.slot.k) is entry:
            held = yield from take(hands, entry.slot.k)
            if held is not None:
                return held
    table, words = worker.table, worker.words
    k = table.find(State.IDLE)
    while k >= 0:
        if worker.attached(k) is not None or words[table.shared_flag + k] == words[table.generation + k] + 1:
            held = yield from take(hands, k)
            if held is not None:
                return held
        k = table.find(State.IDLE, k + 1)
    return None


def take(hands: Hands, k: int) -> Story[Held | None]:
    """Claim slot k if it is idle, attach its session if need be, and look whether it is fit.

    A session that this process never had is asked for before it is claimed: the broker is at work meanwhile.
    """
    worker = hands.worker
    lane = hands.take()

    def hold() -> bool:
        slot = worker.slot(k)
        if not hands.claim(lane, slot):
            return False
        if worker.table.state(k) is not State.IDLE:
            claims.release(worker.words, lane, slot)
            return False
        return True

    entry = None
    if worker.attached(k) is None:
        entry = yield from fetch(worker, k, hold)
    elif hold():
        entry = worker.attached(k) or (yield from fetch(worker, k))
    if entry is None:
        if lane.sure:
            worker.pass_over(lane)
        else:
            hands.give(lane)
        return None
    worker.unlist(entry)
    return (lane, entry) if (yield from fit(hands, lane, entry)) else None


def receive_grant(hands: Hands, lane: Lane, given: Descriptor | None, body: bytes) -> Story[Entry | None]:
    """The broker granted us a session: find our entry for it, attach the descriptor that came with it, or fetch one."""
    worker = hands.worker
    k = claims.named(worker.words[lane.at])
    entry = worker.attached(k)
    if entry is None:
        entry = (yield from attach(worker, k, given, body)) if given is not None else (yield from fetch(worker, k))
    elif given is not None:
        given.close()
    if entry is None:
        worker.pass_over(lane)
        return None
    worker.unlist(entry)
    return entry


def fit(hands: Hands, lane: Lane, entry: Entry) -> Story[bool]:
    """Look at a session that we hold. Fit: it stays held. Not fit: it is closed (or let go), and the lane is given back."""
    worker, k = hands.worker, entry.slot.k
    if worker.words[worker.generation_at + k] != entry.generation:
        # Ended, and perhaps followed by another in the same slot: that one is not ours to judge.
        worker.forget(entry)
        claims.release(worker.words, lane, entry.slot)
        hands.give(lane)
        return False
    if entry.poll(0):
        yield from discard(hands, lane, entry, entry.why_readable())
        return False
    if time.monotonic_ns() >= worker.words[entry.slot.expires_at]:
        yield from discard(hands, lane, entry, why_expired(worker.words[entry.slot.expires_at]))
        return False
    foreign = worker.driver.minds_transfer and entry.uses + 1 != worker.words[entry.slot.uses_at]
    if (foreign or worker.options.check is not None) and worker.mem[entry.slot.state_at] == IDLE:
        worker.table.move(k, State.IN_USE)
    reason = CloseReason.reset_failed
    try:
        if foreign:
            yield Transfer(entry.conn)
        reason = CloseReason.check_failed
        if worker.options.check is not None:
            yield Call(worker.options.check, entry.conn)
    except Exception as error:
        tell(worker, reason, error)
        yield from discard(hands, lane, entry, reason)
        return False
    return True
