"""Running ``mppool``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mppool
from mppool.kernel import link
from tests.helpers.processes import PATIENCE, Child, broker_process
from tests.helpers.server import ask

MPPOOL = [sys.executable, "-m", "mppool"]
ENVIRONMENT = {**os.environ, "COLUMNS": "250"}  # wide enough for every table


def mppool_(*arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run ``mppool ...`` to its end."""
    return subprocess.run([*MPPOOL, *arguments], capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)


def json_of(*arguments: str) -> Any:
    done = mppool_(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


Start = Callable[..., "subprocess.Popen[str]"]


def broker_pid(path: str) -> int:
    """Who serves the socket: the kernel says so."""
    with link.connect(path) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def has_another_broker(path: str, old: int) -> bool:
    """Does anybody else serve the socket? In between nobody does."""
    try:
        return broker_pid(path) != old
    except OSError:
        return False


def clean_directory(path: str) -> None:
    """What a killed broker leaves in its directory goes with the next one."""
    with broker_process(path):
        pass


def hold(pool: mppool.Pool) -> Callable[[Child], None]:
    """A worker that leases one session until it hears the end."""

    def work(child: Child) -> None:
        with pool.connection() as sock:
            ask(sock, "held")
            child.tell("held")
            child.hear()
        pool.close()

    return work
