"""A small pool for the model: the product's own Table, Permits, Worker and Desk over memory whose accesses are steps."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from tests.model.explore import Scenario
from tests.model.steps import Atomic, Lock, Semaphore, Shared

__all__ = ["World"]


class Stories(Atomic):
    """Who is in the middle of what is a matter of one process."""

    def __setitem__(self, serial: int, hands: Any) -> None:
        pass

    def pop(self, serial: int, default: Any) -> None:
        pass

    def items(self) -> list[Any]:
        return []


class World(Scenario):
    """``rows`` processes share ``slots`` slots; the words named in ``interest`` are shared for real, others are constants.

    Only row 0, whose process may be interrupted, uses more than the first of its lanes.
    """

    slots, rows, lanes, max_size = 1, 3, 1, 1
    interest: tuple[str, ...] = ("uses", "state", "lane")

    def __init__(self, code: SimpleNamespace) -> None:
        super().__init__()
        self.code = code
        table = code.table
        of_interest: dict[int, str] = {}
        constants = {
            table.W_VERSION: table.VERSION,
            table.W_SLOTS: 8,
            table.W_ROWS: self.rows,
            table.W_BOOT: table.boot_word(),
            table.W_MAX_SIZE: self.max_size,
            table.W_MAX_DIALING: 2,
        }
        words = Shared(of_interest, constants)
        state_bytes: dict[int, str] = {}
        mem = Shared(state_bytes, {})
        half_words: dict[int, str] = {}
        words.__class__.__len__ = lambda self: 1 << 40  # type: ignore[attr-defined]
        table.ROWS = self.rows

        class ModelTable(Atomic, table.Table):  # type: ignore[misc, name-defined]
            def open_token(self, k: int) -> Any:
                return Semaphore(f"token {k}")

            def open_cap(self) -> Any:
                return Semaphore("cap")

            def text(self, field: str) -> str:
                return "model"

            def names_nothing(self, row: int) -> bool:
                return not any(self.lanes_of(row))

            def is_session(self, k: int, fd: int) -> bool:
                return True

        self.table = ModelTable(SimpleNamespace(words=words, mem=mem, halves=Shared(half_words, {})), "model", 0)
        t = self.table
        t.slots, t.lanes = self.slots, self.lanes

        def shared(kind: str, index: int, place: dict[int, str], at: int, value: int = 0) -> None:
            if kind in self.interest:
                place[at] = self.place(f"{kind} {index}", value)
            elif value:
                (constants if place is of_interest else mem.constants)[at] = value

        for k in range(self.slots):
            self.place(f"token {k}", 1)
            self.place(f"holders {k}")  # ghost: who uses the session, a bit a process
            shared("state", k, state_bytes, t.states_byte + k, self.state_of(k))
            for field in ("generation", "uses", "shared_flag", "spread", "permit", "home"):
                shared(field, k, of_interest, getattr(t, field) + k, self.value_of(field, k))
        for row in range(self.rows):
            at = t.row_at(row)
            shared("pid", row, of_interest, at + table.R_PID, self.value_of("pid", row))
            shared("incarnation", row, of_interest, at + table.R_INCARNATION, self.value_of("incarnation", row))
            for lane in range(self.lanes if row == 0 else 1):
                shared("lane", self.lanes * row + lane, of_interest, t.lanes_at(row) + lane)
            self.place(f"byte {table.FIRST_ROW + row}", row + 1 if self.value_of("pid", row) else 0)
        for byte in (table.CREATION, table.DIAL, table.BROKER):
            self.place(f"byte {byte}")
        shared("max_size", 0, of_interest, table.W_MAX_SIZE, self.max_size)
        shared("waiters", 0, half_words, table.H_WAITERS)
        shared("last_incarnation", 0, of_interest, table.W_INCARNATION, 100)
        held = sum(self.value_of("permit", k) for k in range(self.slots))
        self.place("cap", self.max_size - held)
        self.patient = frozenset({table.CREATION, table.DIAL})

    def state_of(self, k: int) -> int:
        return int(self.code.states.State.IDLE)

    def value_of(self, field: str, at: int) -> int:
        """What a word is at first."""
        return {"permit": 1, "pid": 1, "incarnation": 10 + at}.get(field, 0)

    def permits(self) -> Any:
        permits = self.code.permits.Permits(self.table, Lock())
        permits.door = nullcontext()
        return permits

    def row(self, index: int) -> Any:
        row = object.__new__(self.code.table.Row)
        row.index, row.at, row.lanes_at = index, self.table.row_at(index), self.table.lanes_at(index)
        row.incarnation = self.value_of("incarnation", index)
        row.home, row.lock = index << 32 | row.incarnation, None
        return row

    def worker(self, index: int) -> Any:
        """A Worker as its constructor leaves it, without sockets."""
        code, table = self.code, self.table
        worker = object.__new__(code.worker.Worker)
        worker.table, worker.words, worker.mem, worker.lock, worker.row = table, table.words, table.mem, Lock(), self.row(index)
        worker.permits, worker.slots = self.permits(), [None] * table.slots
        worker.all_lanes = tuple(code.claims.Lane(worker.row, lane) for lane in range(table.lanes))
        worker.lanes, worker.stories = deque(worker.all_lanes), Stories()
        worker.entries, worker.ahead, worker.idle, worker.leases, worker.lines = {}, {}, deque(), {}, deque()
        worker.abandoned, worker.unfinished, worker.limbo = deque(), deque(), deque()
        worker.generation_at, worker.waiting, worker.reclaiming, worker.counting = table.generation, set(), {}, nullcontext()
        worker.options = SimpleNamespace(debug=False)
        worker.reclaimer = code.reclaim.Reclaimer(table, worker.lock, worker.permits, worker.row, worker.slot)
        return worker

    def takes_row(self, worker: Any) -> bool:
        """A process that comes later: a row for it, if one is free."""
        lock = Lock()
        lock.take(self.code.table.CREATION)
        try:
            worker.row = self.code.table.Row(self.table, lock, 1)
        except self.code.errors.Error:
            return False
        finally:
            lock.give(self.code.table.CREATION)
        worker.row.lock = None
        worker.all_lanes = tuple(self.code.claims.Lane(worker.row, lane) for lane in range(self.table.lanes))
        worker.lanes = deque(worker.all_lanes)
        return True


def perform(story: Any, driver: Any = None) -> Any:
    """Tell a story whose requests need little of the outside."""
    try:
        request = story.send(None)
        while True:
            kind = type(request).__name__
            if kind == "Close":
                driver.close(request.session)
            elif kind != "Pause":
                raise NotImplementedError(request)
            request = story.send(None)
    except StopIteration as end:
        return end.value
