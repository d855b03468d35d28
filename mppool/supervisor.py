"""``mppool run -- COMMAND``: a broker and the workers' command under one supervisor.

The supervisor forwards signals to the command, starts another broker when one dies, and exits as the command did. Both
children are told by the kernel (``PR_SET_PDEATHSIG``) to end when the supervisor itself is killed.

A broker of somebody else's is as good as its own: whether it was there from the start or has replaced ours
(``mppool broker --replace``), the supervisor starts one only when nobody has the socket's place any more.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from mppool.errors import BrokerUnavailable
from mppool.kernel import link
from mppool.kernel.systemd import without_service
from mppool.launch import ALREADY_RUNNING
from mppool.succession import is_taken

__all__ = ["Supervisor"]

log = logging.getLogger("mppool.run")

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU)
PAUSE = (0.0, 0.1, 0.5, 1.0)  # seconds before the broker is started again: after one that lived long, none

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def dies_with(parent: int, number: int) -> Callable[[], None]:
    """What a child does between fork and exec, so that the kernel signals it when its parent ends."""

    def set_up() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it ended already
            os._exit(1)

    return set_up


class Supervisor:
    def __init__(self, path: str, command: list[str]) -> None:
        self.path = path
        self.command = command
        self.broker: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.early: list[int] = []  # signals that came before the command ran
        self.started = 0.0
        self.failures = 0
        self.restart_at: float | None = None

    def run(self) -> int:
        """Until the command ends; its exit code, 128 + N if signal N ended it. Raises BrokerUnavailable, FileNotFoundError."""
        mine = os.getpid()
        self.start_broker()
        self.wait_for_broker()
        try:
            previous = {number: signal.signal(number, self.forward) for number in FORWARDED}
            environment = {**os.environ, "MPPOOL_BROKER": self.path}
            self.worker = subprocess.Popen(self.command, env=environment, preexec_fn=dies_with(mine, signal.SIGTERM))
            for number in self.early:
                self.worker.send_signal(number)
            while self.worker.poll() is None:
                self.watch_broker()
                self.wait_for_a_child()
            for number, handler in previous.items():
                signal.signal(number, handler)
            code = self.worker.returncode
            return code if code >= 0 else 128 - code
        finally:
            self.stop_broker()

    def forward(self, number: int, _frame: object) -> None:
        if self.worker is None:
            self.early.append(number)  # it is just being started
        elif self.worker.poll() is None:
            self.worker.send_signal(number)

    def wait_for_a_child(self) -> None:
        """Sleep until a child ends or a signal comes; at most a tenth of a second, which bounds a signal lost in between."""
        try:
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
        except InterruptedError:
            pass

    # The broker.

    def start_broker(self) -> None:
        self.started = time.monotonic()
        self.restart_at = None
        self.broker = subprocess.Popen(
            [sys.executable, "-m", "mppool", "broker", "--socket", self.path],
            preexec_fn=dies_with(os.getpid(), signal.SIGTERM),
            start_new_session=True,  # Ctrl-C is for the command; the broker ends after it
            env=without_service(),
        )

    def wait_for_broker(self) -> None:
        """Until it answers. If another broker serves the socket already, that one is used."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                link.connect(self.path).close()
                return
            except OSError:
                pass
            if self.broker is not None and self.broker.poll() not in (None, ALREADY_RUNNING):
                break
            time.sleep(0.01)
        code = self.broker.poll() if self.broker is not None else None
        self.stop_broker()
        raise BrokerUnavailable(f"broker={self.path!r}: the broker did not start (exit code {code})")

    def watch_broker(self) -> None:
        """Start another broker when ours has ended and no other serves; more slowly when it keeps dying."""
        if self.broker is not None and self.broker.poll() is not None:
            code = self.broker.returncode
            self.broker = None
            self.failures = 0 if time.monotonic() - self.started > 5 else min(self.failures + 1, len(PAUSE) - 1)
            self.restart_at = time.monotonic() + PAUSE[self.failures]
            if is_taken(self.path):
                log.warning("another broker serves %s; if that one ends, one is started here", self.path)
            else:
                log.warning("the broker ended with exit code %s; starting another", code)
        if self.restart_at is not None and time.monotonic() >= self.restart_at and not is_taken(self.path):
            self.start_broker()

    def stop_broker(self) -> None:
        if self.broker is None:
            return
        self.broker.terminate()
        try:
            self.broker.wait(5)
        except subprocess.TimeoutExpired:
            self.broker.kill()
            self.broker.wait()
