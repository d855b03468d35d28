"""What happens at the limits of a machine: each is a clear error or a wait, never a loss. Afterwards the whole cap can be leased and nothing is left.

Too few descriptors and too little shared memory at the very beginning are in test_bad_input.py; here they run out later.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import mppool
from mppool import shell
from mppool.kernel import link
from mppool.kernel.runtime import scope_of
from mppool.table import ROWS
from mppool.wire import Kind, Message, encode, pack_held
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import BrokerProcess, Child, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, _Server, ask, judge
from tests.helpers.users import ALICE, Home, as_root, as_user, broker_of, home_of

SOON = 20.0  # seconds, of a busy machine

Doing = Callable[[Child], Any]


@pytest.fixture
def home() -> Iterator[Home]:
    with home_of(ALICE) as it:
        yield it


@pytest.fixture
def many_descriptors() -> None:
    """So many as processes that fork others, or open hundreds of sessions, need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"RLIMIT_NOFILE allows {hard} descriptors, this needs 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))


def lease_all(pool: mppool.Pool, size: int, name: str, timeout: float = SOON) -> set[int]:
    """The whole cap at once: the numbers of its sessions, each of which answers to us."""
    held = []
    try:
        held = [pool.getconn(timeout=timeout) for _ in range(size)]
        return {ask(sock, f"{name}-{n}") for n, sock in enumerate(held)}
    finally:
        for sock in held:
            pool.putconn(sock)


def worker_of(path: str, server: Judge, rounds: int) -> Callable[[Child], list[int]]:
    """A worker that, each round, takes turns until it is told to stop, and then all there is."""

    def work(child: Child) -> list[int]:
        sizes = []
        with mppool.Pool(server.address, name="web", max_size=2, broker=path) as pool:
            for _ in range(rounds):
                child.hear()
                turns = 0
                while turns <= 50 or not link.wait_readable(child._in, 0.001):
                    with pool.connection(timeout=SOON) as sock:
                        ask(sock, f"{os.getpid()}-{turns}")
                    turns += 1
                    if turns == 50:
                        child.tell()
                child.hear()
                sizes.append(len(lease_all(pool, 2, "both")))
                child.tell()
        return sizes

    return work


def work_together(*workers: Child) -> None:
    """They take turns at the same time, so that sessions move from one to another; then each takes all."""
    for do in (Child.tell, Child.hear):
        for worker in workers:
            do(worker)
    for worker in workers:
        worker.tell()
        worker.hear()


# Descriptors.


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
    assert said[-1] == "lent"
    assert all(re.search("Too many open files|maximum number of files|RLIMIT_NOFILE|lent", line) for line in said), said


def test_descriptors_run_out_at_a_fetch(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """The same when the descriptor of another process's session is lost on its way: the session stays as it was, for others and for later."""

    def owner(child: Child) -> None:
        with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
            for _ in FEW:
                lease_all(pool, 2, "owner")
                child.tell()
                child.hear()

    def poor(child: Child) -> list[str]:
        said = []
        for more in FEW:
            child.hear()
            with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
                said.append(try_with(pool, more, 1))
                assert len(lease_all(pool, 2, f"poor-{more}")) == 2
            child.tell()
        return said

    with fork(owner, poor) as (one, other):
        for _ in FEW:
            one.hear()
            other.tell()
            other.hear()
            one.tell()
        one.result()
        said = other.result()
    assert server.counts()["peak"] <= 2
    assert said[-1] == "lent"
    assert all(re.search("lent|no session within|Too many open files|maximum number of files|RLIMIT_NOFILE", line) for line in said), said


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

    def poor(child: Child) -> list[str]:
        said = []
        for more in FEW:
            child.hear()
            with mppool.Pool(server.address, name="web", max_size=1, broker=socket_path) as pool:
                pool.open()
                said.append(try_with(pool, more, 2))
                assert len(lease_all(pool, 1, f"poor-{more}")) == 1
            child.tell()
        return said

    with fork(owner, poor) as (one, other):
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
    assert said[-1] == "lent"
    assert all(re.search("lent|no session within|Too many open files|maximum number of files|RLIMIT_NOFILE", line) for line in said), said


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


# Shared memory.

FILL = """
import contextlib, os, sys, mppool
pool = mppool.Pool(("127.0.0.1", int(sys.argv[1])), max_size=4, broker=sys.argv[2])
def ask(sock, nonce):
    sock.sendall(nonce.encode() + b"\\n")
    assert sock.recv(100).split()[1].decode() == nonce
with open("/dev/shm/filler", "wb", buffering=0) as filler, pool:
    for k in range(int(sys.argv[3])):
        held = [pool.getconn(timeout=5) for _ in range(k)]
        for sock in held:
            pool.putconn(sock)
    with contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 512)
    held = []
    try:
        for n in range(4):
            held.append(pool.getconn(timeout=2))
            ask(held[-1], f"full-{n}")
    except mppool.Error as error:
        print(len(held), "then", type(error).__name__, error)
    for sock in held:
        pool.putconn(sock)
    filler.truncate(0)
    held = [pool.getconn(timeout=5) for _ in range(4)]
    for n, sock in enumerate(held):
        ask(sock, f"room-{n}")
        pool.putconn(sock)
    print("whole", pool.get_stats()["size"], pool.get_stats()["repairs"])
os.unlink("/dev/shm/filler")
print("left", os.listdir("/dev/shm"))
"""


@pytest.mark.parametrize("made", [1, 2, 4])
def test_shared_memory_is_full_at_a_later_semaphore(server: Judge, socket_path: str, made: int) -> None:
    """A session for which no token can be made is an Error that says what to do; those that are there go on, and with room again all can be had."""
    done = in_private_shm("4m", sys.executable, "-c", FILL, str(server.port), socket_path, str(made))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    where = r"cannot open the semaphore /dev/shm/sem\.mppool-\S+: No space left on device; enlarge /dev/shm \(docker: --shm-size\) or run `mppool gc`"
    assert re.fullmatch(rf"{made - 1} then Error {where}", said[0]), said
    assert said[1:] == ["whole 4 0", "left []"]
    eventually(lambda: server.counts()["live"] == 0)
    assert server.counts()["peak"] <= 4


OPEN = """
import os, sys, mppool
for _ in range(2):
    pool = mppool.Pool(("127.0.0.1", int(sys.argv[1])), broker=sys.argv[2])
    try:
        pool.open()
        print("open")
    except mppool.Error as error:
        print(type(error).__name__, error)
    pool.close()
print("left", os.listdir("/dev/shm"))
"""


@pytest.mark.parametrize(
    ("files", "said"), [(1, r"no room for /dev/shm/mppool-\S+\.lock: "), (2, r"cannot open /dev/shm/|no room in /dev/shm: "), (3, "semaphore")]
)
def test_no_file_more(server: Judge, socket_path: str, files: int, said: str) -> None:
    """A /dev/shm without room for one file more: lock file, table or semaphore, whichever could not be made is said, and what was made goes again."""
    done = in_private_shm(f"4m,nr_inodes={files}", sys.executable, "-c", OPEN, str(server.port), socket_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.search(f"^Error .*{said}", lines[0]), lines
    assert "enlarge" in lines[0]
    assert lines[1:] == [lines[0], "left []"]


BROKER = """
import os, subprocess, sys, time, mppool
path = sys.argv[2]
broker = subprocess.Popen([sys.executable, "-m", "mppool", "broker", "--socket", path])
while not os.path.exists(path):
    assert broker.poll() is None
    time.sleep(0.01)
try:
    exec(sys.argv[3])
    print("broker", broker.poll())
finally:
    broker.terminate()
    broker.wait()
"""


def test_shared_memory_is_full_beside_a_broker(server: Judge, socket_path: str) -> None:
    """A broker needs no room of its own: it serves on a full /dev/shm, and goes on after workers had their errors."""
    done = in_private_shm("4m", sys.executable, "-c", BROKER, str(server.port), socket_path, FILL.replace("sys.argv[3]", "2"))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("1 then Error cannot open the semaphore ")
    assert said[1].startswith("whole 4 ")
    assert said[-1] == "broker None"
    eventually(lambda: server.counts()["live"] == 0)


def limited(kind: int, spare: int) -> Doing:
    def work(child: Child) -> list[str]:
        path, address, max_size = child.hear()
        pool = mppool.Pool(tuple(address), max_size=max_size, name="web", broker=path)
        grown = psutil.Process().memory_info().vms if kind == resource.RLIMIT_AS else 0
        resource.setrlimit(kind, (grown + spare, resource.RLIM_INFINITY))
        said = []
        try:
            pool.open()
        except mppool.Error as error:
            said.append(str(error))
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with pool, pool.connection() as sock:
            said.append(str(ask(sock, "then")))
        return said

    return work


@pytest.mark.parametrize(
    ("kind", "spare", "word"), [(resource.RLIMIT_FSIZE, 4096, "RLIMIT_FSIZE"), (resource.RLIMIT_AS, 2 << 20, "RLIMIT_AS")], ids=["fsize", "as"]
)
def test_a_process_that_may_not_have_the_table(server: Judge, socket_path: str, kind: int, spare: int, word: str) -> None:
    """Limits of files and of memory are named where they stop the table from being made; without them the same pool works."""
    with fork(limited(getattr(resource, word), spare)) as (child,):
        child.tell([socket_path, server.address, 1024])
        said = child.result()
    assert word in said[0]
    assert said[1:] == ["1"]


# The clock.

SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long long *step;
__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_STEP");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) { step = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0); close(fd); }
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = syscall(SYS_clock_gettime, id, t);
    if (!failed && step && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += *step;
    return failed;
}
int gettimeofday(struct timeval *t, void *zone) {
    int failed = syscall(SYS_gettimeofday, t, zone);
    if (!failed && step) t->tv_sec += *step;
    return failed;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that shifts the wall clock of a process by as many seconds as a file says."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("clock")
    (directory / "step.c").write_text(SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(directory / "step.so"), str(directory / "step.c")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot compile: {done.stderr[:200]}")
    return str(directory / "step.so")


class Clock:
    """The wall clock of this process, its broker and its children, stepped by so many seconds at a time."""

    def __init__(self, file: str, step: int) -> None:
        self.file = file
        self.seconds = step
        self.sum = 0

    def step(self) -> None:
        before = time.time()
        self.sum += self.seconds
        with open(self.file, "r+b") as file:
            file.write(struct.pack("q", self.sum))
        assert abs(time.time() - before - self.seconds) < 60, "the shim does nothing"


def timed(clock: Clock | None, work: Callable[[], object]) -> float:
    """How long something took by the clock that nobody can step; the wall clock is stepped meanwhile."""
    thread = threading.Timer(0.3, clock.step) if clock is not None else None
    began = time.monotonic()
    if thread is not None:
        thread.start()
    with contextlib.suppress(mppool.Error):
        work()
    if thread is not None:
        thread.join()
    return time.monotonic() - began


def clock_story(port: int, path: str, file: str, step: int) -> None:
    """Runs in a process with the shim. Prints what took how long."""
    clock = Clock(file, step)
    address = ("127.0.0.1", port)
    found: dict[str, Any] = {}

    def wait(pool: mppool.Pool) -> None:
        with pool.connection(timeout=1.5):
            raise AssertionError("lent")

    with mppool.Pool(address, name="alone", max_size=1, broker=f"{path}-nobody") as pool, pool.connection():
        found["wait without a broker"] = timed(clock, lambda: wait(pool))
    with broker_process(path), mppool.Pool(address, name="web", max_size=1, max_idle=600, max_lifetime=600, max_lease=600, broker=path) as pool:
        with pool.connection() as sock:
            first = ask(sock, "first")
            found["wait in the queue"] = timed(clock, lambda: wait(pool))
            assert ask(sock, "still") == first  # max_lease has not struck
        back = threading.Timer(0.8, pool.putconn, [pool.getconn()])

        def take() -> None:
            back.start()
            pool.putconn(pool.getconn(timeout=60))

        found["a session comes back"] = timed(clock, take)
        clock.step()
        time.sleep(0.5)  # five ticks of the broker, and none of them may evict
        with pool.connection() as sock:
            assert ask(sock, "later") == first  # neither max_idle nor max_lifetime
        found["closed"] = pool.get_stats()["closed"]
        with mppool.Pool(address, name="short", max_size=1, max_idle=1, broker=path) as short:
            with short.connection() as sock:
                ask(sock, "short")
            found["max_idle of 1 s"] = timed(clock, lambda: eventually(lambda: short.get_stats()["closed"].get("idle_too_long"), timeout=30))
        with judge() as gone:
            address = gone.address
        with mppool.Pool(address, name="down", max_size=1, broker=path) as down:
            found["a server that is down"] = timed(clock, lambda: down.getconn(timeout=1.5))
            with judge(address[1]):
                found["a server that is back"] = timed(clock, lambda: down.putconn(down.getconn(timeout=60)))
    print(json.dumps(found))


def test_the_clock_is_stepped(server: Judge, socket_path: str, shim: str, tmp_path: Path) -> None:
    """Steps of an hour, forth or back, in the middle of each: waits, idle times, lifetimes and the pauses of the breaker are as long as they should be."""
    told = []
    for way, step in ("forth", 3600), ("back", -3600):
        file = tmp_path / way
        file.write_bytes(bytes(4096))
        call = f"from tests.test_limits import clock_story; clock_story({server.port}, {socket_path + way!r}, {str(file)!r}, {step})"
        environment = {**os.environ, "LD_PRELOAD": shim, "CLOCK_STEP": str(file)}
        told.append(subprocess.Popen([sys.executable, "-c", call], env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent))
    for process in told:
        found = json.loads(process.communicate(timeout=50)[0] or '"it failed; see stderr"')
        assert process.returncode == 0, found
        assert found.pop("closed") == {}
        shortest = {"wait without a broker": 1.4, "wait in the queue": 1.4, "max_idle of 1 s": 0.9, "a server that is down": 1.4}
        assert found.keys() == {*shortest, "a session comes back", "a server that is back"}
        for what, seconds in found.items():
            assert shortest.get(what, 0.0) <= seconds < SOON, (what, seconds)


# Many.


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
