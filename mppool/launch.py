"""Starting a broker in the background, for ``autostart``."""

from __future__ import annotations

import sys

from mppool.errors import BrokerUnavailable
from mppool.kernel import link
from mppool.kernel.systemd import without_service

__all__ = ["ensure_broker"]

START = 20  # seconds
IDLE_EXIT = 30  # seconds without workers after which a broker that was started by one ends


def ensure_broker(path: str) -> None:
    """Start a broker for this socket unless one answers. Raises BrokerUnavailable with what it said if it does not start."""
    try:
        link.connect(path).close()
        return
    except OSError:
        pass
    import subprocess  # only here: `import mppool` is part of every worker's start

    command = [sys.executable, "-m", "mppool", "broker", "--socket", path, "--idle-exit", str(IDLE_EXIT), "--background"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=START, env=without_service())
    except subprocess.TimeoutExpired as error:
        raise BrokerUnavailable(f"broker={path!r}: autostart: no broker within {START} s") from error
    if done.returncode not in (0, ALREADY_RUNNING):
        said = done.stderr.decode(errors="replace").strip()
        raise BrokerUnavailable(f"broker={path!r}: autostart failed with exit code {done.returncode}: {said}")


ALREADY_RUNNING = 3
