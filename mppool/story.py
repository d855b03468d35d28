"""How a story asks for I/O.

Checkout, return and all that belongs to them are told once, as generators (checkout.py, conversation.py). They decide;
where they need the outside world they yield one of these requests. ``Pool`` performs them by blocking, ``AsyncPool`` by
awaiting; both send the answer in, or throw what was raised. A story that is interrupted puts right what it took.
"""

from __future__ import annotations

import _socket
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mppool.line import Line

__all__ = ["Attach", "Call", "Close", "Dial", "Ended", "Pause", "Receive", "Request", "Story", "Tidy", "Transfer"]


@dataclass(slots=True)
class Dial:
    """Open a new session with the driver; answer: the session."""


@dataclass(slots=True)
class Attach:
    """Make a session of a duplicate of a descriptor and its baggage; answer: the session."""

    fd: int
    baggage: bytes = field(repr=False)


@dataclass(slots=True)
class Call:
    """Call one of the user's hooks with a session; answer: what it returned."""

    function: Callable[[Any], object]
    session: Any


@dataclass(slots=True)
class Tidy:
    """Let the driver bring a returned session into a state in which it may be lent again; answer: nothing. Raises if it cannot."""

    session: Any


@dataclass(slots=True)
class Transfer:
    """Tell the driver that another process used this session since this one did; answer: nothing. Raises if it is no good any more."""

    session: Any


@dataclass(slots=True)
class Close:
    """Let the driver end a session; answer: nothing."""

    session: Any


@dataclass(slots=True)
class Receive:
    """Wait for the next message on a line until a moment of the monotonic clock; answer: (message, fd), or None. Raises LineLost."""

    line: Line
    until: float


@dataclass(slots=True)
class Ended:
    """Wait up to so many seconds until the server ended a connection whose sending side is shut down; answer: did it?"""

    sock: _socket.socket
    seconds: float


@dataclass(slots=True)
class Pause:
    """Do nothing for so many seconds."""

    seconds: float


Request = Dial | Attach | Call | Tidy | Transfer | Close | Receive | Ended | Pause
T = TypeVar("T")
Story = Generator[Request, Any, T]
