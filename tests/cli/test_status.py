"""``mppool status``."""

from __future__ import annotations

import json
import os
import re

import pytest

import mppool
from tests.cli.shared import hold, json_of, mppool_
from tests.helpers.leftovers import names
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge, ask


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
