"""Striking a process at the n-th line of the package that it executes, from outside: the product has no hooks for it."""

from __future__ import annotations

import _thread
import mmap
import os
import signal
import sys
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import mppool

__all__ = ["KINDS", "Thrown", "Trigger", "raised_at"]

PACKAGE = os.path.dirname(mppool.__file__) + os.sep
ARMED, AT, COUNT = range(3)  # words of the shared page
TEXT = 64  # byte at which it says where it struck


class Thrown(BaseException):
    """What the handler raises, like gunicorn's SystemExit or KeyboardInterrupt."""


def throw(_number: int, _frame: FrameType | None) -> None:
    raise Thrown


class Kill:
    def __neg__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Throw:
    """Raise at this very line, also where the interpreter never looks for signals: what is lost there need not be so with a handler.

    So it is at the end of a ``with`` block, before ``__exit__`` is called: a lock stays locked, and the process waits for it for ever.
    """

    def __neg__(self) -> None:
        raise Thrown


class Trip:
    """A signal is there; its handler raises where the interpreter next looks for one, as after each call.

    That is why striking is an operator here: a call in the trace function would be such a place itself.
    """

    __neg__ = staticmethod(partial(_thread.interrupt_main, signal.SIGUSR1))


KINDS: dict[str, Any] = {"kill": Kill(), "signal": Trip(), "throw": Throw()}


class Trigger:
    """A page shared by the process that is struck and the one that arms it and asks where it struck.

    Lines are counted while it is armed; ``at`` is the one to strike at, 0 for none.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._page).cast("Q")
        self._strike: Any = None
        self._opcodes = False

    def arm(self, at: int) -> None:
        self._words[AT], self._words[COUNT] = at, 0
        self._page[TEXT:] = bytes(mmap.PAGESIZE - TEXT)
        self._words[ARMED] = 1

    def disarm(self) -> None:
        self._words[ARMED] = 0

    @property
    def count(self) -> int:
        return self._words[COUNT]

    @property
    def where(self) -> str:
        """The line it struck at, "" if it did not."""
        return self._page[TEXT:].split(b"\0", 1)[0].decode()

    def install(self, strike: Any, opcodes: bool = False) -> None:
        """From here on this thread is traced, in frames that begin now."""
        self._strike, self._opcodes = strike, opcodes
        sys.settrace(self._call)

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if self._opcodes:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._line

    def _line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event in ("line", "opcode") and self._words[ARMED]:
            count = self._words[COUNT] = self._words[COUNT] + 1
            if count == self._words[AT]:
                text = spot(frame, frame.f_lineno).encode()
                self._page[TEXT : TEXT + len(text)] = text
                sys.settrace(None)  # the next trace function's beginning would be a place to find signals, too
                _ = -self._strike
        return self._line


def spot(frame: FrameType, line: int) -> str:
    code = frame.f_code
    return f"{code.co_filename.removeprefix(PACKAGE)}:{line} {getattr(code, 'co_qualname', code.co_name)}"


def raised_at(trace: TracebackType | None) -> str:
    """The innermost line of the package that an exception came through: where the interpreter found the signal."""
    found = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            found = spot(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return found
