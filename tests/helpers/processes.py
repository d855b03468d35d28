"""Real processes: forked, watched, always ended. A child dies with the test that made it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mppool.kernel import link

__all__ = ["PATIENCE", "Child", "broker_process", "ended", "eventually", "fork"]

PATIENCE = 60.0  # seconds: whatever should come about has by then, on the most loaded machine

_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Child:
    """A forked child that runs ``work(child)``. Both sides ``tell`` and ``hear`` JSON values through pipes, which orders them."""

    def __init__(self, work: Callable[[Child], Any]) -> None:
        from_child, to_parent = os.pipe()
        from_parent, to_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                die_with_parent()
                os.close(from_child)
                os.close(to_child)
                self._in, self._out, self._buffer = from_parent, to_parent, b""
                result = work(self)
                self.tell({"result": result})
                code = 0
            except BaseException:
                with contextlib.suppress(BaseException):
                    self.tell({"error": traceback.format_exc()})
            finally:
                os._exit(code)
        os.close(to_parent)
        os.close(from_parent)
        self._in, self._out, self._buffer = from_child, to_child, b""
        self.status: int | None = None

    def tell(self, value: Any = None) -> None:
        os.write(self._out, json.dumps(value).encode() + b"\n")

    def hear(self, timeout: float = PATIENCE) -> Any:
        """The next value the other side told. AssertionError with the child's traceback if it failed, EOFError if it is gone."""
        until = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"nothing heard within {timeout} s")
            data = os.read(self._in, 65536)
            if not data:
                raise EOFError("the other side is gone")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"the child failed:\n{value['error']}")
        return value

    def result(self, timeout: float = 2 * PATIENCE) -> Any:
        """What ``work`` returned; the child has ended then."""
        value = self.hear(timeout)
        self.wait()
        return value["result"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
            os.close(self._in)
            os.close(self._out)
        return self.status

    def end(self) -> None:
        if self.status is None:
            self.kill(signal.SIGCONT)
            self.kill()
            self.wait()


@contextlib.contextmanager
def fork(*works: Callable[[Child], Any]) -> Iterator[list[Child]]:
    """A child for each function; all of them are dead afterwards."""
    children: list[Child] = []
    try:
        for work in works:
            children.append(Child(work))  # noqa: PERF401 (if one fails, those before it are ended)
        yield children
    finally:
        for child in children:
            child.end()


class BrokerProcess:
    def __init__(self, path: str, *options: str) -> None:
        self.path = path
        self.options = options
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mppool", "broker", "--socket", self.path, *self.options]
        process = subprocess.Popen(command, preexec_fn=die_with_parent)
        eventually(lambda: process.poll() is not None or answers(self.path))
        assert process.poll() is None, f"the broker ended with exit code {process.returncode}"
        return process

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextlib.contextmanager
def broker_process(path: str, *options: str) -> Iterator[BrokerProcess]:
    """A real ``mppool broker``, ended by SIGTERM afterwards."""
    broker = BrokerProcess(path, *options)
    try:
        yield broker
    finally:
        broker.stop()


def answers(path: str) -> bool:
    try:
        link.connect(path).close()
    except OSError:
        return False
    return True


def eventually(condition: Callable[[], Any], timeout: float = PATIENCE, what: str = "") -> Any:
    """Wait until the condition is true; AssertionError after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"not within {timeout} s: {what or condition}"
        time.sleep(0.002)


def ended(process: subprocess.Popen[Any], timeout: float = PATIENCE) -> int:
    """SIGTERM, and its exit code; killed if it does not end within so many seconds: TimeoutExpired."""
    process.terminate()
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
