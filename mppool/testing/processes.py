"""Real processes for the checks: forked, each with a deadline, killed with all that it forked itself."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mppool.testing.report import DoesNotApply, PromiseBroken

__all__ = ["Process", "broker", "outcome"]


class Process:
    """A forked process that runs ``work(self)``; both sides ``tell`` and ``hear`` what can be pickled.

    What ``work`` raises is raised by the other side's next ``hear``. With ``group`` it and what it forks are a process group.
    """

    def __init__(self, work: Callable[[Process], Any], group: bool = False) -> None:
        from_child, to_parent = os.pipe()
        from_parent, to_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            if group:
                os.setpgid(0, 0)
            os.close(from_child)
            os.close(to_child)
            self._in, self._out = from_parent, to_parent
            self._run(work)
        os.close(to_parent)
        os.close(from_parent)
        self._in, self._out = from_child, to_child
        self._ended = False

    def _run(self, work: Callable[[Process], Any]) -> None:
        """In the child; never returns."""
        code = 1
        try:
            self.tell(("result", work(self)))
            code = 0
        except (PromiseBroken, DoesNotApply) as error:
            with contextlib.suppress(BaseException):
                self.tell(("raised", error))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            with contextlib.suppress(BaseException):
                self.tell(("raised", PromiseBroken(f"{type(error).__name__}: {error} (at {os.path.basename(last.filename)}:{last.lineno}, in {last.name})")))
        finally:
            os._exit(code)

    def tell(self, value: Any) -> None:
        data = pickle.dumps(value)
        os.write(self._out, struct.pack("<I", len(data)) + data)

    def hear(self, timeout: float) -> Any:
        """The next value told. Raises PromiseBroken with what happened if the other side failed, is silent for so long, or is gone."""
        until = time.monotonic() + timeout
        (size,) = struct.unpack("<I", self._read(4, until))
        kind, value = pickle.loads(self._read(size, until))
        if kind == "raised":
            raise value
        return value

    def _read(self, size: int, until: float) -> bytes:
        data = b""
        while len(data) < size:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise PromiseBroken("it hangs: no end within the time it had")
            more = os.read(self._in, size - len(data))
            if not more:
                raise PromiseBroken("the process ended in the middle (a crash?)")
            data += more
        return data

    def say(self, value: Any) -> None:
        """For ``work``: a value in between."""
        self.tell(("said", value))

    def kill(self) -> None:
        """With SIGKILL, and all that it forked."""
        if not self._ended:
            self._ended = True
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._in)
            os.close(self._out)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def outcome(check: Callable[[], Any], timeout: float) -> Any:
    """What a check returns, run in a process of its own. Raises PromiseBroken, DoesNotApply."""
    with Process(lambda _: check(), group=True) as process:
        return process.hear(timeout)


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """A broker of our own, in a directory of its own: the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="mppool-testing-") as directory:
        path = os.path.join(directory, "b.sock")
        process = subprocess.Popen([sys.executable, "-m", "mppool", "broker", "--socket", path], stdin=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 20
            while not os.path.exists(path):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("mppool broker did not start")
                time.sleep(0.01)
            yield path
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
