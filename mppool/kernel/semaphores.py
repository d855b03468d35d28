"""POSIX named semaphores, opened safely. Nothing here or elsewhere ever waits on one.

A dead process's unit never comes back by itself, posix_ipc swallows SystemExit during a wait, and ``sem_timedwait``
follows the wall clock. So semaphores are only tried (``acquire(0)``); waiting is ``poll`` on a socket.
"""

from __future__ import annotations

import os

import posix_ipc

from mppool.errors import Error, ProtocolError
from mppool.kernel.memory import SHM, names

__all__ = ["BusyError", "Semaphore", "open_semaphore", "unlink", "unlink_all"]

Semaphore = posix_ipc.Semaphore
BusyError = posix_ipc.BusyError

_SMALLEST = 32  # sizeof(sem_t) on 64-bit glibc; touching a shorter file is a SIGBUS


def _file(name: str) -> str:
    return f"{SHM}/sem.{name[1:]}"


def open_semaphore(name: str, initial: int) -> posix_ipc.Semaphore:
    """Open the semaphore, made with ``initial`` units if it was not there. Atomic among processes.

    Raises ProtocolError if the file behind it is no semaphore, Error if it is somebody else's or there is no room.
    """
    try:
        info = os.stat(_file(name), follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if info.st_uid != os.geteuid():
            raise Error(f"{_file(name)} belongs to another user")
        if info.st_size < _SMALLEST:
            raise ProtocolError(f"{_file(name)} is no semaphore; remove it (mppool gc)")
    try:
        return posix_ipc.Semaphore(name, posix_ipc.O_CREAT, mode=0o600, initial_value=initial)
    except posix_ipc.PermissionsError as error:
        raise Error(f"{_file(name)} belongs to another user") from error
    except OSError as error:
        raise Error(f"cannot make the semaphore {name}: {error.strerror}; is there room in {SHM}?") from error


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
