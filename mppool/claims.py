"""Claim, release, grant, reclaim: who may use a session. The only file that touches tokens.

Theory of operation. Invariant: **at most one holder a slot, and what a dead holder held comes back exactly once.**

Slot k has a token, a named semaphore of one unit. Who has taken it may use the session. A process that dies takes the
unit with it, so before it takes, it says so in shared memory: one of its row's *lanes* names the slot.

    claim(k):     lane = TRYING k;  take token k, or {lane = 0; give up};  uses[k] += 1;  lane = HELD k
    release(k):   give token k;  lane = 0
    grant(k, w):  lane of w = GRANTED k;  own lane = 0;  wake w        # the holder hands it to waiter w, in this order
    take_back:    own lane = HELD k;  lane of w = 0                    # w has given up, and does not look until it is told

A lane of a dead row that names k can mean: it died before it took the token, while it held it, or after it gave it back.
Whoever reclaims tells these apart without any help from the dead:

    suspect(k):   remember uses[k];  if a live row names k, or token k is free: no case
    convict(k):   (some milliseconds later) if token k is free, a live row names k, or uses[k] has changed: no case
                  else the token died with its taker: the session is closed, and then the token given again

Two looks are needed, and the comparison of ``uses``: between the first look at the lanes and the look at the token
another process may have taken k and named it. tests/model runs these very functions in all orders of steps, deaths and
interruptions: never two holders, never a live holder's session closed, never a token lost. The pause between the looks
covers processors that reorder stores. There is one reclaimer at a time (the broker's lock), and it works under the dial lock.

A process that lives on can be interrupted too, by an exception from a signal handler after any bytecode. Between the take
(or the give) and its record nobody knows whether it happened, not even the process. Then it disowns the lane: LIMBO k says
that this lane is as good as a dead row's, and the reclaimer settles it by the same two looks, unless the process can take the
token anew, which says as much. ``lane.sure`` tells the doubtful moments from the others.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from mppool.errors import ProtocolError
from mppool.kernel.semaphores import BusyError
from mppool.table import Row, Table

__all__ = ["Evidence", "Lane", "Slot", "accept", "claim", "convict", "disown", "give_token", "grant", "is_granted", "named", "release", "scan", "suspect"]

log = logging.getLogger("mppool")

TRYING, HELD, GRANTED, LIMBO = 1, 2, 3, 4
_KIND = 7


class Slot:
    """A slot's places, worked out once per process, and its token. Owns nothing that a fork could harm."""

    __slots__ = ("expires_at", "give", "granted", "held", "k", "since_at", "state_at", "take", "token", "trying", "uses_at")

    def __init__(self, table: Table, k: int) -> None:
        self.k = k
        self.token = table.open_token(k)
        self.take = self.token.acquire
        self.give = self.token.release
        self.uses_at = table.uses + k
        self.since_at = table.since + k
        self.expires_at = table.expires + k
        self.state_at = table.states_byte + k
        self.trying, self.held, self.granted = k << 3 | TRYING, k << 3 | HELD, k << 3 | GRANTED

    def close(self) -> None:
        """The semaphore is unmapped: no thread of this process may use the slot any more."""
        self.token.close()


class Lane:
    """One lane of this process's row.

    ``sure``: we hold what the lane names, beyond doubt. ``owner`` numbers the story that took the lane last; only that one settles it.
    """

    __slots__ = ("asking", "at", "index", "owner", "sure")

    def __init__(self, row: Row, index: int) -> None:
        self.index = index
        self.at = row.lanes_at + index
        self.sure = False
        self.owner = 0
        self.asking = b""  # what is said to the broker to wait with it, once it has been said


def named(word: int) -> int:
    """The slot that a lane's word names, -1 if none."""
    return word >> 3 if word & _KIND else -1


def claim(words: memoryview, lane: Lane, slot: Slot) -> int:
    """Take the slot if its token is free. Returns how often it was taken in all, 0: somebody else has it."""
    words[lane.at] = slot.trying
    try:
        slot.take(0)
    except BusyError:
        words[lane.at] = 0
        return 0
    uses: int = words[slot.uses_at] + 1
    words[slot.uses_at] = uses
    words[lane.at] = slot.held
    if slot.token.value:
        return _swallow(words, lane, slot)
    lane.sure = True
    return uses


def release(words: memoryview, lane: Lane, slot: Slot) -> None:
    """Give the token back; the state of the slot says already what the next one will find.

    Raises ProtocolError, and gives nothing, if the lane does not say that we hold it: then somebody took it from us for dead.
    """
    lane.sure = False
    if words[lane.at] != slot.held:
        raise ProtocolError(f"slot {slot.k} is to be released, but the lane says {words[lane.at]:#x}; its table is damaged")
    slot.give()
    words[lane.at] = 0


def accept(words: memoryview, lane: Lane, slot: Slot) -> None:
    """A grant has arrived in our lane: from now on we hold the slot as if we had claimed it. Raises ProtocolError if it has not."""
    if words[lane.at] != slot.granted:
        raise ProtocolError(f"slot {slot.k} was announced as granted, but the lane says {words[lane.at]:#x}")
    lane.sure = True
    words[lane.at] = slot.held


def grant(words: memoryview, lane: Lane, slot: Slot, lane_of_waiter: int) -> None:
    """Hand a slot we hold to a waiter. In this order: at every moment a lane names it. The message that wakes comes after."""
    lane.sure = False
    words[lane_of_waiter] = slot.granted
    words[lane.at] = 0


def take_back(words: memoryview, lane: Lane, slot: Slot, lane_of_waiter: int) -> None:
    """What was granted to a waiter that has given up since, and said so, is ours again. It must not look at its lane until it was told."""
    words[lane.at] = slot.held
    words[lane_of_waiter] = 0
    lane.sure = True


def is_granted(word: int) -> bool:
    """Does a lane's word say that its slot was handed to us, and we have yet to accept it?"""
    return word & _KIND == GRANTED


def disown(words: memoryview, lane: Lane, k: int) -> None:
    """After an interruption that left it open whether we hold slot k: let the reclaimer find out. It clears the lane then."""
    words[lane.at] = k << 3 | LIMBO


def _swallow(words: memoryview, lane: Lane, slot: Slot) -> int:
    """A second unit in a token would let two processes hold the slot. It is kept, so that one is left, and nothing is lent now."""
    words[lane.at] = 0
    log.critical("slot %d: its token had more than one unit; please report this", slot.k)
    return 0


# Reclaiming.


class Evidence(NamedTuple):
    """What the first look at a slot found. ``lanes`` are the words of dead rows, and those in LIMBO, that name it."""

    k: int
    uses: int
    lanes: tuple[int, ...]


def scan(table: Table, dead: set[int]) -> tuple[set[int], dict[int, tuple[int, ...]]]:
    """Which slots do the lanes of live rows name? And which lanes of dead rows, or in LIMBO, name which slot?

    A row that died after ``dead`` was made counts as alive: its lanes protect what they name until its own turn comes.
    """
    alive: set[int] = set()
    orphaned: dict[int, tuple[int, ...]] = {}
    for row in table.taken_rows():
        if table.names_nothing(row):
            continue
        at = table.lanes_at(row)
        for index, word in enumerate(table.lanes_of(row)):
            if word & _KIND:
                k = word >> 3
                if row in dead or word & _KIND == LIMBO:
                    orphaned[k] = (*orphaned.get(k, ()), at + index)
                else:
                    alive.add(k)
    return alive, orphaned


def suspect(table: Table, slot: Slot, lanes: tuple[int, ...], named_alive: set[int]) -> Evidence | None:
    """The first look. None if there is no case (yet); lanes that no longer mean anything are cleared."""
    uses = table.words[slot.uses_at]
    if slot.k in named_alive:
        return None
    if slot.token.value:
        clear(table, lanes)
        return None
    return Evidence(slot.k, uses, lanes)


def convict(table: Table, slot: Slot, evidence: Evidence, named_alive: set[int]) -> bool:
    """The second look, some milliseconds after the first. True: the token died with its taker, and only the caller may give it again."""
    if slot.token.value:
        clear(table, evidence.lanes)
        return False
    return slot.k not in named_alive and table.words[slot.uses_at] == evidence.uses


def give_token(table: Table, slot: Slot, lanes: tuple[int, ...]) -> None:
    """The convicted slot may be taken again; then the lanes go. Repeating it after a death in between is safe: see ``suspect``."""
    if not slot.token.value:
        slot.give()
    clear(table, lanes)


def clear(table: Table, lanes: tuple[int, ...]) -> None:
    """The last step of settling a slot: the dead no longer name it."""
    for at in lanes:
        table.words[at] = 0
