"""Rows about children that ignore the pool, and outlive a worker that is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mppool
from tests.helpers.processes import Child, fork
from tests.helpers.server import ask
from tests.matrix.forks import c_fork
from tests.matrix.scene import Scene, row


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


def until_told(stay: int, leave: int) -> None:
    """Ignore everything until the other end of the pipe is closed everywhere."""
    os.close(leave)
    while os.read(stay, 1):
        pass


def mp_child(stay: int, leave: int) -> int:
    process = multiprocessing.get_context("fork").Process(target=until_told, args=(stay, leave))
    process.start()
    return process.pid or 0


@row("multiprocessing child outlives its worker", workers=3, cap=3, alone=True, kills=True)
def mp_orphan(scene: Scene) -> None:
    orphaned(scene, mp_child, settled_at_once=True)


@row("multiprocessing child outlives its worker, debug and makefile", workers=3, cap=3, alone=True, kills=True)
def mp_orphan_with_duplicates(scene: Scene) -> None:
    """The user has a duplicate, and a file on it, which keeps it open although it is closed: the child has none of that."""

    orphaned(scene, mp_child, settled_at_once=True, debug=True)


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


@row("subprocess outlives its worker", workers=3, cap=3, alone=True, kills=True)
def subprocess_orphan(scene: Scene) -> None:
    def start(stay: int, leave: int) -> int:
        return subprocess.Popen(["cat"], stdin=stay, stdout=subprocess.DEVNULL, close_fds=False).pid

    orphaned(scene, start, settled_at_once=True)
