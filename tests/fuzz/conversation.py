"""Conversations in any order: rows that live and die, links that speak for them or pretend to, sessions held, lent on, died with.

``Conversation`` has the moves; who chooses them is a random.Random in the long run and hypothesis in the tests. Each move knows what
the broker must answer to it. What must hold throughout is in ``Rig.check``, what must hold afterwards in ``finish``.
"""

from __future__ import annotations

import os
import random
import select
import socket
import time

from mppool.states import State
from mppool.wire import GIVEN_UP, RESIDENT, Kind, Message, encode
from tests.fuzz.frames import Dice, Frame, Zoo
from tests.fuzz.links import RawLink
from tests.fuzz.rig import CAP, Rig, Seat, Violation
from tests.helpers.server import ask

__all__ = ["MOVES", "Conversation"]

WEIGHTS = {
    "take_row": 3,
    "kill_row": 1,
    "connect": 2,
    "hello": 5,
    "hello_wrongly": 1,
    "share": 4,
    "fetch": 4,
    "wait": 6,
    "wait_wrongly": 1,
    "cancel": 2,
    "give_up": 2,
    "look": 2,
    "shown": 1,
    "accept": 6,
    "hold": 2,
    "use": 4,
    "give_back": 4,
    "garbage": 1,
    "close": 1,
}
MOVES = tuple(name for name, weight in WEIGHTS.items() for _ in range(weight))
SEATS, LINKS = 4, 6


class Conversation:
    """One, with whatever number of links and rows. A move that makes no sense just now does nothing."""

    def __init__(self, rig: Rig, zoo: Zoo, seed: int) -> None:
        self.rig = rig
        self.ground = rig.ground
        self.random = random.Random(seed)
        self.dice = Dice(self.random, zoo)
        self.seats: list[Seat] = []
        self.links: list[RawLink] = []
        self.good: set[RawLink] = set()  # said HELLO rightly, and nothing since that a worker would not say
        self.waiting: dict[RawLink, int] = {}  # link -> lane
        self.held: dict[tuple[Seat, int], int] = {}  # (seat, lane) -> slot
        self.spoilt: set[tuple[Seat, int]] = set()  # lanes that somebody waited with wrongly
        self.frames = 0

    def move(self, name: str) -> None:
        self.frames -= sum(raw.sent for raw in self.links)
        known = list(self.links)
        getattr(self, name)()
        self.frames += sum(raw.sent for raw in {*self.links, *known})
        self.ground.check_tokens()
        if self.rig.deaths() or self.rig.failures:
            self.rig.check()

    def seat(self) -> Seat | None:
        alive = [seat for seat in self.seats if seat.alive]
        return self.random.choice(alive) if alive else None

    def link(self) -> RawLink | None:
        """A link that the broker has no reason to close."""
        good = [raw for raw in self.links if raw in self.good]
        return self.random.choice(good) if good else None

    # Rows.

    def take_row(self) -> None:
        if len(self.seats) < SEATS:
            self.seats.append(Seat(self.ground))

    def kill_row(self) -> None:
        """Its links are still open when it dies, and what it holds it keeps: the broker finds out."""
        seat = self.seat()
        if seat is None:
            return
        seat.die()
        self.seats.remove(seat)
        self.good = {raw for raw in self.good if raw.seat is not seat}
        self.waiting = {raw: lane for raw, lane in self.waiting.items() if raw.seat is not seat}
        self.held = {key: k for key, k in self.held.items() if key[0] is not seat}

    # Links.

    def connect(self) -> None:
        if len(self.links) < LINKS:
            self.links.append(RawLink(self.rig.path, self.ground))

    def hello(self) -> None:
        """For any row of ours, also one that another link speaks for already."""
        if not any(seat.alive for seat in self.seats):
            self.take_row()
        seat = self.seat()
        mute = self.mute()
        if not mute:
            self.connect()
            mute = self.mute()
        if seat is None or not mute:
            return
        raw = self.random.choice(mute)
        raw.hello(seat)
        if raw.await_answer(Kind.WELCOME) is None:
            raise Violation("a good HELLO was refused")
        self.good.add(raw)

    def mute(self) -> list[RawLink]:
        return [raw for raw in self.links if raw.seat is None and not raw.ended and not raw.asked]

    def hello_wrongly(self) -> None:
        """A row that is not there, of a process that is dead, with another incarnation, or of another pool."""
        seat = self.seat()
        if seat is None:
            return
        raw = RawLink(self.rig.path, self.ground)
        row, incarnation, ident = seat.row.index, seat.row.incarnation, self.ground.ident
        wrong = self.random.randrange(5)
        if wrong == 0:
            row = self.random.choice((row + 7, 511, 512, 4096))
        elif wrong == 1:
            incarnation = self.random.choice((0, incarnation + 1, incarnation | 1 << 32, (1 << 64) - 1))
        elif wrong == 2:
            ident = self.random.choice((ident[:-1], ident + "0", ident[:-1] + "z", "", "../../etc/passwd", "mppool-%n\0", ident.upper()))
        elif wrong == 3:
            ident = self.random.choice((ident[:-10] + "0123456789", ident + ".table", f"/{ident}"))
        else:
            row = 0  # the broker's own, or a bystander's: alive, but its incarnation is another
            incarnation = self.ground.table.home_of(0) + 1
        raw.ask(Kind.HELLO, Frame(encode(Message(Kind.HELLO, row, incarnation, body=ident.encode()))))
        if raw.await_answer(Kind.WELCOME) is not None:
            raise Violation(f"welcome, although row {row}, incarnation {incarnation} of pool {ident!r} is not there")
        self.frames += raw.sent
        raw.close()

    def close(self) -> None:
        if self.links:
            raw = self.random.choice(self.links)
            self.links.remove(raw)
            self.forget(raw)
            raw.close(reset=self.random.random() < 0.5)

    def forget(self, raw: RawLink) -> None:
        """We answer for it no more; what it waits for may still come."""
        self.good.discard(raw)
        lane = self.waiting.pop(raw, None)
        if lane is not None and raw.seat is not None:
            self.spoilt.add((raw.seat, lane))

    def garbage(self) -> None:
        """The broker closes the link, or takes it for something harmless; either is fine."""
        if self.links:
            raw = self.random.choice(self.links)
            self.forget(raw)
            frame = self.dice.garbage()
            if frame.data[1:2] != bytes([Kind.REPLACE]):  # all links would end
                raw.send_garbage(frame)

    # Sessions.

    def share(self) -> None:
        """Anything, for any slot: the link must outlive it, and nobody may get it."""
        raw = self.link()
        if raw is None:
            return
        k = self.random.randrange(2 * CAP) if self.random.random() < 0.8 else self.random.randrange(4096)
        self.dice.generations = self.ground.generations()
        fd = self.random.choice((self.dice.fd(), raw.sock.fileno(), self.random.choice(self.links).sock.fileno()))
        message = Message(Kind.SHARE, k, self.dice.serial(k), self.random.choice((0, RESIDENT)), self.dice.body())
        raw.ask(Kind.SHARE, Frame(encode(message, 1), (fd,)))

    def fetch(self) -> None:
        raw = self.link()
        if raw is not None:
            k = self.random.randrange(2 * CAP) if self.random.random() < 0.8 else self.random.randrange(4096)
            self.dice.generations = self.ground.generations()
            self.fetched(raw, k, self.dice.serial(k))

    def fetched(self, raw: RawLink, k: int, generation: int) -> int:
        """The descriptor, -1: there is none. Closed unless the caller is ``use``."""
        if not raw.ask(Kind.FETCH, Frame(encode(Message(Kind.FETCH, k, generation)))):
            raise Violation("a good link was closed")
        answer = raw.await_answer(Kind.SESSION, Kind.GONE)
        if answer is None:
            raise Violation("a good link was closed")
        message, fd = answer
        if message.kind is Kind.SESSION:
            if (message.number, message.serial) != (k, generation):
                raise Violation(f"asked for session {k, generation}, got {message.number, message.serial}")
            os.close(fd)
        return fd

    def wait(self) -> None:
        """With a free lane, as a worker does: sooner or later there must be an answer."""
        raw = self.link()
        if raw is None or raw.seat is None or raw in self.waiting:
            return
        lane = self.free_lane(raw.seat)
        raw.ask(Kind.WAIT, self.dice.wait(lane, raw.seat.row.incarnation))
        self.waiting[raw] = lane

    def free_lane(self, seat: Seat) -> int:
        used = {lane for raw, lane in self.waiting.items() if raw.seat is seat}
        return next(index for index, word in enumerate(seat.lanes()) if not word and index not in used and (seat, index) not in self.spoilt)

    def wait_wrongly(self) -> None:
        """A lane in use, one that is not there, or another's incarnation: the link may be closed, and nothing may be lost."""
        raw = self.link()
        if raw is None or raw.seat is None:
            return
        self.forget(raw)
        lane = self.random.choice((*[lane for seat, lane in self.held if seat is raw.seat], *self.waiting.values(), len(raw.seat.lanes()), 4096))
        self.spoilt.add((raw.seat, lane))
        for other in [other for other, its in self.waiting.items() if other.seat is raw.seat and its == lane]:
            self.forget(other)  # whoever of its own row waits with this lane is worse off, and nobody else
        raw.ask(Kind.WAIT, self.dice.wait(lane, raw.seat.row.incarnation + self.random.choice((0, 0, 0, 1))))

    def accept(self) -> None:
        """Hear the first answer to a wait. It comes, since nobody else holds a session for long, and what we hold is given back."""
        waiting = [raw for raw in self.waiting if raw in self.good]
        if not waiting:
            return
        answer, until = None, time.monotonic() + 10
        while answer is None:
            for raw in waiting:
                answer = raw.take(Kind.GRANT, Kind.DIAL, Kind.TOO_MANY)
                if answer is not None:
                    break
                if raw.ended:
                    raise Violation("a good link was closed while it waited")
            else:
                self.give_back()
                for seat in self.seats:
                    self.adopt_grants(seat)
                if time.monotonic() > until:
                    raise Violation(f"{len(waiting)} wait, and none is served within 10 s")
                select.select([raw.sock for raw in waiting], [], [], 0.05)
        lane, holder = self.waiting.pop(raw), raw.seat
        assert holder is not None
        message, fd = answer
        if fd >= 0:
            os.close(fd)
        if message.kind is Kind.GRANT:
            k = holder.accept(lane)
            if k != message.number:
                raise Violation(f"told that slot {message.number} is ours, the lane says {k}")
            if self.ground.slot(k).token.value or self.ground.table.state(k) is not State.IN_USE:
                raise Violation(f"slot {k} was granted, but is {self.ground.table.state(k)!r}, its token has {self.ground.slot(k).token.value} units")
            self.held[holder, lane] = k

    def cancel(self) -> None:
        raw = self.link()
        if raw is None or raw.seat is None:
            return
        raw.ask(Kind.CANCEL, Frame(encode(Message(Kind.CANCEL))))
        if raw.await_answer(Kind.STRUCK) is None:
            raise Violation("a good link was closed")
        self.waiting.pop(raw, None)
        answer = raw.take(Kind.GRANT, Kind.DIAL)
        if answer is not None and answer[1] >= 0:
            os.close(answer[1])
        self.adopt_grants(raw.seat)

    def give_up(self) -> None:
        """Whoever went away without looking has nothing in its lane once it was struck."""
        raw = self.link()
        if raw is None or raw.seat is None:
            return
        raw.ask(Kind.CANCEL, Frame(encode(Message(Kind.CANCEL, flags=GIVEN_UP))))
        if raw.await_answer(Kind.STRUCK) is None:
            raise Violation("a good link was closed")
        lane = self.waiting.pop(raw, None)
        answer = raw.take(Kind.GRANT, Kind.DIAL)
        if answer is not None and answer[1] >= 0:
            os.close(answer[1])
        if lane is not None and (raw.seat, lane) not in self.spoilt and raw.seat.lanes()[lane]:
            raise Violation(f"struck and given up, but lane {lane} says {raw.seat.lanes()[lane]:#x}")

    def look(self) -> None:
        raw = self.link()
        if raw is not None:
            raw.ask(Kind.LOOK, Frame(encode(Message(Kind.LOOK))))

    def shown(self) -> None:
        raw = self.link()
        if raw is not None:
            raw.ask(Kind.SHOWN, Frame(encode(Message(Kind.SHOWN))))

    def adopt_grants(self, seat: Seat) -> None:
        """Granted while nobody listened: given back."""
        for lane, word in enumerate(seat.lanes()):
            if word and (seat, lane) not in self.held and lane not in [its for raw, its in self.waiting.items() if raw.seat is seat] and word & 7 == 3:
                seat.accept(lane)
                seat.release(lane)

    def hold(self) -> None:
        """Claim an idle session, past everybody who waits: impolite, but safe."""
        seat = self.seat()
        k = self.ground.table.find(State.IDLE)
        if seat is not None and k >= 0 and len(self.held) < CAP:
            lane = self.free_lane(seat)
            if seat.claim(k, lane):
                self.held[seat, lane] = k

    def use(self) -> None:
        """Whoever holds a session may fetch it and talk to the server: the reply is his."""
        holders = {seat for seat, _ in self.held}
        links = [raw for raw in self.good if raw.seat in holders]
        if not links:
            return
        raw = self.random.choice(links)
        k = next(k for (seat, _), k in self.held.items() if seat is raw.seat)
        raw.ask(Kind.FETCH, Frame(encode(Message(Kind.FETCH, k, self.ground.generations()[k]))))
        answer = raw.await_answer(Kind.SESSION, Kind.GONE)
        if answer is None:
            raise Violation("a good link was closed")
        if answer[1] >= 0:
            with socket.socket(fileno=answer[1]) as sock:
                sock.settimeout(10)
                ask(sock, f"use-{self.random.getrandbits(40)}")

    def give_back(self) -> None:
        if self.held:
            seat, lane = self.random.choice(list(self.held))
            del self.held[seat, lane]
            seat.release(lane)

    # The end.

    def finish(self) -> None:
        """All rows die, some of them holding something. Everything must come back."""
        for raw in self.links:
            raw.close(reset=self.random.random() < 0.5)
        for seat in self.seats:
            seat.die()
        self.seats.clear()
        self.rig.check_rest()
