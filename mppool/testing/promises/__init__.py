"""The promises: what the pool relies on, how each is tried, and what to look at if it is not kept.

Each check runs in a process of its own, raises PromiseBroken with what it saw, and may return a note for the report.
"""

from mppool.testing.promises import making, moving, saying, using
from mppool.testing.promises.promise import Promise

__all__ = ["PROMISES"]

PROMISES = [found for module in (saying, making, using, moving) for found in vars(module).values() if isinstance(found, Promise)]
