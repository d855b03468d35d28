"""Every error mppool raises.

    Error
    ├── PoolTimeout          (also TimeoutError)     nothing was free within ``timeout``
    ├── PoolClosed                                   used after ``close()``
    ├── TooManyWaiting                               ``max_waiting`` callers are queued already
    ├── DialFailed           (also ConnectionError)  the server behind could not be reached
    ├── BrokerUnavailable                            a broker is needed, and none of ours answers
    ├── ConfigMismatch       (also ValueError)       one pool name, two meanings
    ├── OptionError          (also ValueError)       an option's value makes no sense; names both
    └── ProtocolError                                the other side, or shared memory, is not what it should be

None of them leaves anything behind: a call that raises has lent nothing, holds no permit and waits in no queue.
"""

from __future__ import annotations

__all__ = [
    "BrokerUnavailable",
    "ConfigMismatch",
    "DialFailed",
    "Error",
    "OptionError",
    "PoolClosed",
    "PoolTimeout",
    "ProtocolError",
    "TooManyWaiting",
]


class Error(Exception):
    """The base of all errors of mppool."""


class PoolTimeout(Error, TimeoutError):
    """No session became free within ``timeout``.

    The message carries the numbers an operator needs; the last failure to reach the server, if there was one, is the ``__cause__``.
    """


class PoolClosed(Error):
    """The pool was used after ``close()``."""


class TooManyWaiting(Error):
    """``max_waiting`` callers are in the queue already; this one was refused at once."""


class DialFailed(Error, ConnectionError):
    """A new session could not be opened. ``permanent`` says that waiting will not help (say, an unknown host name)."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class BrokerUnavailable(Error):
    """A broker is required and cannot be had: it would not start, speaks another version, or belongs to another user."""


class ConfigMismatch(Error, ValueError):
    """Two workers declare the same pool name differently. The message says both."""


class OptionError(Error, ValueError):
    """An option has a value that makes no sense. The message names the option and the value."""


class ProtocolError(Error):
    """A frame or a piece of shared memory is not what it should be. Nothing was lent."""
