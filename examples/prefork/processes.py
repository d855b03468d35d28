"""Processes that end with the demo, however it ends.

The kernel kills the children with their parent. What a SIGKILL of the demo leaves in /dev/shm and in the runtime directory
is removed by a small process that was started first and waits for that (``clean_up_after``).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def start(work: Callable[..., None], *args: Any) -> int:
    """Fork a process that runs ``work`` and is killed with its parent; its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with(parent, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo, which ends the others in order
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        work(*args)
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_with(parent: int, number: int) -> None:
    """Have the kernel send us a signal when our parent ends."""
    ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it had ended before


class Helper:
    """A process of the demo, and the socket over which it is asked for its counts."""

    def __init__(self, work: Callable[[socket.socket], Any]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = start(lambda: asyncio.run(work(theirs)))
        theirs.close()
        self.control.settimeout(10)

    def counts(self, order: bytes = b"counts") -> dict[str, Any]:
        self.control.send(order)
        answer = self.control.recv(4096)
        if not answer:
            raise ConnectionError(f"process {self.pid} has ended")
        counts: dict[str, Any] = json.loads(answer)
        return counts

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def answer_orders(control: socket.socket, counts: Callable[[], dict[str, Any]], stop: Callable[[], None] | None = None) -> None:
    """In a helper's event loop: each order is answered with the counts."""

    def answer() -> None:
        if control.recv(64) == b"stop" and stop is not None:
            stop()
        control.send(json.dumps(counts()).encode())

    asyncio.get_running_loop().add_reader(control, answer)


class Broker:
    """``mppool broker`` as a process of its own. ``start`` it; ``end`` may be called at any time."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, path: str) -> None:
        self.path = path

    def start(self) -> int:
        """Its pid, when it answers."""
        parent = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mppool", "broker", "--socket", self.path],
            preexec_fn=lambda: end_with(parent, signal.SIGTERM),
            start_new_session=True,  # Ctrl-C is for the demo
        )
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"the broker ended with exit code {self.process.returncode}")
            time.sleep(0.005)
        return self.process.pid

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            return sock.connect_ex(self.path) == 0

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(10)


def clean_up_after(directory: str, demo: int) -> None:
    """Once the pipe ``demo`` ends, which the demo and all that it forked have: remove what a SIGKILL left.

    The next broker of the socket finds a pool with nobody in it and removes its names; it ends by itself when unused.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(demo, 1)
    if os.path.exists(directory):
        command = [sys.executable, "-m", "mppool", "broker", "--socket", f"{directory}/broker.sock", "--idle-exit", "0"]
        wait_until(lambda: subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=10).returncode != 3)  # 3: the demo's own still serves
        wait_until(lambda: os.listdir(directory) == [])
        shutil.rmtree(directory, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """False if the condition did not become true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True
