"""Exceptions thrown by signal handlers: they propagate, and nothing is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

import mppool
from tests.helpers.processes import BrokerProcess, Child, fork
from tests.helpers.server import Judge, ask


class Interrupt(BaseException):
    """What a handler raises, like gunicorn's SystemExit or KeyboardInterrupt."""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupt


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# A socket that an exception overtook between its making and its keeping is closed by the interpreter, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(params=[False, True], ids=["alone", "broker"])
def path(request: pytest.FixtureRequest, socket_path: str) -> str:
    if request.param:
        request.getfixturevalue("broker")
    return socket_path


def test_an_exception_ends_a_wait(server: Judge, path: str) -> None:
    """A handler's exception comes out of a waiting checkout at once; the next waiter gets the session."""
    with mppool.Pool(server.address, max_size=1, broker=path) as pool:
        with pool.connection() as sock:
            began = time.monotonic()
            with pytest.raises(Interrupt), interrupted_after(0.05):
                pool.getconn(timeout=30)
            assert time.monotonic() - began < 5
            assert pool.get_stats()["waiting"] == 0
            ask(sock, "mine")
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "again") == 1


def test_an_exception_while_a_grant_is_on_its_way(server: Judge, path: str) -> None:
    """Interrupted at the moment its turn comes, a waiter loses nothing: the session is there for the next."""

    def waits(child: Child) -> None:
        with mppool.Pool(server.address, max_size=1, broker=path) as pool:
            for _ in range(30):
                sock = pool.getconn(timeout=5)
                delay = random.uniform(0.001, 0.004)
                returning = threading.Timer(delay, pool.putconn, (sock,))
                returning.start()
                with contextlib.suppress(Interrupt), interrupted_after(delay + random.uniform(-0.0005, 0.001)), pool.connection(timeout=5):
                    pass
                returning.join()
            with pool.connection(timeout=5) as sock:
                ask(sock, "after")

    with fork(waits) as (child,):  # without threads of the test's own process: what is lost is found where no other runs
        child.result()
    assert server.counts()["peak"] == 1


def test_exceptions_at_random_moments_never_break_the_cap(server: Judge, path: str) -> None:
    """A handler that raises all the time, anywhere in checkout, dial, close and return: never more connections than the cap, no
    crossed reply, and whatever the tortured process holds at its end comes back when it is gone.
    """
    size = 3
    pool = mppool.Pool(server.address, max_size=size, broker=path)

    def tortured(child: Child) -> int:
        signal.signal(signal.SIGALRM, interrupt)
        interrupts = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0015))
                for n in range(20):
                    with pool.connection(timeout=0.2) as sock:
                        ask(sock, f"n{n}")
                        if n % 7 == 3:
                            sock.close()  # so that it is discarded and another dialed
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (Interrupt, mppool.PoolTimeout):
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return interrupts

    with fork(tortured) as (child,):
        assert child.result() > 100
    sessions = [pool.getconn(timeout=5) for _ in range(size)]
    for n, session in enumerate(sessions):
        ask(session, f"whole{n}")
        pool.putconn(session)
    assert server.counts()["peak"] <= size
    pool.close()


def test_a_block_that_is_gone_gives_its_session_back(server: Judge, path: str) -> None:
    """A handler's exception may end a block before the first line of its end: the next checkout finds that out, and only that."""
    with mppool.Pool(server.address, max_size=1, broker=path, timeout=0.1) as pool:
        block = pool.connection()
        block.__enter__()
        with pytest.raises(mppool.PoolTimeout):
            pool.getconn()  # a block that is there has its session
        del block
        conn = pool.getconn(timeout=20)
        with pytest.raises(mppool.PoolTimeout):
            pool.getconn()  # and so does whom no block is known of
        pool.putconn(conn)


def test_a_handler_may_use_the_pool(server: Judge, path: str) -> None:
    """A handler that itself borrows, in the middle of a checkout or a return, disturbs nothing.

    (Not of a dial: what the interrupted dial holds, it cannot give up before the handler is done.)
    """
    with mppool.Pool(server.address, max_size=3, min_size=3, broker=path) as pool:
        calls, busy = 0, False

        def borrow(number: int, frame: FrameType | None) -> None:
            nonlocal calls, busy
            if busy:
                return  # one inside another would need more sessions than there are
            busy = True
            calls += 1
            with pool.connection(timeout=5) as sock:
                ask(sock, f"handler{calls}")
            busy = False

        previous = signal.signal(signal.SIGALRM, borrow)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
            until = time.monotonic() + 1.5
            n = 0
            while time.monotonic() < until:
                n += 1
                with pool.connection(timeout=5) as sock:
                    ask(sock, f"main{n}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert calls > 100
        assert server.counts()["peak"] <= 3


def test_a_stopped_broker_counts_as_absent(server: Judge, broker: BrokerProcess) -> None:
    """A broker that is there but silent for a second holds nobody up for good; when it goes on, so does everything."""
    with mppool.Pool(server.address, max_size=1, broker=broker.path) as pool:
        sock = pool.getconn()
        broker.process.send_signal(signal.SIGSTOP)
        lent: list[float] = []

        def wait() -> None:
            began = time.monotonic()
            with pool.connection(timeout=20) as session:
                lent.append(time.monotonic() - began)
                ask(session, "w")

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        pool.putconn(sock)
        waiting.join()
        assert lent[0] < 5
        broker.process.send_signal(signal.SIGCONT)
        for n in range(50):
            with pool.connection(timeout=5) as session:
                ask(session, f"n{n}")
        assert server.counts()["peak"] == 1
