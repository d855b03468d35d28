"""Shared memory: making it whole or not at all, and mapping it as aligned 8-byte words.

Words are read and written through ``memoryview.cast("Q")`` only: one aligned 8-byte move each. ``struct.pack_into``
zeroes its target first, and other processes saw that zero in a fifth of their reads.

/dev/shm is a public directory: whatever is there under a name of ours is looked at before it is used, as it was opened.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from io import FileIO

from mppool.errors import Error, ProtocolError

__all__ = ["SHM", "SharedWords", "check_ours", "create", "names", "open_existing", "open_file", "open_to_us", "unlink"]

SHM = "/dev/shm"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


def open_file(path: str, flags: int) -> FileIO:
    """An open file, closed when nobody has the object any more.

    Opened and kept in one step of the interpreter: what a signal handler throws, wherever it falls, leaves no descriptor open.
    """
    opened: list[FileIO] = []
    opened.extend(map(FileIO, map(os.open, (path,), (flags,), (0o600,)), ("rb+",)))
    return opened[0]


def check_ours(info: os.stat_result, path: str, *, names: int = 1) -> None:
    """Raise Error unless this is a plain file that belongs to us alone, under this name alone (or so many)."""
    if not stat.S_ISREG(info.st_mode):
        raise Error(f"{path} is no file; somebody else made it, and it is not ours to use")
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise Error(f"{path} must be ours alone: owner {info.st_uid} mode {stat.S_IMODE(info.st_mode):o}, expected {os.geteuid()} 600")
    if info.st_nlink > names:
        raise Error(f"{path} is a hard link to a file with {info.st_nlink} names; it is not ours to use")


def open_to_us(path: str) -> bool:
    """A file of ours that its maker's umask closed even to us (0777 does) is opened to us. False: it is not ours."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if info.st_uid != os.geteuid() or not stat.S_ISREG(info.st_mode):
        return False
    if info.st_mode & 0o600 != 0o600:
        os.chmod(path, 0o600)  # nobody else can have replaced it since: the directory is sticky
    return True


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
        file = open_file(SHM + name, _FLAGS | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        raise
    except OSError as error:
        raise _explained(error, name, size) from error
    try:
        with file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, size)
            return SharedWords(mmap.mmap(file.fileno(), size))
    except BaseException as error:
        unlink(name)
        if isinstance(error, OSError):
            raise _explained(error, name, size) from error
        raise


def _explained(error: OSError, name: str, size: int) -> Error:
    if error.errno == errno.ENOSPC:
        return Error(f"no room in {SHM}: the shared table needs {size} bytes; enlarge it (docker: --shm-size) or run `mppool gc`")
    if error.errno == errno.ENOMEM:
        return Error(f"cannot map {SHM}{name}: this process may not have {size} bytes more (RLIMIT_AS, or the machine's memory)")
    if error.errno == errno.EFBIG:
        return Error(f"cannot make {SHM}{name}: this process may not write a file of {size} bytes (RLIMIT_FSIZE)")
    return Error(f"cannot open {SHM}{name}: {error.strerror}")


def open_existing(name: str, *, again: bool = True) -> SharedWords | None:
    """Map an object that is there; None if it is not, or is still empty. Never resizes it, never removes it."""
    try:
        file = open_file(SHM + name, _FLAGS)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        if again and open_to_us(SHM + name):
            return open_existing(name, again=False)
        raise Error(f"{SHM}{name} belongs to another user") from error
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise Error(f"{SHM}{name} is no file; somebody else made it, and it is not ours to use") from error
        raise _explained(error, name, 0) from error
    with file:
        info = os.fstat(file.fileno())
        check_ours(info, SHM + name)
        if info.st_size < mmap.PAGESIZE:
            return None
        if info.st_size % 8:
            raise ProtocolError(f"{SHM}{name} is damaged: {info.st_size} bytes; end its workers, then mppool gc")
        try:
            return SharedWords(mmap.mmap(file.fileno(), info.st_size))
        except OSError as error:
            raise _explained(error, name, info.st_size) from error


def unlink(name: str) -> None:
    """Remove the name if it is there; mappings of it live on."""
    try:
        os.unlink(SHM + name)
    except FileNotFoundError:
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
