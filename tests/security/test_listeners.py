"""Somebody else listens where a broker or a keeper should."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from mppool.kernel import link
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge, ask
from tests.helpers.users import ALICE, BOB, Home, as_root, as_user, broker_of, home_of
from tests.security.shared import AT_ONCE, pool_of, said_by


def listen_as_bob(path: str) -> Callable[[Child], list[int]]:
    """Listens where anybody may come, and counts the bytes and descriptors that it is sent by each who does."""

    def work(child: Child) -> list[int]:
        listener = link.listen(path)
        os.chmod(path, 0o666)
        child.tell()
        heard: list[int] = []
        listener.setblocking(True)
        listener.settimeout(0.2)
        while not heard:
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                sock.settimeout(10)
                data, ancillary, _, _ = sock.recvmsg(65536, 1024)
                heard.append(len(data) + len(ancillary))
        child.hear()
        return heard

    return as_user(BOB, work)


@pytest.fixture
def trap() -> Iterator[str]:
    """A path at which Bob may listen and to which Alice may connect."""
    with home_of(BOB) as bobs:
        bobs.run.chmod(0o755)
        yield f"{bobs.run}/trap.sock"


@as_root
def test_a_worker_tells_a_stranger_nothing(home: Home, server: Judge, trap: str) -> None:
    """Should the socket's name lead to somebody else's, a worker sees who it is before it says a word."""
    os.symlink(trap, home.socket)
    os.chown(home.socket, ALICE, ALICE, follow_symlinks=False)

    def work(_: Child) -> dict[str, str]:
        with contextlib.closing(pool_of(home, server)) as pool:
            return said_by(pool)

    with fork(listen_as_bob(trap)) as (stranger,):
        stranger.hear()
        with fork(as_user(ALICE, work)) as (worker,):
            assert worker.result(AT_ONCE) == {"BrokerUnavailable": f"broker={home.socket!r}: its broker runs as uid {BOB}, we are {ALICE}"}
        stranger.tell()
        assert stranger.result() == [0]
    eventually(lambda: server.counts()["live"] == 0)


@as_root
def test_a_broker_tells_a_strange_keeper_nothing(home: Home, server: Judge, trap: str) -> None:
    """The same for what a broker gives its keeper: every session and its baggage."""
    os.symlink(trap, f"{home.socket}.keeper")

    def work(_: Child) -> int:
        with pool_of(home, server) as pool, pool.connection() as sock:
            return ask(sock, "mine")

    with fork(listen_as_bob(trap)) as (stranger,):
        stranger.hear()
        with broker_of(ALICE, home.socket):
            with fork(as_user(ALICE, work)) as (worker,):
                assert worker.result() == 1
            os.unlink(f"{home.socket}.keeper")
        stranger.tell()
        assert set(stranger.result()) == {0}
