"""As many workers, sessions and links as there can be."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable

import psutil
import pytest

import mppool
from mppool import shell
from mppool.kernel import link
from mppool.table import ROWS
from tests.helpers.leases import lease_all
from tests.helpers.processes import BrokerProcess, Child, die_with_parent, eventually, fork
from tests.helpers.server import Judge, _Server, ask
from tests.limits.shared import SOON, work_together, worker_of


def crowd(count: int, work: Callable[[int], None]) -> tuple[list[int], int, int]:
    """Light children, forked from here: each works, says so with a byte, and stays until the gate is closed. (pids, their bytes, the gate)"""
    reader, writer = os.pipe()
    gate_out, gate = os.pipe()
    pids = []
    gc.collect()
    gc.freeze()  # else each child would copy what its collector touches
    for n in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                die_with_parent()
                os.close(gate)
                os.close(reader)
                work(n)
                os.write(writer, b".")
                os.read(gate_out, 1)
                code = 0
                for pool in list(shell._pools):
                    pool._close()
            except BaseException as error:
                os.write(writer, f"{error!r}\n".encode()[:500])
            finally:
                os._exit(code)
        pids.append(pid)
    gc.unfreeze()
    os.close(writer)
    os.close(gate_out)
    return pids, reader, gate


def hear(reader: int, count: int, timeout: float) -> bytes:
    said = b""
    until = time.monotonic() + timeout
    while len(said) < count:
        assert select.select([reader], [], [], max(0.0, until - time.monotonic()))[0], f"{len(said)} of {count} within {timeout} s"
        data = os.read(reader, 65536)
        if not data:
            break
        said += data
    return said


def test_a_worker_in_every_row(broker: BrokerProcess, server: Judge, socket_path: str, many_descriptors: None) -> None:
    """As many processes as a pool has rows do their work; one more is told that there is none; then they go, half of them killed, and all rows are free."""
    pool = mppool.Pool(server.address, name="web", max_size=4, timeout=60, broker=socket_path)

    def work(n: int) -> None:
        for turn in range(2):
            with pool.connection() as sock:
                ask(sock, f"{n}-{turn}")

    workers = ROWS - 2  # the broker has one, and we
    pids, reader, gate = crowd(workers, work)
    try:
        with pool.connection() as sock:
            ask(sock, "parent")
        assert hear(reader, workers, 60) == b"." * workers

        def late(_: Child) -> str:
            with pytest.raises(mppool.Error) as caught:
                pool.getconn()
            return str(caught.value)

        with fork(late) as (child,):
            assert child.result() == f"all {ROWS} rows of pool 'web' are taken: too many processes use it"
        assert len(pool.get_stats()["workers"]) == workers + 1
        for pid in pids[::2]:
            os.kill(pid, signal.SIGKILL)
        os.close(gate)
        gate = -1
        for pid in pids:
            os.waitpid(pid, 0)
        pids = []
        eventually(lambda: len(pool.get_stats()["workers"]) == 1, timeout=SOON)
        assert len(lease_all(pool, 4, "after")) == 4
        with fork(lambda _: len(lease_all(pool, 4, "new"))) as (child,):
            assert child.result() == 4
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if gate >= 0:
            os.close(gate)
        os.close(reader)
        pool.close()
    counts = server.counts()
    assert counts["peak"] <= 4
    assert counts["requests"] == 2 * workers + 1 + 4 + 4


def test_five_hundred_sessions(broker: BrokerProcess, server: Judge, socket_path: str, many_descriptors: None) -> None:
    """Five processes lease five hundred sessions at once; then one leases all of them, nearly all dialed by others; not one is dialed twice."""
    pool = mppool.Pool(server.address, name="web", max_size=500, max_dialing=20, timeout=60, broker=socket_path)

    def some(child: Child) -> int:
        held = [pool.getconn() for _ in range(100)]
        numbers = {ask(sock, f"{os.getpid()}-{n}") for n, sock in enumerate(held)}
        child.tell()
        child.hear()
        for sock in held:
            pool.putconn(sock)
        child.tell()
        child.hear()
        pool.close()
        return len(numbers)

    with fork(*[some] * 5) as children:
        for child in children:
            child.hear(60)
        counts = server.counts()
        assert (counts["live"], counts["dials"]) == (500, 500)
        stats = pool.get_stats()
        assert (stats["in_use"], stats["size"]) == (500, 500)
        with pytest.raises(mppool.PoolTimeout, match=r"max_size=500, in_use=500, idle=0, dialing=0"):
            pool.getconn(timeout=0.2)
        for child in children:
            child.tell()
        for child in children:
            child.hear()
        eventually(lambda: pool.get_stats()["idle"] == 500)
        assert len(lease_all(pool, 500, "all")) == 500
        for child in children:
            child.tell()
            assert child.result() == 100
    counts = server.counts()
    assert (counts["peak"], counts["dials"]) == (500, 500)
    pool.close()


def test_a_flood_of_connections_to_a_stopped_broker(broker: BrokerProcess, server: Judge, socket_path: str, many_descriptors: None) -> None:
    """With a broker that does not answer, and a queue to it that is full, workers go on; when it goes on it serves them, and nobody has lost anything."""

    with fork(worker_of(socket_path, server, 2), worker_of(socket_path, server, 1)) as (one, two):
        os.kill(broker.pid, signal.SIGSTOP)
        links = contextlib.ExitStack()
        count = 0
        try:
            with contextlib.suppress(BlockingIOError):
                for count in range(3000):  # noqa: B007 (how far it came)
                    links.enter_context(link.connect(socket_path))
            assert 500 < count < 2999
            work_together(one)
            os.kill(broker.pid, signal.SIGCONT)
            work_together(one, two)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
            links.close()
        assert [one.result(), two.result()] == [[2, 2], [2]]
    eventually(lambda: psutil.Process(broker.pid).num_fds() < 100)
    assert server.counts()["peak"] <= 2


def test_a_server_that_accepts_slowly(socket_path: str, broker: BrokerProcess) -> None:
    """A server whose queue holds one connection, and that looks at it late: dials wait or are tried again, and at last all have what the cap allows."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = listener.getsockname()

    def serve(child: Child) -> None:
        ours.close()
        child.hear()
        _Server(listener, theirs).run()

    def work(_: Child) -> int:
        listener.close()
        with mppool.Pool(address, name="web", max_size=8, max_dialing=8, timeout=SOON, connect_timeout=0.5, broker=socket_path) as pool:
            held = [pool.getconn() for _ in range(2)]
            numbers = {ask(sock, f"{os.getpid()}-{n}") for n, sock in enumerate(held)}
            for sock in held:
                pool.putconn(sock)
            return len(numbers)

    with fork(serve, *[work] * 4) as (slow, *workers):
        theirs.close()
        listener.close()
        time.sleep(1)
        slow.tell()
        assert [child.result() for child in workers] == [2] * 4
        ours.send(b"counts")
        assert json.loads(ours.recv(4096))["peak"] <= 8
    ours.close()
