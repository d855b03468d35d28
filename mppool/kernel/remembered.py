"""What a process has and a forked child must let go of."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["Remembered"]

T = TypeVar("T")

_numbers = itertools.count(1)


class Remembered(Generic[T]):
    """Objects that somebody else owns, for as long as they are there. Several threads may add at once: each does so under a number of its own.

    (Not a WeakSet: what a signal handler throws in its callbacks is swallowed.)
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[T]] = {}

    def add(self, thing: T) -> None:
        for number, reference in list(self._references.items()):
            if reference() is None:
                self._references.pop(number, None)
        self._references[next(_numbers)] = weakref.ref(thing)

    def __iter__(self) -> Iterator[T]:
        for reference in list(self._references.values()):
            thing = reference()
            if thing is not None:
                yield thing
