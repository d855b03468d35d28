"""Shared memory: making it whole or not at all, and mapping it as aligned 8-byte words.

Words are read and written through ``memoryview.cast("Q")`` only: one aligned 8-byte move each. ``struct.pack_into``
zeroes its target first, and other processes saw that zero in a fifth of their reads.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat

import posix_ipc

from mppool.errors import Error

__all__ = ["SHM", "SharedWords", "create", "names", "open_existing", "unlink"]

SHM = "/dev/shm"


class SharedWords:
    """A mapping of a shared memory object: ``mem`` for bytes, ``words`` for 8-byte words. Owns no descriptor."""

    __slots__ = ("halves", "mem", "words")

    def __init__(self, mem: mmap.mmap) -> None:
        self.mem = mem
        self.words: memoryview = memoryview(mem).cast("Q")
        self.halves: memoryview = memoryview(mem).cast("I")

    def close(self) -> None:
        self.words.release()
        self.halves.release()
        self.mem.close()


def create(name: str, size: int) -> SharedWords:
    """Make a new object of ``size`` zero bytes, mode 0600. FileExistsError if the name is taken.

    The memory is reserved before it is mapped: on a full /dev/shm the first touch of an unreserved page would be a SIGBUS.
    """
    try:
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=0)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(name) from error
    try:
        os.fchmod(shm.fd, 0o600)
        os.posix_fallocate(shm.fd, 0, size)
        return SharedWords(mmap.mmap(shm.fd, size))
    except BaseException as error:
        shm.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise Error(f"no room in {SHM}: the shared table needs {size} bytes; enlarge it (docker: --shm-size) or run `mppool gc`") from error
        raise
    finally:
        shm.close_fd()


def open_existing(name: str) -> SharedWords | None:
    """Map an object that is there; None if it is not, or is still empty. Never resizes it, never removes it."""
    try:
        shm = posix_ipc.SharedMemory(name, 0, size=0)
    except posix_ipc.ExistentialError:
        return None
    except posix_ipc.PermissionsError as error:
        raise Error(f"{SHM}{name} belongs to another user") from error
    try:
        info = os.fstat(shm.fd)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise Error(f"{SHM}{name} must be ours alone: owner {info.st_uid} mode {stat.S_IMODE(info.st_mode):o}")
        if info.st_size < mmap.PAGESIZE:
            return None
        return SharedWords(mmap.mmap(shm.fd, info.st_size))
    finally:
        shm.close_fd()


def unlink(name: str) -> None:
    """Remove the name if it is there; mappings of it live on."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass


def names(prefix: str) -> list[str]:
    """The files in /dev/shm that begin with ``prefix`` and belong to us."""
    found = []
    with os.scandir(SHM) as entries:
        for entry in entries:
            try:
                if entry.name.startswith(prefix) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    found.append(entry.name)
            except FileNotFoundError:
                continue
    return sorted(found)
