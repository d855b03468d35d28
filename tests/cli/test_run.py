"""``mppool run``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

import mppool
from tests.cli.shared import Start, broker_pid, has_another_broker, mppool_
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import PATIENCE, BrokerProcess, eventually
from tests.helpers.server import Judge, ask

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
