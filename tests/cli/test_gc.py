"""``mppool gc``."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import pytest

import mppool
from mppool.kernel import memory
from mppool.kernel.runtime import pool_id, scope_of
from tests.cli.shared import MPPOOL, clean_directory, hold, json_of, mppool_
from tests.helpers.leftovers import names, processes_of
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import BrokerProcess, eventually, fork
from tests.helpers.server import Judge, ask

pytestmark = pytest.mark.alone


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
