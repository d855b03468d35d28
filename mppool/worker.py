"""What one process has of a pool: its row and lanes, the sessions it has attached, its links to the broker.

A ``Worker`` is made at a process's first use of a pool and forgotten, not closed, in a forked child. It holds
descriptors, memory and locks; what happens to them in which order is told in checkout.py.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
import traceback
import weakref
from collections import deque
from typing import Any, NamedTuple

from mppool import claims
from mppool.attached import Entry
from mppool.claims import Lane, Slot, named
from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.errors import Error
from mppool.kernel.process import ForkGuard, check_descriptors
from mppool.kernel.runtime import check_if_there, pool_id
from mppool.line import Descriptor, Line
from mppool.options import Options
from mppool.permits import Permits
from mppool.reclaim import Reclaimer, free_slot, take_row
from mppool.snapshot import wait_bucket
from mppool.states import CloseReason, State
from mppool.table import (
    BROKER,
    H_FLAGS,
    H_WAITERS,
    R_ATTACHED,
    R_BUCKETS,
    R_CLAIMED,
    R_CLOSED,
    R_LENT,
    R_PID,
    R_WAIT_US,
    R_WAITING,
    R_WAITS,
    W_BEAT,
    attach_or_create,
    creation_lock,
    remove_if_unused,
)
from mppool.wire import Kind, Message, encode

__all__ = ["Ahead", "Hands", "Ready", "Worker"]

log = logging.getLogger("mppool")

LOOK = encode(Message(Kind.LOOK))
SHORT = 4_000_000  # nanoseconds that a lease may last after which nobody is told that its session is free, since its holder will come right back
PROMPT = 100_000  # nanoseconds between a return and the next checkout within which we call it the same piece of work
SILENT = 1_000_000_000  # nanoseconds without a sign of life after which a broker counts as absent
_serials = itertools.count(1)


# A session and the lane for it: an empty one in the local idle list, the one that holds it in a lease. Whoever takes the pair
# out of list or lease has both, and nobody else has.
Ready = tuple[Entry, Lane]


class Ahead(NamedTuple):
    """A session of another process that was fetched before it is wanted."""

    generation: int
    given: Descriptor
    body: bytes

    def __repr__(self) -> str:
        return f"Ahead({self.generation}, {len(self.body)} bytes)"  # which may be secret


class Hands:
    """What a story in progress holds: the lanes it took and has not given back. Whoever tells the story settles them if it is interrupted."""

    __slots__ = ("__weakref__", "dialing", "serial", "taken", "worker")

    def __init__(self, worker: Worker, lane: Lane | None = None) -> None:
        """``lane``: one that a lease or the local idle list gives up."""
        self.worker = worker
        self.taken: list[Lane] = []
        self.serial = next(_serials)
        self.dialing = False  # a connection is being made that nothing else here knows of
        worker.stories[self.serial] = weakref.ref(self)
        if lane is not None:
            self.take(lane)

    def take(self, lane: Lane | None = None) -> Lane:
        """A free lane, or one that a lease gives up. Error if this process uses all it has."""
        if lane is None:
            try:
                lane = self.worker.lanes.pop()
            except IndexError:
                raise Error(f"all {self.worker.table.slots} lanes of this process are in use") from None
        lane.owner = self.serial
        self.taken.append(lane)
        return lane

    def holds(self, lane: Lane) -> bool:
        return lane.owner == self.serial

    def claim(self, lane: Lane, slot: Slot) -> bool:
        if not claims.claim(self.worker.words, lane, slot):
            return False
        self.worker.bump(R_CLAIMED)
        return True

    def may_reclaim(self) -> bool:
        """Take the broker lock for the moment, if neither a broker nor anybody else has it."""
        worker = self.worker
        if worker.reclaiming.get(BROKER) not in [hands.serial for hands in worker.told()]:
            worker.reclaiming.pop(BROKER, None)  # its end was interrupted
        return worker.reclaiming.setdefault(BROKER, self.serial) == self.serial and worker.lock.take(BROKER)

    def stop_reclaiming(self) -> None:
        if self.worker.reclaiming.get(BROKER) == self.serial:
            self.worker.lock.give(BROKER)
            self.worker.reclaiming.pop(BROKER, None)

    def give(self, lane: Lane) -> None:
        """The lane is empty, and free for other stories."""
        lane.owner = 0
        self.worker.lanes.append(lane)

    def settle(self) -> None:
        """After an interruption: every lane that is still ours, also one whose lease nobody has heard of."""
        self.stop_reclaiming()
        self.worker.permits.let_go()
        for lane in self.taken:
            if self.holds(lane):
                self.worker.settle(lane)
                lane.owner = 0
        self.done()

    def done(self) -> None:
        """The story is over. (Until then, and while anything refers to it, its process does not leave the pool.)"""
        self.worker.stories.pop(self.serial, None)


class Worker:
    """One process's part in one pool. Everything here is this process's own, or shared memory."""

    def __init__(self, name: str, target: str, driver: DriverBase, options: Options, path: str) -> None:
        """Attach to the pool, made if it is not there, and take a row. Raises ConfigMismatch, Error; leaves nothing behind if it does."""
        check_if_there(path)
        check_descriptors(2 * options.max_size + 16, f"pool {name!r} with max_size={options.max_size}")
        self.guard = ForkGuard().page
        self.driver = driver
        self.options = options
        self.path = path
        self.ident = pool_id(path, name)
        try:
            with creation_lock(self.ident) as self.lock:
                self.table, differences = attach_or_create(self.ident, self.lock, options, name=name, target=target, key=driver.key(), broker=path)
                self.row = take_row(self.table, self.lock, os.getpid())
            self.prepare()
            for difference in differences:
                log.warning("pool %r: %s", name, difference)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # one of them may have the creation lock in hand, if a signal handler threw it
            if "lock" in vars(self):
                self.lock.close()  # which is the end of our row
            remove_if_unused(self.ident)
            raise

    def prepare(self) -> None:
        table, options, driver = self.table, self.options, self.driver
        self.words = table.words
        self.mem = table.mem
        self.permits = Permits(table, self.lock)
        self.slots: list[Slot | None] = [None] * table.slots
        self.all_lanes = tuple(Lane(self.row, index) for index in range(table.lanes))
        self.lanes: deque[Lane] = deque(self.all_lanes)
        self.entries: dict[int, Entry] = {}
        self.ahead: dict[int, Ahead] = {}  # by slot
        self.idle: deque[Ready] = deque()
        self.leases: dict[int, Ready] = {}
        self.lines: deque[Line] = deque()
        self.abandoned: deque[tuple[Line, Lane]] = deque()
        self.unfinished: deque[Lane] = deque()
        self.limbo: deque[Lane] = deque()
        self.turn = int(options.turn * 1e9)  # nanoseconds
        self.has_endless = False  # sessions that nobody can end from outside: has one ever been ours?
        self.generation_at = table.generation
        # What pool.py's fast path asks: where hooks are to be called, it finds nothing ready and no return plain.
        self.ready = self.idle if options.check is None and not options.debug else deque[Ready]()
        self.returns_plainly = driver.is_clean if options.reset is None and not options.debug and not driver.tidies_always else never
        self.takes_foreign = not driver.minds_transfer
        self.let_go = driver.abort if isinstance(driver, AsyncDriverBase) else driver.close  # of what has ended
        self.stories: dict[int, weakref.ref[Hands]] = {}  # (not a WeakSet: what a signal handler throws in its callbacks is swallowed)
        self.waiting: set[Hands] = set()
        self.prompt = False  # see comes_right_back
        self.returned_at = 0
        self.shown_epoch = 0
        self.owes = False  # a duplicate that we sent did not get through
        self.next_try = 0.0  # when to look for a broker again, unless another has come since
        self.tried_epoch = 0
        self.autostart = False
        self.call_at = 0.0  # with autostart: when to start a broker if none has come; 0: one was there when we last looked
        self.reclaimer = Reclaimer(table, self.lock, self.permits, self.row, self.slot)
        self.reclaiming: dict[int, int] = {}  # by whom; see permits.Section for why a dictionary
        self.counting = threading.RLock()  # threads of one process share a row; a signal handler may come back in
        self.closing = False  # the pool was closed here, but something is still lent, or waits
        self.left = False  # all but the lock, which is the row
        self.closed = False

    def slot(self, k: int) -> Slot:
        if not 0 <= k < self.table.slots:
            raise self.table.damaged(f"a lane names slot {k}")
        slot = self.slots[k]
        if slot is None:
            slot = self.slots[k] = Slot(self.table, k)
        return slot

    # Attached sessions.

    def attached(self, k: int) -> Entry | None:
        """Our entry for the session in slot k, if we have it; an older session's entry is let go."""
        entry = self.entries.get(k)
        if entry is not None and entry.generation != self.words[self.generation_at + k]:
            self.forget(entry)
            return None
        return entry

    def attach(self, k: int, conn: Any) -> Entry:
        """Keep a session that we hold, as dialed or fetched. Error if there is no room for a descriptor; then it is not kept."""
        entry = Entry(self.slot(k), self.words[self.generation_at + k], self.words[self.table.uses + k], conn, self.driver.fileno(conn))
        entry.residence = self.driver.residence(conn)
        self.has_endless = self.has_endless or entry.sock is None
        older = self.entries.get(k)
        if older is not None:
            self.forget(older)
        if k in self.ahead:
            self.drop_ahead(k)
        self.entries[k] = entry
        self.words[self.row.at + R_ATTACHED] = len(self.entries)
        return entry

    def forget(self, entry: Entry) -> None:
        """Let go of a session that has ended: whatever its driver still says to the server reaches nobody."""
        if self.entries.get(entry.slot.k) is entry:
            del self.entries[entry.slot.k]
            self.words[self.row.at + R_ATTACHED] = len(self.entries)
        self.unlist(entry)
        entry.close()
        if not entry.closed:
            entry.closed = True
            self.let_go(entry.conn)

    def keep_ahead(self, k: int, ahead: Ahead) -> None:
        """Fetched for slot k, and not wanted yet."""
        self.drop_ahead(k)
        if self.attached(k) is None and ahead.generation == self.words[self.generation_at + k]:
            self.ahead[k] = ahead
        else:
            ahead.given.close()

    def drop_ahead(self, k: int) -> None:
        ahead = self.ahead.pop(k, None)
        if ahead is not None:
            ahead.given.close()

    def lend(self, lane: Lane, entry: Entry) -> Any:
        """The session that ``lane`` holds goes to the user, if nothing comes in between: see Hands.settle."""
        mem, words, slot = self.mem, self.words, entry.slot
        mem[slot.state_at] = State.IN_USE
        words[slot.since_at] = time.monotonic_ns()
        entry.uses = words[slot.uses_at]
        entry.lent = entry.conn.dup() if self.options.debug and isinstance(entry.conn, socket.socket) else entry.conn
        self.bump(R_LENT)
        self.leases[id(entry.lent)] = entry, lane
        return entry.lent

    def keep(self, entry: Entry, lane: Lane) -> None:
        """An idle session of ours, newest first, with an empty lane ready for it."""
        lane.owner = 0
        self.idle.append((entry, lane))

    def unlist(self, entry: Entry) -> None:
        """Take a session out of the local idle list, if it is there; its lane is free then."""
        for ready in list(self.idle):
            if ready[0] is entry:
                try:
                    self.idle.remove(ready)
                except ValueError:
                    return  # another thread has it in hand
                self.lanes.append(ready[1])

    def interrupted(self, entry: Entry, lane: Lane) -> None:
        """The fast path of a checkout was interrupted, with this pair from the local idle list in hand."""
        self.leases.pop(id(entry.lent), None)
        if lane.sure:  # ours, and nobody has touched it
            self.mem[entry.slot.state_at] = State.IDLE
            claims.release(self.words, lane, entry.slot)
            self.keep(entry, lane)
        else:
            self.settle(lane)

    # Lanes.

    def settle(self, lane: Lane) -> None:
        """Whatever an interrupted story left of its lane. What we surely hold is closed; what we may hold is found out.

        May be repeated, should it be interrupted itself.
        """
        k = named(self.words[lane.at])
        if k < 0:
            lane.sure = False
            if lane not in self.lanes:
                self.lanes.append(lane)
            return
        if lane in self.unfinished or lane in self.limbo:
            return
        if not lane.sure and not self.settle_doubt(lane, k):
            return
        entry = self.attached(k)
        if entry is None and not self.is_unshared(k) and self.table.state(k) in (State.IDLE, State.IN_USE):
            self.pass_over(lane)  # others have it, we never had: untouched
            return
        if entry is not None:
            self.sever(entry)
            self.leases.pop(id(entry.lent), None)
        if self.table.state(k) is not State.FREE:
            self.table.move(k, State.CLOSING)
        self.unfinished.append(lane)
        self.finish()

    def settle_doubt(self, lane: Lane, k: int) -> bool:
        """We do not know if we hold slot k, which ``lane`` names. True: we do. False: the lane was settled, or is in limbo."""
        try:
            slot = self.slot(k)
        except Error:
            slot = None  # out of descriptors
        if slot is not None and claims.is_granted(self.words[lane.at]):
            claims.accept(self.words, lane, slot)
            return True
        claims.disown(self.words, lane, k)
        self.limbo.append(lane)
        if slot is not None:
            self.find_out(lane, slot)
        return False

    def is_unshared(self, k: int) -> bool:
        return bool(self.words[self.table.spread + k] != self.words[self.generation_at + k] + 1)

    def find_out(self, lane: Lane, slot: Slot) -> None:
        """Do we hold the slot that our ``lane`` in limbo names? Not if its token can be taken. Else the reclaimer decides; what only we have, we end first."""
        k = slot.k
        try:
            other = self.lanes.pop()
        except IndexError:
            return
        if claims.claim(self.words, other, slot):
            self.limbo.remove(lane)
            self.words[lane.at] = 0
            self.lanes.append(lane)
            if self.table.state(k) in (State.IDLE, State.FREE):
                claims.release(self.words, other, slot)
            else:
                self.settle(other)
                return
        elif self.is_unshared(k) and not any(named(word) == k for word in self.other_lanes(lane)):
            entry = self.attached(k)
            if entry is not None:
                self.sever(entry)
        self.lanes.append(other)
        self.look()

    def other_lanes(self, lane: Lane) -> list[int]:
        words = self.table.lanes_of(self.row.index)
        del words[lane.index]
        return words

    def pass_over(self, lane: Lane) -> None:
        """Leave the session that ``lane`` holds as it is, for others."""
        slot = self.slot(named(self.words[lane.at]))
        self.mem[slot.state_at] = State.IDLE
        claims.release(self.words, lane, slot)
        lane.owner = 0
        self.lanes.append(lane)
        self.look()

    def sever(self, entry: Entry) -> None:
        """End the connection for everybody who has it, now."""
        entry.shutdown(socket.SHUT_RDWR)
        self.forget(entry)

    def finish(self) -> None:
        """Bring closes to their end whose connections are shut down already, as far as the dial lock is free just now."""
        while self.unfinished:
            with self.permits.section() as inside:
                if not inside:
                    return
                lane = self.unfinished[0]
                if lane.sure:
                    slot = self.slot(named(self.words[lane.at]))
                    free_slot(self.table, self.permits, self.row, slot.k)
                    self.bump(R_CLOSED + CloseReason.discarded)
                    claims.release(self.words, lane, slot)
                self.unfinished.popleft()  # last: interrupted before, all is done again as far as it was not
            self.settle(lane)
            self.look()

    def tidy(self) -> None:
        """What earlier interruptions left, as far as it can be settled now."""
        if self.unfinished:
            self.finish()
        for k, ahead in list(self.ahead.items()):
            if ahead.generation != self.words[self.generation_at + k]:
                self.drop_ahead(k)
        for key, (entry, lane) in list(self.leases.items()):
            if entry.left_behind():  # its end was interrupted
                self.settle(lane)
                self.leases.pop(key, None)
        for _ in range(len(self.limbo)):
            lane = self.limbo.popleft()
            if self.words[lane.at]:
                self.limbo.append(lane)
            else:
                self.lanes.append(lane)

    # The broker.

    def broker_beats(self) -> bool:
        """Has a broker shown a sign of life within the last second? (A stopped one counts as absent.)"""
        beat = self.words[W_BEAT]
        return bool(beat) and time.monotonic_ns() - beat < SILENT

    def must_queue(self) -> bool:
        """Is somebody waiting before us? The word means nothing without a broker."""
        return bool(self.table.halves[H_WAITERS]) and self.broker_beats()

    def may_overtake(self) -> bool:
        """Others wait: may we take the session again that we gave back last? Yes, while our turn with it lasts.

        Waking the next in line costs as much as several short leases, in which the session stands idle and the processors
        are busy with nothing else. So turns are handed on, not leases; longer leases than a turn are strictly first come, first served.
        """
        now = time.monotonic_ns()
        self.prompt = now - self.returned_at < PROMPT
        try:
            return now < self.ready[-1][0].turn_ends and not self.table.halves[H_FLAGS]
        except IndexError:
            return False

    def comes_right_back(self, entry: Entry) -> bool:
        """We gave back a short lease, and others wait: will we ask again at once, as we did the last time?

        Then nobody need be told: we take the session again, or join the queue, and the broker looks who is next. Should we
        not come, it finds the session by itself (desk.FIRST_PEEK), and after the next lease it is told.
        """
        self.returned_at = now = time.monotonic_ns()
        prompt, self.prompt = self.prompt, False
        return prompt and now - self.words[entry.slot.since_at] < SHORT

    def line_at_hand(self) -> Line | None:
        """A line to a broker that is well, which nobody uses and on which nothing is owed. Put it back into ``lines`` after use."""
        try:
            return self.lines.pop() if not self.owes and self.broker_beats() else None
        except IndexError:
            return None

    def look(self) -> bool:
        """Tell the broker that something became free, if somebody waits for it. False: there is no line to say it on."""
        if not self.table.halves[H_WAITERS]:
            return True
        while True:
            try:
                line = self.lines.pop()
            except IndexError:
                return False  # the broker finds it at its next tick, if the caller opens no line
            try:
                line.sock.send(LOOK)
            except OSError:
                line.close()
                continue
            self.lines.append(line)
            return True

    def refuse_grant(self, lane: Lane) -> None:
        """We wait no more, and nobody will write to this lane again. A session granted to it goes back as it is."""
        k = named(self.words[lane.at])
        if k >= 0:
            claims.accept(self.words, lane, self.slot(k))
            self.pass_over(lane)
        else:
            lane.owner = 0
            self.lanes.append(lane)

    # Counting.

    def bump(self, counter: int, by: int = 1) -> None:
        with self.counting:
            self.words[self.row.at + counter] += by

    def note_waiting(self, hands: Hands, waits: bool) -> None:
        """May be repeated: a story that was interrupted in between counts once, or not at all."""
        with self.counting:
            (self.waiting.add if waits else self.waiting.discard)(hands)
            self.words[self.row.at + R_WAITING] = len(self.waiting)

    def count_wait(self, hands: Hands, seconds: float) -> None:
        """A wait was worth it."""
        words, at = self.words, self.row.at
        with self.counting:
            self.waiting.discard(hands)
            words[at + R_WAITING] = len(self.waiting)
            words[at + R_WAITS] += 1
            words[at + R_WAIT_US] += int(seconds * 1e6)
            words[at + R_BUCKETS + wait_bucket(seconds)] += 1

    # The end.

    def forked(self) -> None:
        """In a child: everything here is the parent's. Close the child's descriptors without a word to anybody."""
        for line in [*self.lines, *(line for line, _ in self.abandoned)]:
            line.close()
        for k in list(self.ahead):
            self.drop_ahead(k)
        for entry in list(self.entries.values()):
            entry.close()
            if entry.lent is not entry.conn:
                self.driver.abort(entry.lent)
            self.driver.abort(entry.conn)
        if self.driver.forked() or not any(hands.dialing for hands in self.told()):
            self.lock.close()
        else:
            self.lock.keep()  # the row lives on with us: a thread that we do not have was making a connection, and we have that
        self.closed = True

    def is_quiet(self) -> bool:
        """Is nothing lent, no story in progress, and every lane where it belongs?"""
        return not self.leases and not self.told() and self.resting() == self.table.lanes

    def resting(self) -> int:
        """How many lanes are where they belong, those in the hands of stories left out. (One that is in two places just now counts twice.)"""
        return len(self.lanes) + len(self.idle) + len(self.leases) + len(self.unfinished) + len(self.limbo) + len(self.abandoned)

    def told(self) -> list[Hands]:
        """The hands of the stories in progress."""
        found = []
        for serial, reference in list(self.stories.items()):
            hands = reference()
            if hands is not None:
                found.append(hands)
            else:
                self.stories.pop(serial, None)
        return found

    def leave(self) -> None:
        """Give up the row; the last one out, where no broker is, removes the pool's names. Leases were returned before."""
        if self.closed or self.lock.fd < 0:
            return
        try:
            if not self.left:
                self.let_go_of_all()
        except Exception:  # the table is damaged
            self.drop_entries()
            self.lock.close()
            raise
        self.lock.close()
        self.closed = True  # last: whatever interrupts this, it can be done again
        remove_if_unused(self.ident)

    def let_go_of_all(self) -> None:
        quiet = self.is_quiet()
        self.tidy()
        for line in [*self.lines, *(line for line, _ in self.abandoned)]:
            line.close()
        self.settle_own_row()
        self.drop_entries()
        self.left = True
        if quiet:  # else a thread of a process that exits may be using them
            for slot in filter(None, self.slots):
                slot.close()
            self.permits.cap.close()

    def drop_entries(self) -> None:
        for k in list(self.ahead):
            self.drop_ahead(k)
        for entry in list(self.entries.values()):
            entry.close()
            self.driver.abort(entry.conn)
        self.entries.clear()
        self.idle.clear()

    def settle_own_row(self) -> None:
        """Before we leave: sessions that only we have end with us. Without a broker we also reclaim our own row; else it will."""
        hands = Hands(self)
        try:
            for k in list(self.entries):
                self.end_unshared(hands, k)
            lanes = self.table.lanes_of(self.row.index)
            if hands.may_reclaim() and not any(lanes):
                self.words[self.row.at + R_WAITING] = self.words[self.row.at + R_ATTACHED] = 0
                self.words[self.row.at + R_PID] = 0
        finally:
            hands.settle()

    def end_unshared(self, hands: Hands, k: int) -> None:
        entry = self.attached(k)
        if entry is None or self.words[self.table.spread + k] == entry.generation + 1:
            return
        lane = hands.take()
        if not hands.claim(lane, entry.slot):
            hands.give(lane)
        elif self.attached(k) is not entry:
            claims.release(self.words, lane, entry.slot)
            hands.give(lane)
        else:
            self.table.move(k, State.CLOSING)
            hands.settle()


def never(_session: Any) -> bool:
    return False
