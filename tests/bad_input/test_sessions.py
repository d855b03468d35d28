"""Sessions that are not what they should be: returned twice, to others, too late."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

import mppool
from tests.bad_input.shared import say
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge, ask


def test_returning_what_was_never_lent(server: Judge, socket_path: str) -> None:
    """Whatever is not a lease of this pool is refused by name, also before the first use; nothing changes."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    with socket.socket() as stranger:
        for thing in (stranger, None, 7, object()):
            with pytest.raises(mppool.Error, match=r"^.* is not lent by pool 'web' in this process: "):
                pool.putconn(thing)
        with pool:
            before = pool.get_stats()
            with pytest.raises(mppool.Error, match="is not lent by pool 'web'"):
                pool.putconn(stranger)
            assert pool.get_stats() == before


def test_returning_twice(server: Judge, socket_path: str) -> None:
    """The second return of a lease is refused; the session is there once."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        sock = pool.getconn()
        pool.putconn(sock)
        for discard in (False, True):
            with pytest.raises(mppool.Error, match=r"is not lent by pool 'web' in this process: returned already, or lent before a fork or by another pool"):
                pool.putconn(sock, discard=discard)
        assert [pool.get_stats()[key] for key in ("size", "in_use", "idle")] == [1, 0, 1]
        again = pool.getconn()
        assert ask(again, "still-good") == 1
        pool.putconn(again)


def test_returning_to_another_pool(server: Judge, socket_path: str) -> None:
    """A lease goes back to the pool it is from; the other one refuses it, and the right one takes it then."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as web, mppool.Pool(server.address, name="jobs", broker=socket_path) as jobs:
        sock = web.getconn()
        with pytest.raises(mppool.Error, match="is not lent by pool 'jobs'"):
            jobs.putconn(sock)
        assert web.get_stats()["in_use"] == 1
        web.putconn(sock)
        assert web.get_stats()["in_use"] == 0


def test_returning_the_parents_lease(server: Judge, socket_path: str) -> None:
    """A lease that was made before a fork is the parent's: the child's return is refused, the parent's is taken."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        sock = pool.getconn()

        def work(child: Child) -> str:
            try:
                pool.putconn(sock)
            except mppool.Error as error:
                return say(error)
            return "taken"

        with fork(work) as (child,):
            assert "is not lent by pool 'web' in this process" in child.result()
        assert ask(sock, "mine") == 1
        pool.putconn(sock)


def test_using_a_lease_after_its_return_with_debug(server: Judge, socket_path: str) -> None:
    """With ``debug=True`` use after return fails at once, and the session is unharmed."""
    with mppool.Pool(server.address, debug=True, broker=socket_path) as pool:
        with pool.connection() as sock:
            ask(sock, "within")
        with pytest.raises(OSError, match="Bad file descriptor"):
            sock.sendall(b"after\n")
        with pool.connection() as sock:
            assert ask(sock, "again") == 1


@pytest.mark.parametrize("was_open", [True, False], ids=["open", "never open"])
def test_use_after_close(server: Judge, socket_path: str, was_open: bool) -> None:
    """A closed pool says so by name, whatever is asked of it; closing again is no error; nothing is dialed."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    if was_open:
        pool.open()
    pool.close()
    uses: list[Callable[[], object]] = [pool.getconn, pool.connection().__enter__, pool.open, pool.__enter__, pool.get_stats, lambda: pool.resize(2)]
    for use in uses:
        with pytest.raises(mppool.PoolClosed, match=r"^pool 'web' is closed$"):
            use()
    pool.close()
    assert pool.closed
    assert repr(pool) == "<Pool 'web' closed>"
    assert server.counts()["dials"] == 0


def test_returning_after_close(server: Judge, socket_path: str) -> None:
    """A lease outlives ``close()``; its return is taken, a second one refused."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    sock = pool.getconn()
    pool.close()
    assert ask(sock, "still-mine") == 1
    pool.putconn(sock)
    with pytest.raises(mppool.Error, match="is not lent by pool 'web'"):
        pool.putconn(sock)
    eventually(lambda: server.counts()["live"] == 0)
