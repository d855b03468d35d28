"""The words: in which states a slot can be, which moves are legal, why a session was closed, and why one cannot move.

Start here. The shared table, the command line, the counters and the messages use these words and no others.

Theory of operation. A *slot* is a place in the shared table for one *session*, one live connection to the server. Its
state tells every process what is going on there, but it is a sign, not a lock: the right to act on a slot belongs to
whoever took its *token* (see claims.py). Only the holder of the token moves the state, so there is one writer at a time.

    FREE ──> DIALING ──> IN_USE <──> IDLE
      ^         │           │          │
      └─────────┴─ CLOSING <┴──────────┘
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["MOVES", "CloseReason", "Residence", "State"]


class State(IntEnum):
    """What a slot is doing; one byte in shared memory. FREE is 0, what fresh memory holds."""

    FREE = 0
    DIALING = 1
    IDLE = 2
    IN_USE = 3
    CLOSING = 4


MOVES: dict[State, frozenset[State]] = {
    # To where it is already: whoever repeats the steps of somebody who died half-way makes the same move again.
    State.FREE: frozenset({State.FREE, State.DIALING, State.CLOSING}),
    State.DIALING: frozenset({State.IN_USE, State.CLOSING}),
    State.IDLE: frozenset({State.IN_USE, State.CLOSING}),
    State.IN_USE: frozenset({State.IDLE, State.CLOSING}),
    State.CLOSING: frozenset({State.CLOSING, State.FREE}),
}


class CloseReason(IntEnum):
    """Why a session was closed; the index of its counter in every row."""

    idle_too_long = 0
    too_old = 1
    peer_closed = 2
    unread_data = 3
    check_failed = 4
    reset_failed = 5
    discarded = 6
    drained = 7
    owner_died = 8
    forked = 9
    pool_closed = 10
    evicted_for_other = 11


class Residence(IntEnum):
    """Why a session stays with the process that dialed it (it is *resident*: capped and ended for others, never shared); 0: it moves."""

    moves = 0
    no_adapter = 1  # its driver knows no way to make a session of a socket
    tls = 2  # keys and record numbers are in the dialer's memory
    gssapi = 3  # likewise
    by_choice = 4  # its user asked for it
