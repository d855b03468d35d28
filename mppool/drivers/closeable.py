"""Anything with ``close()``: sessions that cannot move, made by a function of the user's.

They count in the cap, stay with the process that made them, and are given up when other processes are in need. With a
``fileno()`` of a socket that can be done from outside; without one, the process does it itself when it next comes by.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mppool.drivers.base import DriverBase
from mppool.errors import DialFailed

__all__ = ["CloseableDriver"]


class CloseableDriver(DriverBase):
    name = "closeable"
    tidies_always = True  # a return is never plain: what nobody can end from outside is given up where others wait

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

    def fileno(self, session: Any) -> int:
        get = getattr(session, "fileno", None)
        try:
            fd = get() if get is not None else -1
        except Exception:
            return -1
        return fd if isinstance(fd, int) else -1
