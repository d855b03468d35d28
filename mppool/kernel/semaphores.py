"""POSIX named semaphores, opened safely. Nothing here or elsewhere ever waits on one.

A dead process's unit never comes back by itself, posix_ipc swallows SystemExit during a wait, and ``sem_timedwait``
follows the wall clock. So semaphores are only tried (``acquire(0)``); waiting is ``poll`` on a socket.
"""

from __future__ import annotations

import errno
import os

import posix_ipc

from mppool.errors import Error, ProtocolError
from mppool.kernel.memory import SHM, check_ours, names, open_to_us

__all__ = ["BusyError", "Semaphore", "open_semaphore", "unlink", "unlink_all"]

Semaphore = posix_ipc.Semaphore
BusyError = posix_ipc.BusyError

_SMALLEST = 32  # sizeof(sem_t) on 64-bit glibc; touching a shorter file is a SIGBUS


def _file(name: str) -> str:
    return f"{SHM}/sem.{name[1:]}"


def open_semaphore(name: str, initial: int) -> posix_ipc.Semaphore:
    """Open the semaphore, made with ``initial`` units if it was not there. Atomic among processes.

    Raises ProtocolError if the file behind it is no semaphore, Error if it is somebody else's or there is no room.

    Either it is made, and must not be there, or it is opened, and was seen to be ours: nobody else can replace it then, as
    /dev/shm is sticky. "Open it or make it" in one call would open what somebody else had made a moment before.
    """
    for _ in range(100):
        try:
            if _is_there(name):
                return posix_ipc.Semaphore(name)
            return posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=initial)
        except posix_ipc.ExistentialError:
            continue  # made, or removed, by another process just now
        except posix_ipc.PermissionsError as error:
            if not open_to_us(_file(name)):
                raise Error(f"{_file(name)} belongs to another user") from error
        except OSError as error:
            room = f"; enlarge {SHM} (docker: --shm-size) or run `mppool gc`" if error.errno == errno.ENOSPC else ""
            raise Error(f"cannot open the semaphore {_file(name)}: {error.strerror or error}{room}") from error
    raise Error(f"{_file(name)} comes and goes; who does that?")


def _is_there(name: str) -> bool:
    try:
        info = os.lstat(_file(name))
    except FileNotFoundError:
        return False
    check_ours(info, _file(name), names=1 + _unfinished(info))
    if info.st_size < _SMALLEST:
        raise ProtocolError(f"{_file(name)} is no semaphore; remove it (mppool gc)")
    return True


def _unfinished(info: os.stat_result) -> int:
    """The C library makes a semaphore under a name of its own, then links it: whoever is killed there leaves both. How many such names it has."""
    if info.st_nlink == 1:
        return 0
    with os.scandir(SHM) as entries:
        return sum(entry.inode() == info.st_ino and len(entry.name) == len("sem.XXXXXX") for entry in entries)


def unlink(name: str) -> None:
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        pass


def unlink_all(prefix: str) -> int:
    """Remove every semaphore of ours whose name begins with ``prefix`` (which begins with "/"); how many there were."""
    found = names("sem." + prefix[1:])
    for file in found:
        unlink("/" + file[len("sem.") :])
    return len(found)
