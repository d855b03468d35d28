"""Storms: workers and brokers are killed for many seconds, and the server's own count is the judge.

Short by default; ``--storm-seconds 25`` runs them as long as the figures in the README were made with.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

import mppool
from tests.helpers.processes import BrokerProcess, Child, broker_process, eventually
from tests.helpers.server import Judge, ask

pytestmark = pytest.mark.storm


def worker(pool: mppool.Pool, name: str) -> Callable[[Child], None]:
    """Asks without end; tells of each failure. Ends when the test closes its pipe."""

    def work(child: Child) -> None:
        n = 0
        while True:
            n += 1
            try:
                with pool.connection(timeout=20) as sock:
                    ask(sock, f"{name}-{n}", random.choice((0, 0, 1)))
            except ConnectionError:
                raise  # nothing closes a healthy lease: that would be a finding
            if n % 200 == 0:
                child.tell(n)

    return work


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


class Storm:
    """Some workers, always so many, whoever is killed."""

    def __init__(self, pool: mppool.Pool, count: int) -> None:
        self.pool = pool
        self.count = count
        self.born = 0
        self.children: list[Child] = []
        self.failures: list[str] = []

    def fill(self) -> None:
        while len(self.children) < self.count:
            self.born += 1
            self.children.append(Child(worker(self.pool, f"w{self.born}")))

    def kill_one(self) -> None:
        child = self.children.pop(random.randrange(len(self.children)))
        self.listen(child)
        child.kill()
        child.wait()

    def listen(self, child: Child) -> None:
        """Take in what a worker told so far."""
        try:
            while True:
                child.hear(timeout=0)
        except TimeoutError:
            return
        except (AssertionError, EOFError) as error:
            self.failures.append(str(error))

    def end(self) -> None:
        for child in self.children:
            self.listen(child)
            child.end()
        self.children.clear()


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--storm-seconds"))


@pytest.mark.parametrize("with_broker", [True, False], ids=["broker", "no-broker"])
def test_killed_workers_lose_nothing(server: Judge, socket_path: str, seconds: float, with_broker: bool) -> None:
    """Workers SIGKILLed all the time: never more connections than the cap (one more while a FIN travels), no crossed reply, the cap whole after."""
    cap = 4
    pool = mppool.Pool(server.address, max_size=cap, name="storm", broker=socket_path)
    broker = BrokerProcess(socket_path) if with_broker else None
    storm = Storm(pool, 8)
    kills = 0
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            storm.fill()
            time.sleep(random.uniform(0.0, 0.06))
            storm.kill_one()
            kills += 1
        storm.end()
        took = whole_cap(pool, cap)
        counts = server.counts()
        stats = pool.get_stats()
        print(f"\nkills {kills}, peak {counts['peak']}, dials {counts['dials']}, requests {counts['requests']}, whole after {took * 1000:.1f} ms")
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
    storm = Storm(pool, 8)
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
            eventually(lambda: all(child.hear(20) for child in storm.children))
            storm.end()
            took = whole_cap(pool, cap)
            counts = server.counts()
            print(f"\nbroker kills {kills}, peak {counts['peak']}, dials {counts['dials']}, requests {counts['requests']}, whole after {took * 1000:.1f} ms")
            assert storm.failures == []
            assert counts["peak"] <= cap
        finally:
            storm.end()
            pool.close()
