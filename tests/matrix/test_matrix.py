"""Every row of the fork and server matrix as a test, with little load; ``python -m tests.matrix --seconds 10`` has more."""

from __future__ import annotations

import pytest

from tests.matrix.scene import rows, run

DUPLICATES = "a child keeps the user's duplicates of a lent session open"
NATIVE = "the lock around a pool's first use is a native one where monkey-patching came later: the thread waits for itself"
KNOWN = {
    "multiprocessing child outlives its worker, debug and makefile, alone": DUPLICATES,
    "gevent, patched late, first use held up": NATIVE,
}
SOMETIMES = {"gunicorn gevent, preload": NATIVE}


def cases() -> list[object]:
    return [pytest.param(name, marks=marks(name), id=name) for name in rows()]


def marks(name: str) -> list[pytest.MarkDecorator]:
    reason = KNOWN.get(name) or SOMETIMES.get(name)
    return [pytest.mark.xfail(strict=name in KNOWN, reason=reason)] if reason else []


@pytest.mark.parametrize("name", cases())
def test_row(name: str) -> None:
    """Nothing crossed, failed or foreign, the peak within the cap, the whole cap to be had at the end, nothing left over."""
    result = run(rows()[name], seconds=0.1)
    if result.skipped:
        pytest.skip(result.skipped)
    print(f"\n{name}: {result.requests} requests, peak {result.peak} of {result.cap}, {result.dials} dials, {result.seconds} s; {'; '.join(result.notes)}")
    assert not result.faults, "\n".join(result.faults)
