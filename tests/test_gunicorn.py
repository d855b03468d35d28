"""gunicorn for real: preforked workers over one pool to a real Redis, and Redis' own list of clients is the judge.

The application is examples/gunicorn_redis, started as its docstring says. Client threads load it all the time, each with
keys and values of its own, so that a reply that reached the wrong request would show.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.daemons import daemon, free_port
from tests.helpers.leftovers import names
from tests.helpers.processes import eventually
from tests.helpers.site import Clients, ending
from tests.helpers.site import Site as Gunicorn

EXAMPLE = Path(__file__).parent.parent / "examples" / "gunicorn_redis"
CAP = 4
WORKERS = 6
CLIENTS = 8

pytestmark = [
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed"),
]


class Redis:
    """The judge's own connection to a Redis: asks how many others there are. Threads may share it."""

    def __init__(self, port: int) -> None:
        self.address = f"tcp://127.0.0.1:{port}"
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._reader = self._sock.makefile("rb")
        self._lock = threading.Lock()

    def ask(self, command: str) -> str:
        """The reply to a command, as text; only strings, numbers and "OK" are expected."""
        with self._lock:
            self._sock.sendall(command.encode() + b"\r\n")
            header = self._reader.readline().decode()
            assert header[:1] in ("$", "+", ":"), header
            return self._reader.read(int(header[1:]) + 2).decode() if header[0] == "$" else header[1:].strip()

    def clients(self) -> list[str]:
        """A line for each connection beside the judge's."""
        return [line for line in self.ask("CLIENT LIST").splitlines() if line and "cmd=client|list" not in line]

    def dials(self) -> int:
        """How many connections were accepted since ``begin``."""
        info = dict(line.split(":", 1) for line in self.ask("INFO stats").splitlines() if ":" in line)
        return int(info["total_connections_received"])

    def begin(self) -> None:
        """Wait until only the judge is connected, and count from here."""
        eventually(lambda: not self.clients(), what="only the judge is connected")
        self.ask("CONFIG RESETSTAT")

    def close(self) -> None:
        self._reader.close()
        self._sock.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    with daemon(command, port, tmp_path / "redis.log"):
        judge = Redis(port)
        judge.begin()
        yield judge
        judge.close()


class Sampler:
    """Asks Redis all the time how many connections it has, and keeps the most it ever heard."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.peak = 0
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, len(self.redis.clients()))
            self.samples += 1

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


class Site(Gunicorn):
    """The example as an operator would start it."""

    def __init__(self, redis: Redis, path: str, home: Path, **settings: str) -> None:
        self.path = path
        environment = {**settings, "REDIS": redis.address, "REDIS_CONNECTIONS": str(CAP), "PWD": str(EXAMPLE)}
        super().__init__(EXAMPLE / "gunicorn.conf.py", "app:app", path, home, WORKERS, environment)

    def status(self) -> dict[str, Any]:
        """What ``mppool status --json redis`` prints."""
        command = [sys.executable, "-m", "mppool", "status", "--socket", self.path, "--json", "redis"]
        pool: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=20).stdout)["pools"][0]
        return pool


@contextlib.contextmanager
def site(redis: Redis, path: str, home: Path, **settings: str) -> Iterator[Site]:
    with ending(Site(redis, path, home, **settings)) as it:
        yield it


class Load(Clients):
    """Each client has its own keys, and knows what each reply must be."""

    def __init__(self, site: Site) -> None:
        super().__init__(CLIENTS)
        self.site = site
        self._made = [0] * CLIENTS  # what the counter of each client stands at
        self.wrong: list[str] = []
        self.broken: list[str] = []  # requests whose connection to gunicorn ended without a reply

    def round(self, client: int) -> None:
        n = self.rounds[client]
        if self._expect(f"/set/key-{client}/value-{client}-{n}", 200, f"value-{client}-{n}"):  # else it may or may not be done
            self._expect(f"/get/key-{client}", 200, f"value-{client}-{n}")
        self._expect(f"/pop/nothing-{client}/0.005", 404, "nothing there")  # holds a session for so long: others wait for theirs
        self._made[client] = self._count(f"/incr/count-{client}", self._made[client])
        self.rounds[client] += 1

    def _expect(self, path: str, status: int, text: str) -> bool:
        """Ask; note a wrong reply. False: there was none."""
        got = self._get(path)
        if got is not None and got != (status, text):
            self.wrong.append(f"{path}: expected {status} {text!r}, got {got}")
        return got is not None

    def _count(self, path: str, made: int) -> int:
        got = self._get(path)
        while got is None:  # nobody knows whether it was done
            got, made = self._get(path), -1
        if got[0] != 200 or (made >= 0 and got[1] != str(made + 1)):
            self.wrong.append(f"{path}: expected {made + 1}, got {got}")
        return int(got[1]) if got[0] == 200 else made

    def _get(self, path: str) -> tuple[int, str] | None:
        try:
            return self.site.get(path)
        except (OSError, http.client.HTTPException) as error:
            self.broken.append(f"{path}: {error!r}")
            return None


class Holder:
    """A request that holds a session until the judge lets it go."""

    def __init__(self, site: Site, redis: Redis, key: str) -> None:
        self.redis = redis
        self.key = key
        self.reply: tuple[int, str] | Exception | None = None
        self._site = site
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.reply = self._site.get(f"/pop/{self.key}/4")
        except (OSError, http.client.HTTPException) as error:
            self.reply = error

    def let_go(self) -> None:
        self.redis.ask(f"RPUSH {self.key} item-of-{self.key}")

    def result(self) -> tuple[int, str] | Exception | None:
        self._thread.join(10)
        return self.reply


def whole_cap(site: Site, redis: Redis) -> None:
    """As many requests as the cap, each on a session of its own at the same time, and each gets what is its own."""
    holders = [Holder(site, redis, f"whole-{number}") for number in range(CAP)]
    eventually(lambda: sum("cmd=blpop" in client for client in redis.clients()) == CAP, 3, what="the whole cap in use at once")
    for holder in holders:
        holder.let_go()
    assert [holder.result() for holder in holders] == [(200, f"item-of-whole-{number}") for number in range(CAP)]


def test_workers_share_the_cap_through_restarts(redis: Redis, socket_path: str, tmp_path: Path) -> None:
    """Under load, and while HUP replaces every worker: never more connections than the cap, none dialed again, no request fails."""
    with site(redis, socket_path, tmp_path) as it, Sampler(redis) as sampler, Load(it) as load:
        load.goes_on(20)
        before = set(it.workers())
        it.master().send_signal(signal.SIGHUP)
        eventually(lambda: len(it.workers()) == WORKERS and not before & set(it.workers()), 15, what="gunicorn replaced its workers")
        load.goes_on(20)
        pool = it.status()
    print(f"\nHUP: rounds {sum(load.rounds)}, peak {sampler.peak} in {sampler.samples} samples, dials {redis.dials()}, waits {pool['waits']}")
    assert (load.wrong, load.broken) == ([], [])
    assert sampler.peak == CAP
    assert redis.dials() <= CAP + 2
    assert pool["size"] <= CAP
    assert pool["waits"] > 0


def test_workers_that_retire_leave_their_sessions(redis: Redis, socket_path: str, tmp_path: Path) -> None:
    """``max_requests`` with jitter: workers come and go all the time, and the sessions stay."""
    with site(redis, socket_path, tmp_path, MAX_REQUESTS="40") as it, Sampler(redis) as sampler, Load(it) as load:
        seen = set(it.workers())
        until = time.monotonic() + 15
        while len(seen) < 4 * WORKERS and time.monotonic() < until:
            load.goes_on(1)
            seen |= set(it.workers())
    print(f"\nmax_requests: workers {len(seen)}, rounds {sum(load.rounds)}, peak {sampler.peak} in {sampler.samples} samples, dials {redis.dials()}")
    assert len(seen) >= 4 * WORKERS
    assert (load.wrong, load.broken) == ([], [])
    assert sampler.peak == CAP
    assert redis.dials() <= CAP + 4


def test_a_killed_worker_breaks_its_own_request_only(redis: Redis, socket_path: str, tmp_path: Path) -> None:
    """SIGKILL in mid-request: that request breaks and no other, and the whole cap is to be had again."""
    with site(redis, socket_path, tmp_path) as it, Sampler(redis) as sampler:
        with Load(it) as load:
            load.goes_on(10)
            victim = Holder(it, redis, "victim")
            pid = eventually(lambda: [worker["pid"] for worker in it.status()["workers"] if worker["oldest_lease"] > 0.2], what="a long lease")[0]
            os.kill(pid, signal.SIGKILL)
            assert isinstance(victim.result(), (OSError, http.client.HTTPException))
            for _ in range(3):  # and some that may be anywhere
                eventually(lambda: len(it.workers()) == WORKERS, what="gunicorn replaced the worker")
                it.workers()[0].kill()
                load.goes_on(5)
        whole_cap(it, redis)
        pool = it.status()
    print(f"\nSIGKILL: rounds {sum(load.rounds)}, broken {len(load.broken)}, peak {sampler.peak} in {sampler.samples} samples, dials {redis.dials()}")
    assert load.wrong == []
    assert len(load.broken) <= 3
    assert sampler.peak == CAP
    assert redis.dials() <= CAP + 4 + 1
    assert pool["size"] <= CAP
    assert [worker for worker in pool["workers"] if not worker["alive"]] == []


def test_sigterm_leaves_nothing(redis: Redis, socket_path: str, tmp_path: Path) -> None:
    """SIGTERM to ``mppool run``: it exits as gunicorn does, and no process, connection, socket file or shared name is left."""
    with site(redis, socket_path, tmp_path) as it:
        with Load(it) as load:
            load.goes_on(5)
        everything = it.processes()
        assert len(everything) >= 1 + 2 + 1 + WORKERS  # the supervisor, the broker and its keeper, gunicorn and its workers
        assert names(socket_path)
        assert it.stop() == 0
        eventually(lambda: not [process for process in everything if process.is_running()], what="processes left over")
        eventually(lambda: not redis.clients(), what="connections left over")
        assert names(socket_path) == []
        eventually(lambda: os.listdir(os.path.dirname(socket_path)) == [], what="files left over")
    assert (load.wrong, load.broken) == ([], [])


@pytest.mark.parametrize(
    ("received", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-7\r\n", -7),
        (b"$3\r\na\r\n\r\n", b"a\r\n"),
        (b"$-1\r\n", None),
        (b"*2\r\n$1\r\na\r\n*1\r\n:1\r\n", [b"a", [1]]),
        (b"*-1\r\n", None),
    ],
)
def test_the_examples_reader_takes_one_reply_in_pieces(received: bytes, reply: object) -> None:
    """However a reply is cut into pieces, it is read whole, and nothing of it is taken for whole too early."""
    parse = example_module("resp").parse
    assert [parse(received[:cut]) for cut in range(len(received))] == [None] * len(received)
    assert parse(received) == (reply, len(received))


@pytest.mark.parametrize("received", [b"+OK\r\n+OK\r\n", b"+OK\r\n+", b"$1\r\nabc\r\n", b"$-2\r\nab\r\n", b"$x\r\n", b"?\r\n", b"$5\r\nabc"])
def test_the_examples_reader_raises_on_any_doubt(received: bytes) -> None:
    """More than one reply, less than one, or something else: the session is not to be used again."""
    resp = example_module("resp")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(received)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(resp.Doubt):
            resp.command(ours, "PING")


def example_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
