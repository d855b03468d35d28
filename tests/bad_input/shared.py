"""What these tests look at."""

from __future__ import annotations

from mppool.kernel import memory
from mppool.kernel.runtime import scope_of

AT_ONCE = 1.0  # seconds; the timeouts below are far longer
NOBODY = 65534


def names(path: str) -> list[str]:
    prefix = f"mppool-{scope_of(path)}-"
    return memory.names(prefix) + memory.names(f"sem.{prefix}")


def say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
