"""Defects, each a small change of the product's source, and the scenario that must find it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.model.broker import Order, Restart, Rows
from tests.model.claims import Claims
from tests.model.code import Mutation
from tests.model.explore import Scenario
from tests.model.permits import Permits

__all__ = ["LONG", "MUTATIONS", "SCENARIOS", "Setting"]


class Setting(NamedTuple):
    scenario: Any
    options: dict[str, Any]

    def build(self, code: SimpleNamespace) -> Scenario:
        built: Scenario = self.scenario(code, **self.options)
        return built

    def __str__(self) -> str:
        return f"{self.scenario.__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


DEATH = Setting(Claims, {"deaths": 1})
GRANT = Setting(Claims, {"grants": True, "deaths": 2})
TWICE = Setting(Claims, {"rounds": 2, "deaths": 1, "mortal": 1})
RECLAIMERS = Setting(Claims, {"users": 1, "reclaimers": 2, "deaths": 2})
ARRIVAL = Setting(Claims, {"users": 1, "reclaimers": 2, "arrivals": 1, "deaths": 1})
INTERRUPTED = Setting(Claims, {"users": 1, "interrupts": 1, "deaths": 0})
DIAL = Setting(Permits, {"dialers": 1, "resizes": (2,), "deaths": 1})
DIALERS = Setting(Permits, {"dialers": 2, "reclaimers": 0, "deaths": 0})
INTERRUPTED_DIAL = Setting(Permits, {"dialers": 1, "deaths": 0, "interrupts": 1})
ROWS = Setting(Rows, {"deaths": 1, "ticks": 1})
GIVEN_UP = Setting(Rows, {"deaths": 1, "ticks": 1, "gives_up": True})
RESTART = Setting(Restart, {"deaths": 1, "ticks": 1})
ORDER = Setting(Order, {"ticks": 2})

# What is explored of the code as it is: quick ones for every run of the tests, and larger ones.
SCENARIOS = [DEATH, GRANT, RECLAIMERS, ARRIVAL, INTERRUPTED, DIAL, DIALERS, INTERRUPTED_DIAL, ROWS, GIVEN_UP, RESTART, ORDER]
LONG = [
    Setting(Claims, {"users": 2, "reclaimers": 2, "deaths": 3}),
    Setting(Claims, {"users": 3, "reclaimers": 1, "deaths": 2}),
    Setting(Claims, {"users": 2, "reclaimers": 2, "arrivals": 1, "deaths": 2}),
    Setting(Claims, {"users": 2, "interrupts": 1, "deaths": 0}),
    Setting(Permits, {"dialers": 2, "deaths": 2}),
    Setting(Permits, {"dialers": 2, "deaths": 0, "interrupts": 1}),
    Setting(Rows, {"deaths": 2, "ticks": 2}),
    Setting(Restart, {"deaths": 2, "ticks": 2}),
]

MUTATIONS: list[tuple[Mutation, Setting]] = [
    (
        Mutation(
            "one look only",
            (("claims", "return slot.k not in named_alive and table.words[slot.uses_at]", "return table.words[slot.uses_at]"),),
        ),
        DEATH,
    ),
    (Mutation("uses are not compared", (("claims", " and table.words[slot.uses_at] == evidence.uses", ""),)), TWICE),
    (
        Mutation(
            "a grant clears its own lane first",
            (
                (
                    "claims",
                    "    words[lane_of_waiter] = slot.granted\n    words[lane.at] = 0\n",
                    "    words[lane.at] = 0\n    words[lane_of_waiter] = slot.granted\n",
                ),
            ),
        ),
        GRANT,
    ),
    (
        Mutation(
            "a release clears its lane first",
            (("claims", "    slot.give()\n    words[lane.at] = 0\n", "    words[lane.at] = 0\n    slot.give()\n"),),
        ),
        DEATH,
    ),
    (Mutation("a claim takes before it says so", (("claims", "    words[lane.at] = slot.trying\n    try:", "    try:"),)), DEATH),
    (
        Mutation(
            "dead lanes are cleared before the token is given",
            (
                (
                    "claims",
                    "    if not slot.token.value:\n        slot.give()\n    clear(table, lanes)\n",
                    "    clear(table, lanes)\n    if not slot.token.value:\n        slot.give()\n",
                ),
            ),
        ),
        RECLAIMERS,
    ),
    (Mutation("a grant that nobody waits for is not taken back", (("desk", "if flags & GIVEN_UP:", "if flags & FRONT:"),)), GIVEN_UP),
    (Mutation("what was accepted counts as never accepted", (("desk", "all(claims.is_granted(self.words[at]) for at in case.lanes)", "True"),)), ROWS),
    (Mutation("two reclaimers", (("worker", " == self.serial and worker.lock.take(BROKER)", " == self.serial"),)), ARRIVAL),
    (
        Mutation(
            "who was dead a moment ago counts as dead",
            (("alone", "        dead = reclaimer.dead_rows()  # anew: a row that was dead a moment ago may have been freed, and be somebody else's\n", ""),),
        ),
        ARRIVAL,
    ),
    (Mutation("a doubtful lane is cleared", (("claims", "    words[lane.at] = k << 3 | LIMBO\n", "    words[lane.at] = 0\n"),)), INTERRUPTED),
    (Mutation("lanes in limbo are overlooked", (("claims", "if row in dead or word & _KIND == LIMBO:", "if row in dead:"),)), INTERRUPTED),
    (
        Mutation(
            "repair without the lock",
            (
                (
                    "permits",
                    "            if permits.lock.take(DIAL):\n                if permits.settle():\n",
                    "            repaired = permits.settle()\n            if permits.lock.take(DIAL):\n                if repaired:\n",
                ),
            ),
        ),
        DIALERS,
    ),
    (Mutation("no repair", (("permits", "                if permits.settle():\n", "                if False:\n"),)), DIAL),
    (
        Mutation(
            "the permit goes back before the close",
            (
                (
                    "returning",
                    "    worker.table.move(entry.slot.k, State.CLOSING)\n    try:\n",
                    "    with worker.permits.entered():\n        worker.permits.give(entry.slot.k)\n    try:\n",
                ),
            ),
        ),
        DIALERS,
    ),
    (Mutation("an interrupted section keeps the dial lock", (("worker", "        self.worker.permits.let_go()\n", ""),)), INTERRUPTED_DIAL),
    (
        Mutation(
            "a row is freed before its waiters are struck",
            (
                ("desk", "            self.keeping.cut(link)\n", "            pass\n"),
                ("desk", "if link.row in self.dead or not self.still_theirs(link) or self.words[link.lane_at]:", "if False:"),
            ),
        ),
        ROWS,
    ),
    (
        Mutation(
            "no incarnation in hello and grant",
            (
                ("desk", " or self.words[at + R_INCARNATION] != incarnation", ""),
                ("desk", "        return self.words[self.table.row_at(link.row) + R_INCARNATION] == link.home & 0xFFFFFFFF\n", "        return True\n"),
            ),
        ),
        ROWS,
    ),
    (
        Mutation(
            "shared flags outlive a broker",
            (("desk", "            self.words[table.shared_flag + k] = 0\n", "            pass\n"),),
        ),
        RESTART,
    ),
    (Mutation("what comes back meanwhile goes to whoever is looked at", (("desk", "self.grant_idle(link, before)", "self.grant_idle(link)"),)), ORDER),
]
