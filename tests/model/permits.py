"""Scenario: processes dial and close while others resize; some die anywhere; who comes next repairs, or reclaims."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.model.explore import Explorer, State, Violation
from tests.model.steps import Atomic, Interrupt, Step, access
from tests.model.world import World, perform

__all__ = ["Permits"]


class Driver(Atomic):
    """A connection is the number of its slot."""

    def close(self, conn: int) -> None:
        access("close", conn)


class Permits(World):
    """``dialers`` processes dial once and close; then one each for ``resizes``; then one that reclaims. One slot more than the cap."""

    slots, max_size = 2, 1
    interest = ("uses", "state", "lane", "permit", "home", "max_size")

    def __init__(
        self,
        code: SimpleNamespace,
        *,
        dialers: int = 2,
        resizes: tuple[int, ...] = (),
        reclaimers: int = 1,
        deaths: int = 1,
        interrupts: int = 0,
        rounds: int = 1,
    ) -> None:
        self.rows = dialers + len(resizes) + reclaimers
        super().__init__(code)
        for k in range(self.slots):
            self.place(f"connection {k}")
        self.deaths, self.interrupts = deaths, interrupts
        self.mortal = tuple(range(self.rows))
        self.interruptible = {"dial", "discard", "resize"}
        self.operations.update(dial=self.dial, discard=self.discard, resize=self.resize, tidy=self.tidy, reclaim=self.reclaim)
        operations = [("dial", rounds)] * dialers + [("resize", size) for size in resizes] + [("reclaim",)] * reclaimers
        for me, operation in enumerate(operations):
            self.start(self.worker(me), operation)

    def state_of(self, k: int) -> int:
        return int(self.code.states.State.FREE)

    def value_of(self, field: str, at: int) -> int:
        return 0 if field == "permit" else super().value_of(field, at)

    def worker(self, index: int) -> Any:
        worker = super().worker(index)
        worker.driver = Driver()
        worker.let_go = worker.driver.close
        return worker

    # What processes do.

    def dial(self, worker: Any, rounds: int) -> Any:
        hands = self.code.worker.Hands(worker)
        try:
            lane = perform(self.code.dialing.take_permit(hands))
            if lane is None:
                return None
            k = self.code.claims.named(worker.words[lane.at])
            access("connect", k)
            worker.entries[k] = self.code.worker.Entry(worker.slot(k), 0, 0, k, -1)
            worker.table.move(k, self.code.states.State.IN_USE)
            return "discard", k, rounds
        except Interrupt as error:
            self.code.stray.let_go(error)
            hands.settle()
        return ("tidy",)

    def discard(self, worker: Any, k: int, rounds: int) -> Any:
        hands, entry = self.code.worker.Hands(worker), worker.entries[k]
        [lane] = [lane for lane in worker.all_lanes if lane not in worker.lanes]
        hands.take(lane)
        try:
            perform(self.code.returning.discard(hands, lane, entry, self.code.states.CloseReason.discarded), worker.driver)
        except Interrupt as error:
            self.code.stray.let_go(error)
            hands.settle()
            return ("tidy",)
        return ("dial", rounds - 1) if rounds > 1 else None

    def tidy(self, worker: Any) -> Any:
        """What comes by later: by now the frames of the exception are gone, and a connection that they held."""
        for k in range(self.slots):
            access("lose", k)
        worker.tidy()

    def resize(self, worker: Any, size: int) -> Any:
        try:
            with worker.permits.entered():
                worker.permits.resize(size)
        except Interrupt as error:
            self.code.stray.let_go(error)
            worker.permits.let_go()

    def reclaim(self, worker: Any) -> Any:
        worker.tidy()
        perform(self.code.alone.reclaim(self.code.worker.Hands(worker)))

    # What must hold.

    def stepped(self, memory: list[int], me: int, step: Step) -> Any:
        at = self.places[f"connection {step.place}"]
        if step.kind == "connect":
            memory[at] = me + 1
        elif memory[at] == me + 1:  # close, lose
            memory[at] = 0
        return None

    def died(self, memory: list[int], me: int) -> None:
        for k in range(self.slots):
            if memory[self.places[f"connection {k}"]] == me + 1:
                memory[self.places[f"connection {k}"]] = 0

    def check(self, before: tuple[int, ...], after: list[int], me: int, step: Step) -> None:
        permits = [after[self.places[f"permit {k}"]] for k in range(self.slots)]
        for k in range(self.slots):
            if after[self.places[f"connection {k}"]] and not permits[k]:
                raise Violation(f"connection {k} has no permit")
        undisturbed = not self.deaths and not self.interrupts and not after[self.places[f"byte {self.code.table.DIAL}"]]
        if undisturbed and after[self.places["cap"]] != max(0, after[self.places["max_size 0"]] - sum(permits)):
            raise Violation(f"{after[self.places['cap']]} units beside {sum(permits)} permits, and the lock is free")
        if step.kind == "write" and step.value and step.place.startswith("permit") and sum(permits) > after[self.places["max_size 0"]]:
            raise Violation(f"{sum(permits)} permits")

    def at_rest(self, state: State, explorer: Explorer) -> None:
        """A process that comes last finds everything free, and can dial."""
        last = self.worker(self.rows - 1)
        for _ in range(3):
            state, _ = explorer.alone(state, ("reclaim",), last)
        found = {name: self.get(state.memory, name) for name in ("token 0", "token 1", "permit 0", "permit 1", "connection 0", "connection 1")}
        if list(found.values()) != [1, 1, 0, 0, 0, 0]:
            raise Violation(f"lost: {found}")
        state, dialed = explorer.alone(state, ("dial", 1), last)
        if dialed is None or self.get(state.memory, "cap") != self.get(state.memory, "max_size 0") - 1:
            raise Violation(f"lost: dialed {dialed}, units {self.get(state.memory, 'cap')} of {self.get(state.memory, 'max_size 0')}")
