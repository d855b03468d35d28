"""Leases of a server's sessions, all at once."""

from __future__ import annotations

import mppool
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import ask

__all__ = ["lease_all", "leave_sessions"]


def lease_all(pool: mppool.Pool, size: int, name: str = "all", timeout: float = 20.0) -> set[int]:
    """So many at once: the numbers of the connections, each of which answers to us."""
    held = []
    try:
        for _ in range(size):
            held.append(pool.getconn(timeout=timeout))  # noqa: PERF401 (what was lent before a failure is returned)
        return {ask(sock, f"{name}-{n}") for n, sock in enumerate(held)}
    finally:
        for sock in held:
            pool.putconn(sock)


def leave_sessions(pool: mppool.Pool, count: int) -> None:
    """A worker that dials so many sessions, gives them back, and is gone: afterwards only broker and keeper have them."""

    def work(_: Child) -> None:
        lease_all(pool, count)
        table, words = pool._worker.table, pool._worker.words  # type: ignore[union-attr]
        eventually(lambda: sum(map(bool, words[table.shared_flag : table.shared_flag + table.slots])) == count)

    with fork(work) as (child,):
        child.result()
