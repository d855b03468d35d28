"""What a pool is doing, read from the table alone: no broker, no lock, no effect. Numbers may be a moment apart."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from mppool.claims import named
from mppool.kernel.locks import LockFile
from mppool.states import CloseReason, Residence, State
from mppool.table import (
    BROKER,
    COUNTERS,
    R_ATTACHED,
    R_BUCKETS,
    R_CLAIMED,
    R_CLOSED,
    R_LANES,
    R_LENT,
    R_PID,
    R_ROLE,
    R_STARTED,
    R_WAITING,
    W_EPOCH,
    W_FAILURES,
    W_MAX_SIZE,
    W_MIN_SIZE,
    W_REPAIRS,
    WAIT_BUCKETS,
    WORKER,
    Row,
    Table,
    row_is_alive,
)

__all__ = ["numbers", "percentiles", "snapshot", "waiting"]


def numbers(table: Table) -> str:
    """The numbers an operator needs when a checkout timed out."""
    states = table.states()
    now, since = time.monotonic_ns(), table.array(table.since)
    held = [now - since[k] for k, state in enumerate(states) if state == State.IN_USE]
    return (
        f"max_size={table.words[W_MAX_SIZE]}, in_use={len(held)}, idle={states.count(State.IDLE)}, dialing={states.count(State.DIALING)}, "
        f"waiting={waiting(table)}, longest held {max(held, default=0) / 1e9:.3f} s"
    )


def waiting(table: Table) -> int:
    """How many callers wait for a session, in all processes."""
    return sum(table.words[table.row_at(row) + R_WAITING] for row in table.taken_rows())


def snapshot(table: Table, lock: LockFile | None = None, own: Row | None = None) -> dict[str, Any]:
    """Everything about one pool, host-wide. Times in seconds, waits in microseconds.

    Counters run since the pool was made, over workers that are gone too. With ``lock`` (and the caller's ``own`` row, if it has
    one, whose lock does not stop itself) it says who is alive; the broker's own row is not a worker.
    """
    words, states = table.words, table.states()
    rows = [words[at : at + R_LANES].tolist() for at in (table.row_at(row) for row in range(table.rows)) if words[at + R_STARTED]]
    counters: dict[str, Any] = {name: sum(row[at] for row in rows) for name, at in COUNTERS.items()}
    closed = {reason.name: total for reason in CloseReason if (total := sum(row[R_CLOSED + reason] for row in rows))}
    buckets = [sum(row[R_BUCKETS + bucket] for row in rows) for bucket in range(WAIT_BUCKETS)]
    return {
        "name": table.text("name"),
        "target": table.text("target"),
        "broker": table.text("broker"),
        "broker_alive": lock.is_held(BROKER) if lock is not None else None,
        "broker_epoch": words[W_EPOCH],
        "max_size": words[W_MAX_SIZE],
        "min_size": words[W_MIN_SIZE],
        "size": sum(table.array(table.permit)),
        "in_use": states.count(State.IN_USE),
        "idle": states.count(State.IDLE),
        "dialing": states.count(State.DIALING),
        "closing": states.count(State.CLOSING),
        "waiting": waiting(table),
        "resident": residents(table),
        "checkouts": (sum(table.array(table.uses)) + sum(row[R_LENT] - row[R_CLAIMED] for row in rows)),
        **counters,
        "discards": sum(closed.values()),
        "closed": closed,
        "repairs": words[W_REPAIRS],
        "failures_in_a_row": words[W_FAILURES],
        "last_dial_error": table.text("dial_error"),
        "wait_percentiles_us": percentiles(buckets),
        "workers": workers(table, lock, own),
    }


def residents(table: Table) -> dict[str, int]:
    """How many sessions stay with the process that dialed them, by why they do."""
    found = Counter(table.array(table.residence))
    return {residence.name: found[residence] for residence in Residence if residence and found[residence]}


def workers(table: Table, lock: LockFile | None, own: Row | None) -> list[dict[str, Any]]:
    now, since, states = time.monotonic_ns(), table.array(table.since), table.states()
    found = []
    for row in table.taken_rows():
        at = table.row_at(row)
        if table.words[at + R_ROLE] != WORKER:
            continue
        held = {named(word) for word in table.lanes_of(row) if word}
        ages = [now - since[k] for k in held if 0 <= k < table.slots and states[k] == State.IN_USE]
        found.append(
            {
                "pid": table.words[at + R_PID],
                "alive": (own is not None and row == own.index) or (row_is_alive(lock, row) if lock is not None else None),
                "leases": len(ages),
                "idle_cached": max(0, table.words[at + R_ATTACHED] - len(ages)),
                "waiting": table.words[at + R_WAITING],
                "oldest_lease": max(ages, default=0) / 1e9,
            }
        )
    return found


def percentiles(buckets: list[int]) -> dict[str, int]:
    """Upper bounds, in microseconds, for waits that happened; a bucket is as wide as a third to a half of its value."""
    total, found = sum(buckets), {}
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        seen, value = 0, 0
        for bucket, count in enumerate(buckets):
            seen += count
            if total and seen >= share * total:
                value = bucket_top(bucket)
                break
        found[name] = value
    return found


def wait_bucket(seconds: float) -> int:
    """Which bucket counts a wait. Two an octave: up to 8 us, then 8-12, 12-16, 16-24, 24-32, ..."""
    us = int(seconds * 1e6)
    if us < 8:
        return 0
    bits = us.bit_length()
    return min(1 + 2 * (bits - 4) + (us >> (bits - 2) & 1), WAIT_BUCKETS - 1)


def bucket_top(bucket: int) -> int:
    """The longest wait, in microseconds, that a bucket counts."""
    if bucket == 0:
        return 8
    octave, upper = divmod(bucket - 1, 2)
    return (8 << octave) * (4 if upper else 3) // 2
