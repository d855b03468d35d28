"""One pool of connections for all worker processes of a host."""

import sys

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

__all__ = [
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
