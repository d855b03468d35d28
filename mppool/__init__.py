"""One pool of connections for all worker processes of a host."""

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
