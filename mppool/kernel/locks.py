"""Byte locks that the kernel drops when their holder dies.

Open-file-description locks (``F_OFD_SETLK``) on bytes of a lock file. They belong to the open file, so: open it in the
process that uses it, never before a fork; a child that inherits the descriptor keeps the lock alive with its parent,
exactly as it keeps the parent's TCP sockets alive, which is what "dead" must mean here. SIGKILL frees them, also while
the holder is still a zombie; stopped processes keep them; they work across pid namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from io import FileIO

from mppool.errors import Error
from mppool.kernel.memory import check_ours, open_file, open_to_us
from mppool.kernel.remembered import Remembered

__all__ = ["LockFile", "close_in_child"]

_FLOCK = struct.Struct("@hhqqi4x")


def _flock(kind: int, first: int, count: int = 1) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, first, count, 0)


def _open(path: str, create: bool) -> FileIO:
    """Never waits, not for a pipe either: those are opened for both ends."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return open_file(path, flags)
    except FileNotFoundError:
        if not create:
            raise
        return open_file(path, flags | os.O_CREAT)
    except PermissionError:
        if not open_to_us(path):
            raise
        return open_file(path, flags)


class LockFile:
    """An open lock file of this process. Owns its descriptor; ``close()``, or its end, gives up every lock taken through it.

    Raises Error where the file belongs to somebody else: /dev/shm is a public directory.
    """

    __slots__ = ("__weakref__", "_file", "fd", "inherited", "path")

    def __init__(self, path: str, *, create: bool = True) -> None:
        """Open (and with ``create`` make) the file. FileNotFoundError if it is not there and must not be made, Error for all else."""
        try:
            self._file = _open(path, create)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise Error(f"{path} belongs to another user or is a link; it is not ours to use ({error.strerror})") from error
            if error.errno == errno.ENOSPC:
                raise Error(f"no room for {path}: enlarge {os.path.dirname(path)} or run `mppool gc`") from error
            raise Error(f"cannot open {path}: {error.strerror}") from error
        self.fd = self._file.fileno()
        self.path = path
        self.inherited = False
        try:
            check_ours(os.fstat(self.fd), path)
        except BaseException:
            self.close()
            raise
        _opened.add(self)

    def take(self, byte: int) -> bool:
        """Take the lock of a byte if it is free. Never waits."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give(self, byte: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))

    def is_held(self, first: int, count: int = 1) -> bool:
        """Does somebody else hold any of these bytes? (What this very object holds does not count.)"""
        probe = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, first, count))
        return int(_FLOCK.unpack(probe)[0]) != fcntl.F_UNLCK

    def is_current(self) -> bool:
        """Is this still the file at its path? A clean-up may have removed it between our opening and our locking."""
        try:
            there, ours = os.stat(self.path), os.fstat(self.fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def keep(self) -> None:
        """In a forked child: it is to stay open here, and with it what its parent locked."""
        self.inherited = True
        _inherited.append(self)

    def close(self) -> None:
        self.fd = -1
        self._file.close()


_opened: Remembered[LockFile] = Remembered()
_inherited: list[LockFile] = []


def close_in_child() -> None:
    """In a forked child: every lock file of the parent, also one that another thread had in hand. Else what it locked stays locked as long as we live."""
    for lock in _opened:
        if not lock.inherited:
            lock.close()
