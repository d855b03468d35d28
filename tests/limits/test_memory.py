"""Shared memory, and the rights to it, run out."""

from __future__ import annotations

import re
import resource
import sys

import psutil
import pytest

import mppool
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge, ask
from tests.limits.shared import Doing

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
