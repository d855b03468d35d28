"""Rows about children that use the pool: os.fork, multiprocessing, executors, and C code that forks without Python's hooks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from typing import Any

import mppool
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import ask
from tests.matrix.scene import Scene, row
from tests.matrix.work import Tally, in_threads, use

THREADS = 2


def busy(pool: mppool.Pool, tally: Tally, who: str, times: int = 15, threads: int = THREADS) -> None:
    """A child's work: some threads that use the pool, then its end in order."""
    in_threads(threads, use, pool, tally, who, times)
    pool.close()


def in_a_worker(scene: Scene, work: Callable[[mppool.Pool], None]) -> None:
    """A process that uses the pool, does its ``work``, and uses the pool again."""

    def worker(_: Child) -> None:
        pool = scene.pool()
        use(pool, scene.tally, "before", 3)
        work(pool)
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(worker) as (child,):
        child.result()


@row("fork", workers=5, cap=3, alone=True)
def forked(scene: Scene) -> None:
    """The parent uses the pool before, meanwhile and after."""

    def work(pool: mppool.Pool) -> None:
        with fork(*(lambda child, n=n: busy(pool, scene.tally, f"child{n}") for n in range(4))) as children:
            use(pool, scene.tally, "meanwhile", 30)
            for one in children:
                one.result()

    in_a_worker(scene, work)


@row("C fork", workers=4, cap=3, alone=True)
def c_forked(scene: Scene) -> None:
    """No hook tells the children; the parent has an idle session, and is in the middle of a reply."""

    def work(pool: mppool.Pool) -> None:
        with pool.connection() as sock:
            number = ask(sock, "first")
            sock.sendall(b"middle 100\n")
            pids = []
            for n in range(3):
                pid = c_fork()
                if pid == 0:
                    fine = use(pool, scene.tally, f"child{n}", 15)
                    pool.close()
                    os._exit(not fine)
                pids.append(pid)
            use(pool, scene.tally, "meanwhile", 30)
            assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
            assert sock.recv(100) == b"%d middle\n" % number
            assert ask(sock, "last") == number

    in_a_worker(scene, work)


@row("fork of a fork", workers=4, cap=2)
def generations(scene: Scene) -> None:
    """Each generation uses the pool, forks the next, uses it again when that one has ended, and dies without a word."""

    def generation(left: int) -> None:
        use(pool, scene.tally, f"generation{left}", 5)
        if left:
            with fork(lambda child: generation(left - 1)) as (child,):
                child.result()
            use(pool, scene.tally, f"generation{left}-again", 5)

    pool = scene.pool()
    with fork(lambda child: generation(3)) as (child,):
        child.result()


@row("fork, parent killed", workers=4, cap=3, alone=True, kills=True)
def parent_killed(scene: Scene) -> None:
    """Children go on with a pool whose maker was killed under a lease."""

    def parent(child: Child) -> None:
        use(pool, scene.tally, "before", 3)
        for n in range(3):
            if os.fork() == 0:
                os.read(told, 1)  # the parent's death comes first
                busy(pool, scene.tally, f"orphan{n}")
                os._exit(0)
        with pool.connection() as sock:
            ask(sock, "lease")
            child.tell()
            time.sleep(60)

    pool = scene.pool()
    told, telling = os.pipe()
    with fork(parent) as (child,):
        child.hear()
        child.kill()
        child.wait()
        os.write(telling, b"...")
    eventually(lambda: len(scene.tally.lines("ok")) >= 3 + 3 * THREADS * 15 or scene.tally.lines("failed"), 30, what="the orphans' requests")


@contextlib.contextmanager
def by_multiprocessing(method: str, scene: Scene, pool: mppool.Pool, count: int) -> Iterator[None]:
    context: Any = multiprocessing.get_context(method)
    forkserver._forkserver.__init__()  # type: ignore[misc] # one that a parent of ours started is not our child
    processes = [context.Process(target=busy, args=(pool, scene.tally, f"{method}{n}", 10)) for n in range(count)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.join(30)
        assert process.exitcode == 0, f"{process} ended with {process.exitcode}"


def methods(scene: Scene, method: str) -> None:
    def work(pool: mppool.Pool) -> None:
        with by_multiprocessing(method, scene, pool, 3):
            use(pool, scene.tally, "meanwhile", 30)

    in_a_worker(scene, work)


@row("multiprocessing fork", workers=4, cap=3, alone=True)
def mp_fork(scene: Scene) -> None:
    methods(scene, "fork")


@row("multiprocessing spawn", workers=4, cap=3, alone=True)
def mp_spawn(scene: Scene) -> None:
    """The pool is pickled."""
    methods(scene, "spawn")


@row("multiprocessing forkserver", workers=4, cap=3)
def mp_forkserver(scene: Scene) -> None:
    """The pool is pickled, to children of a server that forks."""
    methods(scene, "forkserver")


def task(pool: mppool.Pool, path: str, n: int) -> bool:
    return use(pool, Tally(path), f"task{n}", 5)


def in_a_lease(scene: Scene, start: Callable[[mppool.Pool], None]) -> None:
    """A worker in the middle of a reply starts processes; the reply is then read, and the lease goes on."""

    def work(pool: mppool.Pool) -> None:
        with pool.connection() as sock:
            number = ask(sock, "first")
            sock.sendall(b"middle 50\n")
            start(pool)
            assert sock.recv(100) == b"%d middle\n" % number
            assert ask(sock, "last") == number

    in_a_worker(scene, work)


@row("multiprocessing.Pool in a lease", workers=4, cap=2)
def mp_pool(scene: Scene) -> None:
    def start(pool: mppool.Pool) -> None:
        with multiprocessing.get_context("fork").Pool(3) as processes:
            assert all(processes.starmap(task, [(pool, scene.tally.path, n) for n in range(9)], chunksize=1))

    in_a_lease(scene, start)


@row("ProcessPoolExecutor in a lease", workers=4, cap=2)
def executor(scene: Scene) -> None:
    def start(pool: mppool.Pool) -> None:
        with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as processes:
            assert all(processes.map(task, [pool] * 9, [scene.tally.path] * 9, range(9)))

    in_a_lease(scene, start)


def c_fork() -> int:
    """fork(2) as C code does it, without Python's hooks."""
    return int(ctypes.PyDLL(None).fork())
