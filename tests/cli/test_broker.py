"""``mppool broker``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

import mppool
from mppool.table import KEEPER, W_BEAT
from tests.cli.shared import Start, broker_pid, clean_directory, mppool_
from tests.helpers.leftovers import names, processes_of
from tests.helpers.processes import PATIENCE, BrokerProcess, Child, answers, eventually, fork
from tests.helpers.server import Judge, ask


def test_a_second_broker_exits_3(broker: BrokerProcess, socket_path: str) -> None:
    """A broker for a socket that is served already says so and exits with 3; the first one goes on."""
    done = mppool_("broker", "--socket", socket_path)
    assert done.returncode == 3
    assert done.stderr == f"mppool: broker={socket_path!r}: a broker serves this socket already\n"
    assert broker_pid(socket_path) == broker.pid


def test_background_returns_when_it_listens(socket_path: str) -> None:
    """``--background`` returns with 0 once the socket answers; the broker goes on, and ends at SIGTERM."""
    done = mppool_("broker", "--socket", socket_path, "--background")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = broker_pid(socket_path)  # at once, without another try
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_second_broker_in_the_background_exits_3(broker: BrokerProcess, socket_path: str) -> None:
    """``--background`` passes on why the broker did not start, and its exit code."""
    done = mppool_("broker", "--socket", socket_path, "--background")
    assert done.returncode == 3
    assert done.stderr == f"mppool: broker={socket_path!r}: a broker serves this socket already\n"
    assert broker_pid(socket_path) == broker.pid


def test_background_says_why_it_fails(tmp_path: Path) -> None:
    """A broker that cannot start in the background exits with 1 and the reason."""
    done = mppool_("broker", "--socket", f"{tmp_path}/no/such/b.sock", "--background")
    assert done.returncode == 1
    assert "cannot make the runtime directory" in done.stderr


def test_idle_exit_ends_an_unused_broker(socket_path: str) -> None:
    """With ``--idle-exit`` a broker that no worker uses ends by itself, with 0, and leaves nothing."""
    done = mppool_("broker", "--socket", socket_path, "--idle-exit", "0.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(socket_path)


def test_idle_exit_waits_for_the_last_worker(start: Start, server: Judge, socket_path: str) -> None:
    """A broker with ``--idle-exit`` stays as long as a worker has the pool, even an idle one."""
    process = start("broker", "--socket", socket_path, "--idle-exit", "1.5")
    eventually(lambda: answers(socket_path))
    with mppool.Pool(server.address, broker=socket_path) as pool:
        with pool.connection() as sock:
            ask(sock, "one")
        words = pool._worker.words  # type: ignore[union-attr]
        first = words[W_BEAT]
        eventually(lambda: words[W_BEAT] - first > 3_000_000_000 or process.poll() is not None)  # three seconds of the broker's own time
        assert process.poll() is None
    assert process.wait(PATIENCE) == 0


NAN = "nan"


@pytest.mark.parametrize("seconds", ["-1", "soon", NAN])
def test_idle_exit_must_be_seconds(seconds: str) -> None:
    """A negative time, NaN or none is refused with option and value, before anything else is looked at."""
    done = mppool_("broker", "--socket", "/no/such/directory/b.sock", "--idle-exit", seconds)
    assert done.returncode == 2
    assert "--idle-exit" in done.stderr
    assert seconds in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_broker_told_to_end_leaves_nothing(start: Start, server: Judge, socket_path: str, number: signal.Signals) -> None:
    """Told to end, a broker closes the sessions nobody uses and removes its socket and the pool's names; exit code 0."""
    process = start("broker", "--socket", socket_path)
    eventually(lambda: answers(socket_path))
    pool = mppool.Pool(server.address, name="web", broker=socket_path)

    def use(child: Child) -> int:
        with pool.connection() as sock:
            number = ask(sock, "hello")
        pool.close()
        return number

    with fork(use) as (child,):
        assert child.result() == 1
    assert names(socket_path), "the pool was to live on with its idle session"
    assert server.counts()["live"] == 1
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    assert not os.path.exists(socket_path)
    assert names(socket_path) == []
    eventually(lambda: server.counts()["live"] == 0)


def test_a_broker_told_to_end_leaves_workers_theirs(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """With a worker there the names stay, and the worker goes on without a broker."""
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool:
        with pool.connection() as sock:
            first = ask(sock, "before")
            assert broker.stop() == 0
            assert ask(sock, "during") == first
        with pool.connection() as sock:
            assert ask(sock, "after") == first
        assert names(socket_path)
        assert not os.path.exists(socket_path)
    clean_directory(socket_path)


def test_the_last_one_out_removes_the_names(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """Broker told to end, then the only worker closes its pool: no name is left."""
    try:
        with mppool.Pool(server.address, broker=socket_path) as pool:
            with pool.connection() as sock:
                ask(sock, "one")
            lock = pool._worker.lock  # type: ignore[union-attr]
            eventually(lambda: lock.is_held(KEEPER), what="the keeper has the session")
            broker.stop()
        eventually(lambda: not processes_of(socket_path))
        assert names(socket_path) == []
    finally:
        clean_directory(socket_path)


def test_verbose_logs_what_happens(start: Start, socket_path: str) -> None:
    """``--verbose`` says that the broker runs, for which socket."""
    process = start("broker", "--socket", socket_path, "--verbose")
    eventually(lambda: answers(socket_path))
    process.terminate()
    _, said = process.communicate(timeout=10)
    assert f"INFO broker of {socket_path}, pid {process.pid}" in said
