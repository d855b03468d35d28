"""Anything with ``close()``: sessions that cannot move, made by a function of the user's.

They count in the cap, stay with the process that made them, and are given up when other processes are in need. With a
``fileno()`` of a socket that can be done from outside; without one, the process does it itself when it next comes by.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mppool.errors import DialFailed, Error

__all__ = ["CloseableDriver"]


class CloseableDriver:
    name = "closeable"
    baggage_version = 1
    transferable = False

    def __init__(self, dial: Callable[[], Any]) -> None:
        self._dial = dial

    def key(self) -> str:
        return "closeable/1"

    def dial(self) -> Any:
        """Raises DialFailed with what the function raised as its cause."""
        try:
            session = self._dial()
        except Exception as error:
            raise DialFailed(f"dial={self._dial!r}: {type(error).__name__}: {error}") from error
        if not callable(getattr(session, "close", None)):
            raise DialFailed(f"dial={self._dial!r} made {session!r}, which has no close()", permanent=True)
        return session

    def detach(self, session: Any) -> bytes:
        return b""

    def attach(self, fd: int, baggage: bytes) -> Any:
        raise Error("these sessions stay in the process that dialed them")

    def is_clean(self, session: Any) -> bool:
        return True

    def reset(self, session: Any) -> None:
        """The user's ``reset=`` does what is to be done."""

    def ping(self, session: Any) -> None:
        """The user's ``check=`` does what is to be done."""

    def close(self, session: Any) -> None:
        try:
            session.close()
        except Exception:
            pass  # it is going away; there is nobody to tell

    def abort(self, session: Any) -> None:
        """In a forked child: ``close()`` would say goodbye on the parent's connection, so the child's descriptor is made a dead one."""
        fd = self.fileno(session)
        if fd >= 0:
            with open(os.devnull, "rb") as dead:
                os.dup2(dead.fileno(), fd, inheritable=False)

    def forked(self) -> bool:
        return False

    def fileno(self, session: Any) -> int:
        get = getattr(session, "fileno", None)
        try:
            fd = get() if get is not None else -1
        except Exception:
            return -1
        return fd if isinstance(fd, int) else -1
