"""What the broker does for workers, and what happens when it, its keeper or a worker dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import mppool
from mppool.claims import is_granted
from mppool.inspect import find_pool
from mppool.kernel import memory
from mppool.kernel.runtime import scope_of
from mppool.line import Line
from mppool.table import H_WAITERS, R_CLAIMED, R_PID, W_BEAT
from mppool.worker import LOOK
from tests.helpers.leftovers import names, processes_of
from tests.helpers.processes import PATIENCE, BrokerProcess, Child, answers, broker_process, eventually, fork
from tests.helpers.server import Judge, ask


def keeper_of(path: str) -> psutil.Process | None:
    return next((process for process in processes_of(path) if "mppool.keeper" in process.cmdline()), None)


def hold(pool: mppool.Pool, count: int) -> Any:
    """A child that leases so many sessions, and returns them when it is told to; then it sleeps."""

    def work(child: Child) -> None:
        sessions = [pool.getconn(timeout=10) for _ in range(count)]
        for n, session in enumerate(sessions):
            ask(session, f"hold{n}")
        child.tell("held")
        child.hear()
        for session in sessions:
            pool.putconn(session)
        child.tell("idle")
        time.sleep(60)

    return work


def test_sessions_move_between_processes(server: Judge, broker: BrokerProcess) -> None:
    """What one process dialed another uses, without a dial."""
    pool = mppool.Pool(server.address, max_size=3, name="p", broker=broker.path)
    with fork(hold(pool, 3)) as (child,):
        child.hear()
        child.tell()
        child.hear()
        numbers = set()
        sessions = [pool.getconn(timeout=2) for _ in range(3)]
        for n, session in enumerate(sessions):
            numbers.add(ask(session, f"n{n}"))
            pool.putconn(session)
        assert numbers == {1, 2, 3}
        assert server.counts()["dials"] == 3
    pool.close()


def test_sixteen_workers_on_four_sessions(server: Judge, broker: BrokerProcess) -> None:
    """16 workers, cap 4, requests of half a millisecond: peak 4, at most 6 dials, nothing crossed, every worker within 2x of every other."""
    pool = mppool.Pool(server.address, max_size=4, name="sixteen", broker=broker.path)

    def work(child: Child) -> int:
        child.hear()
        n = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            n += 1
            with pool.connection(timeout=10) as sock:
                ask(sock, f"{os.getpid()}-{n}", 0.5)
        return n

    with fork(*[work] * 16) as children:
        for child in children:
            child.tell()
        counts = [child.result() for child in children]
    judged = server.counts()
    print(f"\npeak {judged['peak']}, dials {judged['dials']}, requests {judged['requests']}, per worker {min(counts)} to {max(counts)}")
    assert judged["peak"] == 4
    assert judged["dials"] <= 6
    assert max(counts) <= 2 * min(counts)


def test_a_killed_workers_lease_comes_back(server: Judge, broker: BrokerProcess) -> None:
    """SIGKILL in mid-lease: the session is shut down, never lent again, and its permit serves who waits."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    with fork(hold(pool, 1)) as (child,):
        child.hear()
        took: list[float] = []

        def wait() -> None:
            with pool.connection(timeout=10) as sock:
                took.append(time.monotonic())
                assert ask(sock, "next") == 2

        waiting = threading.Thread(target=wait)
        waiting.start()
        eventually(lambda: pool.get_stats()["waiting"] == 1)
        began = time.monotonic()
        child.kill()
        waiting.join()
        print(f"\nserved {1000 * (took[0] - began):.1f} ms after the SIGKILL")
    assert pool.get_stats()["closed"] == {"owner_died": 1}
    assert server.counts()["peak"] <= 2
    pool.close()


def stop_when_granted(pool: mppool.Pool, child: Child) -> None:
    """The child waits for the only session, and is stopped before it takes up the one that the broker then grants it."""
    with pool.connection() as sock:
        ask(sock, "first")
        table = pool._worker.table  # type: ignore[union-attr]
        child.tell()
        eventually(lambda: table.halves[H_WAITERS] == 1)
        child.kill(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
    [row] = [row for row in table.taken_rows() if table.words[table.row_at(row) + R_PID] == child.pid]
    eventually(lambda: any(map(is_granted, table.lanes_of(row))))


def test_a_killed_waiters_grant_costs_no_session(server: Judge, broker: BrokerProcess) -> None:
    """SIGKILL after the broker's grant, before the waiter took it up: the session was never used, and serves the next."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def wait(child: Child) -> None:
        child.hear()
        pool.getconn(timeout=20)

    with fork(wait) as (child,):
        stop_when_granted(pool, child)
        child.kill()
        child.wait()
    with pool.connection(timeout=10) as sock:
        assert ask(sock, "next") == 1
    assert pool.get_stats()["closed"] == {}
    assert server.counts()["dials"] == 1
    pool.close()


class Interrupted(Exception):
    pass


def interrupt(_number: int, _frame: object) -> None:
    raise Interrupted


def test_a_grant_of_a_broker_that_died_reaches_the_next_though_its_waiter_was_interrupted(server: Judge, broker: BrokerProcess) -> None:
    """A session is granted, the broker dies, a signal handler ends the wait: the session is idle again at once, the process need not come by."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def wait(child: Child) -> None:
        signal.signal(signal.SIGUSR1, interrupt)
        child.hear()
        with pytest.raises(Interrupted):
            pool.getconn(timeout=PATIENCE)
        child.tell()
        child.hear()

    with fork(wait) as (child,):
        stop_when_granted(pool, child)
        broker.kill()
        child.kill(signal.SIGUSR1)
        child.kill(signal.SIGCONT)
        child.hear()
        broker.process = broker._start()
        with pool.connection(timeout=10) as sock:
            assert ask(sock, "next") == 1
        child.tell()
        child.result()
    assert server.counts()["dials"] == 1
    pool.close()


def test_a_waiter_leaves_though_its_queue_to_the_broker_is_full(server: Judge, broker: BrokerProcess) -> None:
    """The broker is stopped, and its queue is full when the time of a waiter is over: it gets nothing once the broker goes on."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    with fork(hold(pool, 1)) as (child,):
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            pool.getconn(timeout=0.05)  # there is a line now
        worker: Any = pool._worker
        [line] = worker.lines
        other = Line(broker.path)
        eventually(lambda: answers(broker.path))
        broker.process.send_signal(signal.SIGSTOP)
        os.waitpid(broker.pid, os.WUNTRACED)
        room = fill(other)
        assert fill(line, room - 1) == room - 1
        with pytest.raises(mppool.PoolTimeout):
            pool.getconn(timeout=0.05)
        assert fill(line, 1) == 0, "there was room left"
        child.tell()
        child.hear()  # the session is idle
        broker.process.send_signal(signal.SIGCONT)
        other.close()

        def use(child: Child) -> int:
            with pool.connection(timeout=10) as sock:
                return ask(sock, "next")

        with fork(use) as (user,):
            assert user.result() == 1
    assert server.counts()["dials"] == 1
    pool.close()


def fill(line: Line, most: int = 10_000) -> int:
    """Messages that a stopped broker does not read; how many there was room for."""
    for n in range(most):
        try:
            line.sock.send(LOOK)
        except BlockingIOError:
            return n
    return most


def test_the_queue_is_first_come_first_served(server: Judge, broker: BrokerProcess) -> None:
    """Waiters of several processes are served in the order they came."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def work(child: Child) -> None:
        pool.open()
        child.hear()
        sock = pool.getconn(timeout=20)
        child.tell("served")
        ask(sock, "x")
        child.hear()
        pool.putconn(sock)
        child.hear()

    held = pool.getconn()
    with fork(*[work] * 5) as children:
        for n, child in enumerate(children):
            child.tell()
            eventually(lambda n=n: pool._worker.table.halves[H_WAITERS] == n + 1)  # type: ignore[misc, union-attr]
        pool.putconn(held)
        for child in children:
            assert child.hear() == "served"
            child.tell()
        for child in children:
            child.tell()
    pool.close()


def test_threads_of_one_process_are_served_in_order(server: Judge, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was in the queue first has a session first, whichever thread of whichever process he is."""
    monkeypatch.setattr("mppool.worker.SILENT", 60 * 10**9)  # on a busy machine: waiters of a silent broker leave their places
    for n in range(3):
        pool = mppool.Pool(server.address, max_size=1, name=f"p{n}", broker=broker.path)
        served: list[int] = []

        def wait(number: int, pool: mppool.Pool = pool, served: list[int] = served) -> None:
            with pool.connection(timeout=20):
                served.append(number)

        threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
        with pool.connection():
            for waiting, thread in enumerate(threads, 1):
                thread.start()
                eventually(lambda pool=pool, waiting=waiting: pool._worker.table.halves[H_WAITERS] == waiting)  # type: ignore[misc]
        for thread in threads:
            thread.join()
        pool.close()
        assert served == [0, 1, 2, 3]


def test_workers_give_a_new_broker_their_sessions(server: Judge, socket_path: str) -> None:
    """A worker that comes by gives the new broker what it has; from then on others can use it."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=socket_path)

    def busy(child: Child) -> None:
        while True:
            with pool.connection(timeout=20) as sock:
                ask(sock, "b", 1)

    with fork(busy, busy) as _, broker_process(socket_path):
        for n in range(20):
            with pool.connection(timeout=10) as sock:
                ask(sock, f"n{n}")
        assert server.counts()["peak"] <= 2
        pool.close()


def test_a_damaged_table_met_at_the_keepers_answer_costs_its_own_pool_only(server: Judge, broker: BrokerProcess) -> None:
    """The broker counts in a word that can count no further when the keeper's answer lets it grant a session: it gives up that pool, and goes on."""
    pool, other = (mppool.Pool(server.address, max_size=1, name=name, broker=broker.path) for name in ("damaged", "other"))

    def waits(child: Child) -> None:
        pool.open()
        with pool.connection(timeout=20):
            child.hear()

    pool.putconn(pool.getconn(), discard=True)  # the broker and its keeper are there
    keeper = keeper_of(broker.path)
    assert keeper is not None
    keeper.suspend()
    sock = pool.getconn()
    with fork(waits):
        table = pool._worker.table  # type: ignore[union-attr]
        eventually(lambda: table.halves[H_WAITERS])
        pool.putconn(sock)
        row = next(row for row in table.taken_rows() if table.words[table.row_at(row) + R_PID] == broker.pid)
        table.words[table.row_at(row) + R_CLAIMED] = (1 << 64) - 1
        keeper.resume()
        eventually(lambda: broker.process.poll() is not None or not table.words[W_BEAT], what="the pool is given up")
        with other.connection() as sock:
            ask(sock, "other")
        assert broker.process.poll() is None
    pool.close()
    other.close()


def test_the_keeper_carries_sessions_over_the_brokers_death(server: Judge, broker: BrokerProcess) -> None:
    """Broker killed: the next one has all sessions again, even those of workers that are gone."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    pool.open()
    with fork(hold(pool, 2)) as (child,):
        child.hear()
        child.tell()
        child.hear()
    broker.restart()
    sessions = [pool.getconn(timeout=5) for _ in range(2)]
    assert {ask(session, "x") for session in sessions} == {1, 2}
    for session in sessions:
        pool.putconn(session)
    pool.close()


def test_a_killed_keeper_is_replaced(server: Judge, broker: BrokerProcess) -> None:
    """Keeper killed: the broker starts another and fills it, which the broker's own death proves."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    with fork(hold(pool, 2)) as (child,):
        child.hear()
        child.tell()
        child.hear()
        pool.open()
        keeper = eventually(lambda: keeper_of(broker.path))
        worker = pool._worker
        assert worker is not None
        eventually(lambda: all(worker.words[worker.table.shared_flag + k] for k in range(2)))
        full = keeper.num_fds()
        keeper.kill()
        eventually(lambda: (found := keeper_of(broker.path)) and found.pid != keeper.pid)
        eventually(lambda: (found := keeper_of(broker.path)) and found.num_fds() >= full)
    broker.restart()
    sessions = [pool.getconn(timeout=5) for _ in range(2)]
    assert {ask(session, "x") for session in sessions} == {1, 2}
    for session in sessions:
        pool.putconn(session)
    pool.close()


def test_a_keeper_that_is_slower_than_the_last_broker_removes_the_names(server: Judge, broker: BrokerProcess) -> None:
    """The broker does not wait long for it to let go of a pool; then the keeper is the last one out."""
    with mppool.Pool(server.address, broker=broker.path) as pool:
        with pool.connection() as sock:
            ask(sock, "n0")
        keeper = keeper_of(broker.path)
        assert keeper is not None
        table: Any = pool._worker.table  # type: ignore[union-attr]
        eventually(lambda: any(table.array(table.shared_flag)), what="the keeper has it")
        keeper.suspend()
    broker.stop()
    assert names(broker.path) != []
    keeper.resume()
    eventually(lambda: names(broker.path) == [])


def test_broker_and_keeper_killed_at_once(server: Judge, broker: BrokerProcess) -> None:
    """Nothing is over-counted: the cap holds, and sessions come back as their workers come by."""
    pool = mppool.Pool(server.address, max_size=3, name="p", broker=broker.path)

    def busy(child: Child) -> None:
        while True:
            with pool.connection(timeout=20) as sock:
                ask(sock, "b", 1)

    with fork(*[busy] * 4):
        for _ in range(3):
            time.sleep(0.3)
            keeper = keeper_of(broker.path)
            broker.process.kill()
            if keeper is not None:
                keeper.kill()
            broker.restart()
            for n in range(10):
                with pool.connection(timeout=10) as sock:
                    ask(sock, f"n{n}")
        assert server.counts()["peak"] <= 3
    sessions = [pool.getconn(timeout=10) for _ in range(3)]
    for session in sessions:
        pool.putconn(session)
    assert server.counts()["peak"] <= 4  # one more for the instant a FIN travels
    pool.close()


def test_idle_sessions_are_evicted(server: Judge, broker: BrokerProcess) -> None:
    """Sessions idle for max_idle are closed down to min_size, though nobody comes by."""
    with mppool.Pool(server.address, max_size=3, min_size=1, max_idle=0.2, name="p", broker=broker.path) as pool:
        for session in [pool.getconn() for _ in range(3)]:
            pool.putconn(session)
        eventually(lambda: pool.get_stats()["closed"] == {"idle_too_long": 2})
        eventually(lambda: server.counts()["live"] == 1)


def test_old_and_dead_idle_sessions_are_closed_by_the_broker(server: Judge, broker: BrokerProcess) -> None:
    """An idle session past its lifetime, or ended by the server, goes within a tick."""
    with mppool.Pool(server.address, max_size=2, max_lifetime=0.3, name="p", broker=broker.path) as pool:
        pool.putconn(pool.getconn())
        eventually(lambda: pool.get_stats()["closed"] == {"too_old": 1})
    with mppool.Pool(server.address, max_size=2, name="q", broker=broker.path) as pool:
        with pool.connection() as sock:
            ask(sock, "x")  # the server has it
        server.close_all()
        eventually(lambda: pool.get_stats()["closed"] == {"peer_closed": 1})


def test_a_lease_that_lasts_too_long_is_shut_down(server: Judge, broker: BrokerProcess) -> None:
    """With max_lease a stopped worker cannot keep a session for ever."""
    with mppool.Pool(server.address, max_size=1, max_lease=0.2, name="p", broker=broker.path) as pool:
        sock = pool.getconn()
        assert sock.recv(1) == b""  # blocks until the broker shuts it down
        pool.putconn(sock)
        with pool.connection(timeout=5) as again:
            assert ask(again, "x") == 2


class Connection:
    """A resident session with a descriptor, such as a TLS connection would be."""

    def __init__(self, address: tuple[str, int]) -> None:
        import socket

        self.sock = socket.create_connection(address)
        assert self.sock.gettimeout() is None, "a blocking socket: it must stay one, whoever has a duplicate"

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()


def test_resident_sessions_are_ended_for_others(server: Judge, broker: BrokerProcess) -> None:
    """An idle session that cannot move, in a sleeping process, gives way to a waiter elsewhere: the cap stays strict."""
    pool = mppool.Pool(dial=lambda: Connection(server.address), name="resident", max_size=1, broker=broker.path)
    with fork(hold_resident(pool)) as (child,):
        child.hear()
        with pool.connection(timeout=5) as mine:
            assert ask(mine.sock, "x") == 2
        assert server.counts()["peak"] == 1
        assert pool.get_stats()["closed"] == {"evicted_for_other": 1}
        child.tell()
        assert child.hear() == 3
    pool.close()


def hold_resident(pool: mppool.Pool) -> Any:
    def work(child: Child) -> None:
        with pool.connection() as mine:
            ask(mine.sock, "first")
        child.tell()
        child.hear()
        with pool.connection(timeout=5) as mine:
            child.tell(ask(mine.sock, "again"))
        child.hear()

    return work


def test_what_was_granted_to_nobody_goes_to_others(server: Judge, broker: BrokerProcess) -> None:
    """A waiter whose deadline passed while the broker was stopped, and that does not come by again, keeps nothing that the broker then grants it."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def gives_up(child: Child) -> None:
        pool.open()
        child.tell()
        child.hear()
        try:
            pool.getconn(timeout=0.3)
        except mppool.PoolTimeout:
            child.tell("timeout")
        child.hear()

    with fork(gives_up) as (child,):
        child.hear()
        sock = pool.getconn()
        child.tell()
        table = find_pool(broker.path, "p")
        assert table is not None
        eventually(lambda: table.table.halves[H_WAITERS])
        broker.process.send_signal(signal.SIGSTOP)
        pool.putconn(sock)  # the broker will read this first, and grant
        assert child.hear() == "timeout"
        broker.process.send_signal(signal.SIGCONT)
        with pool.connection(timeout=5) as sock:
            ask(sock, "mine")
        child.tell()
        child.result()
        table.lock.close()
    pool.close()


@pytest.mark.parametrize("linked", [True, False])
def test_a_session_dialed_beside_a_stopped_broker_is_shared(server: Judge, broker: BrokerProcess, linked: bool) -> None:
    """Who dials while the broker is silent, and does not come by again, has given it a duplicate all the same: others get the session."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def dials(child: Child) -> None:
        pool.open()
        if linked:
            pool.putconn(pool.getconn(), discard=True)  # it has a link now
        child.tell()
        child.hear()
        pool.putconn(pool.getconn())
        child.tell()
        child.hear()

    with fork(dials) as (child,):
        child.hear()
        if not linked:
            pool.putconn(pool.getconn(), discard=True)  # the broker knows the pool
        broker.process.send_signal(signal.SIGSTOP)
        time.sleep(1.1)  # it counts as absent
        child.tell()
        child.hear()
        broker.process.send_signal(signal.SIGCONT)
        with pool.connection(timeout=5) as sock:
            ask(sock, "theirs")
        assert server.counts()["dials"] == 2
        child.tell()
        child.result()
    pool.close()


def test_autostart(server: Judge, socket_path: str) -> None:
    """The first worker starts a broker; another process finds the same one."""
    pool = mppool.Pool(server.address, max_size=1, name="auto", broker=socket_path, autostart=True)
    with fork(hold(pool, 1)) as (child,):
        child.hear()
        child.tell()
        child.hear()
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "x") == 1
        pool.close()
    for process in processes_of(socket_path):
        if "broker" in process.cmdline():
            process.send_signal(signal.SIGTERM)


def test_an_autostarted_broker_that_dies_is_started_again(server: Judge, socket_path: str) -> None:
    """By those who wait for a session, all of them attached already; one broker comes, which is nobody's child, and serves them in turn."""
    pool = mppool.Pool(server.address, max_size=1, name="auto", broker=socket_path, autostart=True)

    def wait(child: Child) -> int:
        pool.open()
        child.tell()
        child.hear()
        with pool.connection(timeout=PATIENCE) as sock:
            return ask(sock, "x")

    def brokers() -> list[psutil.Process]:
        return [process for process in processes_of(socket_path) if "broker" in process.cmdline()]

    with fork(*[wait] * 3) as children:
        sock = pool.getconn()
        assert ask(sock, "x") == 1
        for child in children:
            child.hear()
        (first,) = brokers()
        first.kill()
        for child in children:
            child.tell()
        eventually(lambda: answers(socket_path), what="another broker")
        eventually(lambda: pool.get_stats()["waiting"] == 3 and pool._worker.table.halves[H_WAITERS] == 3)  # type: ignore[union-attr]
        pool.putconn(sock)
        assert [child.result() for child in children] == [1] * 3
        (second,) = brokers()
        assert second != first
        assert second.ppid() not in [os.getpid(), *(child.pid for child in children)]
    assert server.counts()["dials"] == 1
    pool.close()
    second.terminate()


def test_of_many_that_come_at_once_one_starts_the_broker(server: Judge, socket_path: str, tmp_path: Path) -> None:
    """Thirty processes find none: one starts it, the others wait for it, and all are served."""
    workers, started = 30, tmp_path / "started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho $$ >>{started}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)

    def use(child: Child) -> int:
        sys.executable = str(python)
        child.hear()
        with mppool.Pool(server.address, max_size=2, name="auto", broker=socket_path, autostart=True) as pool, pool.connection() as sock:
            ask(sock, "x")
        return 1

    with fork(*[use] * workers) as children:
        for child in children:
            child.tell()
        assert sum(child.result() for child in children) == workers
        assert server.counts()["peak"] <= 2
    assert len(started.read_text().split()) == 1
    for process in processes_of(socket_path):
        if "broker" in process.cmdline():
            process.send_signal(signal.SIGTERM)


def test_everything_killed_the_next_broker_starts_clean(server: Judge, socket_path: str) -> None:
    """All processes killed at once leave names; the next broker removes them."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=socket_path)
    broker = BrokerProcess(socket_path)
    with fork(hold(pool, 2)) as (child,):
        child.hear()
        keeper = eventually(lambda: keeper_of(socket_path))
        for pid in (keeper.pid, broker.pid, child.pid):
            os.kill(pid, signal.SIGKILL)
        broker.process.wait()
        child.wait()
    prefix = f"mppool-{scope_of(socket_path)}"
    eventually(lambda: server.counts()["live"] == 0)
    assert memory.names(prefix)
    broker.restart()
    eventually(lambda: not memory.names(prefix))
    broker.stop()
