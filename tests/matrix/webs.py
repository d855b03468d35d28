"""Rows about web servers: gunicorn's worker classes and uWSGI, under load while workers retire, are replaced and killed."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

from tests.helpers.daemons import free_port
from tests.helpers.processes import eventually
from tests.helpers.site import Clients
from tests.matrix.scene import Scene, row

CLIENTS = 8
WORKERS = 4
CAP = 3
THREADS = 3


def missing(*modules: str) -> Callable[[], str]:
    def why_not() -> str:
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        return f"{', '.join(absent)} is not installed" if absent else ""

    return why_not


class Site:
    """A web server with workers, that one of the rows' ways starts."""

    def __init__(self, scene: Scene, *command: str, **environment: str) -> None:
        self.port = free_port()
        address = f"127.0.0.1:{self.port}"
        self.process = scene.start(*(part.replace("BIND", address) for part in command), BIND=address, WEB_CONCURRENCY=str(WORKERS), **environment)
        eventually(lambda: self.process.poll() is not None or len(self.workers()) == WORKERS, 20, what="the workers")
        eventually(self.answers, 20, what="the server answers")

    def workers(self) -> set[int]:
        try:
            return {child.pid for child in psutil.Process(self.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE}
        except psutil.NoSuchProcess:
            return set()

    def answers(self) -> bool:
        assert self.process.poll() is None, f"the server ended with exit code {self.process.returncode}"
        try:
            return self.get("hello", 0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, who: str, milliseconds: float) -> tuple[int, str, int]:
        """Status, whose reply it is, and the worker that made it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", f"/{who}/{milliseconds}")
            reply = connection.getresponse()
            pid, _, name = reply.read().decode().strip().partition(" ")
            return reply.status, name, int(pid or 0)
        finally:
            connection.close()

    def all_new(self, before: set[int]) -> None:
        eventually(lambda: len(self.workers()) == WORKERS and not self.workers() & before, 20, what="other workers")

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


class Load(Clients):
    """Some of the clients ask for something slow."""

    def __init__(self, scene: Scene, site: Site) -> None:
        super().__init__(CLIENTS)
        self.scene = scene
        self.site = site
        self.pids: set[int] = set()  # workers that have replied
        self.broken: list[str] = []  # no reply: the worker was killed, or ended under it

    def round(self, client: int) -> None:
        who = f"client{client}-{self.rounds[client]}"
        try:
            status, name, pid = self.site.get(who, 5 if client % 2 else 0)
        except (OSError, http.client.HTTPException) as error:
            self.broken.append(f"{who}: {error!r}")
            time.sleep(0.02)
            return
        if status == 200 and name != who:
            self.scene.tally.add("crossed", f"asked {who}, got {name}")
        elif status != 200:
            self.scene.tally.add("failed", f"{who}: status {status}")
        self.rounds[client] += 1
        self.pids.add(pid)

    def goes_on(self, rounds: int = 3) -> None:
        """For the row's seconds, and until every client had some more replies."""
        self.scene.load()
        super().goes_on(rounds)

    def settles(self) -> None:
        """Until each worker has replied, if that is soon: a worker that is just beginning loses a signal to end, and is waited for in vain."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: len(self.site.workers()) == WORKERS and self.site.workers() <= self.pids, 4)


def kill_under_a_lease(scene: Scene, site: Site) -> None:
    """SIGKILL to the worker that answers a slow request."""

    def slow() -> None:
        try:
            site.get("victim", 60_000)
        except (OSError, http.client.HTTPException):
            return

    thread = threading.Thread(target=slow)
    thread.start()
    victim = eventually(lambda: long_leases(scene) & site.workers(), 20, what="a long lease").pop()
    os.kill(victim, signal.SIGKILL)
    thread.join(20)
    eventually(lambda: victim not in site.workers(), 20, what="the worker's end")


def long_leases(scene: Scene) -> set[int]:
    """The pids of those who hold a session for longer than any request of the load."""
    return {worker["pid"] for worker in scene.numbers()["workers"] if worker["oldest_lease"] > 0.3}


def through_everything(scene: Scene, site: Site, reload: Callable[[], object]) -> None:
    """Load; all workers replaced; one killed under a lease, one anywhere; then an orderly end."""
    with Load(scene, site) as load:
        load.goes_on()
        load.settles()
        before = site.workers()
        reload()
        site.all_new(before)
        load.goes_on()
        kill_under_a_lease(scene, site)
        with contextlib.suppress(ProcessLookupError):  # it has just retired
            os.kill(eventually(site.workers, 20, what="a worker").pop(), signal.SIGKILL)
        load.goes_on()
        load.settles()
    scene.notes.append(f"{sum(load.rounds)} replies, {len(load.broken)} broken")
    code = site.end()
    assert code == 0, f"exit code {code}"


def gunicorn(scene: Scene, *options: str, **environment: str) -> None:
    command = (sys.executable, "-m", "gunicorn", "-c", "python:tests.matrix.gunicorn_conf", *options, "tests.matrix.webapp:app")
    # Workers with threads or greenlets are quick to reach a limit, and slow to retire.
    site = Site(scene, *command, MAX_REQUESTS="150" if options[:1] == ("-k",) else "60", **environment)
    through_everything(scene, site, lambda: site.process.send_signal(signal.SIGHUP))


@row("gunicorn sync", workers=WORKERS, cap=2, kills=True, why_not=missing("gunicorn"))
def sync(scene: Scene) -> None:
    gunicorn(scene)


@row("gunicorn sync, preload", workers=WORKERS, cap=2, kills=True, why_not=missing("gunicorn"))
def sync_preload(scene: Scene) -> None:
    """The pool is used before the fork, and by the master all the while."""
    gunicorn(scene, "--preload", MATRIX_EARLY="1")


@row("gunicorn gthread", workers=WORKERS * THREADS, cap=CAP, kills=True, why_not=missing("gunicorn"))
def gthread(scene: Scene) -> None:
    gunicorn(scene, "-k", "gthread", "--threads", str(THREADS))


@row("gunicorn gthread, preload", workers=WORKERS * THREADS, cap=CAP, kills=True, why_not=missing("gunicorn"))
def gthread_preload(scene: Scene) -> None:
    gunicorn(scene, "-k", "gthread", "--threads", str(THREADS), "--preload", MATRIX_EARLY="1")


@row("gunicorn gevent", workers=WORKERS, cap=CAP, kills=True, why_not=missing("gunicorn", "gevent"))
def gevent(scene: Scene) -> None:
    """The module is imported after monkey-patching."""
    gunicorn(scene, "-k", "gevent")


@row("gunicorn gevent, preload", workers=WORKERS, cap=CAP, kills=True, why_not=missing("gunicorn", "gevent"))
def gevent_preload(scene: Scene) -> None:
    """The module is imported, and the pool used, before monkey-patching."""
    gunicorn(scene, "-k", "gevent", "--preload", MATRIX_EARLY="1")


def uwsgi(scene: Scene, *options: str, **environment: str) -> None:
    """No hook of Python's runs when it forks."""
    command = [sys.executable, "-c", "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])", "--http-socket", "BIND", "--module", "tests.matrix.webapp:app"]
    command += ["--master", "--processes", str(WORKERS), "--enable-threads", "--threads", "2", "--need-app", "--disable-logging"]
    command += ["--die-on-term", "--no-orphans", "--reload-mercy", "5", "--worker-reload-mercy", "5"]
    site = Site(scene, *command, *options, **environment)
    through_everything(scene, site, lambda: site.process.send_signal(signal.SIGHUP))


@row("uWSGI", workers=WORKERS * 2, cap=CAP, kills=True, why_not=missing("pyuwsgi"))
def uwsgi_early(scene: Scene) -> None:
    """The pool is used in the master before it forks."""
    uwsgi(scene, MATRIX_EARLY="1")


@row("uWSGI, lazy-apps", workers=WORKERS * 2, cap=CAP, kills=True, why_not=missing("pyuwsgi"))
def uwsgi_lazy(scene: Scene) -> None:
    """Each worker imports the application by itself."""
    uwsgi(scene, "--lazy-apps")
