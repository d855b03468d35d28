"""A /dev/shm of one's own, of any size: what other pools leave is not there, and filling it harms nobody."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest

__all__ = ["in_private_shm"]

_MOUNT = 'mount -t tmpfs -o "size=$0" tmpfs /dev/shm && exec "$@"'


def in_private_shm(size: str, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace with a new tmpfs of ``size`` on /dev/shm. Skips the test where that is not possible."""
    reason = _why_not()
    if reason:
        pytest.skip(f"no private mount namespace: {reason}")
    return _run(size, *command, timeout=timeout)


def _run(size: str, *command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    return subprocess.run([*unshare, "sh", "-c", _MOUNT, size, *command], capture_output=True, text=True, timeout=timeout, check=False)


@functools.cache
def _why_not() -> str:
    try:
        done = _run("64k", "true", timeout=10)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
