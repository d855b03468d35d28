"""The broker's side of one pool: its duplicates and body, the queue, closing and reclaiming.

Everything here runs in the broker's one thread and never waits: what takes time is remembered and looked at again.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

from mppool import claims
from mppool.claims import Evidence, Lane, Slot
from mppool.errors import ProtocolError
from mppool.exchange import Facts, Queue, plan_evictions
from mppool.kernel import link as wires
from mppool.kernel.farewell import Farewell
from mppool.kernel.locks import LockFile
from mppool.permits import Permits
from mppool.reclaim import PAUSE, Reclaimer, free_slot
from mppool.states import CloseReason, State
from mppool.table import (
    H_WAITERS,
    R_CLAIMED,
    R_CLOSED,
    R_INCARNATION,
    R_PID,
    W_BEAT,
    W_CLOSE_TIMEOUT,
    W_EPOCH,
    W_FAILURES,
    W_MAX_IDLE,
    W_MAX_LEASE,
    W_MAX_SIZE,
    W_MAX_WAITING,
    W_MIN_SIZE,
    W_RETRY_AT,
    Row,
    Table,
    row_is_alive,
)
from mppool.wire import FRONT, GIVEN_UP, RESIDENT, Kind, Message, encode, unpack_session

__all__ = ["Desk", "Duplicate", "WorkerLink", "shut", "take_socket"]

log = logging.getLogger("mppool.broker")

IDLE, IN_USE = int(State.IDLE), int(State.IN_USE)
LOOK_AGAIN = 0.003  # seconds, doubled up to the broker's tick
SOON, LATER = 0.0003, 0.003  # seconds between two looks at what takes a moment, growing: the end of a process, or of a connection
DYING = 0.3  # seconds within which the kernel closes all that a dead process had open, one after the other; on a busy machine it takes its time
FIRST_PEEK, LAST_PEEK = 0.002, 0.02  # seconds after a grant until we look for idle sessions that nobody told us of, doubled
RIGHT_TO_DIAL = 1.0  # seconds after which a right to dial that was not used is given to somebody else


class Duplicate:
    """A session's socket as the broker has it. Owns ``sock``."""

    __slots__ = ("body", "generation", "kept", "resident", "sock")

    def __init__(self, generation: int, sock: socket.socket, body: bytes, resident: bool) -> None:
        self.generation = generation
        self.sock = sock
        self.body = body  # as it was shared: see wire.pack_session
        self.resident = resident
        self.kept = False  # has the keeper got it, too?


class Closing:
    """A session on its way out: shut down by us, the server's end awaited until ``until``. Owns ``sock``."""

    __slots__ = ("case", "generation", "k", "lane", "reason", "sock", "until")

    def __init__(
        self, k: int, generation: int, sock: socket.socket | None, until: float, reason: CloseReason, lane: Lane | None, case: Evidence | None
    ) -> None:
        self.k = k
        self.generation = generation
        self.sock = sock  # None: it is closed, or we never had it
        self.until = until
        self.reason = reason
        self.lane = lane  # ours, if we claimed it
        self.case = case  # or the dead lanes that name it


class WorkerLink:
    """The broker's end of a worker's line."""

    __slots__ = ("desk", "home", "lane_at", "row", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.desk: Desk | None = None
        self.row = -1
        self.home = 0
        self.lane_at = 0  # where a grant to its waiter is written

    def send(self, message: Message, fd: int = -1) -> bool:
        try:
            wires.send(self.sock, encode(message, 1 if fd >= 0 else 0), fd)
        except OSError:
            return False  # its end is noticed by the loop; what was granted is in the table
        return True


class Keeping(Protocol):
    """What a desk needs of the broker around it."""

    def put(self, desk: Desk, k: int, duplicate: Duplicate) -> None: ...
    def drop(self, desk: Desk, k: int, generation: int) -> None: ...
    def cut(self, link: WorkerLink) -> None: ...


class Desk:
    """One pool. The caller holds its broker lock through ``lock``, and has taken ``row``."""

    def __init__(self, table: Table, lock: LockFile, row: Row, keeping: Keeping) -> None:
        self.table = table
        self.words = table.words
        self.lock = lock
        self.row = row
        self.keeping = keeping
        self.ident = table.ident
        self.name = table.text("name")
        self.permits = Permits(table, lock)
        self._slots: list[Slot | None] = [None] * table.slots
        self.lanes = deque(Lane(row, index) for index in reversed(range(table.lanes)))
        self.reclaimer = Reclaimer(table, lock, self.permits, row, self.slot)
        self.duplicates: dict[int, Duplicate] = {}
        self.queue: Queue[WorkerLink] = Queue(self.words[W_MAX_WAITING])
        self.links: set[WorkerLink] = set()
        self.rights: dict[WorkerLink, float] = {}
        self.granted: dict[int, tuple[WorkerLink, int]] = {}  # to whom which slot was granted last in the lane at that place
        self.known: dict[int, dict[int, int]] = {}  # home -> slot -> generation that it has
        self.shown: set[int] = set()  # homes that have shown us all they have
        self.closing: dict[int, Closing] = {}
        self.cases: list[Evidence] = []
        self.cases_due = 0.0
        self.peek_at, self.peek_pause = 0.0, FIRST_PEEK
        self.farewells: list[Farewell] = []
        self.dead: set[int] = set()
        self.look_at = 0.0  # when to look at dead rows again that could not be settled
        self.look_pause = LOOK_AGAIN
        self.dying: dict[int, float] = {}  # rows whose link ended a moment ago, and until when their process may be about to let go of them
        self.dying_pause = self.closing_pause = SOON
        self.unused_since = time.monotonic()
        self.seen = [(0, 0)] * table.slots  # uses of each slot, and when they were first seen to be so many
        # What an earlier broker said means nothing until it is proved again.
        self.table.halves[H_WAITERS] = 0
        for k in range(table.slots):
            self.words[table.shared_flag + k] = 0
        self.words[W_EPOCH] += 1
        self.beat()

    def slot(self, k: int) -> Slot:
        slot = self._slots[k]
        if slot is None:
            slot = self._slots[k] = Slot(self.table, k)
        return slot

    def beat(self) -> None:
        self.words[W_BEAT] = time.monotonic_ns()

    # Links.

    def hello(self, link: WorkerLink, row: int, incarnation: int) -> bool:
        """A worker presents itself. False if that row is not (any more) its."""
        at = self.table.row_at(row) if row < self.table.rows else -1
        if at < 0 or not self.words[at + R_PID] or self.words[at + R_INCARNATION] != incarnation or not row_is_alive(self.lock, row):
            return False
        link.desk, link.row, link.home = self, row, row << 32 | incarnation
        self.links.add(link)
        link.send(Message(Kind.WELCOME, serial=self.words[W_EPOCH]))
        return True

    def link_ended(self, link: WorkerLink) -> None:
        """The line is gone; if its worker died, settle that at once."""
        self.links.discard(link)
        self.rights.pop(link, None)
        if self.granted.get(link.lane_at, (None,))[0] is link:
            del self.granted[link.lane_at]
        self.strike(link)
        if link.row not in self.dead:
            self.dying[link.row], self.dying_pause = time.monotonic() + DYING, SOON
            self.look_for_dead()
        self.serve()

    def received(self, link: WorkerLink, message: Message, fd: int) -> None:
        """A message of a worker. Owns ``fd``. Raises ProtocolError for what no worker would say."""
        kind, number, serial, flags, body = message
        self.rights.pop(link, None)
        if fd >= 0 and kind is not Kind.SHARE:
            os.close(fd)
            raise ProtocolError(f"a worker sends no descriptor with {kind.name}")
        if kind is Kind.WAIT:
            self.wait(link, number, serial, bool(flags & FRONT))
        elif kind is Kind.LOOK:
            self.serve()
        elif kind is Kind.SHARE:
            self.share(link, number, serial, fd, body, bool(flags & RESIDENT))
        elif kind is Kind.FETCH:
            self.fetch(link, number, serial)
        elif kind is Kind.CANCEL:
            self.strike(link)
            if flags & GIVEN_UP:
                self.take_back(link)
            link.send(Message(Kind.STRUCK, serial=serial))
            self.serve()
        elif kind is Kind.SHOWN:
            self.shown.add(link.home)
        else:
            raise ProtocolError(f"a worker does not say {kind.name}")

    # Duplicates.

    def share(self, link: WorkerLink, k: int, generation: int, fd: int, body: bytes, resident: bool) -> None:
        if k >= self.table.slots or self.words[self.table.generation + k] != generation or not self.table.is_session(k, fd):
            os.close(fd)  # ended meanwhile, or no session of ours
            return
        self.known.setdefault(link.home, {})[k] = generation
        if (k in self.duplicates and self.duplicates[k].generation == generation) or k in self.closing:
            os.close(fd)
            return
        sock = take_socket(fd)
        if sock is not None:
            self.adopt(k, Duplicate(generation, sock, body, resident))

    def adopt(self, k: int, duplicate: Duplicate) -> None:
        """A duplicate is ours now, in the place of any older one; it goes to the keeper before others may know."""
        self.drop(k)
        self.duplicates[k] = duplicate
        if duplicate.kept:
            self.kept(k, duplicate.generation)
        else:
            self.keeping.put(self, k, duplicate)

    def kept(self, k: int, generation: int) -> None:
        """The keeper has it: others may attach it from now on."""
        duplicate = self.duplicates.get(k)
        if duplicate is None or duplicate.generation != generation or self.words[self.table.generation + k] != generation:
            return
        duplicate.kept = True
        if not duplicate.resident:
            self.words[self.table.shared_flag + k] = generation + 1
        self.serve()

    def drop(self, k: int) -> None:
        duplicate = self.duplicates.pop(k, None)
        if duplicate is not None:
            self.keeping.drop(self, k, duplicate.generation)
            duplicate.sock.close()

    def current(self, k: int) -> Duplicate | None:
        """Our duplicate of the session that is in slot k now."""
        duplicate = self.duplicates.get(k)
        if duplicate is not None and duplicate.generation != self.words[self.table.generation + k]:
            self.drop(k)
            return None
        return duplicate

    def fetch(self, link: WorkerLink, k: int, generation: int) -> None:
        duplicate = self.current(k) if k < self.table.slots else None
        if duplicate is None or duplicate.generation != generation or duplicate.resident:
            link.send(Message(Kind.GONE, k))
        elif link.send(Message(Kind.SESSION, k, generation, body=duplicate.body), duplicate.sock.fileno()):
            self.known.setdefault(link.home, {})[k] = generation
        else:
            link.send(Message(Kind.GONE, k))  # too many descriptors of this user are on their way, say

    # The queue.

    def wait(self, link: WorkerLink, lane: int, incarnation: int, front: bool) -> None:
        if lane >= self.table.lanes or link.home & 0xFFFFFFFF != incarnation:
            raise ProtocolError(f"a wait with lane {lane} of incarnation {incarnation}")
        self.strike(link)
        link.lane_at = self.table.lanes_at(link.row) + lane
        if self.words[link.lane_at]:
            raise ProtocolError(f"a wait with lane {lane}, which names a slot already")
        if not self.queue.join(link, front=front):
            link.send(Message(Kind.TOO_MANY, self.queue.limit))
            return
        self.table.halves[H_WAITERS] = len(self.queue)
        self.serve()

    def strike(self, link: WorkerLink) -> None:
        if self.queue.strike(link):
            self.table.halves[H_WAITERS] = len(self.queue)

    def serve(self) -> None:
        """Give the waiters, in order, what there is: an idle session, the right to dial, or the place of a session they cannot use."""
        while self.queue and (self.table.find(State.IDLE) >= 0 or self.permits.may_dial()):
            link = self.queue.head()
            if link.row in self.dead or not self.still_theirs(link) or self.words[link.lane_at]:
                self.strike(link)  # it is gone, or has used the lane for something else
            elif not (self.grant_idle(link) or self.grant_dial(link)):
                self.make_room(link)
                self.serve_behind(link.home)
                return

    def serve_behind(self, first: int) -> None:
        """Idle sessions that the first in line cannot have yet, for want of a duplicate, go to whoever behind it can.

        One that it can have is kept for it, also if it came back after we had looked.
        """
        before = {first}
        for link in self.queue.behind() if self.table.find(State.IDLE) >= 0 else ():
            if link.row not in self.dead and self.still_theirs(link) and not self.words[link.lane_at]:
                self.grant_idle(link, before)
                before.add(link.home)

    def still_theirs(self, link: WorkerLink) -> bool:
        return self.words[self.table.row_at(link.row) + R_INCARNATION] == link.home & 0xFFFFFFFF

    def grant_idle(self, link: WorkerLink, before: Collection[int] = ()) -> bool:
        """Grant an idle session, none that one of those who wait ``before`` can have."""
        k = self.table.find(State.IDLE)
        while k >= 0:
            if self.can_have(link.home, k) and not any(self.can_have(home, k) for home in before):
                lane = self.claim(k)
                if lane is not None:
                    self.grant(link, k, lane, self.current(k))
                    return True
            k = self.table.find(State.IDLE, k + 1)
        return False

    def can_have(self, home: int, k: int) -> bool:
        """Has this worker the session in slot k, or can we give it? (Who has it needs no duplicate of ours, and does not wait for the keeper to have one.)"""
        duplicate, words = self.current(k), self.words
        if (duplicate is not None and duplicate.kept and not duplicate.resident) or words[self.table.home + k] == home:
            return True
        return k in self.known.get(home, ()) and self.known[home][k] == words[self.table.generation + k]

    def claim(self, k: int) -> Lane | None:
        """Claim an idle session for ourselves; it is IN_USE then."""
        lane = self.lanes.pop()
        slot = self.slot(k)
        if claims.claim(self.words, lane, slot):
            self.words[self.row.at + R_CLAIMED] += 1
            if self.table.mem[slot.state_at] == IDLE:
                self.table.mem[slot.state_at] = IN_USE
                return lane
            claims.release(self.words, lane, slot)
        self.lanes.append(lane)
        return None

    def grant(self, link: WorkerLink, k: int, lane: Lane, duplicate: Duplicate | None) -> None:
        claims.grant(self.words, lane, self.slot(k), link.lane_at)
        generation = self.words[self.table.generation + k]
        known = self.known.setdefault(link.home, {})
        if duplicate is None or duplicate.generation != generation or known.get(k) == generation:
            link.send(Message(Kind.GRANT, k, generation))
        elif link.send(Message(Kind.GRANT, k, generation, body=duplicate.body), duplicate.sock.fileno()):
            known[k] = generation
        else:
            link.send(Message(Kind.GRANT, k, generation))  # it asks for the descriptor, later
        self.granted[link.lane_at] = link, k
        self.peek_at, self.peek_pause = time.monotonic() + FIRST_PEEK, FIRST_PEEK
        self.lanes.append(lane)
        self.strike(link)

    def take_back(self, link: WorkerLink) -> None:
        """Its waiter went away before it heard of our grant, and may not come by for long: the session is idle again."""
        whose, k = self.granted.get(link.lane_at, (None, -1))
        if whose is link and claims.is_granted(self.words[link.lane_at]) and claims.named(self.words[link.lane_at]) == k:
            lane, slot = self.lanes.pop(), self.slot(k)
            claims.take_back(self.words, lane, slot, link.lane_at)
            self.table.mem[slot.state_at] = IDLE
            claims.release(self.words, lane, slot)
            self.lanes.append(lane)

    def grant_dial(self, link: WorkerLink) -> bool:
        """The right to dial, to as many as there is room for; a right that is being used is a DIALING slot already."""
        if not self.permits.may_dial():
            return False
        now = time.monotonic()
        dialing = {self.words[self.table.home + k] for k in self.table.find_all(State.DIALING)}
        pending = [other for other, until in self.rights.items() if until > now and other.home not in dialing]
        if len(pending) >= self.permits.room_to_dial():
            return False
        self.queue.serve()
        self.table.halves[H_WAITERS] = len(self.queue)
        self.rights[link] = now + RIGHT_TO_DIAL
        link.send(Message(Kind.DIAL))
        return True

    def make_room(self, link: WorkerLink) -> None:
        """Idle sessions are there, but none that this waiter can use: end one for it. The right to dial follows when its permit is back."""
        if self.table.find(State.IDLE) < 0 or any(closing.reason is CloseReason.evicted_for_other for closing in self.closing.values()):
            return
        for k in self.table.find_all(State.IDLE):
            duplicate = self.current(k)
            if duplicate is not None and duplicate.resident:
                lane = self.claim(k)
                if lane is not None:
                    self.close(k, CloseReason.evicted_for_other, lane=lane)
                    return

    # Closing.

    def close(self, k: int, reason: CloseReason, *, lane: Lane | None = None, case: Evidence | None = None) -> None:
        """End a session that our ``lane`` holds, or whose holder was convicted: say so to the server and wait for its end."""
        self.table.move(k, State.CLOSING)
        sock = None
        duplicate = self.current(k)
        if duplicate is not None:
            if case is not None:
                self.say_farewell(duplicate)
            # The keeper's duplicate stays until the slot is free: should we die before, the next broker needs it to bring this to its end.
            sock = self.duplicates.pop(k).sock
            shut(sock, socket.SHUT_WR)
        until = time.monotonic() + self.words[W_CLOSE_TIMEOUT] / 1e9
        self.closing_pause = SOON
        self.closing[k] = Closing(k, self.words[self.table.generation + k], sock, until, reason, lane, case)
        self.finish_closing()

    def say_farewell(self, duplicate: Duplicate) -> None:
        """The holder has died, perhaps in the middle of a request: the server need not go on with it."""
        word = unpack_session(duplicate.body)[1]
        if word:
            self.closing_pause = SOON
            self.farewells.append(Farewell(duplicate.sock, word, time.monotonic() + self.words[W_CLOSE_TIMEOUT] / 1e9))
            self.finish_farewells()

    def finish_farewells(self) -> None:
        self.farewells = [farewell for farewell in self.farewells if not farewell.is_said()]

    def finish_closing(self) -> None:
        """Those that have ended, at the server too, give their permits back."""
        now = time.monotonic()
        freed = False
        for closing in list(self.closing.values()):
            if closing.sock is not None:
                if now < closing.until and not wires.has_ended(closing.sock):
                    continue
                shut(closing.sock, socket.SHUT_RDWR)
                closing.sock.close()
                closing.sock = None
            with self.permits.section() as inside:
                if not inside:
                    break
                if closing.case is not None:
                    self.reclaimer.bury(closing.case)
                elif closing.lane is not None:
                    free_slot(self.table, self.permits, self.row, closing.k)
                    claims.release(self.words, closing.lane, self.slot(closing.k))
                    self.lanes.append(closing.lane)
                    self.words[self.row.at + R_CLOSED + closing.reason] += 1
            del self.closing[closing.k]
            self.keeping.drop(self, closing.k, closing.generation)
            freed = True
        if freed:
            self.free_rows()
            self.serve()

    # The dead.

    def look_for_dead(self) -> None:
        """Find rows whose process died. First their links go and their waiters are struck; then what they held is looked at."""
        dead = self.reclaimer.dead_rows()
        if dead - self.dead:
            self.look_pause = LOOK_AGAIN
        self.dead = dead
        for row in dead:
            self.dying.pop(row, None)
        for link in [link for link in self.links if link.row in dead]:
            self.keeping.cut(link)
        if not self.cases:
            self.cases = [case for case in self.reclaimer.suspects(dead) if case.k not in self.closing]
            self.cases_due = time.monotonic() + PAUSE
            if dead and not self.cases:
                self.bury_and_free()

    def judge(self) -> None:
        """The second look, when its time has come."""
        cases, self.cases = self.cases, []
        for case in self.reclaimer.convicted(cases, self.dead):
            if case.k in self.closing:
                pass
            elif self.was_never_accepted(case):
                self.table.mem[self.slot(case.k).state_at] = IDLE
                claims.give_token(self.table, self.slot(case.k), case.lanes)
            elif self.current(case.k) is not None or not self.may_be_elsewhere(case.k):
                self.close(case.k, CloseReason.owner_died, case=case)
        self.bury_and_free()

    def was_never_accepted(self, case: Evidence) -> bool:
        """Did a waiter die with our grant still in its lane? Then nobody has used the session since it was idle, and others can have it."""
        granted = bool(case.lanes) and all(claims.is_granted(self.words[at]) for at in case.lanes)
        duplicate = self.current(case.k) if granted and self.table.state(case.k) is not State.CLOSING else None
        return duplicate is not None and duplicate.kept and not duplicate.resident

    def may_be_elsewhere(self, k: int) -> bool:
        """We have no duplicate of this session: may a live process have one? Not if it never left its dead home, nor when all have shown what they have."""
        if self.words[self.table.spread + k] != self.words[self.table.generation + k] + 1:
            return False
        older = (home for home in map(self.table.home_of, set(self.table.taken_rows()) - self.dead) if home & 0xFFFFFFFF < self.row.incarnation)
        return not self.shown.issuperset(older)  # who came after us can have it through us only

    def bury_and_free(self) -> None:
        """Idle sessions that nobody alive can have; then the rows that nothing needs any more."""
        for k in self.lost_sessions():
            lane = self.claim(k)
            if lane is not None:
                self.close(k, CloseReason.owner_died, lane=lane)
        self.free_rows()
        self.look_at = time.monotonic() + self.look_pause
        self.look_pause = min(2 * self.look_pause, 0.25)
        self.serve()

    def lost_sessions(self) -> list[int]:
        alive = {self.table.home_of(row) for row in self.table.taken_rows() if row not in self.dead}
        homes = self.table.array(self.table.home)
        return [k for k in self.table.find_all(State.IDLE) if homes[k] not in alive and self.current(k) is None and not self.may_be_elsewhere(k)]

    def free_rows(self) -> None:
        if not self.dead:
            return
        homes = {row: self.table.home_of(row) for row in self.dead}
        for row in self.reclaimer.free_rows(self.dead):
            self.dead.discard(row)
            self.known.pop(homes[row], None)
            self.shown.discard(homes[row])

    # Time.

    def tick(self) -> None:
        """A few times a second: what no message tells."""
        self.look_for_dead()
        if self.lost_sessions():
            self.bury_and_free()
        self.check_idle()
        self.evict()
        self.end_long_leases()
        for k in [k for k, duplicate in self.duplicates.items() if duplicate.generation != self.words[self.table.generation + k]]:
            self.drop(k)
        self.serve()

    def check_idle(self) -> None:
        """Idle sessions with something to read have ended, or are dirty."""
        poller = select.poll()
        watched = {}
        for k in self.table.find_all(State.IDLE):
            duplicate = self.current(k)
            if duplicate is not None:
                poller.register(duplicate.sock, select.POLLIN | select.POLLPRI | select.POLLRDHUP)
                watched[duplicate.sock.fileno()] = k
        for fd, events in poller.poll(0) if watched else ():
            lane = self.claim(watched[fd])
            if lane is not None:
                ended = events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR)
                self.close(watched[fd], CloseReason.peer_closed if ended else CloseReason.unread_data, lane=lane)

    def evict(self) -> None:
        words, table = self.words, self.table
        facts = Facts(
            now=time.monotonic_ns(),
            states=table.states(),
            unused_since=self.unused_since_of(),
            expires=table.array(table.expires),
            size=self.permits.held(),
            max_size=words[W_MAX_SIZE],
            min_size=words[W_MIN_SIZE],
            max_idle=words[W_MAX_IDLE],
        )
        for k, reason in plan_evictions(facts):
            if self.current(k) is not None:  # else only its own process can end it
                lane = self.claim(k)
                if lane is not None:
                    self.close(k, reason, lane=lane)

    def unused_since_of(self) -> list[int]:
        now, places = time.monotonic_ns(), zip(self.seen, self.table.array(self.table.uses), self.table.states(), strict=True)
        self.seen = [seen if seen[0] == uses and state == State.IDLE else (uses, now) for seen, uses, state in places]
        return [since for _, since in self.seen]

    def end_long_leases(self) -> None:
        """With ``max_lease``: the connection under a lease that lasts too long is shut down; its holder finds out and returns it."""
        limit = self.words[W_MAX_LEASE]
        if limit:
            now, since = time.monotonic_ns(), self.table.array(self.table.since)
            for k in self.table.find_all(State.IN_USE):
                duplicate = self.current(k)
                if duplicate is not None and now - since[k] > limit:
                    self.say_farewell(duplicate)
                    shut(duplicate.sock, socket.SHUT_RDWR)

    def due(self) -> float:
        """The moment something of this desk wants to be looked at, on the monotonic clock."""
        moments = [time.monotonic() + self.closing_pause] if self.closing or self.farewells else []
        if self.cases:
            moments.append(self.cases_due)
        elif self.dead:
            moments.append(self.look_at)
        if self.queue:
            moments.append(self.peek_at)
        if self.dying:
            moments.append(time.monotonic() + self.dying_pause)
        if self.queue and self.words[W_FAILURES]:
            moments.append(max(self.words[W_RETRY_AT] / 1e9, time.monotonic() + 0.002))
        return min(moments, default=float("inf"))

    def attend(self) -> None:
        """After every turn of the loop: what is due by now."""
        self.beat()
        now = time.monotonic()
        if self.cases:
            if now >= self.cases_due:
                self.judge()
        elif (self.dead and now >= self.look_at) or self.has_died(now):
            self.look_for_dead()
        if self.closing:
            self.finish_closing()
        if self.farewells:
            self.finish_farewells()
        self.closing_pause = min(1.25 * self.closing_pause, LATER)
        if self.queue and (self.words[W_FAILURES] or now >= self.peek_at):
            self.peek_pause = min(2 * self.peek_pause, LAST_PEEK)
            self.peek_at = now + self.peek_pause
            self.serve()

    def has_died(self, now: float) -> bool:
        """Has one of those whose link ended a moment ago let go of its row?"""
        self.dying_pause = min(1.25 * self.dying_pause, LATER)
        for row, until in list(self.dying.items()):
            if not row_is_alive(self.lock, row):
                return True
            if now >= until:
                del self.dying[row]
        return False

    def workers_alive(self) -> bool:
        return any(row != self.row.index and row_is_alive(self.lock, row) for row in self.table.taken_rows())

    # The end.

    def leave(self) -> None:
        """The broker goes; workers go on without. Our row is left to the next reclaimer."""
        self.table.halves[H_WAITERS] = 0
        self.words[W_BEAT] = 0
        for duplicate in self.duplicates.values():
            duplicate.sock.close()
        self.duplicates.clear()
        for farewell in self.farewells:
            farewell.close()
        for closing in self.closing.values():
            if closing.sock is not None:
                shut(closing.sock, socket.SHUT_RDWR)
                closing.sock.close()
        self.closing.clear()
        for slot in filter(None, self._slots):
            slot.close()
        self.permits.cap.close()
        self.table.close()
        self.lock.close()


def take_socket(fd: int) -> socket.socket | None:
    """A received descriptor as a socket; None (and it is closed) if it is not a socket's.

    Whether the connection blocks is left as it is: that belongs to everybody who has it, and a resident one may well block.
    """
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None


def shut(sock: socket.socket, how: int) -> None:
    """End a connection, or our side of it, for everybody who has a duplicate."""
    try:
        sock.shutdown(how)
    except OSError:
        pass  # the server was faster
