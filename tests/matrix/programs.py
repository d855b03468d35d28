"""Rows about other programs that a worker starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable

import mppool
from tests.helpers.processes import Child, fork
from tests.helpers.server import ask
from tests.matrix.scene import Scene, row
from tests.matrix.work import Tally, keep_using, use


def sockets_of(pid: int) -> list[str]:
    """Sockets and shared memory that a process has beyond its standard streams."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            what = os.readlink(f"/proc/{pid}/fd/{fd}")
            if int(fd) > 2 and (what.startswith("socket:") or "mppool" in what or "shm" in what):
                found.append(f"{fd} -> {what}")
    return found


def no_descriptor_reaches(scene: Scene, start: Callable[[], int]) -> None:
    """Under load (dials, fetches, waits, closes in other threads), and with a lease: no program that is started has a socket of ours."""

    def worker(child: Child) -> None:
        pool, stop = scene.pool(), threading.Event()
        threads = [threading.Thread(target=keep_using, args=(pool, scene.tally, "thread", stop)) for _ in range(3)]
        threads.append(threading.Thread(target=keep_dialing, args=(pool, scene.tally, stop)))
        with pool.connection() as sock:
            ask(sock, "lease")
            for thread in threads:
                thread.start()
            try:
                for _ in range(15):
                    pid = start()
                    try:
                        assert (found := sockets_of(pid)) == [], found
                    finally:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            ask(sock, "lease-again")
        pool.close()

    def other(child: Child) -> None:
        """Sessions come and go between two processes."""
        pool = scene.pool()
        use(pool, scene.tally, "other", 50)
        pool.close()

    with fork(worker, other) as children:
        for child in children:
            child.result()


def keep_dialing(pool: mppool.Pool, tally: Tally, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            pool.putconn(pool.getconn(timeout=20), discard=True)
        except mppool.Error as error:
            tally.add("failed", repr(error))


@row("subprocess", workers=2, cap=2, alone=True)
def subprocesses(scene: Scene) -> None:
    no_descriptor_reaches(scene, lambda: subprocess.Popen(["sleep", "60"], close_fds=False).pid)


@row("subprocess with preexec_fn", workers=2, cap=2)
def preexec(scene: Scene) -> None:
    """Python's hooks run between fork and exec there."""
    no_descriptor_reaches(scene, lambda: subprocess.Popen(["sleep", "60"], close_fds=False, preexec_fn=os.getpid).pid)


@row("os.posix_spawn", workers=2, cap=2, alone=True)
def posix_spawn(scene: Scene) -> None:
    no_descriptor_reaches(scene, lambda: os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ))
