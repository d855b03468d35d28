"""Every row of the fork and server matrix as a test, with little load; ``python -m tests.matrix --seconds 10`` has more."""

from __future__ import annotations

import pytest

from tests.matrix.scene import rows, run


@pytest.mark.parametrize("name", rows())
def test_row(name: str) -> None:
    """Nothing crossed, failed or foreign, the peak within the cap, the whole cap to be had at the end, nothing left over."""
    result = run(rows()[name], seconds=0.1)
    if result.skipped:
        pytest.skip(result.skipped)
    print(f"\n{name}: {result.requests} requests, peak {result.peak} of {result.cap}, {result.dials} dials, {result.seconds} s; {'; '.join(result.notes)}")
    assert not result.faults, "\n".join(result.faults)
