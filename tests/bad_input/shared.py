"""What these tests look at."""

from __future__ import annotations

AT_ONCE = 1.0  # seconds; the timeouts below are far longer
NOBODY = 65534


def say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
