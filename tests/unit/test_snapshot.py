"""snapshot.py: waits are counted in buckets, and percentiles are upper bounds of what was counted."""

from __future__ import annotations

import random

import pytest

from mppool.snapshot import bucket_top, percentiles, wait_bucket
from mppool.table import WAIT_BUCKETS

TOPS = [bucket_top(bucket) for bucket in range(WAIT_BUCKETS)]


def test_buckets_begin_and_grow_as_said() -> None:
    """Up to 8 us, then two an octave: 12, 16, 24, 32, ..."""
    assert TOPS[:9] == [8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert sorted(set(TOPS)) == TOPS


@pytest.mark.parametrize("us", [0, 1, 7, 8, 11, 12, 15, 16, 23, 24, 31, 32, 999, 1000, 1_000_000, 30_000_000, 60_000_000])
def test_a_wait_is_counted_in_the_bucket_it_fits(us: int) -> None:
    """A wait is shorter than its bucket's top, and not shorter than the top of the bucket before."""
    bucket = wait_bucket((us + 0.5) / 1e6)
    assert us < TOPS[bucket]
    assert bucket == 0 or us >= TOPS[bucket - 1]


def test_every_wait_fits() -> None:
    """For waits of all magnitudes the bucket's top is at most half above the wait, which is never above it."""
    dice = random.Random(7)
    for _ in range(5000):
        us = int(10 ** dice.uniform(1, 7.8))
        top = TOPS[wait_bucket((us + 0.5) / 1e6)]
        assert us < top <= 1.5 * us + 1


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 100.0, 1e6, 1e12])
def test_absurd_waits_have_a_bucket_too(seconds: float) -> None:
    """Nothing falls outside the table: what is too long is counted in the last bucket, what is below nothing in the first."""
    assert wait_bucket(seconds) == (0 if seconds < 1e-6 else WAIT_BUCKETS - 1)


def test_the_last_bucket_says_a_minute() -> None:
    """The longest wait that is told apart is about a minute."""
    assert 60e6 < TOPS[-1] < 140e6


def test_no_waits_no_percentiles() -> None:
    """A pool where nobody waited says 0."""
    assert percentiles([0] * WAIT_BUCKETS) == {"p50": 0, "p95": 0, "p99": 0}


def test_one_wait_is_every_percentile() -> None:
    """A single wait is the median and the 99th percentile."""
    buckets = [0] * WAIT_BUCKETS
    buckets[5] = 1
    assert percentiles(buckets) == {"p50": TOPS[5], "p95": TOPS[5], "p99": TOPS[5]}


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [(50, 50, (8, 1024, 1024)), (51, 49, (8, 1024, 1024)), (49, 51, (1024, 1024, 1024)), (95, 5, (8, 8, 1024)), (99, 1, (8, 8, 8)), (98, 2, (8, 8, 1024))],
)
def test_percentiles_are_taken_at_their_share(short: int, long: int, expected: tuple[int, int, int]) -> None:
    """With so many short and so many long waits each percentile says which of the two it falls on."""
    buckets = [0] * WAIT_BUCKETS
    buckets[0], buckets[TOPS.index(1024)] = short, long
    assert tuple(percentiles(buckets).values()) == expected


def test_percentiles_bound_the_true_ones() -> None:
    """For random waits each percentile is not below the true one, and at most half above it."""
    dice = random.Random(11)
    for _ in range(50):
        waits = sorted(10 ** dice.uniform(1.2, 7.5) for _ in range(dice.randrange(1, 400)))
        buckets = [0] * WAIT_BUCKETS
        for us in waits:
            buckets[wait_bucket(us / 1e6)] += 1
        found = percentiles(buckets)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            true = waits[max(0, -int(-share * len(waits) // 1) - 1)]
            assert true <= found[name] <= 1.5 * true + 1, (name, true, found[name])
