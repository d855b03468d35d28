"""Scenario: processes claim, release and grant one slot; some die anywhere, some are interrupted; who is in need reclaims."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.model.explore import WAIT, Explorer, State, Violation
from tests.model.steps import Interrupt, Step, access
from tests.model.world import World, perform

__all__ = ["Claims"]


class Claims(World):
    """Processes 0.. use the slot, ``reclaimers`` more reclaim as processes do that have no broker, ``arrivals`` take a row that was freed."""

    interest: tuple[str, ...] = ("uses", "state", "lane", "generation", "permit")

    def __init__(
        self,
        code: SimpleNamespace,
        *,
        users: int = 2,
        reclaimers: int = 1,
        arrivals: int = 0,
        rounds: int = 1,
        looks: int = 1,
        deaths: int = 1,
        interrupts: int = 0,
        grants: bool = False,
        mortal: int = 100,
    ) -> None:
        self.rows = users + reclaimers
        self.lanes = 2 if interrupts else 1
        if arrivals:
            self.interest = (*self.interest, "pid", "incarnation", "last_incarnation")
        super().__init__(code)
        self.deaths, self.interrupts = deaths, interrupts
        self.mortal = tuple(range(min(mortal, self.rows)))
        self.operations.update(arrive=self.arrive, claim=self.claim, release=self.release, grant=self.grant, accept=self.accept, reclaim=self.reclaim)
        self.interruptible = {"claim", "release"}
        self.grants = grants
        self.place("message")
        for me in range(users):
            self.start(self.worker(me), ("accept", rounds) if grants and me == 1 else ("claim", rounds))
        for me in range(users, self.rows):
            self.start(self.worker(me), ("reclaim", looks))
        for _ in range(arrivals):
            self.start(self.worker(0), ("arrive",))

    # What processes do.

    def arrive(self, worker: Any) -> Any:
        return ("claim", 1) if self.takes_row(worker) else None

    def claim(self, worker: Any, rounds: int) -> Any:
        if not rounds:
            return None
        lane = worker.all_lanes[0]
        try:
            if not self.code.claims.claim(worker.words, lane, worker.slot(0)):
                return None
            access("hold", 0)
        except Interrupt:
            access("drop", 0)
            worker.lanes.remove(lane)
            worker.settle(lane)
            return None
        return [("release", rounds), ("grant", rounds)] if self.grants and worker.row.index == 0 else ("release", rounds)

    def release(self, worker: Any, rounds: int) -> Any:
        access("drop", 0)
        lane = worker.all_lanes[0]
        try:
            self.code.claims.release(worker.words, lane, worker.slot(0))
        except Interrupt:
            worker.lanes.remove(lane)
            worker.settle(lane)
            return None
        return "claim", rounds - 1

    def grant(self, worker: Any, rounds: int) -> Any:
        """To process 1, which waits."""
        access("drop", 0)
        self.code.claims.grant(worker.words, worker.all_lanes[0], worker.slot(0), self.table.lanes_at(1))
        access("wake", 0)

    def accept(self, worker: Any, rounds: int) -> Any:
        """Woken, or left alone by a granter that died: the table says whether the slot was granted."""
        access("woken", 0)
        if self.code.conversation.granted(worker, worker.all_lanes[0]).lane is None:
            return "claim", rounds
        access("hold", 0)
        return "release", rounds

    def reclaim(self, worker: Any, looks: int) -> Any:
        perform(self.code.alone.reclaim(self.code.worker.Hands(worker)))
        return ("reclaim", looks - 1) if looks > 1 else None

    # What must hold.

    def stepped(self, memory: list[int], me: int, step: Step) -> Any:
        at = self.places["holders 0"]
        if step.kind == "hold":
            if memory[at] & ~(1 << me):
                raise Violation("two holders")
            memory[at] |= 1 << me
        elif step.kind == "drop":
            memory[at] &= ~(1 << me)
        elif step.kind == "wake":
            memory[self.places["message"]] = 1
        elif step.kind == "woken" and not memory[self.places["message"]]:
            return WAIT
        return None

    def died(self, memory: list[int], me: int) -> None:
        memory[self.places["holders 0"]] &= ~(1 << me)
        if me == 0:
            memory[self.places["message"]] = 1  # the end of its link

    def check(self, before: tuple[int, ...], after: list[int], me: int, step: Step) -> None:
        if step.place == "generation 0" and after[self.places["holders 0"]] & ~(1 << me):
            raise Violation("a live holder's session was closed")

    def at_rest(self, state: State, explorer: Explorer) -> None:
        """A process that comes last finds, or makes, everything whole."""
        last = self.worker(self.rows - 1)
        for _ in range(3):
            state, _ = explorer.alone(state, ("reclaim", 1), last)
        if not self.get(state.memory, "holders 0"):
            token, permit, cap = (self.get(state.memory, name) for name in ("token 0", "permit 0", "cap"))
            if (token, permit + cap) != (1, 1):
                raise Violation(f"lost: token {token}, permit {permit}, units {cap}")
