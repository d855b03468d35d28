"""One pool of connections for all worker processes of a host."""

import sys
from typing import TYPE_CHECKING, Any

if sys.platform != "linux":
    raise ImportError(f"mppool runs on Linux only (this is {sys.platform}): it needs SCM_RIGHTS, SOCK_SEQPACKET and F_OFD_SETLK")

from mppool.errors import (
    BrokerUnavailable,
    ConfigMismatch,
    DialFailed,
    Error,
    OptionError,
    PoolClosed,
    PoolTimeout,
    ProtocolError,
    TooManyWaiting,
)
from mppool.pool import Lease, Pool

if TYPE_CHECKING:
    from mppool.aio import AsyncLease, AsyncPool

__all__ = [
    "AsyncLease",
    "AsyncPool",
    "BrokerUnavailable",
    "ConfigMismatch",
    "DialFailed",
    "Error",
    "Lease",
    "OptionError",
    "Pool",
    "PoolClosed",
    "PoolTimeout",
    "ProtocolError",
    "TooManyWaiting",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """asyncio is imported where it is used only: most workers have no use for it."""
    if name in ("AsyncLease", "AsyncPool"):
        from mppool import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
