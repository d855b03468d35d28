"""Another broker in the place of a running one: no session lost, no request failed, whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

import mppool
from mppool.broker import serve
from mppool.inspect import find_pool
from mppool.keeper import keeper_path
from mppool.kernel import link
from mppool.launch import ALREADY_RUNNING
from mppool.succession import is_taken, take_place
from mppool.wire import Kind, Message, decode, encode
from tests.helpers.leases import lease_all, leave_sessions
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import PATIENCE, BrokerProcess, Child, answers, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask
from tests.replace import Rig, keeper_of


@contextmanager
def replacing(path: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``mppool broker --replace``, ended afterwards."""
    command = [sys.executable, "-m", "mppool", "broker", "--replace", "--socket", path, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE)


def pid_serving(path: str) -> int:
    """0: nobody, just now."""
    try:
        with link.connect(path) as sock:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    except OSError:
        return 0


def brokers_of(path: str) -> list[psutil.Process]:
    return [process for process in processes_of(path) if "broker" in process.info["cmdline"]]  # as it was then: it may be a zombie by now


def test_under_load_nothing_is_lost_and_nothing_fails(server: Judge, socket_path: str) -> None:
    """Replaced again and again under load, also by two at once: every session lives on, every request is answered, the old ones exit with 0."""
    rig = Rig(server, socket_path, workers=4)
    try:
        for number in range(5):
            rig.round(number, deaths=0)
        rig.finish()
    finally:
        rig.end()
    print(f"\n{dict(rig.counts)}")
    assert rig.complaints == []
    assert rig.counts["sessions_lost"] == rig.counts["failed_requests"] == 0
    assert server.counts()["dials"] == 8  # one of them the rig's own


def test_deaths_in_the_middle(server: Judge, socket_path: str) -> None:
    """Whoever dies meanwhile, the broker that goes, the one that comes, the keeper, two of them: one broker is there afterwards, the cap is whole."""
    rig = Rig(server, socket_path, workers=4)
    try:
        for number in range(8):
            rig.round(number, deaths=0.9)
        rig.finish()
    finally:
        rig.end()
    print(f"\n{dict(rig.counts)}")
    assert rig.complaints == []


def test_without_a_broker_it_starts(socket_path: str) -> None:
    """``--replace`` where nobody runs is a plain start."""
    with replacing(socket_path) as process:
        eventually(lambda: answers(socket_path))
        assert pid_serving(socket_path) == process.pid
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_sessions_of_pools_without_workers_live_on(server: Judge, broker: BrokerProcess) -> None:
    """Sessions whose workers are all gone are there after a replacement, too: the keeper waits for the next broker."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    leave_sessions(pool, 2)
    with replacing(broker.path):
        assert broker.process.wait(PATIENCE) == 0
        assert lease_all(pool, 2) == {1, 2}
        assert server.counts()["dials"] == 2
        pool.close()


def test_who_waits_in_the_queue_goes_on_waiting(server: Judge, broker: BrokerProcess) -> None:
    """Callers that queue with a timeout are served by the next broker."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)

    def wait(child: Child) -> int:
        child.hear()
        with pool.connection(timeout=5) as sock:
            return ask(sock, "waited")

    def next_broker(child: Child) -> None:  # all imports are done: what is left is what happens to those who wait
        child.hear()
        serve(broker.path, None, child.tell, replace=True)

    held = pool.getconn()
    with fork(next_broker, wait, wait) as (coming, *waiting):
        for child in waiting:
            child.tell()
        eventually(lambda: pool.get_stats()["waiting"] == 2)
        coming.tell()
        coming.hear()
        assert broker.process.wait(PATIENCE) == 0
        pool.putconn(held)
        assert [child.result() for child in waiting] == [1, 1]
        pool.close()
        coming.kill(signal.SIGTERM)
        coming.wait()


def test_two_at_once(server: Judge, broker: BrokerProcess) -> None:
    """Two that want the place at the same time get it one after the other: one broker is left."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    lease_all(pool, 1)
    with replacing(broker.path) as one, replacing(broker.path) as other:
        assert broker.process.wait(PATIENCE) == 0
        eventually(lambda: (one.poll() is None) != (other.poll() is None), 20)
        first, last = (one, other) if one.poll() is not None else (other, one)
        assert first.returncode == 0
        eventually(lambda: answers(broker.path))
        assert pid_serving(broker.path) == last.pid
        assert lease_all(pool, 1) == {1}
        pool.close()


# The new one dies on its way. (Here it is the test.)


@pytest.mark.parametrize("step", ["asked", "place is free", "place taken"])
def test_the_old_one_comes_back(server: Judge, broker: BrokerProcess, step: str) -> None:
    """If the one that asked dies before it serves, the one that made room serves again, with all sessions."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    leave_sessions(pool, 2)
    asking = link.connect(broker.path)
    link.send(asking, encode(Message(Kind.REPLACE)))
    if step != "asked":
        assert link.wait_readable(asking.fileno(), 10)
        assert decode(link.receive(asking)[0], 0).kind is Kind.LEAVE
        assert not answers(broker.path)
        place = take_place(broker.path) if step == "place taken" else None
        if place is not None:
            place.close()
    asking.close()
    eventually(lambda: answers(broker.path) and is_taken(broker.path))
    assert pid_serving(broker.path) == broker.pid
    assert lease_all(pool, 2) == {1, 2}
    pool.close()


def test_a_stopped_broker_is_named(broker: BrokerProcess) -> None:
    """A broker that does not answer: the message says its pid and what to do, exit code 1; when it goes on it still serves."""
    broker.process.send_signal(signal.SIGSTOP)
    try:
        with replacing(broker.path) as process:
            _, said = process.communicate(timeout=30)
    finally:
        broker.process.send_signal(signal.SIGCONT)
    assert process.returncode == 1
    assert f"(pid {broker.pid}) does not make room within 5 s" in said
    assert f"kill -CONT {broker.pid}" in said
    with link.connect(broker.path) as sock:  # answered: it has seen the request of the one that is gone, and goes on
        link.send(sock, encode(Message(Kind.LOOK)))
        assert link.wait_readable(sock.fileno(), 10)
    assert broker.process.poll() is None


def test_duplicates_on_their_way_are_taken(server: Judge, broker: BrokerProcess) -> None:
    """What a worker sent before it died, and the old broker has not read yet, the next one has."""
    pool = mppool.Pool(server.address, max_size=4, name="p", broker=broker.path)

    def work(child: Child) -> None:
        lease_all(pool, 1)
        child.tell()
        child.hear()
        lease_all(pool, 4)

    with fork(work) as (child,):
        child.hear()
        broker.process.send_signal(signal.SIGSTOP)
        child.tell()
        child.result()
        with link.connect(broker.path) as asking:
            link.send(asking, encode(Message(Kind.REPLACE)))
            broker.process.send_signal(signal.SIGCONT)
            assert link.wait_readable(asking.fileno(), 10)
            place = take_place(broker.path)
            place.close()
            with replacing(broker.path):
                eventually(lambda: answers(broker.path))
                link.send(asking, encode(Message(Kind.REPLACED)))
                assert broker.process.wait(PATIENCE) == 0
                assert lease_all(pool, 4) == {1, 2, 3, 4}
                pool.close()


def test_duplicates_on_their_way_when_it_is_told_to_end(server: Judge, broker: BrokerProcess) -> None:
    """The same with SIGTERM: it reads what was sent to it before it leaves."""
    pool = mppool.Pool(server.address, max_size=6, name="p", broker=broker.path)
    pool.open()

    def work(child: Child) -> None:
        lease_all(pool, 1)
        child.tell()
        child.hear()
        lease_all(pool, 6)

    with fork(work) as (child,):
        child.hear()
        broker.process.send_signal(signal.SIGSTOP)
        child.tell()
        child.result()
        broker.process.terminate()
        broker.process.send_signal(signal.SIGCONT)
        assert broker.process.wait(PATIENCE) == 0
        broker.process = broker._start()
        assert lease_all(pool, 6) == {1, 2, 3, 4, 5, 6}
        pool.close()


# Those around it.


def test_run_lives_with_a_replaced_broker(server: Judge, socket_path: str) -> None:
    """``mppool run``, whose broker somebody replaces, starts no rival; when the other one dies it starts its own again."""
    command = [sys.executable, "-m", "mppool", "run", "--socket", socket_path, "--", "sleep", "1000"]
    with subprocess.Popen(command, preexec_fn=die_with_parent) as run:
        try:
            eventually(lambda: answers(socket_path) and psutil.Process(run.pid).children())
            pool = mppool.Pool(server.address, max_size=2, broker=socket_path)
            lease_all(pool, 2)
            with replacing(socket_path) as process:
                eventually(lambda: pid_serving(socket_path) == process.pid, 20)
                eventually(lambda: [broker.pid for broker in brokers_of(socket_path)] == [process.pid])
                until = time.monotonic() + 1.5
                while time.monotonic() < until:
                    assert [broker.pid for broker in brokers_of(socket_path)] == [process.pid], "a rival"
                    time.sleep(0.05)
                process.kill()
                process.wait()
                eventually(lambda: (pid := pid_serving(socket_path)) and is_taken(socket_path) and psutil.Process(pid).ppid() == run.pid, 20)
            assert lease_all(pool, 2) == {1, 2}
            pool.close()
        finally:
            run.terminate()


def test_an_autostarted_broker_is_replaced(server: Judge, socket_path: str) -> None:
    """A broker that a worker started makes room like any other."""
    with mppool.Pool(server.address, max_size=1, name="auto", broker=socket_path, autostart=True) as pool:
        lease_all(pool, 1)
        first = pid_serving(socket_path)
        with replacing(socket_path, "--background") as process:
            assert process.wait(PATIENCE) == 0
        eventually(lambda: not psutil.pid_exists(first))
        assert lease_all(pool, 1) == {1}
        second = pid_serving(socket_path)
        assert second not in (first, process.pid)
    os.kill(second, signal.SIGTERM)


def test_a_group_killed_leaves_nothing(server: Judge, socket_path: str) -> None:
    """All of ``mppool run`` killed at once, the broker told to end while the workers die: no name is left."""
    code = f"import mppool, time; p = mppool.Pool({server.address!r}); p.putconn(p.getconn()); print(1, flush=True); time.sleep(1000)"
    command = [sys.executable, "-m", "mppool", "run", "--socket", socket_path, "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=die_with_parent) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"1\n"
        os.killpg(run.pid, signal.SIGKILL)
    # What is left is looked at by the fixture.


def test_a_second_broker_is_refused_as_before(broker: BrokerProcess) -> None:
    """Without ``--replace`` a second broker says that there is one, exit code 3."""
    done = subprocess.run([sys.executable, "-m", "mppool", "broker", "--socket", broker.path], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == ALREADY_RUNNING


# The keeper.


def test_what_a_dead_broker_put_is_kept(server: Judge, broker: BrokerProcess) -> None:
    """Sessions that are on their way to the keeper when the broker is killed reach the next broker."""
    pool = mppool.Pool(server.address, max_size=3, name="p", broker=broker.path)
    leave_sessions(pool, 1)
    pool.open()
    keeper = eventually(lambda: keeper_of(broker.path))

    def work(child: Child) -> None:
        lease_all(pool, 3)
        child.tell()
        time.sleep(60)

    keeper.suspend()
    with fork(work) as (child,):
        child.hear()
        sockets = psutil.Process(broker.pid).net_connections
        eventually(lambda: len(sockets("tcp")) == 3, what="the broker has all three")
        broker.kill()
        goes_on = threading.Timer(0.3, keeper.resume)  # by then the next one may have come, too: what the dead one said comes first all the same
        goes_on.start()
        child.kill()
        child.wait()
        broker.process = broker._start()
        goes_on.join()
        assert lease_all(pool, 3) == {1, 2, 3}
        pool.close()


def test_a_silent_keeper_is_replaced(server: Judge, broker: BrokerProcess) -> None:
    """A keeper that is stopped is given up after some seconds; another one gets everything."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    lease_all(pool, 1)
    keeper = eventually(lambda: keeper_of(broker.path))
    keeper.suspend()
    try:
        lease_all(pool, 2)
        worker: Any = pool._worker
        eventually(lambda: all(worker.words[worker.table.shared_flag + k] for k in range(2)), 20)
    finally:
        keeper.resume()
    psutil.wait_procs([keeper], 10)
    assert not keeper.is_running()
    broker.restart()
    assert lease_all(pool, 2) == {1, 2}
    pool.close()


def test_stray_descriptors_are_closed(server: Judge, broker: BrokerProcess) -> None:
    """Messages with descriptors that nobody asked for cost neither broker nor keeper a descriptor."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    lease_all(pool, 1)
    keeper = eventually(lambda: keeper_of(broker.path))
    found = find_pool(broker.path, "p")
    assert found is not None
    with contextlib.closing(found.lock):
        eventually(lambda: found.table.words[found.table.shared_flag], what="broker and keeper have the session")
    process = psutil.Process(broker.pid)
    before = process.num_fds(), keeper.num_fds()
    for path in (broker.path, keeper_path(broker.path)):
        for kind in Kind:
            for descriptors in (0, 1):
                with link.connect(path) as sock:
                    with contextlib.suppress(OSError):  # closed already: a keeper speaks with one at a time
                        link.send(sock, encode(Message(kind, body=b"\x03abc"), descriptors), 0)
                    link.wait_readable(sock.fileno(), 0.2 if kind is Kind.GIVE_ALL else 5)
        with link.connect(path) as sock, contextlib.suppress(OSError):
            link.send(sock, b"", 0)
    eventually(lambda: (process.num_fds(), eventually(lambda: keeper_of(broker.path)).num_fds()) == before, what=f"{before}")
    assert lease_all(pool, 1) == {1}
    pool.close()


def test_a_broker_process_is_itself(socket_path: str) -> None:
    """Two sockets, two brokers: a replacement at one does not touch the other."""
    other = f"{socket_path}2"
    with broker_process(socket_path) as one, broker_process(other) as two, replacing(socket_path):
        assert one.process.wait(PATIENCE) == 0
        assert two.process.poll() is None
