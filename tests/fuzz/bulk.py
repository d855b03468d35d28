"""A million frames: many links at once, each a short life of requests and garbage, as fast as the broker takes them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from mppool.wire import Kind
from tests.fuzz.frames import Dice, Frame, Zoo
from tests.fuzz.links import RawLink
from tests.fuzz.rig import Rig, Seat

__all__ = ["Bulk"]

LINKS = 24
SEATS = 6
BURST = 48  # frames on one link before the next has its turn


class Bulk:
    """Sends. ``frames`` counts what the kernel took for the broker."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.zoo = Zoo()
        self.dice = Dice(self.random, self.zoo)
        self.seats = [Seat(rig.ground) for _ in range(SEATS)]
        self.links: list[RawLink] = []
        self.frames = self.opened = self.turns = 0

    def run(self, frames: int, progress: Callable[[], None] = lambda: None) -> None:
        """Until so many more frames are out. ``progress`` is called about once a second."""
        target, tell = self.frames + frames, time.monotonic() + 1
        while self.frames < target:
            self.turn()
            if time.monotonic() >= tell:
                self.rig.check()
                self.change_seats()
                progress()
                tell = time.monotonic() + 1

    def turn(self) -> None:
        if len(self.links) < LINKS:
            self.open()
        self.dice.generations = self.rig.ground.generations()
        self.turns += 1
        raw = self.links[self.turns % len(self.links)]
        before = raw.sent
        keep = self.burst(raw)
        self.frames += raw.sent - before
        for seat in self.seats:
            seat.sweep()
        if keep and not raw.ended:
            raw.drain()
        if not keep or raw.ended:
            self.links.remove(raw)
            raw.close(reset=self.random.random() < 0.3)

    def open(self) -> None:
        raw = RawLink(self.rig.path, self.rig.ground)
        self.opened += 1
        self.links.append(raw)
        if self.random.random() < 0.95:
            raw.hello(self.random.choice(self.seats))
        self.frames += raw.sent

    def burst(self, raw: RawLink) -> bool:
        """Some frames, perhaps the last of this link. False: it is to be closed."""
        dice = self.dice
        for _ in range(self.random.randrange(1, BURST)):
            if raw.seat is None or self.random.random() < 0.004:
                raw.send_garbage(dice.garbage())
                if self.random.random() < 0.2:  # what comes behind it is read to its end, or not at all
                    for _ in range(self.random.randrange(8)):
                        raw.ask(*dice.request())
                return self.random.random() < 0.5
            kind, frame = dice.request()
            if kind is Kind.WAIT:
                frame = self.wait(raw.seat)
            if not raw.ask(kind, frame):
                time.sleep(0.0005)  # it is behind
                break
        return self.random.random() < 0.97

    def wait(self, seat: Seat) -> Frame:
        """Mostly with a lane that is free, as a worker does."""
        lane = seat.free_lane() + self.random.randrange(20) if self.random.random() < 0.95 else self.random.randrange(len(seat.lanes()))
        return self.dice.wait(lane, seat.row.incarnation)

    def change_seats(self) -> None:
        """One of the rows dies; another process's row takes its place."""
        self.seats.pop(0).die()
        self.seats.append(Seat(self.rig.ground))

    def close(self) -> None:
        for raw in self.links:
            raw.close()
        for seat in self.seats:
            seat.sweep()
            seat.die()
        self.zoo.close()
