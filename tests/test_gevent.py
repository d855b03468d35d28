"""gevent for real: in a monkey-patched interpreter waiting lets other greenlets go on, and a gevent.Timeout loses nothing, whichever wait it ends.

What is called ``in_gevent`` runs in an interpreter of its own, patched before anything else is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mppool
from tests.helpers.processes import die_with_parent
from tests.helpers.server import Judge, ask
from tests.helpers.speaker import Talk, reply, speaker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")

CAP = 2
PATIENCE = 10.0  # seconds a checkout may wait; only a lost permit makes it so long
HOST = "127.0.0.1"


@pytest.fixture(params=[False, True], ids=["alone", "broker"])
def path(request: pytest.FixtureRequest, socket_path: str) -> str:
    if request.param:
        request.getfixturevalue("broker")
    return socket_path


def patched(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The command that calls a function of this file in an interpreter of its own, and prints what it returns."""
    call = f"import json; from {__name__} import {function.__name__} as it; print(json.dumps(it(*{arguments!r})))"
    return [sys.executable, "-c", f"from gevent import monkey; monkey.patch_all(); {call}"]


def in_gevent(function: Callable[..., Any], *arguments: Any) -> Any:
    command = patched(function, *arguments)
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=100, preexec_fn=die_with_parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    print(f"\n{function.__name__}: {done.stdout}")
    return json.loads(done.stdout)


# What runs there.


class Torture:
    """Does something in a greenlet, and throws a gevent.Timeout into it at its n-th wait, for every n."""

    def __init__(self, pool: mppool.Pool) -> None:
        self.pool = pool

    def at_every_wait(self, operate: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, meanwhile: Callable[[], Any] = lambda: None) -> int:
        """How many waits there were. Before each trial ``prepare``, while it waits for the first time ``meanwhile``; afterwards nothing may be missing."""
        n, most = 0, 0
        while most == n:
            n += 1
            for _ in range(3):  # an answer may be there so soon that nobody waits for it
                prepare()
                if self.thrown_at(n, operate, meanwhile):
                    most = n
                self.check(n)
        return most

    def thrown_at(self, n: int, operate: Callable[[], Any], meanwhile: Callable[[], Any]) -> bool:
        import gevent
        import greenlet

        hub, waits, thrown, waiting = gevent.get_hub(), 0, False, gevent.event.Event()

        def be_thrown_at() -> None:
            with contextlib.suppress(gevent.Timeout):
                operate()

        victim = gevent.Greenlet(be_thrown_at)

        def throw() -> None:
            nonlocal thrown
            if not victim.dead:
                thrown = True
                victim.throw(gevent.Timeout())

        def trace(event: str, switch: Any) -> None:
            nonlocal waits
            if switch[0] is victim and switch[1] is hub and not victim.dead:
                waits += 1
                waiting.set()
                if waits == n:
                    hub.loop.run_callback(throw)  # as gevent's timers do; what the greenlet waits for comes after that

        greenlet.settrace(trace)
        try:
            victim.start()
            gevent.wait([waiting, victim], timeout=PATIENCE, count=1)
            meanwhile()
            victim.join(PATIENCE)
        finally:
            greenlet.settrace(None)
        assert victim.dead, "it waits for ever"
        victim.get()
        return thrown

    def check(self, n: int) -> None:
        """The whole cap can be had, and every session answers what it was asked."""
        sessions = [self.pool.getconn(PATIENCE) for _ in range(CAP)]
        for k, session in enumerate(sessions):
            ask(session, f"check{n}-{k}")
            self.pool.putconn(session)
        assert self.pool.get_stats()["in_use"] == 0

    def empty(self) -> None:
        """Close what is idle."""
        for session in [self.pool.getconn(PATIENCE) for _ in range(CAP)]:
            self.pool.putconn(session, discard=True)

    def use(self) -> None:
        with self.pool.connection(PATIENCE) as sock:
            ask(sock, "victim")


def dialing(port: int, path: str) -> int:
    with mppool.Pool((HOST, port), max_size=CAP, broker=path, name="green") as pool:
        torture = Torture(pool)
        return torture.at_every_wait(torture.use, torture.empty)


def waiting(port: int, path: str) -> int:
    """The session comes back while it waits; and at the n-th wait the timeout, too: before it, with it, after it."""
    with mppool.Pool((HOST, port), max_size=CAP, broker=path, name="green") as pool:
        held: list[Any] = []

        def give() -> None:
            while held:
                pool.putconn(held.pop())

        torture = Torture(pool)
        return torture.at_every_wait(torture.use, lambda: held.extend(pool.getconn(PATIENCE) for _ in range(CAP)), give)


def discarding(port: int, path: str) -> int:
    """What is closed waits for the server's end of it."""
    with mppool.Pool((HOST, port), max_size=CAP, broker=path, name="green") as pool:
        torture = Torture(pool)

        def discard() -> None:
            sock = pool.getconn(PATIENCE)
            try:
                ask(sock, "victim")
            finally:
                pool.putconn(sock, discard=True)

        return torture.at_every_wait(discard)


def fetching(port: int, path: str) -> int:
    """A session that another process dialed, as it did all, each time new ones."""
    other = subprocess.Popen(patched(dialing_for_others, port, path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    stdin, stdout = other.stdin, other.stdout

    def dial() -> None:
        print("dial", file=stdin, flush=True)
        assert stdout.readline() == "dialed\n"

    with other, mppool.Pool((HOST, port), max_size=CAP, broker=path, name="green") as pool:
        torture = Torture(pool)
        try:
            return torture.at_every_wait(torture.use, dial)
        finally:
            stdin.close()
            stdout.read()


def dialing_for_others(port: int, path: str) -> None:
    with mppool.Pool((HOST, port), max_size=CAP, broker=path, name="green") as pool:
        torture = Torture(pool)
        for _ in sys.stdin:
            torture.empty()
            torture.check(0)
            print("dialed", flush=True)


class TortureOfUrllib3(Torture):
    """The same of its requests: to it belongs what gives a connection back."""

    def __init__(self, url: str, path: str) -> None:
        from mppool.integrations.urllib3 import PoolManager

        self.url = url
        self.manager = PoolManager(maxsize=CAP, shared={"broker": path})
        pool: Any = self.manager.connection_from_url(url)
        super().__init__(pool.shared_pool)

    def check(self, n: int) -> None:
        responses = [self.manager.request("GET", f"{self.url}/echo?nonce=check{n}", pool_timeout=PATIENCE, preload_content=False) for _ in range(CAP)]
        assert [response.read().split()[1].decode() for response in responses] == [f"check{n}"] * CAP
        assert self.pool.get_stats()["in_use"] == 0

    def use(self) -> None:
        self.manager.request("GET", f"{self.url}/parts?nonce=victim", pool_timeout=PATIENCE)


def requesting(url: str, path: str) -> int:
    torture = TortureOfUrllib3(url, path)
    try:
        return torture.at_every_wait(torture.use)
    finally:
        torture.manager.clear()


def cooperating(port: int, path: str) -> list[str]:
    """One greenlet waits for what another has, and only a third makes that one give it back."""
    import gevent

    done: list[str] = []
    with mppool.Pool((HOST, port), max_size=1, broker=path, name="green") as pool:
        held = pool.getconn(PATIENCE)

        def wait() -> None:
            done.append("waits")
            with pool.connection(PATIENCE) as sock:
                ask(sock, "waiter")
            done.append("served")

        def work() -> None:
            for n in range(3):
                gevent.sleep(0.01)
                done.append(f"works {n}")
            pool.putconn(held)

        gevent.joinall([gevent.spawn(wait), gevent.spawn(work)], raise_error=True, timeout=30)
    return done


def timing_out(port: int, path: str) -> str:
    """Nobody gives anything back."""
    import gevent

    with mppool.Pool((HOST, port), max_size=1, broker=path, name="green") as pool, pool.connection(PATIENCE), gevent.Timeout(PATIENCE):
        try:
            pool.getconn(0.05)
        except mppool.PoolTimeout as error:
            return str(error)
    return "lent twice"


# The tests.


def test_waits_let_other_greenlets_go_on(server: Judge, path: str) -> None:
    """Who holds the session can go on and give it back."""
    assert in_gevent(cooperating, server.address[1], path) == ["waits", "works 0", "works 1", "works 2", "served"]


def test_waits_end_with_their_own_timeout(server: Judge, path: str) -> None:
    """With PoolTimeout, not when something happens to come."""
    assert "no session within 0.05 s (max_size=1, in_use=1" in in_gevent(timing_out, server.address[1], path)


@pytest.mark.parametrize("function", [dialing, waiting, discarding])
def test_a_timeout_at_any_wait_loses_nothing(server: Judge, path: str, function: Callable[..., int]) -> None:
    """Dialing, waiting for others, closing, and the request itself: the cap stays whole, and is never exceeded."""
    assert in_gevent(function, server.address[1], path) > 0
    assert server.counts()["peak"] <= CAP


def test_a_timeout_while_a_session_is_fetched_loses_nothing(server: Judge, socket_path: str, broker: object) -> None:
    """From another process, through the broker."""
    assert in_gevent(fetching, server.address[1], socket_path) > 0
    assert server.counts()["peak"] <= CAP


def in_parts(talk: Talk) -> None:
    """One that has to be waited for more than once: a moment between its parts."""
    text = reply(talk)
    for part in (text[:20], text[20:-3], text[-3:]):
        time.sleep(0.01)
        talk.say(part)


def test_a_timeout_in_an_http_request_loses_nothing(path: str) -> None:
    """urllib3 closes its connection and does not say so to the pool."""
    with speaker({"/echo": lambda talk: talk.say(reply(talk)), "/parts": in_parts}) as server:
        assert in_gevent(requesting, server.url, path) > 0
