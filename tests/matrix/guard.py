"""A process tree of its own for each row: what of it is left afterwards is found exactly, and all of it ends with its caller.

The guard stands between the caller and the row. It is the subreaper, so that daemons and orphans become its children; it
kills whatever there is when the row takes too long, or when the caller is gone, however the caller ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mppool.kernel import memory
from mppool.kernel.runtime import scope_of

__all__ = ["contained"]

PR_SET_CHILD_SUBREAPER = 36
GRACE = 5.0  # seconds a row's processes have to end after it
MOST = 60_000  # bytes of an answer: less than a pipe takes

Answer = dict[str, Any]


def contained(work: Callable[[Path], Answer], seconds: float) -> Answer:
    """What ``work(directory)`` returned, or {"fault": ...}; and in "left" what there was left of its processes, files and names."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours.close()
            _guard(work, theirs, seconds)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    with ours:
        data = ours.recv(2 * MOST)
    os.waitpid(pid, 0)
    answer: Answer = json.loads(data) if data else {"fault": "the guard itself failed"}
    return answer


def _guard(work: Callable[[Path], Answer], caller: socket.socket, seconds: float) -> None:
    os.setsid()  # Ctrl-C is for the caller, whose end reaches us in any case
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    home = Path(tempfile.mkdtemp(prefix="matrix-"))
    home.chmod(0o700)
    try:
        answer = _watch(_start(work, home, caller, seconds), caller, seconds)
        answer.setdefault("left", []).extend(_left(home, 0.0 if "fault" in answer else GRACE))
        with contextlib.suppress(OSError):
            caller.send(json.dumps(answer).encode())
    finally:
        _end_all()
        _left(home, 0.0)
        shutil.rmtree(home, ignore_errors=True)


def _start(work: Callable[[Path], Answer], home: Path, caller: socket.socket, seconds: float) -> tuple[int, int]:
    """The row's own process, and the pipe that its answer comes through."""
    answers, answering = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            caller.close()
            os.close(answers)
            faulthandler.dump_traceback_later(max(1.0, seconds - 2), file=2)
            try:
                answer = work(home)
            except BaseException:
                answer = {"fault": traceback.format_exc()}
            data = json.dumps(answer).encode()
            os.write(answering, data if len(data) < MOST else json.dumps({"fault": f"too long an answer: {data[:3000]!r}"}).encode())
        finally:
            os._exit(0)
    os.close(answering)
    return pid, answers


def _watch(started: tuple[int, int], caller: socket.socket, seconds: float) -> Answer:
    """Until the row's process has ended, and reap those that became ours meanwhile. SystemExit if the caller is gone."""
    runner, answers = started
    until = time.monotonic() + seconds
    while runner not in _reaped():
        if select.select([caller], [], [], 0.02)[0]:
            raise SystemExit
        if time.monotonic() > until:
            return {"fault": f"not done within {seconds:g} s; processes: {_commands(_tree())}"}
    os.set_blocking(answers, False)
    try:
        data = os.read(answers, 2 * MOST)
    except BlockingIOError:
        data = b""
    os.close(answers)
    answer: Answer = json.loads(data) if data else {"fault": "the row's process died"}
    return answer


def _reaped() -> set[int]:
    """The children that have ended by now."""
    found = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            found.add(pid)
    return found


def _tree() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _commands(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(f"{process.pid} of {process.ppid()}: {' '.join(process.cmdline())[-200:]}")
    return found


def _left(home: Path, grace: float) -> list[str]:
    """What is still there after so many seconds; names are removed."""
    scope = f"mppool-{scope_of(str(home / 'run' / 'b.sock'))}"
    until = time.monotonic() + grace
    while True:
        _reaped()
        processes = _tree()
        names = memory.names(scope) + memory.names(f"sem.{scope}")
        files = os.listdir(home / "run") if (home / "run").exists() else []
        if not (processes or names or files) or time.monotonic() >= until:
            break
        time.sleep(0.02)
    found = [f"process {command}" for command in _commands(processes)] + [f"name {name}" for name in names] + [f"file {file}" for file in files]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{memory.SHM}/{name}")
    return found


def _end_all() -> None:
    """Kill what is left of the tree; a killed parent's children become ours, so again until there is none."""
    while processes := _tree():
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        _reaped()
        time.sleep(0.005)
    _reaped()
