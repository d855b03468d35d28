"""What a broker, its workers and their pools may leave behind."""

from __future__ import annotations

import psutil

from mppool.kernel import memory
from mppool.kernel.runtime import scope_of

__all__ = ["names", "processes_of"]


def names(path: str) -> list[str]:
    """Shared memory, lock files and semaphores of all pools of this socket."""
    prefix = f"mppool-{scope_of(path)}"
    return memory.names(prefix) + memory.names(f"sem.{prefix}")


def processes_of(path: str) -> list[psutil.Process]:
    """Brokers and keepers of this socket."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(part in (path, f"{path}.keeper") for part in command):
            found.append(process)
    return found
