"""How to open, move and close the sessions of a protocol: base.py is the seam, the others fill it.

For a driver of your own: derive from ``DriverBase`` (or ``AsyncDriverBase``), open connections with a ``Dialer``, make sockets
of duplicates with ``adopt``, let go of them with ``abandon``, and try the result with ``mppool.testing.check_driver``.
"""

from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.drivers.dialer import FOREVER, Dialer, abandon, adopt
from mppool.options import Target, parse_target
from mppool.states import Residence

__all__ = ["FOREVER", "AsyncDriverBase", "Dialer", "DriverBase", "Residence", "Target", "abandon", "adopt", "parse_target"]
