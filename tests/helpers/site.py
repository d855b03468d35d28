"""A web site as an operator starts it: ``mppool run -- gunicorn ...``, and clients that load it all the time."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.helpers.daemons import free_port, listens
from tests.helpers.processes import die_with_parent, eventually

__all__ = ["Load", "Site", "site"]


class Site:
    def __init__(self, settings: Path, application: str, socket_path: str, home: Path, workers: int, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.log = home / "gunicorn.log"
        # gunicorn puts a control socket of its own somewhere in the last two.
        given = {"BIND": f"127.0.0.1:{self.port}", "WEB_CONCURRENCY": str(workers), "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", str(settings), "--chdir", environment["PWD"], application]
        command = [sys.executable, "-m", "mppool", "run", "--socket", socket_path, "--", *gunicorn]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **environment, **given}, stdout=log, stderr=log, preexec_fn=die_with_parent)
        eventually(lambda: self.process.poll() is not None or len(self.workers()) == workers, what="gunicorn's workers")
        assert self.process.poll() is None, self.log.read_text()
        eventually(lambda: listens(self.port), what="gunicorn listens")

    def workers(self) -> list[psutil.Process]:
        """gunicorn's: the children of its master."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if "gunicorn" in child.cmdline():
                    return [worker for worker in child.children() if worker.status() != psutil.STATUS_ZOMBIE]
        return []

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of the reply. OSError or HTTPException if the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode().removesuffix("\n")
        finally:
            connection.close()

    def kill_a_worker(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            random.choice(self.workers()).send_signal(signal.SIGKILL)

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def site(example: Path, settings: str, application: str, socket_path: str, home: Path, workers: int, **environment: str) -> Iterator[Site]:
    it = Site(example / settings, application, socket_path, home, workers, {**environment, "PWD": str(example)})
    supervisor = psutil.Process(it.process.pid)
    everything = [supervisor, *supervisor.children(recursive=True)]
    try:
        yield it
    finally:
        if it.process.poll() is None:
            it.stop()
        _, left = psutil.wait_procs(everything, 5)  # the keeper ends a moment after the broker
        for process in left:
            process.kill()


class Load:
    """Threads that ask all the time, each with ``ask(get, client, n)``, which raises AssertionError at a wrong reply. Broken connections are counted."""

    def __init__(self, site: Site, ask: Callable[[Callable[[str], tuple[int, str]], int, int], None], clients: int = 6) -> None:
        self.site = site
        self.ask = ask
        self.rounds = [0] * clients
        self.wrong: list[str] = []
        self.broken = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,), daemon=True) for client in range(clients)]

    def _run(self, client: int) -> None:
        while not self._stop.is_set():
            try:
                self.ask(self.site.get, client, self.rounds[client])
            except AssertionError as error:
                self.wrong.append(str(error))
            except (OSError, http.client.HTTPException):
                self.broken += 1
            self.rounds[client] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
