"""What is sent: any bytes, messages that make sense, and everything in between, with any descriptors.

``Dice`` makes them fast from a seed, for the long run; the strategies at the end make them for hypothesis, from the same pieces.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
from typing import Any, NamedTuple

from hypothesis import strategies as st

from mppool.kernel.link import MAX_MESSAGE
from mppool.wire import FRONT, GIVEN_UP, RESIDENT, WIRE_VERSION, Kind, Message, encode

__all__ = ["COUNTS", "Dice", "Frame", "Zoo", "bad_frames"]

HEAD = struct.Struct("<BBBBIQ")
COUNTS = (0, 1, 2, 16, 253)  # descriptors in one message: none, one, some, as many as are looked for, as many as the kernel takes
LENGTHS = (0, 1, 15, 16, 17, 64, 4096, 65536, MAX_MESSAGE - 16, MAX_MESSAGE - 1, MAX_MESSAGE, MAX_MESSAGE + 1, 2 * MAX_MESSAGE)
BIG = ((1 << 64) - 1, 1 << 63, (1 << 32) - 1, 1 << 32)
ASKS = (Kind.SHARE, Kind.SHOWN, Kind.FETCH, Kind.WAIT, Kind.CANCEL, Kind.LOOK)  # what a worker says after HELLO


class Frame(NamedTuple):
    data: bytes
    fds: tuple[int, ...] = ()


class Zoo:
    """Descriptors that are not sessions. Owns them."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        listener = socket.create_server(("127.0.0.1", 0))
        one, other = socket.socketpair()
        things: list[Any] = [
            os.open(os.devnull, os.O_RDWR),
            os.open("/", os.O_RDONLY),
            os.memfd_create("fuzz"),
            select.epoll(),
            listener,
            one,
            other,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            socket.socket(socket.AF_INET),
            socket.create_connection(listener.getsockname()),
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        ]
        self.things: list[Any] = [reader, writer, *things]
        self.fds = [thing if isinstance(thing, int) else thing.fileno() for thing in self.things]

    def close(self) -> None:
        for thing in self.things:
            if isinstance(thing, int):
                os.close(thing)
            else:
                thing.close()


class Dice:
    """Frames by chance. ``generations`` are those of the table, so that some of what is asked for exists."""

    def __init__(self, random: random.Random, zoo: Zoo) -> None:
        self.random = random
        self.zoo = zoo
        self.generations: list[int] = [0]
        self.lanes = 1

    def number(self) -> int:
        dice = self.random
        return dice.choice(
            (dice.randrange(4), dice.randrange(64), dice.randrange(1 << 12), dice.choice((63, 64, 127, 128, 511, 512, 4096, 4097, (1 << 32) - 1)))
        )

    def serial(self, slot: int) -> int:
        """Often the generation that slot has just now, or was or will be."""
        dice = self.random
        if dice.random() < 0.6 and slot < len(self.generations):
            return max(0, self.generations[slot] + dice.choice((0, 0, 0, 1, -1)))
        return dice.choice((0, 1, dice.getrandbits(8), dice.getrandbits(64), *BIG))

    def body(self) -> bytes:
        dice = self.random
        return b"" if dice.random() < 0.7 else dice.randbytes(dice.choice((1, 16, 200)) if dice.random() < 0.97 else dice.choice((4096, 65536)))

    def fd(self) -> int:
        return self.random.choice(self.zoo.fds)

    def request(self) -> tuple[Kind, Frame]:
        """What a worker might say, about anything: it is no reason to close the link."""
        dice, kind = self.random, self.random.choices(ASKS, (20, 8, 30, 10, 12, 20))[0]
        if kind is Kind.SHARE:
            k = self.number() & 0xFFF
            return kind, Frame(encode(Message(kind, k, self.serial(k), dice.choice((0, 0, RESIDENT, 255)), self.body()), 1), (self.fd(),))
        if kind is Kind.FETCH:
            k = self.number() & 0xFFF
            return kind, Frame(encode(Message(kind, k, self.serial(k))))
        flags = dice.getrandbits(8) & ~(GIVEN_UP if kind is Kind.CANCEL else 0)  # who says that it has given up must not look at its lane
        return kind, Frame(encode(Message(kind, self.number() & 0xFFF, dice.getrandbits(64), flags, self.body())))

    def wait(self, lane: int, incarnation: int) -> Frame:
        return Frame(encode(Message(Kind.WAIT, lane, incarnation, self.random.choice((0, 0, FRONT, 255)))))

    def garbage(self) -> Frame:
        """Anything else."""
        dice = self.random
        choice = dice.randrange(8)
        if choice == 0:
            return Frame(dice.randbytes(dice.randrange(64)), self.fds())
        if choice == 1:
            return Frame(bytes(dice.choice(LENGTHS)), self.fds())
        if choice == 2:
            return Frame((encode(Message(Kind.LOOK)) + bytes(2 * MAX_MESSAGE))[: dice.choice(LENGTHS)], self.fds())
        if choice == 3:
            return Frame(bytes([dice.choice((0, 1, 0xA0, 0xA2, 0xFF))]) + self.request()[1].data[1:])
        fds = self.fds()
        announced = len(fds) if dice.random() < 0.7 else dice.choice((0, 1, 2, 255))
        kind = dice.randrange(256) if choice == 4 else dice.choice(list(Kind))
        return Frame(HEAD.pack(WIRE_VERSION, kind, dice.getrandbits(8), announced & 255, self.number(), self.serial(self.number())) + self.body(), fds)

    def fds(self) -> tuple[int, ...]:
        count = self.random.choices(COUNTS, (10, 12, 2, 1, 1))[0]
        return tuple(self.fd() for _ in range(count))


def bad_frames(zoo: Zoo) -> st.SearchStrategy[Frame]:
    """The same for hypothesis: bytes, heads and descriptors independent of each other."""
    fds = st.sampled_from(COUNTS).flatmap(lambda count: st.lists(st.sampled_from(zoo.fds), min_size=count, max_size=count)).map(tuple)
    numbers = st.one_of(st.integers(0, 70), st.integers(0, (1 << 32) - 1))
    serials = st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1))
    body = st.one_of(st.binary(max_size=40), st.sampled_from(LENGTHS).map(bytes))
    byte = st.integers(0, 255)
    versions, kinds = st.one_of(st.just(WIRE_VERSION), byte), st.one_of(st.sampled_from([int(kind) for kind in Kind]), byte)
    heads = st.builds(HEAD.pack, versions, kinds, byte, st.sampled_from((0, 1, 2, 255)), numbers, serials)
    return st.builds(Frame, st.one_of(st.binary(max_size=40), body, st.builds(bytes.__add__, heads, body)), fds)
