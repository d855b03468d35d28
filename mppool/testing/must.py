"""What the checks must see."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

from mppool.testing.peer import SilentPeer
from mppool.testing.report import PromiseBroken

__all__ = ["PATIENCE", "is_open", "must_be", "must_be_open", "must_hear_nothing", "must_not_raise", "open_descriptors"]

PATIENCE = 3.0  # seconds for things that should take no time


def must_be(true: bool, else_seen: str) -> None:
    if not true:
        raise PromiseBroken(else_seen)


def must_not_raise(what: str, call: Callable[..., object], *args: Any) -> None:
    try:
        call(*args)
    except Exception as error:
        raise PromiseBroken(f"{what} raised {type(error).__name__}: {error}") from error


def must_hear_nothing(peer: SilentPeer, after: str) -> None:
    heard = peer.heard()
    if heard is not None:
        raise PromiseBroken(f"after {after} the server heard {heard}")


def must_be_open(before: set[int], after: str) -> None:
    left = open_descriptors() - before
    if left:
        raise PromiseBroken(f"{len(left)} descriptors are left open after {after}")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_descriptors() -> set[int]:
    gc.collect()
    return {int(name) for name in os.listdir("/proc/self/fd")} - {-1}
