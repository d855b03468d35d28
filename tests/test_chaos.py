"""A short while of chaos, with another seed each time (scripts/chaos runs longer and repeats a seed); and what it found, step by step."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest

import mppool
from mppool.drivers.dialer import FOREVER
from mppool.drivers.raw import RawDriver
from mppool.kernel.runtime import pool_id
from mppool.options import parse_target
from mppool.stray import settle_strays
from mppool.table import creation_lock
from mppool.worker import Hands, Ready
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import Child, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask


@pytest.mark.storm
@pytest.mark.timeout(300)  # it takes long only if it finds something
@pytest.mark.parametrize("options", [["--seconds", "9"], ["--seconds", "6", "--no-broker"]], ids=["broker", "no-broker"])
def test_a_host_full_of_trouble_loses_nothing(options: list[str]) -> None:
    """Whatever is killed, stopped, closed, reset, refused or resized: the servers never see too many connections, nothing crosses, nothing is lost."""
    command = [sys.executable, "-m", "tests.chaos", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, preexec_fn=die_with_parent)
    print(done.stdout)
    assert done.returncode == 0, "see what was found above; --seed repeats the actions"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests"] > 0
    assert figures["rounds"] > 0
    assert figures["kills"] > 0


def test_a_row_that_was_taken_again_is_not_taken_for_dead(server: Judge, socket_path: str) -> None:
    """A worker in need that saw a dead row, and whose turn to reclaim comes when a living process has that row, leaves that one alone."""

    def pool(size: int = 1) -> mppool.Pool:
        return mppool.Pool(server.address, max_size=size, name="again", broker=socket_path)

    def dead(child: Child) -> None:
        pool().open()
        child.tell()
        child.hear()

    def slow(child: Child) -> None:
        """In need; between its look for the dead and its turn to reclaim it is held up."""
        turns: list[Hands] = []
        real = Hands.may_reclaim

        def may_reclaim(hands: Hands) -> bool:
            turns.append(hands)
            if len(turns) == 1:
                child.tell("held up")
                child.hear()
            return real(hands)

        setattr(Hands, "may_reclaim", may_reclaim)  # noqa: B010 (which mypy allows)
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=0.5)
        child.tell("gave up")
        child.hear()

    def quick(child: Child) -> None:
        """In need, too, and not held up; it frees the dead row."""
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=0.1)
        child.tell("gave up")
        child.hear()

    def holder(child: Child) -> None:
        with pool().connection():
            child.tell("holds")
            child.hear()

    def newcomer(child: Child) -> None:
        """Takes the row that became free, and then the session."""
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with mine.connection() as sock:
            child.tell("holds")
            child.hear()
            ask(sock, "still-mine")
        child.tell("returned")
        child.hear()

    with fork(dead) as [one]:
        one.hear()
        with fork(holder, slow, quick) as [two, three, four]:
            assert [two.hear(), three.hear(), four.hear()] == ["holds", "there", "there"]
            one.end()
            three.tell()
            assert three.hear() == "held up"
            four.tell()
            assert four.hear() == "gave up"
            with fork(newcomer) as [five]:
                assert five.hear() == "there"
                two.end()
                five.tell()
                assert five.hear() == "holds"
                three.tell()
                assert three.hear() == "gave up"
                five.tell()
                assert five.hear() == "returned"
                last = pool()
                workers = {worker["pid"] for worker in last.get_stats()["workers"]}
                assert workers >= {three.pid, four.pid, five.pid}
    last.close()  # the names go with the last to leave


def test_close_while_a_thread_waits(server: Judge, socket_path: str) -> None:
    """A pool closed while another thread waits: that one gets PoolClosed, or what it is just granted, to use and give back; nothing is lost."""

    def pool() -> mppool.Pool:
        return mppool.Pool(server.address, max_size=1, name="close", broker=socket_path)

    def holder(child: Child) -> None:
        mine = pool()
        with mine.connection():
            child.tell()
            child.hear()
        child.tell("returned")
        child.hear()
        mine.close()

    def closer(child: Child) -> None:
        mine = pool()
        mine.open()
        said: list[str] = []

        def wait() -> None:
            try:
                with mine.connection(timeout=20):
                    said.append("lent")
            except mppool.PoolClosed:
                said.append("closed")

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: mine.get_stats()["waiting"])
        mine.close()
        child.tell("closed")
        thread.join(20)
        child.tell(said)

    def bystander(child: Child) -> None:
        mine = pool()
        with mine.connection(timeout=10) as sock:
            child.tell(ask(sock, "mine"))
        mine.close()

    with broker_process(socket_path), fork(holder) as [one]:
        one.hear()
        with fork(closer) as [two]:
            assert two.hear() == "closed"
            one.tell()
            assert one.hear() == "returned"
            assert two.hear() in (["closed"], ["lent"])
            two.result()
            with fork(bystander) as [three]:
                assert three.hear() in (1, 2)
                three.result()
                assert server.counts()["peak"] == 1
        one.tell()
        one.result()


def test_a_literal_address_is_not_looked_up(server: Judge, socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dial to an address in digits asks no resolver: in a fork child its locks may be held for ever by a thread that is not there."""

    def looked_up(*_: object, **__: object) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with mppool.Pool(server.address, name="digits", broker=socket_path) as pool, pool.connection(timeout=1) as sock:
        assert ask(sock, "digits") == 1


class SlowLogin(RawDriver):
    """Connected, but not yet logged in, for as long as the test likes."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(parse_target(address))
        self.connected = threading.Event()
        self.welcome = threading.Event()

    def dial(self) -> socket.socket:
        sock = super().dial()
        self.connected.set()
        self.welcome.wait(20)
        return sock


@pytest.mark.parametrize("with_broker", [True, False], ids=["broker", "no-broker"])
def test_a_fork_in_the_middle_of_a_dial_keeps_the_cap(server: Judge, socket_path: str, with_broker: bool) -> None:
    """A process forks while another of its threads dials, and is killed; while the child lives there is never one connection more than the cap."""

    def pool(driver: RawDriver) -> mppool.Pool:
        return mppool.Pool(driver=driver, max_size=1, name="fork", broker=socket_path)

    def dialer(child: Child) -> None:
        driver = SlowLogin(server.address)
        mine = pool(driver)
        threading.Thread(target=mine.getconn, daemon=True).start()
        assert driver.connected.wait(10)
        sleeper = os.fork()
        if sleeper == 0:
            end_with(parent)
            time.sleep(60)
            os._exit(0)
        child.tell(sleeper)
        child.hear()

    def bystander(child: Child) -> None:
        mine = pool(RawDriver(parse_target(server.address)))
        mine.open()
        child.tell()
        child.hear()
        with contextlib.suppress(mppool.PoolTimeout), mine.connection(timeout=1):
            pass
        child.tell(server.counts()["live"])
        child.hear()
        with mine.connection(timeout=10):
            child.tell("leased")
        mine.close()

    parent = os.getpid()
    with broker_process(socket_path) if with_broker else contextlib.nullcontext(), fork(bystander) as [one]:
        one.hear()
        with fork(dialer) as [two]:
            sleeper = two.hear()
            two.end()
        try:
            one.tell()
            assert one.hear() <= 1, "the dead one's child has its connection, and another was dialed"
        finally:
            os.kill(sleeper, 9)
        eventually(lambda: server.counts()["live"] <= 1)
        one.tell()
        assert one.hear() == "leased"
        one.result()


def test_a_fork_inside_the_creation_lock_locks_nobody_out(server: Judge, socket_path: str) -> None:
    """A process forks while another of its threads attaches to the pool, and is killed before that is done: others attach while the child lives."""

    def attacher(child: Child) -> None:
        inside = threading.Event()

        def attach() -> None:
            with creation_lock(pool_id(socket_path, "locked")):
                inside.set()
                time.sleep(60)

        threading.Thread(target=attach, daemon=True).start()
        assert inside.wait(10)
        sleeper = os.fork()
        if sleeper == 0:
            end_with(parent)
            time.sleep(60)
            os._exit(0)
        child.tell(sleeper)
        child.hear()

    def bystander(child: Child) -> None:
        with mppool.Pool(server.address, name="locked", broker=socket_path) as pool, pool.connection() as sock:
            child.tell(ask(sock, "attached"))

    parent = os.getpid()
    with fork(attacher) as [one]:
        sleeper = one.hear()
        one.end()
        try:
            with fork(bystander) as [two]:
                assert two.hear() == 1
                two.result()
        finally:
            os.kill(sleeper, 9)


def end_with(pid: int) -> None:
    """This process outlives its parent, but not the process ``pid``."""

    def watch() -> None:
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class SlowAttach(RawDriver):
    """To make a usable object of a descriptor takes as long as the test likes."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(parse_target(address))
        self.received = threading.Event()
        self.go_on = threading.Event()

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        self.received.set()
        self.go_on.wait(20)
        return super().attach(fd, baggage)


def test_a_session_attached_across_a_change_of_brokers_is_shown(server: Judge, socket_path: str) -> None:
    """Received from the old broker, attached after another thread showed everything to the new one: it counts as long as it is open."""

    def pool(driver: RawDriver) -> mppool.Pool:
        return mppool.Pool(driver=driver, max_size=1, name="shown", broker=socket_path)

    def dialer(child: Child) -> None:
        with pool(RawDriver(parse_target(server.address))).connection() as sock:
            ask(sock, "first")
        child.tell()
        child.hear()

    def worker(child: Child) -> None:
        driver = SlowAttach(server.address)
        mine = pool(driver)

        def use() -> None:
            with mine.connection(timeout=20) as sock:
                ask(sock, "second")

        child.hear()
        thread = threading.Thread(target=use)
        thread.start()
        assert driver.received.wait(10)
        child.tell("received")
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=1)
        child.tell("shown")
        child.hear()
        driver.go_on.set()
        thread.join()
        child.tell("returned")
        child.hear()
        mine.close()

    def bystander(child: Child) -> None:
        mine = pool(RawDriver(parse_target(server.address)))
        mine.open()
        child.tell()
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=1)
        child.tell("shown")
        child.hear()
        with contextlib.suppress(mppool.PoolTimeout), mine.connection(timeout=2):
            pass
        child.tell(server.counts()["live"])
        child.hear()
        mine.close()

    with broker_process(socket_path) as broker, fork(dialer, worker, bystander) as [one, two, three]:
        one.hear()
        three.hear()
        two.tell()
        assert two.hear() == "received"
        one.end()
        keepers = [process for process in processes_of(socket_path) if "mppool.keeper" in process.cmdline()]
        broker.kill()
        for keeper in keepers:
            keeper.kill()
        broker.restart()
        for child in (two, three):
            child.tell()
            assert child.hear() == "shown"
        two.tell()
        assert two.hear() == "returned"
        three.tell()
        assert three.hear() == 1, "one more connection than the cap"
        for child in (two, three):
            child.tell()
            child.result()


class Watched(deque[Ready]):
    """The local idle list, with something that happens right after it was looked through."""

    then: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Ready]:
        yield from list(super().__iter__())
        if self.then is not None:
            self.then()


def test_a_lane_on_its_way_is_no_stray(server: Judge, socket_path: str) -> None:
    """While one thread looks for stray lanes another returns a session, at the worst moment if there is one, thrice: every lane is in one place only."""
    pool = mppool.Pool(server.address, max_size=1, name="stray", broker=socket_path)
    turns: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[str] = queue.SimpleQueue()

    def use() -> None:
        conn = pool.getconn()
        done.put("lent")
        while turns.get() != "end":
            pool.putconn(conn)
            done.put("returned")
            turns.get()
            conn = pool.getconn()
            done.put("lent")
        pool.putconn(conn)

    def return_it() -> None:
        idle.then = None
        turns.put("return")
        assert done.get(timeout=10) == "returned"

    pool.open()
    worker = pool._worker
    assert worker is not None
    idle = worker.idle = worker.ready = Watched()
    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert done.get(timeout=10) == "lent"
        for _ in range(3):
            idle.then = return_it
            settle_strays(worker)
            if idle.then is not None:
                return_it()  # it did not look where others move
            turns.put("lend")
            assert done.get(timeout=10) == "lent"
        places = [*worker.lanes, *(lane for _, lane in [*worker.idle, *worker.leases.values()])]
        assert len(places) == len(set(places)), "a lane is in two places: two threads will use it"
        assert len(places) == worker.table.lanes
    finally:
        turns.put("end")
        thread.join(10)
        pool.close()


class SlowSocket(socket.socket):
    """Sets its timeout only when it may."""

    def settimeout(self, value: float | None) -> None:
        if value == FOREVER and self.gettimeout() == 5.0:
            returning.set()
            go_on.wait(10)
        super().settimeout(value)


returning, go_on = threading.Event(), threading.Event()


class SlowReturn(RawDriver):
    def dial(self) -> socket.socket:
        sock = super().dial()
        slow = SlowSocket(fileno=sock.detach())
        slow.settimeout(FOREVER)
        return slow


def test_a_lease_on_its_way_back_is_no_stray(server: Judge, socket_path: str) -> None:
    """While one thread returns a session others look for stray lanes: it is returned, still alive, and every lane is in one place only."""
    returning.clear()
    go_on.clear()
    pool = mppool.Pool(driver=SlowReturn(parse_target(server.address)), max_size=1, name="stray", broker=socket_path)
    failed: list[BaseException] = []

    def use() -> None:
        try:
            with pool.connection() as sock:
                sock.settimeout(5.0)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert returning.wait(10)
        worker = pool._worker
        assert worker is not None
        settle_strays(worker)
        settle_strays(worker)
        go_on.set()
        thread.join()
        assert failed == []
        places = [*worker.lanes, *(lane for _, lane in [*worker.idle, *worker.leases.values()])]
        assert len(places) == len(set(places)) == worker.table.lanes
        with pool.connection() as sock:
            assert ask(sock, "alive") == 1
    finally:
        go_on.set()
        thread.join()
        pool.close()
