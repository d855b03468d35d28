"""What is done to the host, drawn from the seed: the same seed gives the same actions, whatever comes of them.

Each round has a mood, which says what happens often. Timing, and who is in the middle of what, is not the seed's.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tests.chaos.board import PLACES

__all__ = ["BASE", "MOODS", "Action", "Round", "rounds"]

BASE = 8  # places that always have a worker; the others are for bursts
LONGEST_STOP = 2.5  # seconds

KILLS = {"kill worker": 30, "kill broker": 4, "kill keeper": 2, "kill both": 3}
STOPS = {"stop worker": 12, "stop broker": 4, "stop keeper": 2}
NETWORK = {"close": 10, "reset": 10, "cut": 8, "refuse": 4, "delay": 4}
SERVER = {"kill server": 2, "stop server": 2}
PEOPLE = {"fork": 12, "burst": 2, "reopen": 5, "resize": 6}

# mood: weights of what is done, mean seconds between two actions, of a thousand requests so many end their connection
MOODS: dict[str, tuple[dict[str, int], float, int]] = {
    "workers die": ({"kill worker": 30, "fork": 3}, 0.03, 0),
    "workers, broker and keeper die": (KILLS, 0.05, 0),
    "broker and keeper die together": ({"kill worker": 20, "kill both": 4}, 0.06, 0),
    "the server closes, the rest dies": (KILLS, 0.05, 30),
    "the server closes, broker and keeper die together": ({"kill worker": 20, "kill both": 4}, 0.06, 60),
    "forks in the middle of dials": ({"fork": 20, "kill worker": 15, "kill both": 1}, 0.04, 100),
    "all are stopped": ({**STOPS, "kill worker": 6, "kill broker": 1}, 0.08, 0),
    "the network": ({**NETWORK, "kill worker": 3}, 0.06, 0),
    "the server": ({**SERVER, "kill worker": 4, "close": 2}, 0.25, 0),
    "forks, bursts, resizes": ({**PEOPLE, "kill worker": 8}, 0.06, 0),
    "resizes under closes": ({"resize": 10, "close": 5, "kill worker": 5, "kill both": 1}, 0.06, 20),
    "everything": ({**KILLS, **STOPS, **NETWORK, **SERVER, **PEOPLE}, 0.06, 5),
}


@dataclass(frozen=True)
class Action:
    """``place``: whose turn it is. ``seconds``: how long it lasts, or until what was killed comes back. ``number`` and ``share``: how much, which."""

    wait: float  # seconds before it
    kind: str
    place: int
    seconds: float
    number: int
    share: float


@dataclass(frozen=True)
class Round:
    number: int
    mood: str
    closes: int  # in a thousand requests
    actions: tuple[Action, ...]


def rounds(seed: str, seconds: float, with_broker: bool, without: Collection[str] = ()) -> Iterator[Round]:
    """Rounds without end; each mood comes once before any comes again. ``without``: kinds that are left out."""
    order: list[str] = []
    number = 0
    while True:
        dice = random.Random(f"{seed} {number}")
        if not order:
            order = sorted(mood for mood in MOODS if with_broker or "together" not in mood)
            dice.shuffle(order)
        mood = order.pop()
        _, _, closes = MOODS[mood]
        yield Round(number, mood, closes, tuple(one for one in actions(dice, mood, seconds, with_broker) if one.kind not in without))
        number += 1


def actions(dice: random.Random, mood: str, seconds: float, with_broker: bool) -> Iterator[Action]:
    weights, mean, _ = MOODS[mood]
    if not with_broker:
        weights = {kind: weight for kind, weight in weights.items() if kind.rpartition(" ")[2] not in ("broker", "keeper", "both")}
    total = 0.0
    while total < seconds:
        wait = min(dice.expovariate(1 / mean), 1.0)
        total += wait
        kind = dice.choices(list(weights), list(weights.values()))[0]
        place = dice.randrange(BASE)
        yield Action(wait, kind, place, length(dice, kind), count(dice, kind), dice.random())


def length(dice: random.Random, kind: str) -> float:
    if kind.startswith("stop"):
        return dice.choice((0.01, 0.1, 0.5, 1.3, LONGEST_STOP))
    if kind == "fork":
        return dice.choice((0.0, 0.05, 0.3, 1.5))
    if kind == "kill worker":
        return dice.choice((0.0, 0.0, 0.02, 0.2))
    if kind in ("refuse", "delay"):
        return dice.choice((0.05, 0.3, 1.0))
    return dice.choice((0.0, 0.1, 0.4, 1.0))


def count(dice: random.Random, kind: str) -> int:
    if kind == "resize":
        return dice.randint(1, 10)
    if kind == "burst":
        return dice.randint(2, PLACES - BASE - 2)
    return dice.choice((1, 1, 2, 4))
