"""Rows about forks: os.fork, multiprocessing, executors, subprocesses, daemons, and C code that forks without Python's hooks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import mppool
from mppool.drivers.raw import RawDriver
from mppool.options import parse_target
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import ask
from tests.matrix.scene import Scene, row
from tests.matrix.work import Tally, from_environment, in_threads, keep_using, use

THREADS = 2


# Children that use the pool.


def busy(pool: mppool.Pool, tally: Tally, who: str, times: int = 15, threads: int = THREADS) -> None:
    """A child's work: some threads that use the pool, then its end in order."""
    in_threads(threads, use, pool, tally, who, times)
    pool.close()


@row("fork", workers=5, cap=3, alone=True)
def forked(scene: Scene) -> None:
    """The parent uses the pool before, meanwhile and after."""

    def parent(child: Child) -> None:
        pool = scene.pool()
        use(pool, scene.tally, "before", 3)
        with fork(*(lambda child, n=n: busy(pool, scene.tally, f"child{n}") for n in range(4))) as children:
            use(pool, scene.tally, "meanwhile", 30)
            for one in children:
                one.result()
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(parent) as (child,):
        child.result()


@row("C fork", workers=4, cap=3, alone=True)
def c_forked(scene: Scene) -> None:
    """No hook tells the children; the parent has an idle session, and is in the middle of a reply."""

    def parent(child: Child) -> None:
        pool = scene.pool()
        with pool.connection() as sock:
            use(pool, scene.tally, "before", 3)
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
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(parent) as (child,):
        child.result()


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
    def parent(child: Child) -> None:
        pool = scene.pool()
        use(pool, scene.tally, "before", 3)
        with by_multiprocessing(method, scene, pool, 3):
            use(pool, scene.tally, "meanwhile", 30)
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(parent) as (child,):
        child.result()


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


# A worker that holds a lease starts processes.


def task(pool: mppool.Pool, path: str, n: int) -> bool:
    return use(pool, Tally(path), f"task{n}", 5)


def in_a_lease(scene: Scene, start: Callable[[mppool.Pool], None]) -> None:
    """A worker in the middle of a reply starts processes; the reply is then read, and the lease goes on."""

    def worker(child: Child) -> None:
        pool = scene.pool()
        with pool.connection() as sock:
            number = ask(sock, "first")
            sock.sendall(b"middle 50\n")
            start(pool)
            assert sock.recv(100) == b"%d middle\n" % number
            assert ask(sock, "last") == number
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(worker) as (child,):
        child.result()


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


# Children that ignore the pool, and outlive a worker that is killed.


def as_many_as_can_be(scene: Scene, timeout: float) -> int:
    """Lease at most the whole cap at once, and see that the server has no more connections than that; how many they were."""
    pool = scene.pool()
    sessions = []
    with contextlib.suppress(mppool.PoolTimeout):
        for _ in range(scene.cap):
            sessions.append(pool.getconn(timeout=timeout))  # noqa: PERF401 (those before a timeout count)
    for session in sessions:
        ask(session, "whole")
    live = scene.server.counts()["live"]
    assert live <= scene.cap, f"{live} connections at the server, the cap is {scene.cap}"
    for session in sessions:
        pool.putconn(session)
    pool.close()
    return len(sessions)


def orphaned(scene: Scene, start: Callable[[int, int], int], *, settled_at_once: bool, debug: bool = False) -> None:
    """A worker with one idle and one lent session starts a child and is killed; the child lives on."""

    def worker(child: Child) -> None:
        sessions = [pool.getconn(), pool.getconn()]
        for session in sessions:
            ask(session, "mine")
        pool.putconn(sessions[0])
        reader = sessions[1].makefile("rb") if debug else None  # keeps a closed socket open
        child.tell(start(stay, leave))
        time.sleep(60)
        del reader

    pool = scene.pool(debug=debug)
    stay, leave = os.pipe()
    os.set_inheritable(stay, True)
    with fork(worker) as (child,):
        orphan = child.hear()
        child.kill()
        child.wait()
    with fork(lambda child: as_many_as_can_be(scene, 10 if settled_at_once else 0.5)) as (child,):
        had = child.result()
    assert Path(f"/proc/{orphan}").exists(), "the orphan is there all the while"
    scene.notes.append(f"{had} of {scene.cap} to be had while the child lives")
    if settled_at_once:
        assert had == scene.cap
    else:  # what it may still hold stays counted: see Limits in the README
        assert had < scene.cap
    os.close(leave)
    os.close(stay)


@row("multiprocessing child outlives its worker", workers=3, cap=3, alone=True, kills=True)
def mp_orphan(scene: Scene) -> None:
    def start(stay: int, leave: int) -> int:
        process = multiprocessing.get_context("fork").Process(target=until_told, args=(stay, leave))
        process.start()
        return process.pid or 0

    orphaned(scene, start, settled_at_once=True)


def until_told(stay: int, leave: int) -> None:
    """Ignore everything until the other end of the pipe is closed everywhere."""
    os.close(leave)
    while os.read(stay, 1):
        pass


@row("multiprocessing child outlives its worker, debug and makefile", workers=3, cap=3, alone=True, kills=True)
def mp_orphan_with_duplicates(scene: Scene) -> None:
    """The user has a duplicate, and a file on it, which keeps it open although it is closed: the child has none of that."""

    def start(stay: int, leave: int) -> int:
        process = multiprocessing.get_context("fork").Process(target=until_told, args=(stay, leave))
        process.start()
        return process.pid or 0

    orphaned(scene, start, settled_at_once=True, debug=True)


@row("C-forked child outlives its worker", workers=3, cap=3, alone=True, kills=True)
def c_orphan(scene: Scene) -> None:
    """No hook ran: the child has the dead worker's sockets and its row, so what was lent stays counted until it ends."""

    def start(stay: int, leave: int) -> int:
        pid = c_fork()
        if pid == 0:
            until_told(stay, leave)
            os._exit(0)
        return pid

    orphaned(scene, start, settled_at_once=False)


def c_fork() -> int:
    """fork(2) as C code does it, without Python's hooks."""
    return int(ctypes.PyDLL(None).fork())


@row("subprocess outlives its worker", workers=3, cap=3, alone=True, kills=True)
def subprocess_orphan(scene: Scene) -> None:
    def start(stay: int, leave: int) -> int:
        return subprocess.Popen(["cat"], stdin=stay, stdout=subprocess.DEVNULL, close_fds=False).pid

    orphaned(scene, start, settled_at_once=True)


# Other programs.


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


# Forks while another thread is inside a checkout. C forks only where that thread waits: beside a thread that runs Python
# code, a child forked without Python's hooks hangs for the interpreter's own lock, with or without a pool.


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
    def worker(child: Child) -> None:
        pool, stop = scene.pool(), threading.Event()
        threads = [threading.Thread(target=hurry, args=(pool, scene.tally, stop)) for _ in range(2)]
        threads.append(threading.Thread(target=keep_using, args=(pool, scene.tally, "thread", stop)))
        use(pool, scene.tally, "before", 1)
        for thread in threads:
            thread.start()
        try:
            forks_meanwhile(pool, scene, 12)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        use(pool, scene.tally, "after", 3)
        pool.close()

    with fork(worker) as (child,):
        child.result()


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
        process = multiprocessing.get_context("fork").Process(target=until_told, args=(stay, leave))
        process.start()
        child.tell(process.pid)
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


# Daemons, and ways to end.


def in_new_interpreters(scene: Scene, function: str, *arguments: str) -> None:
    """Call a function of this file in a new interpreter, with a real exit and its atexit functions, beside one that uses the pool."""
    code = f"from tests.matrix.forks import {function}; {function}({', '.join(map(repr, arguments))})"
    with fork(lambda child: busy(scene.pool(), scene.tally, "beside", 40)) as (child,):
        exit_code = scene.python(code)
        child.result()
    assert exit_code == 0, f"{function}{arguments}: exit code {exit_code}"


@row("daemon", workers=2, cap=2, alone=True)
def daemon(scene: Scene) -> None:
    """Double fork and setsid under a lease; those in between exit in order, and the daemon uses the pool."""
    in_new_interpreters(scene, "daemonize")
    eventually(lambda: scene.tally.lines("note") == ["the daemon is done"], 20, what="the daemon's end")


def daemonize() -> None:
    pool, tally = from_environment()
    use(pool, tally, "before", 3)
    with pool.connection() as sock:
        ask(sock, "lease")
        if os.fork():
            sys.exit(0)
        os.setsid()
        if os.fork():
            sys.exit(0)
    use(pool, tally, "daemon", 20)
    pool.close()
    tally.add("note", "the daemon is done")


@row("fork in a lease, child leaves by sys.exit", workers=3, cap=2, alone=True)
def by_exit(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "sys.exit")


@row("fork in a lease, child leaves by os._exit", workers=3, cap=2, alone=True)
def by_os_exit(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "os._exit")


@row("fork in a lease, child leaves by an exception", workers=3, cap=2, alone=True)
def by_exception(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "exception")


def leave(how: str) -> None:
    """In the middle of a reply a child is forked and leaves the block; the parent reads its reply, and goes on."""
    pool, tally = from_environment()
    for used in (False, True):
        with pool.connection() as sock:
            number = ask(sock, "first")
            sock.sendall(b"middle 20\n")
            pid = os.fork()
            if pid == 0:
                if used:
                    use(pool, tally, "child", 3)
                if how == "sys.exit":
                    sys.exit(0)
                elif how == "os._exit":
                    os._exit(0)
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (its traceback is wanted, but not seen)
                raise RuntimeError("the child fails")
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == (1 if how == "exception" else 0), code
            assert sock.recv(100) == b"%d middle\n" % number
            assert ask(sock, "last") == number
        use(pool, tally, "after", 3)
    pool.close()
