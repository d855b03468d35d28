"""What is scribbled into a pool's shared memory, and where: single words, ranges, whole pages; noise, ones, zeros, plausible lies."""

from __future__ import annotations

import mmap
import random
import time
from typing import NamedTuple

from hypothesis import strategies as st

from mppool.claims import GRANTED, HELD, LIMBO, TRYING
from mppool.table import R_LANES, Table
from tests.fuzz.rig import CAP

__all__ = ["HOWS", "REGIONS", "Damage", "any_damage", "damages", "inflict"]

REGIONS = ("header", "texts", "states", "slots", "row", "lanes", "rows", "all")
HOWS = ("noise", "ones", "zeros", "plausible", "bit")
LENGTHS = (1, 1, 1, 1, 4, 64, mmap.PAGESIZE // 8)
HEADER_WORDS = 26  # those that mean something, and two that do not


class Damage(NamedTuple):
    region: str
    at: int  # taken modulo the region's size, in words (of "states" and "texts": bytes)
    length: int  # in the same unit
    how: str
    seed: int


def any_damage(dice: random.Random) -> list[Damage]:
    count = dice.choice((1, 1, 1, 2, 5))
    return [Damage(dice.choice(REGIONS), dice.getrandbits(20), dice.choice(LENGTHS), dice.choice(HOWS), dice.getrandbits(32)) for _ in range(count)]


def damages() -> st.SearchStrategy[list[Damage]]:
    one = st.builds(Damage, st.sampled_from(REGIONS), st.integers(0, 1 << 20), st.sampled_from(LENGTHS), st.sampled_from(HOWS), st.integers(0, 1 << 32))
    return st.lists(one, min_size=1, max_size=5)


def inflict(table: Table, damage: Damage) -> None:
    """``table`` is a mapping of our own, made while all was well: its places are right."""
    dice = random.Random(damage.seed)
    if damage.region in ("states", "texts"):
        start, size = (table.states_byte, table.slots) if damage.region == "states" else (64 * 8, table.states_byte - 64 * 8)
        size = min(size, 2 * CAP) if damage.region == "states" and dice.random() < 0.7 else size
        for n in range(min(damage.length, size)):
            at = start + (damage.at + n) % size
            old = table.mem[at]
            table.mem[at] = byte(damage.how, dice, old)
        return
    places = region(table, damage.region, dice)
    for n in range(min(damage.length, len(places))):
        at = places[(damage.at + n) % len(places)]
        table.words[at] = word(table, damage.how, dice, table.words[at])


def region(table: Table, name: str, dice: random.Random) -> range | list[int]:
    slots_at = table.generation
    if name == "header":
        return range(HEADER_WORDS)
    if name == "slots":
        used = [slots_at + field * table.slots + k for field in range(10) for k in range(2 * CAP)]
        return used if dice.random() < 0.7 else range(slots_at, table.row_at(0))
    if name in ("row", "lanes"):
        row = dice.choice(table.taken_rows() or [0]) if dice.random() < 0.8 else dice.randrange(table.rows)
        at, lanes = table.row_at(row), table.lanes_at(row)
        return range(at, at + R_LANES) if name == "row" else range(lanes, lanes + (8 if dice.random() < 0.7 else table.lanes))
    if name == "rows":
        return range(table.row_at(0), table.row_at(table.rows))
    return range(len(table.words))


def byte(how: str, dice: random.Random, old: int) -> int:
    if how == "plausible":
        return dice.randrange(5)
    return {"noise": dice.getrandbits(8), "ones": 0xFF, "zeros": 0, "bit": old ^ 1 << dice.randrange(8)}[how]


def word(table: Table, how: str, dice: random.Random, old: int) -> int:
    if how == "plausible":
        return plausible(table, dice, old)
    return {"noise": dice.getrandbits(64), "ones": (1 << 64) - 1, "zeros": 0, "bit": old ^ 1 << dice.randrange(64)}[how]


def plausible(table: Table, dice: random.Random, old: int) -> int:
    """What could stand there, or somewhere else in the table."""
    k = dice.randrange(CAP) if dice.random() < 0.8 else dice.randrange(table.slots + 2)
    rows = table.taken_rows() or [0]
    now = time.monotonic_ns()
    return dice.choice(
        (
            dice.randrange(8),
            dice.choice(rows),
            min(old + 1, (1 << 64) - 1),
            max(old - 1, 0),
            k << 3 | dice.choice((TRYING, HELD, GRANTED, LIMBO, 5, 7)),
            table.words[table.generation + k % table.slots] + dice.randrange(2) & (1 << 64) - 1,
            dice.choice(rows) << 32 | dice.randrange(8),
            now + dice.choice((-1, 1)) * 10 ** dice.randrange(12),
            1 << dice.randrange(64),
        )
    )
