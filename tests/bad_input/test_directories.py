"""Runtime directories that cannot be trusted, or made."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mppool
from tests.bad_input.shared import NOBODY
from tests.helpers.leftovers import names, processes_of
from tests.helpers.processes import broker_process, eventually
from tests.helpers.server import Judge, ask


def too_open(directory: Path) -> tuple[str, str]:
    run = directory / "run"
    run.mkdir()
    run.chmod(0o770)
    return f"{run}/b.sock", f"the directory {run} is open to others (mode 770); chmod 700 it"


def a_symlink(directory: Path) -> tuple[str, str]:
    (directory / "real").mkdir(mode=0o700)
    (directory / "run").symlink_to("real")
    return f"{directory}/run/b.sock", f"{directory}/run is not a directory (a symbolic link is refused too)"


def a_file(directory: Path) -> tuple[str, str]:
    (directory / "run").write_text("")
    return f"{directory}/run/b.sock", f"{directory}/run is not a directory (a symbolic link is refused too)"


def without_parent(directory: Path) -> tuple[str, str]:
    return f"{directory}/no/such/b.sock", f"cannot make the runtime directory {directory}/no/such: No such file or directory"


def of_another_user(directory: Path) -> tuple[str, str]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of another user")
    run = directory / "run"
    run.mkdir(mode=0o700)
    os.chown(run, NOBODY, NOBODY)
    return f"{run}/b.sock", f"the directory {run} belongs to uid {NOBODY}, we are 0"


Trouble = Callable[[Path], "tuple[str, str]"]
troubles = pytest.mark.parametrize("trouble", [too_open, a_symlink, a_file, without_parent, of_another_user])


@troubles
def test_a_broker_refuses_a_directory_it_cannot_trust(directory: Path, trouble: Trouble) -> None:
    """Whoever may write there could put a socket of his own: exit code 1, the option, the path and what to do."""
    path, why = trouble(directory)
    done = subprocess.run([sys.executable, "-m", "mppool", "broker", "--socket", path], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"mppool: broker={path!r}: {why}\n")


@troubles
def test_autostart_that_cannot_work(directory: Path, trouble: Trouble, server: Judge) -> None:
    """BrokerUnavailable passes on why no broker could be started, and nothing is left behind."""
    path, why = trouble(directory)
    pool = mppool.Pool(server.address, broker=path, autostart=True)
    with pytest.raises(mppool.BrokerUnavailable) as caught:
        pool.getconn()
    assert str(caught.value) == f"broker={path!r}: autostart failed with exit code 1: mppool: broker={path!r}: {why}"
    assert names(path) == []
    assert server.counts()["dials"] == 0


def test_autostart_works_once_the_trouble_is_gone(directory: Path, server: Judge) -> None:
    """A pool whose autostart failed is not spoilt: the next checkout tries again."""
    path, _ = too_open(directory)
    pool = mppool.Pool(server.address, broker=path, autostart=True)
    with pytest.raises(mppool.BrokerUnavailable):
        pool.getconn()
    os.chmod(directory / "run", 0o700)
    try:
        with pool, pool.connection() as sock:
            assert ask(sock, "hello") == 1
            assert pool.get_stats()["broker_alive"]
    finally:
        end_brokers(path)
    assert names(path) == []


def end_brokers(path: str) -> None:
    for process in processes_of(path):
        process.terminate()
    eventually(lambda: not processes_of(path))


def test_a_runtime_directory_is_made_for_us_alone(directory: Path) -> None:
    """A broker makes the directory of its socket if it can, for nobody else to enter; the socket is ours alone."""
    path = f"{directory}/run/b.sock"
    with broker_process(path):
        assert stat.S_IMODE(os.stat(f"{directory}/run").st_mode) == 0o700
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    eventually(lambda: not processes_of(path))
