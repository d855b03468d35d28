"""Rows about Celery: prefork children over one pool, with a real Redis as its message broker."""

from __future__ import annotations

import os
import shutil
import signal
import sys

from tests.helpers.daemons import free_port, listens
from tests.helpers.processes import eventually
from tests.matrix.scene import Scene, row
from tests.matrix.webs import long_leases, missing

CONCURRENCY = 6
CAP = 2
TASKS = 120


def why_not() -> str:
    return missing("celery", "redis")() or ("" if shutil.which("redis-server") else "redis-server is not installed")


class Queue:
    """A Redis, and a Celery worker with its children, ended by SIGTERM."""

    def __init__(self, scene: Scene, *options: str, **environment: str) -> None:
        self.scene = scene
        port = free_port()
        where = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(scene.home))
        self.redis = scene.start("redis-server", *where, name="log-redis")
        eventually(lambda: listens(port), 20, what="redis-server listens")
        self.environment = {**environment, "MATRIX_REDIS": f"redis://127.0.0.1:{port}/0"}
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")
        command = (sys.executable, "-m", "celery", "-A", "tests.matrix.tasks", "worker", "--pool", "prefork", "--concurrency", str(CONCURRENCY))
        self.worker = scene.start(*command, *quiet, *options, **self.environment)
        self.sent = 0
        eventually(lambda: scene.tally.lines("parent"), 30, what="the worker is ready")

    def send(self, tasks: int, milliseconds: float) -> None:
        sender = self.scene.start(sys.executable, "-m", "tests.matrix.tasks", str(tasks), str(milliseconds), name="log-sender", **self.environment)
        assert sender.wait(60) == 0
        self.sent += tasks

    def all_done(self, but: int = 0) -> None:
        """``but``: tasks whose process was killed."""
        done = self.scene.tally
        eventually(lambda: len(done.lines("task")) >= self.sent - but, 60, what="all tasks are done")

    def end(self) -> None:
        self.worker.terminate()
        code = self.worker.wait(30)
        self.redis.terminate()
        self.redis.wait(20)
        pids = set(self.scene.tally.lines("task"))
        self.scene.notes.append(f"{len(self.scene.tally.lines('task'))} of {self.sent} tasks in {len(pids)} children")
        assert code == 0, f"exit code {code}"
        assert len(self.scene.tally.lines("parent")) == 2, "the parent used the pool at the end, too"


@row("Celery prefork", workers=CONCURRENCY, cap=CAP, kills=True, why_not=why_not)
def prefork(scene: Scene) -> None:
    """The pool is used in the parent before the fork, after it, and at the end. A child is killed under a lease."""
    queue = Queue(scene, MATRIX_EARLY="1")
    queue.send(TASKS // 2, 5)
    queue.all_done()
    before = len(scene.tally.lines("task"))
    queue.send(1, 60_000)
    os.kill(eventually(lambda: long_leases(scene), 20, what="a long lease").pop(), signal.SIGKILL)
    queue.send(TASKS // 2, 5)
    queue.all_done(but=1)
    assert len(scene.tally.lines("task")) == before + TASKS // 2
    queue.end()


@row("Celery prefork, max-tasks-per-child", workers=CONCURRENCY, cap=CAP, why_not=why_not)
def retiring(scene: Scene) -> None:
    """Children end after some tasks each; their successors find the sessions."""
    queue = Queue(scene, "--max-tasks-per-child", "8")
    queue.send(TASKS, 3)
    queue.all_done()
    queue.end()
    assert len(set(scene.tally.lines("task"))) > CONCURRENCY
