"""Broker and keeper come to terms again, whatever became of either: a keeper that does not start, is stopped, is behind, or holds what is no use."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mppool
from mppool import bond
from mppool.bond import Bond
from mppool.inspect import find_pool
from mppool.keeper import keeper_path
from mppool.kernel import link
from mppool.kernel.runtime import scope_of
from mppool.table import BROKER
from mppool.wire import Kind, Message, encode, pack_held
from tests.helpers.leases import lease_all, leave_sessions
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import PATIENCE, BrokerProcess, Child, broker_process, eventually, fork
from tests.helpers.server import Judge
from tests.replace import keeper_of

MANY = 600  # messages: more than a link's queue holds


@contextmanager
def none_can_start(path: str) -> Iterator[None]:
    """Where a new keeper would bind its socket there is something else."""
    trap = f"{keeper_path(path)}.new"
    os.mkdir(trap)
    try:
        yield
    finally:
        os.rmdir(trap)


def wait_for_failed_starts(path: str, count: int) -> None:
    """So many keepers more have been started, and have ended."""
    seen: set[int] = set()
    first = keeper_of(path)

    def look() -> bool:
        keeper = keeper_of(path)
        if keeper is not None and keeper != first:
            seen.add(keeper.pid)
        return keeper is None and len(seen) >= count

    eventually(look, what=f"{count} keepers that do not start")


def test_after_keepers_that_did_not_start_another_comes_soon(server: Judge, broker: BrokerProcess) -> None:
    """A new session cannot move before a keeper has it: one that does not start is followed by another long before we would give it up."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    keeper = eventually(lambda: keeper_of(broker.path))

    def work(child: Child) -> None:
        lease_all(pool, 1)
        child.tell()
        child.hear()

    with fork(work) as (child,):
        with none_can_start(broker.path):
            keeper.kill()
            child.hear()
            wait_for_failed_starts(broker.path, 2)
        assert lease_all(pool, 1, timeout=bond.START - 1) == {1}
        child.tell()
        child.result()
    pool.close()


def test_a_broker_that_gets_no_keeper_ends_all_the_same(server: Judge, broker: BrokerProcess) -> None:
    """Told to end, it tries for a while to leave its sessions to a keeper."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    with none_can_start(broker.path):
        eventually(lambda: keeper_of(broker.path)).kill()
        lease_all(pool, 1)
        broker.process.terminate()
        assert broker.process.wait(PATIENCE) == 0
    assert lease_all(pool, 1) == {1}
    pool.close()


def test_a_keeper_whose_broker_has_died_meanwhile_takes_no_place(socket_path: str) -> None:
    """It was being started when its broker was killed: the next one may have another keeper at that path."""
    ours, theirs = os.pipe()
    os.close(ours)
    with link.listen(keeper_path(socket_path)):
        inode = os.stat(keeper_path(socket_path)).st_ino
        try:
            subprocess.run([sys.executable, "-m", "mppool.keeper", keeper_path(socket_path)], stdout=theirs, check=True, timeout=PATIENCE)
            assert os.stat(keeper_path(socket_path)).st_ino == inode
        finally:
            os.close(theirs)
            os.unlink(keeper_path(socket_path))


# A bond by itself, with a real keeper.


class Loop:
    """What a broker's loop would do for its bond."""

    def __init__(self, path: str) -> None:
        self.handlers: dict[int, Callable[[], object]] = {}
        self.bond = Bond(path, {}, set(), self.handlers.__setitem__, self.unwatch, lambda _desk, action: action())

    def unwatch(self, fd: int) -> None:
        self.handlers.pop(fd, None)

    def until(self, condition: Callable[[], Any]) -> None:
        def turn() -> Any:
            self.bond.tick()
            for fd, handler in list(self.handlers.items()):
                if link.wait_readable(fd, 0):
                    handler()
            return condition()

        eventually(turn)


@pytest.fixture
def loop(socket_path: str) -> Iterator[Loop]:
    it = Loop(socket_path)
    it.bond.take()
    it.bond.wait_for_start()
    assert it.bond.link is not None
    yield it
    it.bond.close()


def ident_of(path: str) -> str:
    return f"mppool-{scope_of(path)}-{0:010}"


def test_what_a_stopped_keeper_was_not_told_it_is_told_later(loop: Loop, socket_path: str) -> None:
    """It answers a session that it gets, not one that it loses: with its queue full of those nothing would come after."""
    keeper = eventually(lambda: keeper_of(socket_path))
    keeper.suspend()
    try:
        for k in range(MANY):
            loop.bond.drop(ident_of(socket_path), k, 1)
        assert loop.bond.undropped, "all of it fitted into the queue"
    finally:
        keeper.resume()
    before = keeper.pid
    loop.until(lambda: not loop.bond.undropped)
    assert eventually(lambda: keeper_of(socket_path)).pid == before


def test_a_stopped_keeper_is_replaced_though_no_answer_is_due(loop: Loop, socket_path: str) -> None:
    """Its queue is full of what it does not answer."""
    keeper = eventually(lambda: keeper_of(socket_path))
    keeper.suspend()
    try:
        for k in range(MANY):
            loop.bond.drop(ident_of(socket_path), k, 1)
        loop.until(lambda: [found.pid for found in processes_of(socket_path) if found.pid != keeper.pid] and loop.bond.link is not None)
    finally:
        keeper.resume()
    keeper.wait(PATIENCE)


def test_a_keeper_is_told_of_much_that_nobody_wants(loop: Loop, socket_path: str) -> None:
    """It holds more sessions of pools that are gone than its queue has room for: each is dropped, and it goes on."""
    keeper = eventually(lambda: keeper_of(socket_path))
    ours, theirs = socket.socketpair()
    with ours, theirs, link.connect(keeper_path(socket_path)) as another:
        another.settimeout(PATIENCE)
        for k in range(MANY):
            link.send(another, encode(Message(Kind.PUT, k, 1, body=pack_held(ident_of(socket_path), b"")), 1), ours.fileno())
            another.recv(4096)
        loop.bond.lose()
        assert loop.bond.reach()  # before the other one ends: a keeper that is of no use to anybody ends, too
    loop.until(lambda: not loop.bond.undropped)
    assert eventually(lambda: keeper_of(socket_path)).pid == keeper.pid
    eventually(lambda: keeper.num_fds() < MANY)


# A pool that is busy.


def test_sessions_of_a_pool_that_somebody_reclaims_in_are_kept(server: Judge, broker: BrokerProcess) -> None:
    """A worker has the right to reclaim when the next broker comes: what the keeper has of that pool is there when it lets go."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    leave_sessions(pool, 2)
    pool.open()
    found = find_pool(broker.path, "p")
    assert found is not None
    broker.kill()
    eventually(lambda: found.lock.take(BROKER))
    with broker_process(broker.path):
        found.lock.give(BROKER)
        found.lock.close()
        assert lease_all(pool, 2) == {1, 2}
        assert server.counts()["dials"] == 2
        pool.close()
