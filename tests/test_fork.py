"""Forks: a pool made before, sessions lent before, children that touch nothing of their parent's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import mppool
from mppool.drivers import DriverBase
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge, ask


def asking(pool: mppool.Pool, name: str, times: int = 20) -> int:
    """Some requests; the number of the last connection."""
    number = 0
    for n in range(times):
        with pool.connection(timeout=20) as sock:
            number = ask(sock, f"{name}-{n}")
    return number


def clean_up(pool: mppool.Pool) -> None:
    """The children left by os._exit, as if killed: without a broker the next one to leave in order takes the names along."""
    pool.open()
    pool.close()


@pytest.fixture(params=[False, True], ids=["alone", "broker"])
def pool(request: pytest.FixtureRequest, server: Judge, socket_path: str) -> mppool.Pool:
    if request.param:
        request.getfixturevalue("broker")
    return mppool.Pool(server.address, max_size=2, name="forked", broker=socket_path)


def test_a_pool_made_before_the_fork_works_in_every_child(server: Judge, pool: mppool.Pool) -> None:
    """As with gunicorn --preload: made once, used by every child, capped over all."""
    with fork(*(lambda child, name=name: asking(pool, name, 50) for name in "abcdef")) as children:
        for child in children:
            child.result()
    assert server.counts()["peak"] <= 2
    assert server.counts()["requests"] == 300
    clean_up(pool)


def test_a_pool_used_before_the_fork_works_in_every_child(server: Judge, pool: mppool.Pool) -> None:
    """The parent's sessions stay the parent's: used before, meanwhile and after."""
    asking(pool, "before")
    with fork(*(lambda child, name=name: asking(pool, name, 50) for name in "abcd")) as children:
        asking(pool, "meanwhile", 50)
        for child in children:
            child.result()
    asking(pool, "after")
    assert server.counts()["peak"] <= 2
    pool.close()


def test_a_child_never_harms_a_lease_of_its_parent(server: Judge, pool: mppool.Pool) -> None:
    """Forked inside a lease, the child leaves the block and exits; the parent's session goes on, in the middle of a reply."""
    with pool.connection() as sock:
        sock.sendall(b"half 50\n")

        def leave(child: Child) -> None:
            assert sock.fileno() == -1, "the child's copy of the parent's session is closed"
            with pytest.raises(mppool.Error, match="not lent"):
                pool.putconn(sock)
            asking(pool, "child", 3)

        with fork(leave) as (child,):
            child.result()
        assert sock.recv(100) == b"1 half\n"
        assert ask(sock, "whole") == 1
    asking(pool, "after")
    assert server.counts()["peak"] <= 2
    pool.close()


def test_a_child_leaves_the_with_block_of_its_parent_silently(server: Judge, pool: mppool.Pool) -> None:
    """The end of a block that began in the parent returns nothing in the child."""

    def work(child: Child) -> None:
        """Forks inside the block; both sides leave it."""
        with pool.connection() as sock:
            ask(sock, "a")
            pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        asking(pool, "b")

    with fork(work) as (child,):
        child.result()
    assert server.counts()["dials"] == 1
    clean_up(pool)


def test_a_fork_while_another_thread_is_inside_a_checkout(server: Judge, pool: mppool.Pool) -> None:
    """Locks of other threads are not inherited taken: children forked at any moment use the pool."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def busy() -> None:
        try:
            while not stop.is_set():
                with pool.connection(timeout=20) as sock:
                    ask(sock, "busy")
                pool.putconn(pool.getconn(timeout=20), discard=True)  # dials and closes, inside the dial lock
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for name in range(5):
            with fork(lambda child, name=name: asking(pool, f"c{name}", 3)) as (child,):  # type: ignore[misc]
                child.result()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        pool.close()
    assert failures == []
    assert server.counts()["peak"] <= 2


def test_a_dead_parents_children_hold_nothing_of_it(server: Judge, pool: mppool.Pool) -> None:
    """A worker that forked and was killed: its session is closed and its permit comes back, although its child lives on."""

    def parent(child: Child) -> None:
        pool.getconn()
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        child.tell(pid)
        time.sleep(30)

    with fork(parent) as (child,):
        grandchild = child.hear()
        try:
            child.kill()
            sessions = [pool.getconn(timeout=5), pool.getconn(timeout=5)]
            assert server.counts()["peak"] <= 2
            for session in sessions:
                pool.putconn(session)
        finally:
            os.kill(grandchild, signal.SIGKILL)
        pool.close()


def task(arguments: tuple[mppool.Pool, int]) -> int:
    pool, name = arguments
    return asking(pool, f"m{name}", 5)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(server: Judge, socket_path: str, broker: BrokerProcess, method: str) -> None:
    """multiprocessing's three ways to start: the pool travels, and is one pool in all."""
    pool = mppool.Pool(server.address, max_size=2, name="mp", broker=socket_path)
    with multiprocessing.get_context(method).Pool(4) as workers:
        workers.map(task, [(pool, name) for name in range(12)])
        workers.close()
        workers.join()
    assert server.counts()["peak"] <= 2
    assert server.counts()["requests"] == 60


def test_subprocesses_inherit_nothing(server: Judge, pool: mppool.Pool) -> None:
    """No descriptor of ours survives an exec."""
    with pool.connection() as sock:
        ask(sock, "a")
        before = {
            link for link in subprocess.check_output([sys.executable, "-c", LIST], close_fds=False, text=True).split() if "socket" in link or "mppool" in link
        }
    pool.close()
    ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}
    assert not {link for link in before if "mppool" in link}
    assert not before - ours, "the session's socket reached a subprocess"


LIST = "import os; print(*(os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{fd}')))"


def test_a_fork_by_c_code_is_noticed(server: Judge, socket_path: str) -> None:
    """A fork that runs no hooks of Python's (as uWSGI's) is noticed at the child's first use."""
    code = f"""
import ctypes, os, sys
import mppool
from tests.helpers.server import ask
pool = mppool.Pool({server.address!r}, max_size=1, name="c", broker={socket_path!r})
with pool.connection() as sock:
    first = ask(sock, "parent")
libc = ctypes.PyDLL(None)  # holds the interpreter's lock over the call, and runs no hook
pid = libc.fork()
if pid == 0:
    with pool.connection(timeout=5) as sock:
        ask(sock, "child")
    pool.close()
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
with pool.connection(timeout=5) as sock:
    ask(sock, "again")
sys.exit(code)
"""
    from tests.helpers.processes import broker_process

    with broker_process(socket_path):
        done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert server.counts()["peak"] == 1


def test_a_stopped_worker_keeps_nobody_from_its_idle_sessions(server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """A worker that dialed 4 sessions and is stopped while idle: another process leases all 4, without a dial."""
    pool = mppool.Pool(server.address, max_size=4, name="stopped", broker=socket_path)

    def dial_four(child: Child) -> None:
        for session in [pool.getconn() for _ in range(4)]:
            ask(session, "x")
            pool.putconn(session)
        child.tell()
        time.sleep(60)

    with fork(dial_four) as (child,):
        child.hear()
        stats = pool.get_stats()
        assert (stats["idle"], stats["dials"]) == (4, 4)
        child.kill(signal.SIGSTOP)
        began = time.monotonic()
        sessions = [pool.getconn(timeout=2) for _ in range(4)]
        print(f"all 4 after {(time.monotonic() - began) * 1000:.1f} ms")
        for n, session in enumerate(sessions):
            ask(session, f"s{n}")
            pool.putconn(session)
        assert server.counts()["dials"] == 4
        child.kill(signal.SIGCONT)
    eventually(lambda: len(pool.get_stats()["workers"]) == 1)
    pool.close()


def over_tls_by_httpx(port: int) -> DriverBase:
    httpcore = pytest.importorskip("httpcore")
    from mppool.drivers.httpcore import HttpcoreDriver

    return HttpcoreDriver(httpcore.Origin(b"https", b"127.0.0.1", port), 60.0, ssl.create_default_context())


def over_tls_by_pymemcache(port: int) -> DriverBase:
    pytest.importorskip("pymemcache")
    from mppool.drivers.pymemcache import PymemcacheDriver

    return PymemcacheDriver(("127.0.0.1", port), connect_timeout=60, tls_context=ssl.create_default_context())


def over_tls_by_pg8000(port: int) -> DriverBase:
    pytest.importorskip("pg8000")
    from mppool.drivers.pg8000 import Pg8000Driver

    return Pg8000Driver("app", "127.0.0.1", port=port, timeout=60)


def over_tls_by_pymysql(port: int) -> DriverBase:
    pytest.importorskip("pymysql")
    from mppool.drivers.pymysql import PyMySQLDriver

    return PyMySQLDriver(host="127.0.0.1", port=port, user="app", connect_timeout=60)


GREETING = b"\x0a8.0.0\0" + struct.pack("<I8sxHBHHB10x13s", 1, b"challeng", 0xFFFF, 33, 2, 0x0008, 21, b"e, continued")


@pytest.mark.parametrize(
    ("make", "offer", "asks"),
    [
        (over_tls_by_httpx, b"", 0),
        (over_tls_by_pymemcache, b"", 0),
        (over_tls_by_pg8000, b"S", 8),
        (over_tls_by_pymysql, struct.pack("<I", len(GREETING)) + GREETING, 36),
    ],
    ids=["httpx", "pymemcache", "pg8000", "pymysql"],
)
def test_a_child_forked_during_a_tls_handshake_does_not_claim_to_have_let_go(make: Callable[[int], DriverBase], offer: bytes, asks: int) -> None:
    """It has the connection, which another thread of its parent was making; if it cannot close it, the driver says so, and the pool goes on counting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        driver = make(port)

        def dial() -> None:
            with contextlib.suppress(OSError):
                driver.dial()

        thread = threading.Thread(target=dial, daemon=True)
        thread.start()
        server, _ = listener.accept()
        with server:
            server.settimeout(20)
            server.sendall(offer)
            server.recv(asks, socket.MSG_WAITALL)
            assert server.recv(1) == b"\x16"  # a TLS handshake

            def child(_: Child) -> bool:
                return not driver.forked() or not connections_to(port)

            with fork(child) as (forked,):
                assert forked.result()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        thread.join(20)


def connections_to(port: int) -> list[int]:
    """The descriptors of this process that are such."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.getpeername()[1:2] == (port,):
                found.append(fd)
    return found
