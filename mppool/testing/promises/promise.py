"""What a promise is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mppool.testing.kit import Kit

__all__ = ["Promise", "promise"]


class Promise(NamedTuple):
    name: str
    says: str
    advice: str
    check: Callable[[Kit], str | None]
    pooled: bool  # it needs a broker


def promise(says: str, advice: str, pooled: bool = False) -> Callable[[Callable[[Kit], str | None]], Promise]:
    """What is promised, and what to look at if it is not kept; the function tries it."""
    return lambda check: Promise(check.__name__, says, advice, check, pooled)
