"""Where the broker's socket is, and whether the directory around it can be trusted."""

from __future__ import annotations

import hashlib
import os
import stat

from mppool.errors import BrokerUnavailable, Error, OptionError

__all__ = ["check_directory", "check_if_there", "distrust", "pool_id", "scope_of", "socket_path"]

MAX_PATH = 107  # bytes of a socket's


def socket_path(broker: str | None) -> str:
    """The path of the broker's socket: ``broker``, else ``$MPPOOL_BROKER``, else ``broker.sock`` in the user's runtime directory."""
    if broker is not None and (not isinstance(broker, str) or not broker or "\0" in broker):
        raise OptionError(f"broker={broker!r}: expected the path of a socket")
    path = broker or os.environ.get("MPPOOL_BROKER")
    if not path:
        base = os.environ.get("XDG_RUNTIME_DIR")
        path = f"{base}/mppool/broker.sock" if base else f"/tmp/mppool-{os.geteuid()}/broker.sock"
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > MAX_PATH - len(".keeper.new"):
        raise OptionError(f"broker={path!r}: a socket path may have at most {MAX_PATH - len('.keeper.new')} bytes")
    return path


def check_directory(path: str, *, create: bool = False) -> None:
    """Raise Error unless the directory of ``path`` is a real directory, ours, and closed to everybody else.

    Whoever may write there could put a socket of his own in the broker's place. With ``create`` it is made, mode 0700.
    """
    directory = os.path.dirname(path)
    if create:
        try:
            os.mkdir(directory, 0o700)
            os.chmod(directory, 0o700)  # whatever the umask
        except FileExistsError:
            pass
        except OSError as error:
            raise Error(f"broker={path!r}: cannot make the runtime directory {directory}: {error.strerror}") from error
    try:
        info = os.lstat(directory)
    except FileNotFoundError as error:
        raise Error(f"broker={path!r}: there is no directory {directory}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise Error(f"broker={path!r}: {directory} is not a directory (a symbolic link is refused too)")
    if info.st_uid != os.geteuid():
        raise Error(f"broker={path!r}: the directory {directory} belongs to uid {info.st_uid}, we are {os.geteuid()}")
    if info.st_mode & 0o077:
        raise Error(f"broker={path!r}: the directory {directory} is open to others (mode {stat.S_IMODE(info.st_mode):o}); chmod 700 it")
    if why := distrust(path):
        raise Error(f"broker={path!r}: {why}")


def distrust(path: str) -> str:
    """Why others could put something of theirs in the place of the socket at ``path``, or of its directory; "" if they cannot.

    The directory must belong to us or root, and nobody else may write to it. Above it nobody may be able to replace it: a directory that
    all may write to must be sticky. Who owns a directory above, or is in its group, is trusted by whoever chose that place.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        info = os.stat(directory)
        if info.st_uid not in (os.geteuid(), 0):
            return f"the directory {directory} belongs to uid {info.st_uid}, we are {os.geteuid()}"
        if info.st_mode & 0o022:
            return f"the directory {directory} is open to others (mode {stat.S_IMODE(info.st_mode):o}); chmod 700 it"
        for above in _above(directory):
            info = os.lstat(above)
            if stat.S_ISLNK(info.st_mode):
                if info.st_uid not in (os.geteuid(), 0):
                    return f"{above} is a symbolic link of uid {info.st_uid}, we are {os.geteuid()}"
            elif info.st_mode & 0o002 and not info.st_mode & stat.S_ISVTX:
                return f"anybody may replace what is in {above} (mode {stat.S_IMODE(info.st_mode):o} without the sticky bit); chmod +t it"
    except OSError as error:
        return f"cannot look at the directory {directory}: {error.strerror}"
    return ""


def _above(directory: str) -> list[str]:
    """The directory as named, links and all, and everything above it and above where it really is."""
    found = []
    for start in {directory, os.path.realpath(directory)}:
        at = start
        while at != "/":
            found.append(at)
            at = os.path.dirname(at)
    return [*found, "/"]


def check_if_there(path: str) -> None:
    """Raise BrokerUnavailable if there is a directory for this socket, and it cannot be trusted: whoever owns it says what its links mean."""
    if os.path.lexists(os.path.dirname(path)) and (why := distrust(path)):
        raise BrokerUnavailable(f"broker={path!r}: {why}")


def scope_of(path: str) -> str:
    """Eight hex digits for all pools of one broker socket; pools of different sockets never meet."""
    return hashlib.blake2b(f"{os.geteuid()}:{os.path.realpath(path)}".encode(), digest_size=4).hexdigest()


def pool_id(path: str, name: str) -> str:
    """The name of a pool in shared memory: ``mppool-`` + scope + name, hashed."""
    return f"mppool-{scope_of(path)}-{hashlib.blake2b(name.encode(), digest_size=5).hexdigest()}"
