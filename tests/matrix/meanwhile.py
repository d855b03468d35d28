"""Rows about forks while another thread is inside a checkout.

C forks only where that thread waits: beside a thread that runs Python code, a child forked without Python's hooks hangs for
the interpreter's own lock, with or without a pool.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mppool
from mppool.drivers.raw import RawDriver
from mppool.options import parse_target
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import ask
from tests.matrix.forks import c_fork, in_a_worker
from tests.matrix.orphans import as_many_as_can_be, mp_child
from tests.matrix.scene import Scene, row
from tests.matrix.work import Tally, keep_using, use


def forks_meanwhile(pool: mppool.Pool, scene: Scene, times: int) -> None:
    """Fork so many children that use the pool, one after the other, the last three at once."""
    children = []
    for n in range(times):
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                if use(pool, scene.tally, f"child{n}", 4):
                    code = 0
                pool.close()
            os._exit(code)
        children.append(pid)
        if len(children) == 3 or n == times - 1:
            for child in children:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            children.clear()


def hurry(pool: mppool.Pool, tally: Tally, stop: threading.Event) -> None:
    """Check out and return, as quickly as can be."""
    while not stop.is_set():
        try:
            for _ in range(50):
                pool.putconn(pool.getconn(timeout=20))
        except mppool.Error as error:
            tally.add("failed", repr(error))


@row("fork while threads are on the fast path", workers=4, cap=2)
def fast_path(scene: Scene) -> None:
    def work(pool: mppool.Pool) -> None:
        stop = threading.Event()
        threads = [threading.Thread(target=hurry, args=(pool, scene.tally, stop)) for _ in range(2)]
        threads.append(threading.Thread(target=keep_using, args=(pool, scene.tally, "thread", stop)))
        for thread in threads:
            thread.start()
        try:
            forks_meanwhile(pool, scene, 12)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    in_a_worker(scene, work)


def is_asleep(thread: threading.Thread) -> bool:
    """Is it in poll(2), or in a sleep? C code that forks while a thread runs Python may inherit a lock that nobody ever lets go."""
    with open(f"/proc/self/task/{thread.native_id}/syscall", encoding="ascii") as file:
        return file.read().split()[0] in ("7", "271", "73", "35", "230", "101", "115")  # poll, ppoll, nanosleep, clock_nanosleep, here and on ARM


def while_waiting(scene: Scene, forking: Callable[[], int]) -> None:
    """Another process has the whole cap; a thread waits; the process forks; then the others give back."""

    def holder(child: Child) -> None:
        for _ in range(rounds):
            child.hear()
            sessions = [pool.getconn(timeout=20) for _ in range(scene.cap)]
            child.tell()
            child.hear()
            for session in sessions:
                ask(session, "held")
                pool.putconn(session)
            if not scene.row.broker:
                pool.close()  # idle it would keep them
        pool.close()

    def worker(child: Child) -> None:
        for _ in range(rounds):
            child.hear()
            thread = threading.Thread(target=use, args=(pool, scene.tally, "waiter", 3))
            thread.start()
            eventually(lambda: scene.numbers()["waiting"] == 1, what="the thread waits")
            eventually(partial(is_asleep, thread))
            pid = forking()
            if pid == 0:
                fine = use(pool, scene.tally, "child", 3)
                pool.close()
                os._exit(not fine)
            eventually(lambda: scene.numbers()["waiting"] == 2, what="the child waits, too")
            child.tell()
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            thread.join()
            child.tell()
        use(pool, scene.tally, "after", 3)
        pool.close()

    pool = scene.pool()
    rounds = 3 if scene.row.broker else 1
    with fork(holder, worker) as (holding, working):
        for _ in range(rounds):
            holding.tell()
            holding.hear()
            working.tell()
            working.hear()
            holding.tell()
            working.hear()
        for child in (holding, working):
            child.result()


@row("fork while a thread waits", workers=3, cap=2, alone=True)
def waiting(scene: Scene) -> None:
    while_waiting(scene, os.fork)


@row("C fork while a thread waits", workers=3, cap=2)
def c_waiting(scene: Scene) -> None:
    while_waiting(scene, c_fork)


class SlowDriver(RawDriver):
    """Stays in the middle of a dial, the connection just made, until it is let go."""

    def __init__(self, target: str) -> None:
        super().__init__(parse_target(target))
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def dial(self) -> socket.socket:
        sock = super().dial()
        self.inside.set()
        assert self.go_on.wait(30)
        return sock


def dialing_pool(scene: Scene) -> tuple[mppool.Pool, SlowDriver]:
    driver = SlowDriver(scene.target)
    return scene.pool(driver=driver, max_dialing=scene.cap), driver


def in_a_thread(pool: mppool.Pool, scene: Scene, driver: SlowDriver) -> threading.Thread:
    """A thread that is in the middle of a dial."""
    thread = threading.Thread(target=use, args=(pool, scene.tally, "dialer", 3))
    thread.start()
    assert driver.inside.wait(20)
    return thread


def while_dialing(scene: Scene, forking: Callable[[], int]) -> None:
    def worker(child: Child) -> None:
        pool, driver = dialing_pool(scene)
        thread = in_a_thread(pool, scene, driver)
        pid = forking()
        if pid == 0:
            driver.inside, driver.go_on = threading.Event(), threading.Event()
            driver.go_on.set()
            fine = use(pool, scene.tally, "child", 5)
            pool.close()
            os._exit(not fine)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        driver.go_on.set()
        thread.join()
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(worker) as (child,):
        child.result()


@row("fork while a thread dials", workers=2, cap=2, alone=True)
def dialing(scene: Scene) -> None:
    while_dialing(scene, os.fork)


@row("C fork while a thread dials", workers=2, cap=2)
def c_dialing(scene: Scene) -> None:
    while_dialing(scene, c_fork)


@row("fork while a thread dials, child outlives its worker", workers=3, cap=2, alone=True, kills=True)
def dialing_orphan(scene: Scene) -> None:
    """The child lets go of what the worker's thread was dialing: with the worker dead the whole cap is to be had, while the child lives."""

    def worker(child: Child) -> None:
        pool, driver = dialing_pool(scene)
        in_a_thread(pool, scene, driver)
        child.tell(mp_child(stay, leave))
        time.sleep(60)

    stay, leave = os.pipe()
    with fork(worker) as (child,):
        orphan = child.hear()
        child.kill()
        child.wait()
    with fork(lambda child: as_many_as_can_be(scene, 0.5)) as (child,):
        had = child.result()
    assert Path(f"/proc/{orphan}").exists(), "the orphan is there all the while"
    assert had == scene.cap
    os.close(leave)
    os.close(stay)
