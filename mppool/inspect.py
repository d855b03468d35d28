"""Looking at pools from outside: what `status`, `resize` and `gc` do. Needs no broker and takes no row."""

from __future__ import annotations

import os
from typing import Any

from mppool.errors import Error
from mppool.kernel import memory
from mppool.kernel.locks import LockFile
from mppool.kernel.runtime import check_if_there, pool_id, scope_of
from mppool.permits import Permits, check_max_size
from mppool.snapshot import snapshot
from mppool.table import BROKER, FIRST_ROW, KEEPER, ROWS, W_MAX_SIZE, Table, creation_lock, is_in_use, lock_path, open_table, remove_names

__all__ = ["Inspected", "collect_garbage", "find_pool", "open_pools"]


class Inspected:
    """A pool that is there."""

    def __init__(self, table: Table, lock: LockFile) -> None:
        self.table = table
        self.lock = lock

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.table, self.lock)

    def resize(self, max_size: int) -> int:
        """The new cap; what it was before. Raises OptionError. The broker serves those who wait within its next tick."""
        check_max_size(self.table, max_size)
        permits = Permits(self.table, self.lock)
        with permits.entered(timeout=5.0):
            before = self.table.words[W_MAX_SIZE]
            permits.resize(max_size)
        return before


def find_pool(path: str, name: str) -> Inspected | None:
    """Raises BrokerUnavailable if the directory of the socket is not to be trusted."""
    check_if_there(path)
    return inspect(pool_id(path, name))


def open_pools(path: str) -> tuple[list[Inspected], list[str]]:
    """The pools of one broker's socket; and what is wrong with those that cannot be read. Raises as ``find_pool``."""
    check_if_there(path)
    pools, faults = [], []
    for ident in idents(f"mppool-{scope_of(path)}-"):
        try:
            pool = inspect(ident)
        except Error as error:
            faults.append(str(error))
        else:
            if pool is not None:
                pools.append(pool)
    return pools, faults


def inspect(ident: str) -> Inspected | None:
    try:
        lock = LockFile(lock_path(ident), create=False)
    except FileNotFoundError:
        return None
    table = None
    try:
        table = open_table(ident, lock)
    finally:
        if table is None:
            lock.close()
    return Inspected(table, lock) if table is not None else None


def idents(prefix: str) -> list[str]:
    found = {file.removeprefix("sem.").rpartition(".")[0] for start in (prefix, f"sem.{prefix}") for file in memory.names(start)}
    return sorted(found)


def collect_garbage() -> dict[str, list[dict[str, Any]]]:
    """Remove the names of every pool of this user that no process holds; say what was removed, and what is refused and why."""
    removed: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for ident in idents("mppool-"):
        try:
            with creation_lock(ident) as lock:
                name = name_of(ident, lock)
                if is_in_use(lock):
                    refused.append({"pool": ident, "name": name, "why": who_holds(lock)})
                else:
                    removed.append({"pool": ident, "name": name, "what": remove_names(ident)})
                    os.unlink(lock.path)
                lock.close()
        except Error as error:
            refused.append({"pool": ident, "name": "", "why": str(error)})
    return {"removed": removed, "refused": refused}


def name_of(ident: str, lock: LockFile) -> str:
    try:
        table = open_table(ident, lock)
    except Error:
        return ""
    return table.text("name") if table is not None else ""


def who_holds(lock: LockFile) -> str:
    workers = sum(lock.is_held(FIRST_ROW + row) for row in range(ROWS))
    holders = [f"{workers} rows held"] if workers else []
    holders += [word for byte, word in ((BROKER, "a broker"), (KEEPER, "a keeper")) if lock.is_held(byte)]
    return ", ".join(holders)
