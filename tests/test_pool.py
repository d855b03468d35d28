"""The pool as one process sees it, with and without a broker."""

from __future__ import annotations

import gc
import logging
import pickle
import socket
import threading
import time
from typing import Any

import pytest

import mppool
from mppool.drivers.raw import RawDriver
from mppool.options import parse_target
from tests.helpers.processes import BrokerProcess, eventually
from tests.helpers.server import Judge, ask


@pytest.fixture(params=[False, True], ids=["alone", "broker"])
def path(request: pytest.FixtureRequest, socket_path: str) -> str:
    """A socket path, with a broker behind it or not: everything here holds in both cases."""
    if request.param:
        request.getfixturevalue("broker")
    return socket_path


def test_sessions_are_reused(server: Judge, path: str) -> None:
    """One connection serves one caller after the other."""
    with mppool.Pool(server.address, max_size=2, broker=path) as pool:
        numbers = set()
        for n in range(50):
            with pool.connection() as sock:
                numbers.add(ask(sock, f"n{n}"))
        assert numbers == {1}
        stats = pool.get_stats()
        assert (stats["checkouts"], stats["dials"], stats["idle"], stats["in_use"], stats["size"]) == (50, 1, 1, 0, 1)


def test_the_cap_holds_among_threads(server: Judge, path: str) -> None:
    """Many threads of one process get at most max_size connections, and each its own reply."""
    with mppool.Pool(server.address, max_size=3, broker=path) as pool:
        failures: list[BaseException] = []

        def work(name: int) -> None:
            try:
                for n in range(40):
                    with pool.connection(timeout=20) as sock:
                        ask(sock, f"t{name}-{n}")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert server.counts()["peak"] <= 3
        assert pool.get_stats()["checkouts"] == 480


def test_more_threads_than_lanes_wait(server: Judge, path: str) -> None:
    """More waiting threads than a row has lanes: they wait a little longer, none fails."""
    with mppool.Pool(server.address, max_size=2, broker=path) as pool:
        failures: list[BaseException] = []

        def work(name: int) -> None:
            try:
                with pool.connection(timeout=30) as sock:
                    ask(sock, f"t{name}", 1)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert server.counts()["peak"] <= 2


def test_timeout_says_the_numbers(server: Judge, path: str) -> None:
    """A checkout that timed out says what an operator needs, and leaves nothing behind."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with (
            pool.connection(),
            pytest.raises(mppool.PoolTimeout, match=r"within 0.05 s \(max_size=1, in_use=1, idle=0, dialing=0, waiting=1, longest held") as caught,
        ):
            pool.getconn(timeout=0.05)
        assert isinstance(caught.value, TimeoutError)
        with pool.connection(timeout=1) as sock:
            ask(sock, "after")
        assert pool.get_stats()["timeouts"] == 1
        assert pool.get_stats()["waiting"] == 0


def test_an_exception_discards(server: Judge, path: str) -> None:
    """A session whose block raised is closed, not lent on."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with pytest.raises(ZeroDivisionError), pool.connection():
            raise ZeroDivisionError
        with pool.connection() as sock:
            assert ask(sock, "b") == 2
        assert pool.get_stats()["closed"] == {"discarded": 1}


def test_putconn_can_discard(server: Judge, path: str) -> None:
    """``putconn(conn, discard=True)`` closes the session."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        pool.putconn(pool.getconn(), discard=True)
        assert server.counts()["live"] == 0
        assert pool.get_stats()["size"] == 0


@pytest.mark.parametrize(("order", "reason"), [("!close", "peer_closed"), ("!extra", "unread_data")])
def test_unfit_sessions_are_not_lent(server: Judge, path: str, order: str, reason: str) -> None:
    """An idle session that the server ended, or that has bytes nobody asked for, is closed with its reason."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with pool.connection() as sock:
            ask(sock, "a")
            sock.sendall(order.encode() + b"\n")
        eventually(lambda: _readable(pool) or pool.get_stats()["closed"])
        with pool.connection() as sock:
            assert ask(sock, "b") == 2
        assert pool.get_stats()["closed"] == {reason: 1}


def _readable(pool: mppool.Pool) -> bool:
    worker = pool._worker
    assert worker is not None
    return any(entry.poll(0) for entry, _ in worker.idle)


def test_a_session_closed_by_its_user_is_discarded(server: Judge, path: str) -> None:
    """Closing a lent socket, or leaving a makefile() open on it, is no harm: it goes, and its permit comes back."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with pool.connection() as sock:
            sock.close()
        with pool.connection() as sock:
            kept = sock.makefile("rb")
        with pool.connection(timeout=2) as sock:
            ask(sock, "b")
        kept.close()
        assert server.counts()["peak"] == 1


def test_a_changed_timeout_is_put_back(server: Judge, path: str) -> None:
    """The next user finds the socket as a fresh one, whatever timeout the last one set."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with pool.connection() as sock:
            fresh = sock.gettimeout()
            sock.settimeout(None)
        with pool.connection() as sock:
            assert sock.gettimeout() == fresh


def test_hooks_are_called_in_life_order(server: Judge, path: str) -> None:
    """configure once with each new session, check before lending, reset at return; a failing check or reset closes."""
    calls: list[str] = []
    bad: set[str] = set()

    def hook(name: str) -> Any:
        def call(sock: socket.socket) -> None:
            calls.append(name)
            if name in bad:
                raise ValueError(name)

        return call

    with mppool.Pool(server.address, max_size=1, broker=path, configure=hook("configure"), check=hook("check"), reset=hook("reset")) as pool:
        with pool.connection() as sock:
            ask(sock, "a")
        with pool.connection() as sock:
            ask(sock, "b")
        assert calls == ["configure", "reset", "check", "reset"]
        bad.add("check")
        calls.clear()
        with pool.connection() as sock:
            assert ask(sock, "c") == 2
        assert calls == ["check", "configure", "reset"]
        bad = {"reset"}
        with pool.connection() as sock:
            pass
        stats = pool.get_stats()
        assert stats["closed"] == {"check_failed": 1} or stats["closed"] == {"check_failed": 1, "reset_failed": 1}


def test_a_failing_configure_is_said(server: Judge, path: str) -> None:
    """A session that cannot be configured is closed and the caller told why."""

    def configure(sock: socket.socket) -> None:
        raise ValueError("no such setting")

    with mppool.Pool(server.address, max_size=1, broker=path, configure=configure) as pool:
        with pytest.raises(mppool.DialFailed, match=r"configure=.*no such setting"):
            pool.getconn(timeout=1)
        assert server.counts()["live"] == 0
        assert pool.get_stats()["size"] == 0


def test_lifetime_and_idle_time_are_kept(server: Judge, path: str) -> None:
    """A session past its lifetime is closed at its next checkout at the latest."""
    with mppool.Pool(server.address, max_size=1, broker=path, max_lifetime=0.05) as pool:
        with pool.connection() as sock:
            assert ask(sock, "a") == 1
        time.sleep(0.06)
        with pool.connection() as sock:
            assert ask(sock, "b") == 2
        assert pool.get_stats()["closed"] == {"too_old": 1}


def test_min_size_is_dialed_at_open(server: Judge, path: str) -> None:
    """``open()`` brings the pool to min_size."""
    with mppool.Pool(server.address, max_size=4, min_size=3, broker=path) as pool:
        assert pool.get_stats()["size"] == 3
        eventually(lambda: server.counts()["live"] == 3)


def test_who_opens_the_pool_dials_what_is_missing_of_min_size(server: Judge, path: str) -> None:
    """Sessions that end are not replaced behind anybody's back; the next process that comes does it, and ``open(wait=True)`` at any time."""
    with mppool.Pool(server.address, name="p", min_size=3, broker=path) as pool:
        for _ in range(2):
            pool.putconn(pool.getconn(), discard=True)
        assert pool.get_stats()["size"] == 1
        with mppool.Pool(server.address, name="p", min_size=3, broker=path):
            assert pool.get_stats()["size"] == 3
        for _ in range(2):
            pool.putconn(pool.getconn(), discard=True)
        pool.open(wait=True)
        assert pool.get_stats()["size"] == 3


def test_resize_works_live(server: Judge, path: str) -> None:
    """A grown cap serves who waits; a shrink is paid as sessions come back."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        first = pool.getconn()
        waiting = threading.Thread(target=lambda: pool.putconn(pool.getconn(timeout=10)))
        waiting.start()
        eventually(lambda: pool.get_stats()["waiting"] == 1)
        pool.resize(3)
        waiting.join()
        second, third = pool.getconn(), pool.getconn()
        assert pool.get_stats()["size"] == 3
        pool.resize(1)
        for session in (first, second, third):
            pool.putconn(session)
        eventually(lambda: pool.get_stats()["size"] == 1)
        assert pool.get_stats()["max_size"] == 1
        eventually(lambda: server.counts()["live"] == 1)


def test_server_down_then_up(server: Judge, path: str, unused_port: int) -> None:
    """While the server is down a checkout times out with the last failure as its cause; the pool comes back by itself."""
    from tests.helpers.server import judge

    with mppool.Pool(("127.0.0.1", unused_port), max_size=2, broker=path) as pool:
        with pytest.raises(mppool.PoolTimeout) as caught:
            pool.getconn(timeout=0.3)
        assert isinstance(caught.value.__cause__, mppool.DialFailed)
        failures = pool.get_stats()["dial_failures"]
        assert 2 <= failures <= 8, "the breaker lets one at a time try, at growing distances"
        with judge(unused_port), pool.connection(timeout=10) as sock:
            ask(sock, "up")


def test_down_for_good_fails_at_once(path: str, unused_port: int) -> None:
    """When the server has been down for reconnect_timeout, checkouts fail at once with DialFailed."""
    pool = mppool.Pool(("127.0.0.1", unused_port), max_size=2, broker=path, reconnect_timeout=0.1)
    with pool, pytest.raises(mppool.DialFailed, match="reconnect_timeout"):
        pool.getconn(timeout=10)


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_debug_lends_duplicates(server: Judge, path: str) -> None:
    """With debug=True use after return fails at once."""
    with mppool.Pool(server.address, max_size=1, broker=path, debug=True) as pool:
        with pool.connection() as sock:
            ask(sock, "a")
        with pytest.raises(OSError, match="Bad file descriptor"):
            sock.sendall(b"late\n")
        with pool.connection() as sock:
            assert ask(sock, "b") == 1


class Thing:
    """Something with close(), and nothing else."""

    living = 0

    def __init__(self) -> None:
        Thing.living += 1

    def close(self) -> None:
        Thing.living -= 1


def test_anything_that_closes_can_be_pooled(path: str) -> None:
    """``dial=`` pools objects with close() as resident sessions."""
    Thing.living = 0
    with mppool.Pool(dial=Thing, name="things", max_size=2, broker=path) as pool:
        with pool.connection() as one, pool.connection() as two:
            assert one is not two
            with pytest.raises(mppool.PoolTimeout):
                pool.getconn(timeout=0.05)
        with pool.connection() as again:
            assert again in (one, two)
        assert Thing.living == 2
        with pytest.raises(ZeroDivisionError), pool.connection():
            raise ZeroDivisionError
        assert Thing.living == 1
    assert Thing.living == 0


def test_a_driver_can_be_given(server: Judge, path: str) -> None:
    """``driver=`` takes anything that fills the seam."""
    with mppool.Pool(driver=RawDriver(parse_target(server.address)), name="mine", max_size=1, broker=path) as pool, pool.connection() as sock:
        ask(sock, "a")


def test_pools_are_pickled_by_what_they_declare(server: Judge, path: str) -> None:
    """A pool that travels opens the same pool by its name."""
    with mppool.Pool(server.address, max_size=1, name="travels", broker=path) as pool:
        with pool.connection() as sock:
            ask(sock, "a")
        copy = pickle.loads(pickle.dumps(pool))
        assert (copy.name, copy.options) == (pool.name, pool.options)
        with copy:
            assert copy.get_stats()["dials"] == 1


def test_repr_says_what_goes_on(server: Judge, path: str) -> None:
    """``repr`` is an interface."""
    pool = mppool.Pool(server.address, max_size=3, name="r", broker=path)
    assert repr(pool) == "<Pool 'r' not open>"
    with pool, pool.connection():
        assert repr(pool) == "<Pool 'r' 1 in use, 0 idle, 0 waiting | host 1 in use, 0 idle, 1/3>"
    assert repr(pool) == "<Pool 'r' closed>"


def test_close_lets_leases_come_back(server: Judge, path: str) -> None:
    """After close() nothing is lent, and what was lent is closed at its return."""
    pool = mppool.Pool(server.address, max_size=1, broker=path)
    sock = pool.getconn()
    pool.close()
    with pytest.raises(mppool.PoolClosed):
        pool.getconn()
    pool.putconn(sock)
    pool.close()


def test_another_max_size_is_reported(server: Judge, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that declares another max_size is told; the running one stays."""
    with mppool.Pool(server.address, max_size=2, name="n", broker=path) as pool, caplog.at_level(logging.WARNING, "mppool"):
        with mppool.Pool(server.address, max_size=5, name="n", broker=path) as other:
            assert other.get_stats()["max_size"] == 2
        assert "max_size=5 declared here, 2 is running and stays" in caplog.text
        assert pool.get_stats()["max_size"] == 2


def test_max_waiting_refuses(server: Judge, broker: BrokerProcess) -> None:
    """With max_waiting callers in the queue another one is refused at once."""
    with mppool.Pool(server.address, max_size=1, max_waiting=1, broker=broker.path) as pool:
        with pool.connection():
            waiting = threading.Thread(target=lambda: pool.putconn(pool.getconn(timeout=10)))
            waiting.start()
            eventually(lambda: pool.get_stats()["waiting"] == 1)
            time.sleep(0.05)
            with pytest.raises(mppool.TooManyWaiting, match="max_waiting=1"):
                pool.getconn(timeout=5)
        waiting.join()
        assert pool.get_stats()["rejected"] == 1


def test_a_forgotten_pool_lets_go(server: Judge, path: str) -> None:
    """A pool that is dropped without ``close()`` gives its row up when this process next comes to a pool, or ends."""
    pool = mppool.Pool(server.address, max_size=1, name="forgotten", broker=path)
    with pool.connection() as sock:
        ask(sock, "x")
    del pool
    gc.collect()
    with mppool.Pool(server.address, max_size=1, name="next", broker=path), mppool.Pool(server.address, name="forgotten", max_size=1, broker=path) as other:
        eventually(lambda: len(other.get_stats()["workers"]) == 1, what="the forgotten pool's row is free")
