"""This process: has it been forked, since when does the machine run, how many descriptors may it open."""

from __future__ import annotations

import mmap
import os
import resource

from mppool.errors import Error

__all__ = ["ForkGuard", "boot_word", "check_descriptors", "raise_descriptors"]

_MADV_WIPEONFORK = 18  # linux/mman.h; since Linux 4.14


class ForkGuard:
    """``guard.page[0]`` is 1 in the process that made it and 0 in every child, whoever forked it.

    A page the kernel hands to children zeroed (``MADV_WIPEONFORK``): C code that forks without Python's hooks (uWSGI)
    is noticed too, and reading it costs a fifth of ``os.getpid()``.
    """

    __slots__ = ("page",)

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.page.madvise(_MADV_WIPEONFORK)
        self.page[0] = 1


def boot_word() -> int:
    """A number for this run of the kernel: a table from before a reboot is not to be believed."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return int(file.read().replace("-", "").strip()[:15], 16)


def check_descriptors(needed: int, what: str) -> None:
    """Raise Error unless this process may open ``needed`` descriptors beyond those it has; the soft limit is raised where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed + len(os.listdir("/proc/self/fd"))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return
    raise Error(f"too few file descriptors: {what} needs {wanted}, RLIMIT_NOFILE allows {hard}; raise it (ulimit -n {wanted})")


def raise_descriptors() -> None:
    """Allow this process all the descriptors it may have: for processes of our own, which never use ``select()``, that stay few and open many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
