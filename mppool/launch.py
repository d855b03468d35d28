"""Starting a broker in the background, for ``autostart``."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mppool.errors import BrokerUnavailable, Error
from mppool.kernel import link
from mppool.kernel.runtime import check_directory
from mppool.kernel.systemd import without_service

__all__ = ["ensure_broker", "start_again"]

log = logging.getLogger("mppool")

START = 20  # seconds
LOOK_AGAIN = 0.02  # seconds between two looks for the broker that somebody else starts
IDLE_EXIT = 30  # seconds without workers after which a broker that was started by one ends
ALREADY_RUNNING = 3
FORK = "import os, sys; os.fork() or os.execv(sys.argv[1], sys.argv[1:])"


def ensure_broker(path: str) -> None:
    """Start a broker for this socket unless one answers. Of many processes that come at once one starts it, and the others wait for it.

    Raises BrokerUnavailable with what it said if it does not start, or if there is none within 20 s.
    """
    until = time.monotonic() + START
    while not answers(path):
        with starting(path) as (ours, _):
            if ours:
                if not answers(path):
                    start(path)
                return
        if time.monotonic() > until:
            raise none_within(path)
        time.sleep(LOOK_AGAIN)


def answers(path: str) -> bool:
    try:
        link.connect(path).close()
    except OSError:
        return False
    return True


@contextmanager
def starting(path: str) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Is it ours to start the broker? And the descriptor that holds this right.

    Only one process at a time may, which locks the socket's directory (and leaves no file there).
    """
    try:
        check_directory(path, create=True)
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (Error, OSError):
        yield True, ()  # the broker will say what is wrong
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours, (fd,)
    finally:
        os.close(fd)


def start_again(path: str) -> None:
    """Have a broker started in the place of one that has gone, unless one answers or somebody is at it. Nobody waits for it here, and nothing is raised.

    The new broker has the right to start brokers from us, and keeps it for life: until it answers nobody starts another.
    """
    import subprocess

    with starting(path) as (ours, right):
        if not ours or answers(path):
            return
        log.warning("broker=%r: autostart: it has gone; another is started", path)
        try:
            # A process in between, which ends at once: the broker is nobody's child to wait for.
            command, null = [sys.executable, "-I", "-S", "-c", FORK, *command_for(path)], subprocess.DEVNULL
            subprocess.run(command, stdin=null, stdout=null, stderr=null, pass_fds=right, timeout=START, env=without_service())
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("broker=%r: autostart: %s", path, error)


def command_for(path: str) -> list[str]:
    return [sys.executable, "-m", "mppool", "broker", "--socket", path, "--idle-exit", str(IDLE_EXIT), "--background"]


def start(path: str) -> None:
    import subprocess  # only here: `import mppool` is part of every worker's start

    try:
        done = subprocess.run(
            command_for(path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=START, env=without_service()
        )
    except subprocess.TimeoutExpired as error:
        raise none_within(path) from error
    if done.returncode not in (0, ALREADY_RUNNING):
        said = done.stderr.decode(errors="replace").strip()
        raise BrokerUnavailable(f"broker={path!r}: autostart failed with exit code {done.returncode}: {said}")


def none_within(path: str) -> BrokerUnavailable:
    return BrokerUnavailable(f"broker={path!r}: autostart: no broker within {START} s")
