"""Real code, one step at a time: what it would do next to shared memory, given what it has seen so far.

The functions of the product run here as they are, over a table whose every access is a *step*: a word read or written, a
semaphore tried, a byte locked. A process that has taken some steps of an operation is nothing but the list of what it saw.
To know its next step, its operation is run from the start with that list, up to the first access beyond it. The
answer never changes, so each is worked out once; what remains of a million interleavings is looking up.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import posix_ipc

__all__ = ["Done", "Interrupt", "Lock", "Oracle", "Pending", "Shared", "Step", "Violation", "access", "freeze"]


KINDS = frozenset({"read", "write", "take", "give", "value", "lock", "unlock", "held"})


class Step(NamedTuple):
    """One access to what processes share: one of ``KINDS``, or a kind of the scenario's own, which is there for the judge only."""

    kind: str
    place: Any
    value: Any = None


class Done(NamedTuple):
    """The operation ran through: what it returned, and its process's own objects as it left them."""

    result: Any
    local: int


class Violation(Exception):
    """What must never happen happened. ``path``: the steps that lead to it."""

    path: tuple[str, ...] = ()


class Pending(BaseException):
    """Nothing more was seen: the operation waits for the answer to its next step. Goes through every handler."""


class Interrupt(BaseException):
    """What a signal handler throws."""


BEFORE, AFTER = "interrupted before", "interrupted after"  # instead of an answer: was the step taken?


class _Run:
    """One run of an operation with what it saw."""

    def __init__(self, seen: tuple[Any, ...]) -> None:
        self.answers: Iterator[Any] = iter(seen)
        self.wanted: Step | None = None

    def ask(self, step: Step) -> Any:
        if self.wanted is not None:
            raise Pending  # a clean-up on the way out
        try:
            answer = next(self.answers)
        except StopIteration:
            self.wanted = step
            raise Pending from None
        if answer is BEFORE or answer is AFTER:
            raise Interrupt
        return answer


_run: _Run | None = None


def access(kind: str, place: Any, value: Any = None) -> Any:
    assert _run is not None
    return _run.ask(Step(kind, place, value))


class Oracle:
    """What each operation does next. ``operations``: name -> function(local), where ``local`` is a copy of the process's own objects."""

    def __init__(self, operations: dict[str, Callable[..., Any]]) -> None:
        self.operations = operations
        self.numbers: dict[Any, int] = {}
        self.locals: list[Any] = []
        self.known: dict[Any, Step | Done] = {}

    def keep(self, local: Any) -> int:
        """A number for a process's own objects, the same for equal ones."""
        number = self.numbers.setdefault(freeze(local), len(self.locals))
        if number == len(self.locals):
            self.locals.append(local)
        return number

    def next(self, local: int, operation: tuple[Any, ...], seen: tuple[Any, ...]) -> Step | Done:
        key = local, operation, seen
        known = self.known.get(key)
        if known is None:
            known = self.known[key] = self._run(local, operation, seen)
        return known

    def _run(self, local: int, operation: tuple[Any, ...], seen: tuple[Any, ...]) -> Step | Done:
        global _run
        mine = copy.deepcopy(self.locals[local])
        name, *arguments = operation
        _run = _Run(seen)
        previous, sys.unraisablehook = sys.unraisablehook, lambda _: None  # Pending, in finalizers
        try:
            result = self.operations[name](mine, *arguments)
        except Pending:
            result = None
        except Exception as error:
            raise Violation(f"{name} raised {type(error).__name__}: {error}") from error
        finally:
            run, _run = _run, None
            sys.unraisablehook = previous
        if run.wanted is not None:
            return run.wanted
        return Done(result, self.keep(mine))


# What processes share, as the product's code sees it.


class Atomic:
    """Not part of a process's own state."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Shared(Atomic):
    """Words, or bytes, of which some are of interest; the rest are constants, and what is written to them is forgotten."""

    def __init__(self, of_interest: dict[int, str], constants: dict[int, int]) -> None:
        self.of_interest = of_interest
        self.constants = constants

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Several([self[one] for one in range(at.start, at.stop, at.step or 1)])
        place = self.of_interest.get(at)
        return access("read", place) if place is not None else self.constants.get(at, 0)

    def __setitem__(self, at: int, value: int) -> None:
        if at in self.of_interest:
            access("write", self.of_interest[at], int(value))

    def find(self, wanted: bytes, start: int, stop: int) -> int:
        return next((at for at in range(start, stop) if self[at] == wanted[0]), -1)


class Several(list[int]):
    def tolist(self) -> list[int]:
        return self

    def count(self, value: Any) -> int:
        return super().count(int(value))


class Semaphore(Atomic):
    def __init__(self, name: str) -> None:
        self.name = name

    def acquire(self, timeout: float) -> None:
        assert timeout == 0
        if not access("take", self.name):
            raise posix_ipc.BusyError

    def release(self) -> None:
        access("give", self.name)

    @property
    def value(self) -> int:
        return int(access("value", self.name))


class Lock(Atomic):
    """A process's lock file."""

    fd = 0

    def take(self, byte: int) -> bool:
        return bool(access("lock", byte))

    def give(self, byte: int) -> None:
        access("unlock", byte)

    def is_held(self, first: int, count: int = 1) -> bool:
        return bool(access("held", first))


def freeze(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Something hashable that says all about an object, and what it has."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, bytes, Enum)):
        return value
    if isinstance(value, Atomic) or callable(value):
        return type(value).__name__
    if id(value) in seen:
        return "same", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return ("dict", *((freeze(key, seen), freeze(item, seen)) for key, item in value.items()))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted((freeze(item, seen) for item in value), key=repr))
    if isinstance(value, (tuple, list, deque)):
        return ("list", *(freeze(item, seen) for item in value))
    names = list(getattr(value, "__dict__", ())) or [name for name in type(value).__slots__ if hasattr(value, name)]
    return (type(value).__name__, *((name, freeze(getattr(value, name), seen)) for name in names))
