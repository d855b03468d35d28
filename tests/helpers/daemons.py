"""Real servers for tests: each on a free loopback port, with a directory of its own, dead when the test ends or is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.processes import PATIENCE, die_with_parent, eventually

__all__ = ["daemon", "free_port", "listens", "needs"]

os.environ["PATH"] += os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))  # where Debian keeps servers


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def daemon(
    command: Sequence[str], port: int, log: Path, user: str | int | None = None, patience: float = PATIENCE, stop: str = "SIGKILL"
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the foreground that listens on ``port``; AssertionError with what it printed if it does not. Ended by the signal ``stop`` afterwards."""
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=die_with_parent, user=user, group=user)
    try:
        eventually(lambda: process.poll() is not None or listens(port), patience, what=f"{command[0]} does not listen")
        assert process.poll() is None, f"{command[0]} ended with exit code {process.returncode}: {log.read_text(errors='replace')[-2000:]}"
        yield process
    finally:
        process.send_signal(signal.Signals[stop])
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
