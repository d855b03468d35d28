"""Storms: workers and brokers are killed for many seconds, and the server's own count is the judge.

Short by default; ``--storm-seconds 25`` runs them as long as the figures in the README were made with.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

import mppool
from tests.helpers.processes import BrokerProcess, broker_process, eventually
from tests.helpers.server import Judge, ask
from tests.helpers.storm import Ask, Storm

pytestmark = pytest.mark.storm


def asks(pool: mppool.Pool) -> Callable[[], Ask]:
    """Nothing closes a healthy lease: a ConnectionError would be a finding."""

    def begin() -> Ask:
        def one(nonce: str) -> None:
            with pool.connection(timeout=20) as sock:
                ask(sock, nonce, random.choice((0, 0, 1)))

        return one

    return begin


def whole_cap(pool: mppool.Pool, size: int, within: float = 10.0) -> float:
    """Lease the whole cap at once; how long that took."""
    began = time.monotonic()
    sessions = []
    try:
        for n in range(size):
            sessions.append(pool.getconn(timeout=within))
            ask(sessions[-1], f"whole-{n}")
    finally:
        for session in sessions:
            pool.putconn(session)
    return time.monotonic() - began


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--storm-seconds"))


@pytest.mark.parametrize("with_broker", [True, False], ids=["broker", "no-broker"])
def test_killed_workers_lose_nothing(server: Judge, socket_path: str, seconds: float, with_broker: bool) -> None:
    """Workers SIGKILLed all the time: never more connections than the cap (one more while a FIN travels), no crossed reply, the cap whole after."""
    cap = 4
    pool = mppool.Pool(server.address, max_size=cap, name="storm", broker=socket_path)
    broker = BrokerProcess(socket_path) if with_broker else None
    storm = Storm(asks(pool), 8)
    try:
        storm.run(seconds, kill_every=0.03)
        storm.end()
        took = whole_cap(pool, cap)
        counts = server.counts()
        stats = pool.get_stats()
        print(f"\nkills {storm.kills}, peak {counts['peak']}, dials {counts['dials']}, requests {counts['requests']}, whole after {took * 1000:.1f} ms")
        print(f"{stats['repairs']} repairs, closed {stats['closed']}")
        assert storm.failures == []
        assert counts["peak"] <= cap + 1
        assert counts["live"] <= cap
        assert stats["size"] == counts["live"]
    finally:
        storm.end()
        pool.close()
        if broker is not None:
            broker.stop()


def test_killed_brokers_fail_no_request(server: Judge, socket_path: str, seconds: float) -> None:
    """The broker SIGKILLed again and again under load: no request fails, the cap holds."""
    cap = 3
    pool = mppool.Pool(server.address, max_size=cap, name="brokers", broker=socket_path)
    storm = Storm(asks(pool), 8)
    kills = 0
    with broker_process(socket_path) as broker:
        try:
            storm.fill()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(random.uniform(0.2, 0.6))
                broker.kill()
                kills += 1
                time.sleep(random.uniform(0.0, 0.3))
                broker.restart()
            eventually(lambda: all(child.hear(20) for _, child in storm.children))
            storm.end()
            took = whole_cap(pool, cap)
            counts = server.counts()
            print(f"\nbroker kills {kills}, peak {counts['peak']}, dials {counts['dials']}, requests {counts['requests']}, whole after {took * 1000:.1f} ms")
            assert storm.failures == []
            assert counts["peak"] <= cap
        finally:
            storm.end()
            pool.close()
