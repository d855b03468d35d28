"""Too little shared memory, too few descriptors, from the beginning."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import mppool
from mppool.table import _size as size_of_table
from mppool.table import slots_for
from tests.bad_input.shared import say
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge

CHECKOUT = """
import os, sys, mppool
pool = mppool.Pool(("127.0.0.1", int(sys.argv[1])), broker=sys.argv[2])
try:
    with pool.connection(timeout=5) as sock:
        sock.sendall(b"hello\\n")
        assert sock.recv(100).endswith(b" hello\\n")
        print("lent")
except mppool.Error as error:
    print(type(error).__name__, error)
print("size", pool.get_stats()["size"] if pool._worker else None)
pool.close()
print("left", *os.listdir("/dev/shm"))
"""


def checkout_with(pages: int, server: Judge, path: str) -> dict[str, str]:
    """A checkout with so many pages of shared memory: what it said."""
    done = in_private_shm(f"{pages * 4}k", sys.executable, "-c", CHECKOUT, str(server.port), path)
    assert done.returncode == 0, f"with {pages} pages: exit code {done.returncode}\n{done.stderr}"
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


TABLE = -(-size_of_table(slots_for(4)) // 4096)  # pages


def test_no_room_for_the_table(server: Judge, socket_path: str) -> None:
    """On a full /dev/shm the first use is an Error that says how much is needed and what to do; nothing is dialed."""
    said = checkout_with(TABLE // 2, server, socket_path)
    assert (
        said["Error"] == f"no room in /dev/shm: the shared table needs {size_of_table(slots_for(4))} bytes; enlarge it (docker: --shm-size) or run `mppool gc`"
    )
    assert server.counts()["dials"] == 0


def test_no_room_leaves_nothing(server: Judge, socket_path: str) -> None:
    """A pool that could not be made leaves no name."""
    assert checkout_with(TABLE // 2, server, socket_path)["left"] == ""


def test_hardly_any_room(server: Judge, socket_path: str) -> None:
    """With every amount of room around what the table needs, a checkout works or is an Error about room: never a signal, never a lost permit."""
    said = [checkout_with(pages, server, socket_path) for pages in range(TABLE - 1, TABLE + 4)]
    for outcome in said:
        assert "lent" in outcome or "/dev/shm" in outcome.get("Error", ""), outcome
        assert outcome["size"] in (("1",) if "lent" in outcome else ("0", "None")), outcome
    assert "Error" in said[0]
    assert "lent" in said[-1]
    eventually(lambda: server.counts()["live"] == 0)


def test_too_few_descriptors(server: Judge, socket_path: str) -> None:
    """Where RLIMIT_NOFILE cannot be raised far enough, the first use is an Error that says by how much."""
    pool = mppool.Pool(server.address, name="web", max_size=100, broker=socket_path)

    def work(child: Child) -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            pool.getconn()
        except mppool.Error as error:
            return say(error)
        return "lent"

    with fork(work) as (child,):
        assert re.fullmatch(
            r"Error: too few file descriptors: pool 'web' with max_size=100 needs ([12]\d\d), RLIMIT_NOFILE allows 64; raise it \(ulimit -n \1\)",
            child.result(),
        )


def test_a_soft_limit_is_raised(server: Judge, socket_path: str) -> None:
    """Where only the soft limit is low it is raised, and the whole cap can be lent."""
    pool = mppool.Pool(server.address, max_size=60, broker=socket_path)

    def work(child: Child) -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 1024))
        leases = [pool.getconn(timeout=10) for _ in range(60)]
        for sock in leases:
            pool.putconn(sock)
        pool.close()
        return len(leases)

    with fork(work) as (child,):
        assert child.result() == 60


def start_with(limit: int, path: str) -> subprocess.CompletedProcess[str]:
    command = f'ulimit -n {limit} && exec "$@"'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "mppool", "broker", "--socket", path], capture_output=True, text=True, timeout=30, check=False
    )


def test_too_few_descriptors_for_a_broker(directory: Path) -> None:
    """A broker that may not open enough does not start: exit code 1 and by how much."""
    done = start_with(256, f"{directory}/run/b.sock")
    assert done.returncode == 1
    assert re.fullmatch(r"mppool: too few file descriptors: the broker needs (1\d{3}), RLIMIT_NOFILE allows 256; raise it \(ulimit -n \1\)\n", done.stderr)


def test_a_broker_that_does_not_start_leaves_nothing(directory: Path) -> None:
    """A broker that fails after it took the socket's lock removes the lock file again."""
    start_with(256, f"{directory}/run/b.sock")
    assert os.listdir(f"{directory}/run") == []
