"""A web site as an operator starts it: ``mppool run -- gunicorn ...``, and clients that load it all the time."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from tests.helpers.daemons import free_port, listens
from tests.helpers.processes import die_with_parent, ended, eventually

__all__ = ["Clients", "Load", "Site", "ending", "get", "site"]

C = TypeVar("C", bound="Clients")
S = TypeVar("S", bound="Site")


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

    def processes(self) -> list[psutil.Process]:
        """All of it: the supervisor, the broker and its keeper, gunicorn and its workers."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def master(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if "gunicorn" in child.cmdline())

    def workers(self) -> list[psutil.Process]:
        """gunicorn's: the children of its master."""
        with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
            return [worker for worker in self.master().children() if worker.status() != psutil.STATUS_ZOMBIE]
        return []

    def get(self, path: str) -> tuple[int, str]:
        return get(self.port, path)

    def kill_workers(self, seconds: float) -> int:
        """Two each second, any of them, for so long; how many kills those were."""
        until, kills = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            time.sleep(0.5)
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                random.choice(self.workers()).kill()
            kills += 1
        return kills

    def stop(self) -> int:
        return ended(self.process)


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of the reply. OSError or HTTPException if the connection broke."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode().removesuffix("\n")
    finally:
        connection.close()


@contextlib.contextmanager
def site(example: Path, settings: str, application: str, socket_path: str, home: Path, workers: int, **environment: str) -> Iterator[Site]:
    with ending(Site(example / settings, application, socket_path, home, workers, {**environment, "PWD": str(example)})) as it:
        yield it


@contextlib.contextmanager
def ending(it: S) -> Iterator[S]:
    """Nothing of it is left afterwards."""
    everything = it.processes()
    try:
        yield it
    finally:
        if it.process.poll() is None:
            it.stop()
        _, left = psutil.wait_procs(everything, 5)  # the keeper ends a moment after the broker
        for process in left:
            process.kill()


class Clients:
    """Threads that ask all the time, while the block lasts: each does ``round`` again and again, which counts in ``rounds``."""

    def __init__(self, clients: int) -> None:
        self.rounds = [0] * clients
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,), daemon=True) for client in range(clients)]

    def round(self, client: int) -> None:
        raise NotImplementedError

    def goes_on(self, rounds: int = 5) -> None:
        """Until every client has had so many more rounds."""
        goal = [had + rounds for had in self.rounds]
        eventually(lambda: all(map(int.__ge__, self.rounds, goal)), 30, what="every client goes on")

    def _run(self, client: int) -> None:
        while not self._stop.is_set():
            self.round(client)

    def __enter__(self: C) -> C:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


class Load(Clients):
    """Each client asks with ``ask(get, client, n)``, which raises AssertionError at a wrong reply. Broken connections are counted."""

    def __init__(self, site: Site, ask: Callable[[Callable[[str], tuple[int, str]], int, int], None], clients: int = 6) -> None:
        super().__init__(clients)
        self.site = site
        self.ask = ask
        self.wrong: list[str] = []
        self.broken = 0

    def round(self, client: int) -> None:
        try:
            self.ask(self.site.get, client, self.rounds[client])
        except AssertionError as error:
            self.wrong.append(str(error))
        except (OSError, http.client.HTTPException):
            self.broken += 1
        self.rounds[client] += 1
