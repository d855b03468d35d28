"""Descriptors run out: of a worker, a broker, a keeper, and those in flight."""

from __future__ import annotations

import array
import contextlib
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import mppool
from mppool.kernel import link
from mppool.kernel.runtime import scope_of
from mppool.wire import Kind, Message, encode, pack_held
from tests.helpers.leases import lease_all
from tests.helpers.processes import BrokerProcess, Child, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask
from tests.helpers.users import ALICE, Home, as_root, as_user, broker_of
from tests.limits.shared import SOON, work_together, worker_of


@contextlib.contextmanager
def only(more: int) -> Iterator[None]:
    """This process may open so many more descriptors, and no other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    null = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(top, null) + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(null))
        for _ in range(more):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in (*fillers, null):
            os.close(fd)


def try_with(pool: mppool.Pool, more: int, timeout: float) -> str:
    """A checkout with so few descriptors: what it came to. What it lends is dirtied, so that the next may not get it."""
    with only(more):
        try:
            sock = pool.getconn(timeout=timeout)
        except mppool.Error as error:
            return f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        ask(sock, f"few-{more}")
        sock.sendall(b"!extra\n")
        assert link.wait_readable(sock.fileno(), SOON)
        pool.putconn(sock)
    return "lent"


FEW = range(5)


def check_words(said: list[str], *others: str) -> None:
    """With enough of them it was lent; with too few, too, or an error said why."""
    assert said[-1] == "lent"
    assert all(re.search("|".join(("lent", "Too many open files", "maximum number of files", "RLIMIT_NOFILE", *others)), line) for line in said), said


def poor(server: Judge, path: str, size: int, timeout: float) -> Callable[[Child], list[str]]:
    """A worker that tries again and again, with one descriptor more each time, whenever it is told to."""

    def work(child: Child) -> list[str]:
        said = []
        for more in FEW:
            child.hear()
            with mppool.Pool(server.address, name="web", max_size=size, broker=path) as pool:
                said.append(try_with(pool, more, timeout))
                assert len(lease_all(pool, size, f"poor-{more}")) == size
            child.tell()
        return said

    return work


@pytest.mark.parametrize("with_broker", [False, True], ids=["alone", "broker"])
def test_descriptors_run_out_at_a_dial(server: Judge, socket_path: str, with_broker: bool) -> None:
    """However few are left when a session is dialed: it is lent as it should be, or an error says why; no session is lost, kept in secret, or lent dirty."""

    def work(_: Child) -> list[str]:
        with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
            said = []
            for more in FEW:
                said.append(try_with(pool, more, 1))
                assert len(lease_all(pool, 2, f"dial-{more}")) == 2
                for sock in [pool.getconn(timeout=SOON) for _ in range(2)]:
                    pool.putconn(sock, discard=True)
            eventually(lambda: server.counts()["live"] == 0)
            return said

    with contextlib.ExitStack() as stack:
        if with_broker:
            stack.enter_context(broker_process(socket_path))
        (child,) = stack.enter_context(fork(work))
        said = child.result()
    assert server.counts()["peak"] <= 2
    check_words(said)


def test_descriptors_run_out_at_a_fetch(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """The same when the descriptor of another process's session is lost on its way: the session stays as it was, for others and for later."""

    def owner(child: Child) -> None:
        with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
            for _ in FEW:
                lease_all(pool, 2, "owner")
                child.tell()
                child.hear()

    with fork(owner, poor(server, socket_path, 2, 1)) as (one, other):
        for _ in FEW:
            one.hear()
            other.tell()
            other.hear()
            one.tell()
        one.result()
        said = other.result()
    assert server.counts()["peak"] <= 2
    check_words(said, "no session within")


def test_descriptors_run_out_at_a_grant(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """The same when a session is granted to a waiter that cannot take its descriptor any more: it, or the next in line, gets the session later."""

    def owner(child: Child) -> None:
        with mppool.Pool(server.address, name="web", max_size=1, broker=socket_path) as pool:
            for _ in FEW:
                with pool.connection(timeout=SOON) as sock:
                    ask(sock, "owner")
                    child.tell()
                    child.hear()
                    eventually(lambda: pool.get_stats()["waiting"] == 1)
                child.tell()
                child.hear()

    with fork(owner, poor(server, socket_path, 1, 2)) as (one, other):
        for _ in FEW:
            one.hear()
            one.tell()
            other.tell()
            one.hear()
            other.hear()
            one.tell()
        one.result()
        said = other.result()
    assert server.counts()["peak"] <= 1
    check_words(said, "no session within")


@as_root
def test_a_broker_without_descriptors(home: Home, server: Judge, tmp_path: Path, many_descriptors: None) -> None:
    """A broker that can accept nobody any more goes on; a worker does its work without it; when there is room again, its sessions move to others."""
    log = str(tmp_path / "log")

    def flood(child: Child) -> int:
        links: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while len(links) < 1500:
                links.append(link.connect(home.socket))
        child.tell()
        child.hear()
        return len(links)

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1100, 1100))

    with (
        broker_of(ALICE, home.socket, log=log, limits=few) as pid,
        fork(as_user(ALICE, flood), *[as_user(ALICE, worker_of(home.socket, server, rounds)) for rounds in (2, 1)]) as (crowd, one, two),
    ):
        crowd.hear(SOON)
        work_together(one)
        assert psutil.Process(pid).cpu_percent(1.0) < 60
        crowd.tell()
        assert crowd.result() > 1000
        work_together(one, two)
        assert [one.result(), two.result()] == [[2, 2], [2]]
    assert server.counts()["peak"] <= 2
    assert len(Path(log).read_text().splitlines()) < 300


def test_a_keeper_of_more_sessions_than_select_can(socket_path: str, many_descriptors: None) -> None:
    """A keeper may hold the sessions of many pools: with more than 1024 descriptors it gives them all to the next broker."""
    path, count = f"{socket_path}.keeper", 1100
    keeper = subprocess.Popen([sys.executable, "-m", "mppool.keeper", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    assert keeper.stdout is not None
    try:
        keeper.stdout.readline()
        ours, theirs = socket.socketpair()
        with ours, theirs, link.connect(path) as first:
            first.setblocking(True)
            first.settimeout(SOON)
            for n in range(count):
                pool = f"mppool-{scope_of(socket_path)}-{n // 1000:010}"
                link.send(first, encode(Message(Kind.PUT, n % 1000, 1, body=pack_held(pool, b"")), 1), ours.fileno())
                assert first.recv(4096)
            with link.connect(path) as second:
                second.setblocking(True)
                second.settimeout(SOON)
                link.send(second, encode(Message(Kind.GIVE_ALL)))
                given = 0
                while True:
                    _, fd = link.receive(second)
                    if fd < 0:
                        break
                    os.close(fd)
                    given += 1
                assert given == count
                assert keeper.poll() is None
    finally:
        keeper.kill()
        keeper.wait()
        keeper.stdout.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def flooded(child: Child) -> None:
    """As many descriptors in flight as this user may have: messages that nobody reads."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    with open(os.devnull, "rb") as null:
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 250))]
        with contextlib.suppress(OSError):
            for n in range(20 * 200):
                pairs[n % 20][0].sendmsg([b"x"], fds)
    child.tell()
    child.hear()


def is_shared(pool: mppool.Pool, k: int) -> bool:
    worker = pool._worker
    return worker is not None and bool(worker.words[worker.table.shared_flag + k])


@as_root
def test_too_many_descriptors_in_flight_at_a_grant(home: Home, server: Judge) -> None:
    """ETOOMANYREFS: a waiter that is granted a session whose descriptor cannot be sent waits on or gives up; the session is there for the next."""

    def owner(child: Child) -> None:
        with mppool.Pool(server.address, name="web", max_size=1, broker=home.socket) as pool:
            with pool.connection() as sock:
                ask(sock, "owner")
                eventually(lambda: is_shared(pool, 0))
                child.tell()
                child.hear()
                eventually(lambda: pool.get_stats()["waiting"] == 1)
            child.tell()
            child.hear()

    def waiter(child: Child) -> list[int]:
        child.hear()
        with mppool.Pool(server.address, name="web", max_size=1, broker=home.socket) as pool:
            with contextlib.suppress(mppool.PoolTimeout), pool.connection(timeout=3) as sock:
                ask(sock, "waiter")
            child.tell()
            child.hear()
            return sorted(lease_all(pool, 1, "waiter"))

    def flood(child: Child) -> None:
        child.hear()
        flooded(child)

    with broker_of(ALICE, home.socket), fork(*[as_user(ALICE, work) for work in (owner, waiter, flood)]) as (one, two, three):
        one.hear()
        three.tell()
        three.hear()
        two.tell()
        one.tell()
        one.hear()
        two.hear()
        three.tell()
        three.result()
        two.tell()
        assert two.result() == [1]
        one.tell()
        one.result()
    assert server.counts()["dials"] == 1


@as_root
def test_too_many_descriptors_in_flight_at_a_share(home: Home, server: Judge) -> None:
    """A new session that could not be shared stays with its dialer, and is shared when there is room again: others get it then."""

    def owner(child: Child) -> None:
        with mppool.Pool(server.address, name="web", max_size=2, broker=home.socket) as pool:
            with pool.connection() as sock:
                ask(sock, "owner")
                eventually(lambda: is_shared(pool, 0))
                child.tell()
                child.hear()
                with pool.connection() as other:
                    ask(other, "owner-too")
            child.tell(is_shared(pool, 1))
            while not link.wait_readable(child._in, 0.02):
                with pool.connection(timeout=SOON) as sock:
                    ask(sock, "again")

    def other(child: Child) -> list[int]:
        child.hear()
        with mppool.Pool(server.address, name="web", max_size=2, broker=home.socket) as pool:
            return sorted(lease_all(pool, 2, "other"))

    def flood(child: Child) -> None:
        child.hear()
        flooded(child)

    with broker_of(ALICE, home.socket), fork(*[as_user(ALICE, work) for work in (flood, owner, other)]) as (three, one, two):
        one.hear()
        three.tell()
        three.hear()
        one.tell()
        assert one.hear() is False
        three.tell()
        three.result()
        two.tell()
        assert two.result() == [1, 2]
        one.tell()
        one.result()
    assert server.counts()["dials"] == 2
