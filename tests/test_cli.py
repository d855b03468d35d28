"""The command line, as real processes: broker, run, status, resize, gc."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import mppool
from mppool.kernel import link, memory
from mppool.kernel.runtime import pool_id, scope_of
from mppool.table import KEEPER, W_BEAT
from tests.conftest import processes_of
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import PATIENCE, BrokerProcess, Child, answers, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask

MPPOOL = [sys.executable, "-m", "mppool"]
ENVIRONMENT = {**os.environ, "COLUMNS": "250"}  # wide enough for every table


def mppool_(*arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run ``mppool ...`` to its end."""
    return subprocess.run([*MPPOOL, *arguments], capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)


def json_of(*arguments: str) -> Any:
    done = mppool_(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(socket_path: str) -> Iterator[Start]:
    """Start ``mppool ...`` in the background; what is still running afterwards is killed, before ``socket_path`` looks what is left."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([*MPPOOL, *arguments], stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, preexec_fn=die_with_parent))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()  # not read to its end: a child that should have ended may have it, too


def broker_pid(path: str) -> int:
    """Who serves the socket: the kernel says so."""
    with link.connect(path) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def has_another_broker(path: str, old: int) -> bool:
    """Does anybody else serve the socket? In between nobody does."""
    try:
        return broker_pid(path) != old
    except OSError:
        return False


def names(path: str) -> list[str]:
    prefix = f"mppool-{scope_of(path)}-"
    return memory.names(prefix) + memory.names(f"sem.{prefix}")


def clean_directory(path: str) -> None:
    """What a killed broker leaves in its directory goes with the next one."""
    with broker_process(path):
        pass


# In general.


@pytest.mark.parametrize("command", [[], ["broker"], ["run"], ["status"], ["resize"], ["gc"]], ids=" ".join)
def test_help_says_usage_and_exit_codes(command: list[str]) -> None:
    """``--help`` of every command shows its usage and, where they matter, the exit codes."""
    done = mppool_(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(" ".join(["Usage: mppool", *command, "["]))
    if command != ["gc"]:
        assert re.search(r"^ *Exit codes:\n +0 +done$", done.stdout, re.MULTILINE)


def test_version() -> None:
    """``--version`` says the package's."""
    done = mppool_("--version")
    assert (done.returncode, done.stdout) == (0, f"mppool, version {mppool.__version__}\n")


def test_the_installed_command_is_the_same() -> None:
    """``mppool`` on the path and ``python -m mppool`` are one program."""
    command = shutil.which("mppool", path=os.path.dirname(sys.executable))
    if command is None:
        pytest.skip("the mppool command is not installed beside this interpreter")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=30, env=ENVIRONMENT, check=True)
    assert done.stdout == mppool_("--help").stdout


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["--frobnicate"], ["broker", "--frobnicate"], ["run"], ["run", "--"], ["resize"], ["resize", "x"]], ids=" ".join
)
def test_a_command_line_without_sense_exits_2(arguments: list[str]) -> None:
    """Unknown commands and options, and missing arguments, say so and exit with 2."""
    done = mppool_(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr


# mppool broker.


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


# mppool run.

LISTENER = """
import os, signal, sys
awaited = [getattr(signal, name) for name in sys.argv[1:]]
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # one that comes between two waits is not lost
print(os.getpid(), flush=True)
got = None
while got != "SIGTERM":
    got = signal.Signals(signal.sigwait(awaited)).name
    print(got, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("code", [0, 7])
def test_run_exits_as_the_command_did(socket_path: str, code: int) -> None:
    """The exit code of the command is that of ``run``; the broker has ended with it."""
    done = mppool_("run", "--socket", socket_path, "--", sys.executable, "-c", f"raise SystemExit({code})")
    assert (done.returncode, done.stderr) == (code, "")
    assert not processes_of(socket_path) or eventually(lambda: not processes_of(socket_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_run_says_which_signal_ended_the_command(socket_path: str, number: signal.Signals) -> None:
    """A command that signal N ended makes it 128 + N, as in a shell."""
    done = mppool_("run", "--socket", socket_path, "--", "sh", "-c", f"kill -{int(number)} $$")
    assert done.returncode == 128 + number


def test_run_of_nothing_that_exists_exits_127(socket_path: str) -> None:
    """A command that is not found makes it 127, and says which."""
    done = mppool_("run", "--socket", socket_path, "--", "/no/such/command", "--option")
    assert done.returncode == 127
    assert done.stderr == "mppool: COMMAND '/no/such/command': No such file or directory\n"


def test_run_of_what_cannot_be_run_exits_126(socket_path: str, tmp_path: Path) -> None:
    """A file that is no program makes it 126, as in a shell."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    done = mppool_("run", "--socket", socket_path, "--", str(plain))
    assert done.returncode == 126
    assert done.stderr == f"mppool: COMMAND {str(plain)!r}: Permission denied\n"


@pytest.mark.parametrize("dashes", [["--"], []], ids=["dashes", "no dashes"])
def test_run_passes_arguments_and_output_on(socket_path: str, dashes: list[str]) -> None:
    """The command gets its arguments as they are, its own options too; what it prints is printed."""
    done = mppool_("run", "--socket", socket_path, *dashes, "printf", "%s|", "-c", "--json", "a b")
    assert (done.returncode, done.stdout) == (0, "-c|--json|a b|")


def test_run_tells_the_command_where_the_broker_is(socket_path: str, server: Judge) -> None:
    """MPPOOL_BROKER is set for the command, the broker answers there from the start, and a plain Pool uses it."""
    code = f"""
import os, mppool
with mppool.Pool({server.address!r}) as pool:
    with pool.connection() as sock:
        sock.sendall(b"hello\\n")
        assert sock.recv(100) == b"1 hello\\n"
    print(pool.broker, pool.get_stats()["broker_alive"], os.environ["MPPOOL_BROKER"])
"""
    done = mppool_("run", "--socket", socket_path, "--", sys.executable, "-c", code)
    assert (done.stdout, done.stderr) == (f"{socket_path} True {socket_path}\n", "")


def test_run_forwards_signals(start: Start, socket_path: str) -> None:
    """What is sent to the supervisor reaches the command, which decides what to do; its exit code counts."""
    names = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTTIN", "SIGTTOU", "SIGTERM"]
    process = start("run", "--socket", socket_path, "--", sys.executable, "-c", LISTENER, *names)
    assert process.stdout is not None
    assert int(process.stdout.readline()) != process.pid
    for name in names:
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == f"{name}\n"
    assert process.wait(PATIENCE) == 7


def test_run_restarts_a_killed_broker(start: Start, server: Judge, socket_path: str) -> None:
    """After a SIGKILL of the broker another serves the socket; the command never noticed, and the pool's sessions are the same."""
    process = start("run", "--socket", socket_path, "--", sys.executable, "-c", LISTENER, "SIGTERM")
    assert process.stdout is not None
    command = int(process.stdout.readline())
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool:
        with pool.connection() as sock:
            session = ask(sock, "before")
        for _ in range(3):
            old = broker_pid(socket_path)
            os.kill(old, signal.SIGKILL)
            eventually(lambda old=old: has_another_broker(socket_path, old))  # type: ignore[misc]
            with pool.connection() as sock:
                assert ask(sock, "after") == session
    assert psutil.pid_exists(command)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 7
    assert "the broker ended with exit code -9; starting another" in process.communicate()[1]


def test_run_ends_everything_when_it_is_killed(start: Start, socket_path: str) -> None:
    """A SIGKILL of the supervisor ends the command and the broker: the kernel tells them."""
    process = start("run", "--socket", socket_path, "--", "sleep", "1000")
    command = eventually(lambda: [child for child in psutil.Process(process.pid).children() if child.name() == "sleep"])[0]
    broker = psutil.Process(broker_pid(socket_path))
    process.kill()
    process.wait()
    try:
        for child in (command, broker):
            eventually(lambda child=child: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # type: ignore[misc]
        eventually(lambda: not os.path.exists(socket_path))
    finally:
        if command.is_running():
            command.kill()


def test_run_uses_a_broker_that_is_there(broker: BrokerProcess, socket_path: str) -> None:
    """With a broker on the socket already, the command runs with that one, which outlives it."""
    done = mppool_("run", "--socket", socket_path, "--", sys.executable, "-c", "print('ran')")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert broker_pid(socket_path) == broker.pid


def test_run_takes_over_from_a_broker_that_ends(broker: BrokerProcess, start: Start, socket_path: str) -> None:
    """When the broker that was there ends, the supervisor's own takes its place."""
    process = start("run", "--socket", socket_path, "--", sys.executable, "-c", LISTENER, "SIGTERM")
    assert process.stdout is not None
    process.stdout.readline()
    first = broker.pid
    broker.stop()
    eventually(lambda: has_another_broker(socket_path, first))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 7


def test_run_without_a_broker_runs_nothing(tmp_path: Path) -> None:
    """When the broker cannot start, the command is not run; exit code 1 and the reason."""
    tmp_path.chmod(0o755)
    done = mppool_("run", "--socket", f"{tmp_path}/b.sock", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is open to others (mode 755)" in done.stderr


# mppool status.


def hold(pool: mppool.Pool) -> Callable[[Child], None]:
    """A worker that leases one session until it hears the end."""

    def work(child: Child) -> None:
        with pool.connection() as sock:
            ask(sock, "held")
            child.tell("held")
            child.hear()
        pool.close()

    return work


def test_status_without_pools(broker: BrokerProcess, socket_path: str) -> None:
    """A broker without pools says so, in words and as JSON."""
    assert mppool_("status", "--socket", socket_path).stdout == "no pools\n"
    assert json_of("status", "--socket", socket_path, "--json") == {"pools": []}


def test_status_as_json(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """Every number of a pool with a lease, an idle session and a waiter is as it should be, for the host and for each worker."""
    pool = mppool.Pool(server.address, max_size=2, name="web", broker=socket_path)

    def wait(child: Child) -> None:
        child.tell("begins")
        with pool.connection() as sock:
            ask(sock, "waited")
        pool.close()

    with fork(hold(pool), hold(pool)) as (first, second):
        first.hear()
        second.hear()
        with fork(wait) as (waiter,):
            waiter.hear()
            found = eventually(lambda: [found for found in json_of("status", "--socket", socket_path, "--json")["pools"] if found["waiting"]])[0]
            numbers = {key: found[key] for key in ("name", "target", "max_size", "size", "in_use", "idle", "dialing", "waiting", "dials", "checkouts")}
            assert numbers == {
                "name": "web",
                "target": f"tcp://127.0.0.1:{server.port}",
                "max_size": 2,
                "size": 2,
                "in_use": 2,
                "idle": 0,
                "dialing": 0,
                "waiting": 1,
                "dials": 2,
                "checkouts": 2,
            }
            assert (found["broker_alive"], found["broker"]) == (True, socket_path)
            workers = {worker["pid"]: worker for worker in found["workers"]}
            assert sorted(workers) == sorted([first.pid, second.pid, waiter.pid])
            for child, leases, waiting in ((first, 1, 0), (second, 1, 0), (waiter, 0, 1)):
                worker = workers[child.pid]
                assert (worker["alive"], worker["leases"], worker["idle_cached"], worker["waiting"]) == (True, leases, 0, waiting)
                assert (0 < worker["oldest_lease"] < 20) if leases else worker["oldest_lease"] == 0
            first.tell()
            waiter.result()
            first.result()
        eventually(lambda: len(json_of("status", "--socket", socket_path, "--json")["pools"][0]["workers"]) == 1)  # the broker clears rows soon
        found = json_of("status", "--socket", socket_path, "--json", "web")["pools"][0]
        assert [found[key] for key in ("size", "in_use", "idle", "waiting", "dials", "checkouts", "waits")] == [2, 1, 1, 0, 2, 3, 1]
        waits = found["wait_percentiles_us"]
        assert 0 < waits["p50"] == waits["p95"] == waits["p99"]
        assert [worker["pid"] for worker in found["workers"]] == [second.pid]
        second.tell()
        second.result()


def test_status_counts_idle_sessions_of_a_worker(server: Judge, socket_path: str) -> None:
    """A worker that has returned its sessions shows them as cached, with no lease."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        with pool.connection() as one, pool.connection() as two:
            ask(one, "one")
            ask(two, "two")
        found = json_of("status", "--socket", socket_path, "--json")["pools"][0]
        assert [found[key] for key in ("size", "in_use", "idle")] == [2, 0, 2]
        workers = [(worker["pid"], worker["leases"], worker["idle_cached"], worker["oldest_lease"]) for worker in found["workers"]]
        assert workers == [(os.getpid(), 0, 2, 0)]


def test_status_as_a_table(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """The table has every column, and a row for each pool and each worker."""
    with mppool.Pool(server.address, max_size=3, name="web", broker=socket_path) as pool, pool.connection() as sock:
        ask(sock, "one")
        done = mppool_("status", "--socket", socket_path)
    assert done.returncode == 0
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in done.stdout.splitlines() if line.startswith(("│", "┃"))]
    pools, workers = dict(zip(lines[0], lines[1], strict=True)), dict(zip(lines[2], lines[3], strict=True))
    expected = {"name": "web", "target": f"tcp://127.0.0.1:{server.port}", "max_size": "3", "size": "1", "in_use": "1", "idle": "0", "dialing": "0"}
    expected |= {"waiting": "0", "resident": "-", "dials": "1", "checkouts": "1", "wait p50": "-", "p95": "-", "p99": "-", "broker": "yes"}
    assert pools == expected
    assert (workers["pool"], workers["pid"], workers["leases"], workers["idle cached"]) == ("web", str(os.getpid()), "1", "0")
    assert re.fullmatch(r"[\d.]+ (ms|s)", workers["oldest lease"])


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_status_works_without_a_broker(server: Judge, socket_path: str, option: list[str]) -> None:
    """Where no broker ever was, status reads the table and says that there is none."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool, pool.connection() as sock:
        ask(sock, "one")
        done = mppool_("status", "--socket", socket_path, *option)
        assert done.returncode == 0
        if option:
            found = json.loads(done.stdout)["pools"][0]
            assert (found["name"], found["broker_alive"], found["in_use"]) == ("web", False, 1)
        else:
            assert re.search(r"│ web .*│ +no │", done.stdout)


def test_status_shows_who_is_dead(server: Judge, socket_path: str) -> None:
    """A worker that was killed where no broker is shows as dead, with the lease it held, until somebody reclaims it."""
    pool = mppool.Pool(server.address, max_size=1, name="web", broker=socket_path)
    with fork(hold(pool)) as (child,), pool:
        child.hear()
        child.kill()
        child.wait()
        workers = {worker["pid"]: worker for worker in json_of("status", "--socket", socket_path, "--json")["pools"][0]["workers"]}
        assert (workers[child.pid]["alive"], workers[child.pid]["leases"]) == (False, 1)
        assert workers[os.getpid()]["alive"]
        assert f"{child.pid} (dead)" in mppool_("status", "--socket", socket_path).stdout
        with pool.connection(timeout=5) as sock:
            ask(sock, "reclaimed")
        assert f"{child.pid} (dead)" not in mppool_("status", "--socket", socket_path).stdout


def test_status_forgets_who_left_in_order(server: Judge, socket_path: str) -> None:
    """A worker that closed its pool is no dead worker, with or without a broker."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)

    def use(child: Child) -> None:
        with pool.connection() as sock:
            ask(sock, "one")
        pool.close()

    with pool, fork(use) as (child,):
        child.result()
        assert [worker["pid"] for worker in json_of("status", "--socket", socket_path, "--json")["pools"][0]["workers"]] == [os.getpid()]


def test_status_of_one_pool(server: Judge, socket_path: str) -> None:
    """With a NAME only that pool is shown; an unknown one exits with 4 and says which."""
    with mppool.Pool(server.address, name="web", broker=socket_path), mppool.Pool(server.address, name="jobs", broker=socket_path):
        both = json_of("status", "--socket", socket_path, "--json")["pools"]
        assert sorted(pool["name"] for pool in both) == ["jobs", "web"]
        assert [pool["name"] for pool in json_of("status", "--socket", socket_path, "--json", "jobs")["pools"]] == ["jobs"]
        done = mppool_("status", "--socket", socket_path, "mail")
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr == "mppool: NAME='mail': no such pool\n"


def test_status_has_no_effect(server: Judge, socket_path: str) -> None:
    """Looking takes no row, opens no connection and changes no number."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        with pool.connection() as sock:
            ask(sock, "one")
        before, kept = pool.get_stats(), names(socket_path)
        json_of("status", "--socket", socket_path, "--json")
        assert (pool.get_stats(), names(socket_path)) == (before, kept)
        assert server.counts()["dials"] == 1


def test_one_damaged_pool_does_not_hide_the_others(server: Judge, socket_path: str) -> None:
    """A table that cannot be read is reported, and the other pools are shown."""
    with mppool.Pool(server.address, name="web", broker=socket_path), mppool.Pool(server.address, name="jobs", broker=socket_path) as jobs:
        words = jobs._worker.words  # type: ignore[union-attr]
        version, words[1] = words[1], 99
        try:
            done = mppool_("status", "--socket", socket_path)
        finally:
            words[1] = version
        assert "web" in done.stdout
        assert "version 99" in done.stdout + done.stderr


# mppool resize.


def test_resize_grows_for_those_who_wait(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A larger cap serves a waiting worker at once, and says what it was before."""
    with mppool.Pool(server.address, max_size=1, name="web", broker=socket_path) as pool, pool.connection() as held:
        ask(held, "held")
        served: list[int] = []

        def wait() -> None:
            with pool.connection(timeout=10) as sock:
                served.append(ask(sock, "waited"))

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: pool.get_stats()["waiting"] == 1)
        done = mppool_("resize", "--socket", socket_path, "web", "2")
        assert (done.returncode, done.stdout) == (0, "web: max_size 1 -> 2\n")
        thread.join(10)
        assert served == [2]
        assert pool.get_stats()["max_size"] == 2
        assert server.counts()["peak"] == 2


def test_resize_shrinks_idle_sessions(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A smaller cap closes idle sessions above it, and leases as they come back, as drained."""
    with mppool.Pool(server.address, max_size=4, name="web", broker=socket_path) as pool:
        leases = [pool.getconn() for _ in range(4)]
        for n, sock in enumerate(leases):
            ask(sock, f"n{n}")
        pool.putconn(leases.pop())
        assert mppool_("resize", "--socket", socket_path, "web", "1").returncode == 0
        eventually(lambda: server.counts()["live"] == 3)  # only the idle one: leases are their holders'
        for sock in leases:
            ask(sock, "still")
            pool.putconn(sock)
        eventually(lambda: server.counts()["live"] <= 1)
        stats = eventually(lambda: [stats for stats in [pool.get_stats()] if stats["size"] <= 1])[0]
        assert (stats["size"], stats["max_size"], stats["closed"]) == (1, 1, {"drained": 3})


def test_resize_works_without_a_broker(server: Judge, socket_path: str) -> None:
    """The cap is in the table: a resize needs nobody else."""
    with mppool.Pool(server.address, max_size=1, name="web", broker=socket_path) as pool, pool.connection() as one:
        ask(one, "one")
        assert mppool_("resize", "--socket", socket_path, "web", "2").returncode == 0
        with pool.connection(timeout=5) as two:
            assert ask(two, "two") == 2


@pytest.mark.parametrize(
    ("value", "said"), [("0", "max_size=0: expected a whole number from 1 to 64"), ("65", "max_size=65: expected a whole number from 1 to 64")]
)
def test_resize_beyond_the_bounds(server: Judge, socket_path: str, value: str, said: str) -> None:
    """Below 1 or above the table's room is refused with option, value and bounds, and the cap stays."""
    with mppool.Pool(server.address, max_size=3, name="web", broker=socket_path) as pool:
        done = mppool_("resize", "--socket", socket_path, "web", value)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert pool.get_stats()["max_size"] == 3


@pytest.mark.parametrize("value", ["many", "2.5", "", "-1"])
def test_resize_to_no_number(socket_path: str, value: str) -> None:
    """What is no whole number is refused with its value, before any pool is looked for."""
    done = mppool_("resize", "--socket", socket_path, "web", value)
    assert done.returncode == 2
    assert value in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["mail", "", "../x"])
def test_resize_of_an_unknown_pool_exits_4(server: Judge, socket_path: str, name: str) -> None:
    """A name nobody uses exits with 4 and says name and socket; nothing is made."""
    with mppool.Pool(server.address, name="web", broker=socket_path):
        before = names(socket_path)
        done = mppool_("resize", "--socket", socket_path, name, "2")
        assert (done.returncode, done.stderr) == (4, f"mppool: NAME={name!r}: no such pool at {socket_path}\n")
        assert names(socket_path) == before


# mppool gc.


def of(found: dict[str, Any], path: str) -> dict[str, list[dict[str, Any]]]:
    """What gc said about the pools of one socket: others of this user are not ours to judge."""
    return {key: [item for item in items if item["pool"].startswith(f"mppool-{scope_of(path)}-")] for key, items in found.items()}


def test_gc_removes_what_killed_processes_left(server: Judge, socket_path: str) -> None:
    """After a SIGKILL of everything, workers, broker and keeper, gc removes every name and says which pool it was."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    broker = BrokerProcess(socket_path)
    try:
        with fork(hold(pool)) as (child,):
            child.hear()
            for process in processes_of(socket_path):
                process.kill()
            child.kill()
            child.wait()
            broker.process.wait()
        eventually(lambda: not processes_of(socket_path))
        left = names(socket_path)
        assert any(name.endswith(".table") for name in left)
        assert any(name.startswith("sem.") for name in left)
        assert json_of("status", "--socket", socket_path, "--json")["pools"][0]["workers"][0]["alive"] is False
        said = of(json_of("gc", "--json"), socket_path)
        assert said["refused"] == []
        assert [(item["pool"], item["name"], item["what"]) for item in said["removed"]] == [(pool_id(socket_path, "web"), "web", ["2 semaphores", "table"])]
        assert names(socket_path) == []
        assert of(json_of("gc", "--json"), socket_path) == {"removed": [], "refused": []}
        eventually(lambda: server.counts()["live"] == 0)
    finally:
        broker.kill()
        clean_directory(socket_path)


def test_gc_refuses_what_is_in_use(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A pool with a worker is refused, with who holds it, and goes on; one nobody holds goes. gc says both, with exit code 0."""
    abandoned = mppool.Pool(server.address, name="abandoned", broker=f"{socket_path}.other")
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        with pool.connection() as sock:
            session = ask(sock, "before")
        with fork(hold(abandoned)) as (child,):
            child.hear()
            child.kill()
            child.wait()
        done = mppool_("gc")
        assert done.returncode == 0
        assert f"in use  {pool_id(socket_path, 'web')} (web): 2 rows held, a broker, a keeper" in done.stdout
        assert f"removed {pool_id(abandoned.broker, 'abandoned')} (abandoned): 2 semaphores, table" in done.stdout
        assert names(abandoned.broker) == []
        assert names(socket_path)
        with pool.connection() as sock:
            assert ask(sock, "after") == session


def test_gc_refuses_a_stopped_worker(server: Judge, socket_path: str) -> None:
    """A worker that is merely stopped keeps its pool."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    with fork(hold(pool)) as (child,):
        child.hear()
        child.kill(signal.SIGSTOP)
        said = of(json_of("gc", "--json"), socket_path)
        assert said["removed"] == []
        assert [(item["name"], item["why"]) for item in said["refused"]] == [("web", "1 rows held")]
        child.kill(signal.SIGCONT)
        child.tell()
        child.result()


@pytest.mark.parametrize("ending", [".lock", ".table", ".cap", ".0"])
def test_gc_removes_pools_that_were_never_finished(socket_path: str, ending: str) -> None:
    """Whatever single name a creator left that died half-way goes."""
    ident = pool_id(socket_path, "half")
    name = f"{ident}{ending}" if ending in (".lock", ".table") else f"sem.{ident}{ending}"
    os.close(os.open(f"{memory.SHM}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    assert [(item["pool"], item["name"]) for item in of(json_of("gc", "--json"), socket_path)["removed"]] == [(ident, "")]
    assert names(socket_path) == []


def test_gc_with_nothing_to_do() -> None:
    """Where there is nothing, gc says so, with exit code 0."""
    done = in_private_shm("1m", *MPPOOL, "gc")
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n")
    done = in_private_shm("1m", *MPPOOL, "gc", "--json")
    assert json.loads(done.stdout) == {"removed": [], "refused": []}


def test_gc_goes_on_after_a_name_that_is_not_as_it_should_be() -> None:
    """One odd file is reported; everything else that nobody holds goes."""
    script = f"""
        umask 077
        touch /dev/shm/mppool-00000000-0000000000.lock /dev/shm/mppool-00000000-1111111111.lock
        chmod 666 /dev/shm/mppool-00000000-0000000000.lock
        {sys.executable} -m mppool gc
        ls /dev/shm
    """
    done = in_private_shm("1m", "sh", "-c", script)
    assert "mppool-00000000-0000000000" in done.stdout + done.stderr
    assert "mppool-00000000-1111111111.lock" not in done.stdout.splitlines()
