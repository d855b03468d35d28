"""How a session comes to a process that never had it: asked for before it is claimed, and others along with it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import mppool
from mppool.conversation import AHEAD, fetch
from mppool.pool import perform
from mppool.states import State
from mppool.worker import Hands, Worker
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import BrokerProcess, Child, broker_process, eventually, fork
from tests.helpers.server import Judge, ask

SESSIONS = AHEAD + 1


@pytest.fixture
def pool(server: Judge, broker: BrokerProcess) -> Iterator[mppool.Pool]:
    pool = mppool.Pool(server.address, max_size=SESSIONS, name="fetched", broker=broker.path, timeout=20)
    yield pool
    pool.close()


def dial_all(pool: mppool.Pool) -> Callable[[Child], None]:
    """A child that dials all sessions, returns them, and stays; told to, it ends the second one and dials another in its place."""

    def work(child: Child) -> None:
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        for n, session in enumerate(sessions):
            ask(session, f"dialed{n}")
            pool.putconn(session)
        worker = the_worker(pool)
        eventually(lambda: all(worker.words[worker.table.shared_flag + k] for k in range(SESSIONS)))
        child.tell()
        child.hear()
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        pool.putconn(sessions[1], discard=True)
        sessions[1] = pool.getconn()
        for n, session in enumerate(sessions):
            ask(session, f"again{n}")
            pool.putconn(session)
        eventually(lambda: all(worker.words[worker.table.shared_flag + k] for k in worker.table.find_all(State.IDLE)))
        child.tell()
        time.sleep(60)

    return work


def the_worker(pool: mppool.Pool) -> Worker:
    return pool._attached()


def test_others_come_along_and_serve_without_a_broker(server: Judge, broker: BrokerProcess, pool: mppool.Pool) -> None:
    with fork(dial_all(pool)) as (child,):
        child.hear()
        sessions = [pool.getconn()]
        assert len(the_worker(pool).ahead) == AHEAD
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            sessions += [pool.getconn() for _ in range(AHEAD)]
            assert sorted(ask(session, f"moved{n}") for n, session in enumerate(sessions)) == [1, 2, 3, 4]
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert not the_worker(pool).ahead
        assert pool.get_stats()["fetches"] == SESSIONS
        assert server.counts()["dials"] == SESSIONS
        for session in sessions:
            pool.putconn(session)


@pytest.mark.parametrize("at_its_claim", [False, True])
def test_what_came_along_and_has_ended_is_let_go(pool: mppool.Pool, at_its_claim: bool) -> None:
    """At this process's next checkout, or when it turns out at the claim; and what is dialed in its place is fetched."""
    with fork(dial_all(pool)) as (child,):
        child.hear()
        with pool.connection():
            worker = the_worker(pool)
            stale = dict(worker.ahead)
        child.tell()
        child.hear()
        [ended] = [k for k, ahead in stale.items() if ahead.generation != worker.words[worker.generation_at + k]]
        if at_its_claim:
            hands = Hands(worker)
            lane, slot = hands.take(), worker.slot(ended)
            entry = perform(worker, fetch(worker, ended, lambda: hands.claim(lane, slot)))
            assert entry is not None
            assert entry.generation == worker.words[worker.generation_at + ended]
            assert stale[ended].given.closed
            worker.pass_over(lane)
            hands.done()
        else:
            worker.tidy()
            assert stale[ended].given.closed
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        assert stale[ended].given.closed
        assert len({ask(session, f"moved{n}") for n, session in enumerate(sessions)}) == SESSIONS
        assert not worker.ahead
        for session in sessions:
            pool.putconn(session)


def test_a_forked_child_and_a_pool_that_is_closed_have_let_go_of_what_came_along(pool: mppool.Pool) -> None:
    with fork(dial_all(pool)) as (child,):
        child.hear()
        with pool.connection():
            ahead = [ahead.given for ahead in the_worker(pool).ahead.values()]
        fds = {given.fileno() for given in ahead}

        def look(_: Child) -> list[int]:
            return [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]

        with fork(look) as (other,):
            assert other.result() == []
        assert len(look(other)) == AHEAD
        pool.close()
        assert all(given.closed for given in ahead)


def test_a_claim_that_fails_leaves_the_line_in_order(pool: mppool.Pool) -> None:
    """The session was asked for, and another process takes it before we do: what comes is kept, and the line's next answer is the next question's."""
    with fork(dial_all(pool)) as (child,):
        child.hear()
        worker = the_worker(pool)
        for k in (0, 1):
            assert perform(worker, fetch(worker, k, lambda: False)) is None
        assert sorted(worker.ahead) == [0, 1]
        assert len(worker.lines) == 1
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        assert sorted(ask(session, f"moved{n}") for n, session in enumerate(sessions)) == [1, 2, 3, 4]
        for session in sessions:
            pool.putconn(session)


def test_a_line_whose_answer_is_lost_to_an_exception_is_not_used_again(pool: mppool.Pool) -> None:
    """Nor is anything lost with it."""
    with fork(dial_all(pool)) as (child,):
        child.hear()
        worker = the_worker(pool)
        for k in range(SESSIONS):
            with pytest.raises(KeyboardInterrupt):
                perform(worker, fetch(worker, k, interrupt))
            assert not worker.lines
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        assert sorted(ask(session, f"moved{n}") for n, session in enumerate(sessions)) == [1, 2, 3, 4]
        for session in sessions:
            pool.putconn(session)


def test_what_came_along_is_shown_to_the_next_broker(server: Judge, socket_path: str) -> None:
    """Broker, keeper and the process that dialed are all killed: what this process has, and never used, is all there is of three sessions."""
    pool = mppool.Pool(server.address, max_size=SESSIONS, name="fetched", broker=socket_path, timeout=20)
    with broker_process(socket_path) as broker, fork(dial_all(pool)) as (child,):
        child.hear()
        with pool.connection():
            assert len(the_worker(pool).ahead) == AHEAD
        doomed = [broker.pid, *(process.pid for process in processes_of(socket_path) if "mppool.keeper" in process.cmdline()), child.pid]
        assert len(doomed) == 3
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
    with broker_process(socket_path):
        sessions = [pool.getconn() for _ in range(SESSIONS)]
        assert len({ask(session, f"moved{n}") for n, session in enumerate(sessions)}) == SESSIONS
        assert server.counts()["dials"] == server.counts()["peak"] == SESSIONS
        for session in sessions:
            pool.putconn(session)
        pool.close()


def interrupt() -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ahead", [False, True])
def test_another_thread_attaches_the_session_between_question_and_claim(pool: mppool.Pool, ahead: bool) -> None:
    """Its object is the one that is lent. (The other way round it would be closed, with a goodbye that the server hears.)"""
    with fork(dial_all(pool)) as (child,):
        child.hear()
        worker = the_worker(pool)
        hands = Hands(worker)
        lane = hands.take()
        if ahead:
            assert perform(worker, fetch(worker, 0, lambda: False)) is None

        attached = []

        def hold() -> bool:
            thread = threading.Thread(target=use_all)
            thread.start()
            thread.join()
            attached.append(worker.entries[0])
            return hands.claim(lane, worker.slot(0))

        def use_all() -> None:
            sessions = [pool.getconn() for _ in range(SESSIONS)]
            for session in sessions:
                pool.putconn(session)

        entry = perform(worker, fetch(worker, 0, hold))
        assert entry is not None
        assert [entry] == attached == [worker.attached(0)]
        assert 0 not in worker.ahead
        assert isinstance(entry.conn, socket.socket)
        assert ask(entry.conn, "alive")
        hands.settle()
