"""Every order of the steps of some processes, with deaths and interruptions at any of them, until nothing new turns up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.model.steps import AFTER, BEFORE, KINDS, Done, Oracle, Step, Violation

__all__ = ["WAIT", "Explorer", "Process", "Scenario", "State", "Violation", "explore"]

WAIT = object()  # the answer to a step of a scenario's own that cannot be taken yet


class Process(NamedTuple):
    """``operation`` None: it is through with all it does. ``seen``: the answers to the steps of its operation so far."""

    local: Any
    operation: tuple[Any, ...] | None
    seen: tuple[Any, ...] = ()
    alive: bool = True


class State(NamedTuple):
    memory: tuple[int, ...]
    processes: tuple[int, ...]  # see Explorer.known
    deaths: int  # that may still happen
    interrupts: int


class Scenario:
    """Some processes with their operations over a memory. Subclasses say what is there, and what must hold.

    An operation returns the next one, a list of those it may choose from, or None.
    """

    deaths = 0
    interrupts = 0
    mortal: tuple[int, ...] = ()
    patient: frozenset[int] = frozenset()  # lock bytes that processes wait for; others are only tried

    def __init__(self) -> None:
        self.operations: dict[str, Callable[..., Any]] = {}
        self.interruptible: set[str] = set()
        self.oracle = Oracle(self.operations)
        self.places: dict[Any, int] = {}
        self.initial: list[int] = []
        self.processes: list[Process] = []

    def place(self, name: Any, value: int = 0) -> Any:
        self.places[name] = len(self.initial)
        self.initial.append(value)
        return name

    def get(self, memory: tuple[int, ...], name: Any) -> int:
        return memory[self.places[name]]

    def start(self, local: Any, operation: tuple[Any, ...] | None) -> int:
        self.processes.append(Process(self.oracle.keep(local), operation))
        return len(self.processes) - 1

    # To override.

    def selectable(self, memory: tuple[int, ...], me: int, step: Step) -> list[Any]:
        """The answers to a "select": what this process may turn to next. None: it waits."""
        raise NotImplementedError(step)

    def died(self, memory: list[int], me: int) -> None:
        """What the kernel does when a process ends, besides freeing its locks."""

    def stepped(self, memory: list[int], me: int, step: Step) -> Any:
        """A step of a kind that only this scenario knows; its answer."""
        raise NotImplementedError(step)

    def check(self, before: tuple[int, ...], after: list[int], me: int, step: Step) -> None:
        """Raise Violation if this step must not happen."""

    def at_rest(self, state: State, explorer: Explorer) -> None:
        """Nothing happens any more by itself. Raise Violation if something is lost."""


def put(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])


class Explorer:
    """Processes and memories are many, states of a single process few: each gets a number, and its successors are worked out once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.oracle = scenario.oracle
        self.numbers: dict[Process, int] = {}
        self.known: list[Process] = []
        self.wanted: list[Step | None] = []
        self.following: dict[tuple[int, Any], list[int]] = {}
        self.bytes = {name: at for name, at in scenario.places.items() if isinstance(name, str) and name.startswith("byte ")}

    def number(self, process: Process) -> int:
        number = self.numbers.get(process)
        if number is None:
            number = self.numbers[process] = len(self.known)
            self.known.append(process)
            found = None if process.operation is None else self.oracle.next(process.local, process.operation, process.seen)
            assert not isinstance(found, Done)
            self.wanted.append(found)
        return number

    def settle(self, process: Process) -> list[int]:
        """A process whose operation has run through begins the next, or one of those it may choose from."""
        if process.operation is None:
            return [self.number(process)]
        found = self.oracle.next(process.local, process.operation, process.seen)
        if isinstance(found, Step):
            return [self.number(process)]
        choices = found.result if isinstance(found.result, list) else [found.result]
        return [number for choice in choices for number in self.settle(Process(found.local, choice))]

    def after(self, number: int, answer: Any) -> list[int]:
        found = self.following.get((number, answer))
        if found is None:
            process = self.known[number]
            found = self.following[number, answer] = self.settle(process._replace(seen=(*process.seen, answer)))
        return found

    def take(self, memory: tuple[int, ...], me: int, step: Step) -> list[tuple[Any, tuple[int, ...]]]:
        """The answers that a step may get, each with the memory after it; none if it must wait."""
        scenario = self.scenario
        kind, place, value = step
        at = scenario.places.get(f"byte {place}" if kind in ("lock", "unlock", "held") else place, -1)
        if kind in ("read", "value"):
            return [(memory[at], memory)]
        if kind == "held":
            return [(memory[at] not in (0, me + 1), memory)]
        if kind == "select":
            return [(answer, memory) for answer in scenario.selectable(memory, me, step)]
        after = list(memory)
        answer: Any = None
        if kind == "write":
            after[at] = value
        elif kind == "take":
            answer = memory[at] > 0
            after[at] -= answer
        elif kind == "give":
            after[at] += 1
        elif kind == "lock":
            answer = memory[at] in (0, me + 1)
            if not answer and place in scenario.patient:
                return []
            if answer:
                after[at] = me + 1
        elif kind == "unlock":
            after[at] = 0 if memory[at] == me + 1 else memory[at]
        else:
            answer = scenario.stepped(after, me, step)
            if answer is WAIT:
                return []
        scenario.check(memory, after, me, step)
        return [(answer, tuple(after))]

    def unlocked(self, memory: list[int], me: int) -> None:
        for at in self.bytes.values():
            if memory[at] == me + 1:
                memory[at] = 0

    def killed(self, state: State, me: int) -> State:
        memory = list(state.memory)
        self.unlocked(memory, me)
        self.scenario.died(memory, me)
        dead = self.number(Process(0, None, (), False))
        return State(tuple(memory), put(state.processes, me, dead), state.deaths - 1, state.interrupts)

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """(what happens, what is then)"""
        scenario = self.scenario
        for me, number in enumerate(state.processes):
            process = self.known[number]
            if not process.alive:
                continue
            if state.deaths and me in scenario.mortal:
                yield f"{me} dies", self.killed(state, me)
            step = self.wanted[number]
            if step is None:
                continue
            taken = self.take(state.memory, me, step)
            for answer, memory in taken:
                for next_number in self.after(number, answer):
                    yield f"{me} {process.operation} {step} -> {answer}", State(memory, put(state.processes, me, next_number), state.deaths, state.interrupts)
            if me == 0 and state.interrupts and step.kind in KINDS and self.may_be_interrupted(process):
                for when, memory in ((BEFORE, state.memory), *((AFTER, memory) for _, memory in taken)):
                    for next_number in self.after(number, when):
                        yield (
                            f"{me} {process.operation} {when} {step}",
                            State(memory, put(state.processes, me, next_number), state.deaths, state.interrupts - 1),
                        )

    def may_be_interrupted(self, process: Process) -> bool:
        """Process 0 may, once an operation: the handler that settles what the first interruption left is not interrupted itself."""
        return process.operation is not None and process.operation[0] in self.scenario.interruptible and not {BEFORE, AFTER} & set(process.seen)

    def go_on(self, state: State, me: int, local: int, operation: tuple[Any, ...]) -> tuple[State, Done]:
        """Let a process run one operation while nobody else moves."""
        memory, seen = state.memory, ()  # type: tuple[Any, ...], tuple[Any, ...]
        while isinstance(step := self.oracle.next(local, operation, seen), Step):
            taken = self.take(memory, me, step)
            if not taken:
                raise Violation(f"who comes last waits for ever: {step}")
            answer, memory = taken[0]
            seen = *seen, answer
        return state._replace(memory=memory), step

    def alone(self, state: State, operation: tuple[Any, ...], local: Any) -> tuple[State, Any]:
        """Let a new process run one operation while nobody else moves, and end; also what the operation returned."""
        me = len(state.processes)
        state, done = self.go_on(state, me, self.oracle.keep(local), operation)
        after = list(state.memory)
        self.unlocked(after, me)
        return state._replace(memory=tuple(after)), done.result

    def begin(self) -> Iterator[State]:
        scenario = self.scenario
        states: list[tuple[int, ...]] = [()]
        for process in scenario.processes:
            states = [(*state, number) for state in states for number in self.settle(process)]
        for processes in states:
            yield State(tuple(scenario.initial), processes, scenario.deaths, scenario.interrupts)


def explore(scenario: Scenario, limit: int = 10_000_000) -> int:
    """How many states there are. Raises Violation with the path that leads to the first that must not be (in fewest steps)."""
    explorer = Explorer(scenario)
    came_from: dict[State, tuple[State | None, str]] = dict.fromkeys(explorer.begin(), (None, ""))
    todo = deque(came_from)
    state = None
    try:
        while todo:
            state = todo.popleft()
            moved = False
            for what, successor in explorer.successors(state):
                moved = moved or not what.endswith(" dies")
                if successor not in came_from:
                    came_from[successor] = state, what
                    todo.append(successor)
            if not moved:
                scenario.at_rest(state, explorer)
            if len(came_from) > limit:
                raise RuntimeError(f"more than {limit} states")
    except Violation as violation:
        path: list[str] = []
        while state is not None:
            state, what = came_from[state]
            path.insert(0, what)
        violation.path = tuple(path[1:])
        raise
    return len(came_from)
