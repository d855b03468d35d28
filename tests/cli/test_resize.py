"""``mppool resize``."""

from __future__ import annotations

import threading

import pytest

import mppool
from tests.cli.shared import mppool_
from tests.helpers.leftovers import names
from tests.helpers.processes import BrokerProcess, eventually
from tests.helpers.server import Judge, ask


def test_resize_grows_for_those_who_wait(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A larger cap serves a waiting worker at once, and says what it was before."""
    with mppool.Pool(server.address, max_size=1, name="web", broker=socket_path) as pool, pool.connection() as held:
        ask(held, "held")
        served: list[int] = []

        def wait() -> None:
            with pool.connection(timeout=10) as sock:
                served.append(ask(sock, "waited"))

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: pool.get_stats()["waiting"] == 1)
        done = mppool_("resize", "--socket", socket_path, "web", "2")
        assert (done.returncode, done.stdout) == (0, "web: max_size 1 -> 2\n")
        thread.join(10)
        assert served == [2]
        assert pool.get_stats()["max_size"] == 2
        assert server.counts()["peak"] == 2


def test_resize_shrinks_idle_sessions(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A smaller cap closes idle sessions above it, and leases as they come back, as drained."""
    with mppool.Pool(server.address, max_size=4, name="web", broker=socket_path) as pool:
        leases = [pool.getconn() for _ in range(4)]
        for n, sock in enumerate(leases):
            ask(sock, f"n{n}")
        pool.putconn(leases.pop())
        assert mppool_("resize", "--socket", socket_path, "web", "1").returncode == 0
        eventually(lambda: server.counts()["live"] == 3)  # only the idle one: leases are their holders'
        for sock in leases:
            ask(sock, "still")
            pool.putconn(sock)
        eventually(lambda: server.counts()["live"] <= 1)
        stats = eventually(lambda: [stats for stats in [pool.get_stats()] if stats["size"] <= 1])[0]
        assert (stats["size"], stats["max_size"], stats["closed"]) == (1, 1, {"drained": 3})


def test_resize_works_without_a_broker(server: Judge, socket_path: str) -> None:
    """The cap is in the table: a resize needs nobody else."""
    with mppool.Pool(server.address, max_size=1, name="web", broker=socket_path) as pool, pool.connection() as one:
        ask(one, "one")
        assert mppool_("resize", "--socket", socket_path, "web", "2").returncode == 0
        with pool.connection(timeout=5) as two:
            assert ask(two, "two") == 2


@pytest.mark.parametrize(
    ("value", "said"), [("0", "max_size=0: expected a whole number from 1 to 64"), ("65", "max_size=65: expected a whole number from 1 to 64")]
)
def test_resize_beyond_the_bounds(server: Judge, socket_path: str, value: str, said: str) -> None:
    """Below 1 or above the table's room is refused with option, value and bounds, and the cap stays."""
    with mppool.Pool(server.address, max_size=3, name="web", broker=socket_path) as pool:
        done = mppool_("resize", "--socket", socket_path, "web", value)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert pool.get_stats()["max_size"] == 3


@pytest.mark.parametrize("value", ["many", "2.5", "", "-1"])
def test_resize_to_no_number(socket_path: str, value: str) -> None:
    """What is no whole number is refused with its value, before any pool is looked for."""
    done = mppool_("resize", "--socket", socket_path, "web", value)
    assert done.returncode == 2
    assert value in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["mail", "", "../x"])
def test_resize_of_an_unknown_pool_exits_4(server: Judge, socket_path: str, name: str) -> None:
    """A name nobody uses exits with 4 and says name and socket; nothing is made."""
    with mppool.Pool(server.address, name="web", broker=socket_path):
        before = names(socket_path)
        done = mppool_("resize", "--socket", socket_path, name, "2")
        assert (done.returncode, done.stderr) == (4, f"mppool: NAME={name!r}: no such pool at {socket_path}\n")
        assert names(socket_path) == before
