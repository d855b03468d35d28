"""The benchmarks run, and print what they promise. How fast anything is, no test asserts: that depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.processes import die_with_parent

SCRIPTS = Path(__file__).parent.parent / "scripts"


def bench(name: str, *options: str) -> str:
    command = [sys.executable, str(SCRIPTS / f"bench_{name}.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=die_with_parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def test_checkout_measures_ours_and_says_what_it_skips() -> None:
    """Ours and the queue are always measured; every other pool either is, too, or it is said why not."""
    result: dict[str, Any] = json.loads(bench("checkout", "--rounds", "2", "--number", "20", "--imports", "1", "--json"))
    measured, skipped = result["checkouts"], result["skipped"]
    assert {"mppool getconn+putconn", "mppool getconn+putconn, no broker", "mppool connection()", "queue.LifoQueue get+put"} <= set(measured)
    assert len(measured) + len(skipped) == 10
    assert all(skipped.values())
    for row in measured.values():
        assert 0 < row["min_us"] <= row["median_us"]
        assert row["to_lifo"] > 0
        assert ("to_psycopg" in row) == ("psycopg_pool connection()" in measured)
    assert measured["queue.LifoQueue get+put"]["to_lifo"] == 1
    assert result["cpus"] >= 1
    assert result["python"]


def test_importing_the_pool_imports_no_command_line() -> None:
    """Workers do not pay for what only the commands need."""
    result: dict[str, Any] = json.loads(bench("checkout", "--rounds", "1", "--number", "1", "--imports", "3", "--json"))["import"]
    assert not {"click", "rich", "json", "asyncio", "psutil", "multiprocessing", "subprocess"} & set(result["larger"])
    assert 0 < result["min_ms"] <= result["median_ms"]
    assert result["modules"] > 0


def test_saturated_measures_both() -> None:
    """A line for each load, round and contender; everybody was served, and nobody held more than there is."""
    options = ("--workers", "5", "--cap", "2", "--hold-ms", "1", "--hold-ms", "0.2", "--seconds", "0.3", "--rounds", "1", "--json")
    result: dict[str, Any] = json.loads(bench("saturated", *options))
    assert (result["workers"], result["cap"]) == (5, 2)
    assert [(run["hold_ms"], run["contender"]) for run in result["runs"]] == [(1, "mppool"), (1, "semaphore"), (0.2, "mppool"), (0.2, "semaphore")]
    for run in result["runs"]:
        assert 0 < run["utilisation"] <= 1
        assert run["checkouts"] > 0
        assert run["lease_ms"] > 0
        assert 0 <= run["wait_p50_ms"] <= run["wait_p99_ms"] <= run["wait_max_ms"]
        assert 0 <= run["min_per_worker"] <= run["max_per_worker"]


def test_tables_say_where_they_were_made() -> None:
    """Without --json: the Python, the CPUs, and a row for each."""
    table = bench("saturated", "--workers", "2", "--cap", "1", "--hold-ms", "1", "--seconds", "0.1", "--rounds", "1").splitlines()
    assert table[0].startswith("Python ")
    assert "CPUs" in table[0]
    assert [line.split()[2] for line in table[2:]] == ["mppool", "semaphore"]


def test_clients_measures_each_or_says_why_not() -> None:
    """For every client: logins, adoptions and checkouts, ours and theirs, and their ratios."""
    result: dict[str, Any] = json.loads(bench("clients", "--rounds", "2", "--number", "10", "--json"))
    assert set(result["clients"]) | set(result["skipped"]) == {"PyMySQL", "pymemcache"}
    for row in result["clients"].values():
        assert all(row[what] > 0 for what in ("login", "adopt", "checkout", "theirs", "with command", "theirs with command"))
        assert set(row["ratios"]) == {"adopt", "checkout", "with command"}


def test_http_measures_each_client_beside_its_own_pool() -> None:
    """Connections and requests of every client, ours and theirs; of httpx no bare checkout, which its own pool has not."""
    result: dict[str, Any] = json.loads(bench("http", "--rounds", "2", "--number", "10", "--json"))
    assert set(result["clients"]) | set(result["skipped"]) == {"urllib3", "requests", "httpx", "httpx, async"}
    for name, row in result["clients"].items():
        assert all(row[what] > 0 for what in ("login", "adopt", "checkout", "with command", "theirs with command"))
        assert set(row["ratios"]) == {"adopt", "with command"} | (set() if "httpx" in name else {"checkout"})
