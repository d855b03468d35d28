"""Platforms that are not Linux, or lack what it has."""

from __future__ import annotations

import subprocess
import sys

import pytest


def import_with(statement: str) -> str:
    """``import mppool`` in a fresh interpreter after a statement: the last line of what it said."""
    done = subprocess.run([sys.executable, "-c", f"import sys; {statement}; import mppool"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_a_platform_that_is_not_linux(platform: str) -> None:
    """The import fails with one clear sentence that names the platform."""
    expected = f"ImportError: mppool runs on Linux only (this is {platform}): it needs SCM_RIGHTS, SOCK_SEQPACKET and F_OFD_SETLK"
    assert import_with(f"sys.platform = {platform!r}") == expected


@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        ("darwin", "import socket; del socket.MSG_CMSG_CLOEXEC"),
        ("win32", "sys.modules.update(fcntl=None, resource=None, posix_ipc=None)"),
    ],
)
def test_a_platform_that_lacks_what_linux_has(platform: str, missing: str) -> None:
    """The same where modules and names of Linux really are missing."""
    assert import_with(f"{missing}; sys.platform = {platform!r}").startswith(f"ImportError: mppool runs on Linux only (this is {platform})")
