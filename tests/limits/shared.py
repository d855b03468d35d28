"""Workers that take turns, and then all there is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mppool
from mppool.kernel import link
from tests.helpers.leases import lease_all
from tests.helpers.processes import Child
from tests.helpers.server import Judge, ask

SOON = 20.0  # seconds, of a busy machine
Doing = Callable[[Child], Any]


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
