"""Pure functions from data to tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

__all__ = ["render_gc", "render_status"]


def render_status(data: dict[str, Any]) -> Iterable[Any]:
    """Two tables: pools, and their workers."""
    if not data["pools"]:
        return ["no pools"]
    pools = Table(title="pools", title_justify="left")
    for heading in ("name", "target"):
        pools.add_column(heading, overflow="fold")
    for heading in ("max_size", "size", "in_use", "idle", "dialing", "waiting", "resident", "dials", "checkouts", "wait p50", "p95", "p99", "broker"):
        pools.add_column(heading, justify="right")
    workers = Table(title="workers", title_justify="left")
    workers.add_column("pool")
    for heading in ("pid", "leases", "idle cached", "waiting", "oldest lease"):
        workers.add_column(heading, justify="right")
    for pool in data["pools"]:
        numbers = (str(pool[key]) for key in ("max_size", "size", "in_use", "idle", "dialing", "waiting"))
        resident = ", ".join(f"{count} {why}" for why, count in pool["resident"].items()) or "-"
        waits = (duration(pool["wait_percentiles_us"][key] / 1e6) for key in ("p50", "p95", "p99"))
        pools.add_row(
            pool["name"], pool["target"], *numbers, resident, str(pool["dials"]), str(pool["checkouts"]), *waits, "yes" if pool["broker_alive"] else "no"
        )
        for worker in pool["workers"]:
            pid = str(worker["pid"]) + ("" if worker["alive"] else " (dead)")
            counts = (str(worker[key]) for key in ("leases", "idle_cached", "waiting"))
            workers.add_row(pool["name"], pid, *counts, duration(worker["oldest_lease"]) if worker["leases"] else "-")
    return [pools, workers]


def render_gc(data: dict[str, Any]) -> Iterable[Any]:
    lines = [f"removed {item['pool']} ({item['name'] or 'never finished'}): {', '.join(item['what']) or 'lock file'}" for item in data["removed"]]
    lines += [f"in use  {item['pool']} ({item['name']}): {item['why']}" for item in data["refused"]]
    return lines or ["nothing to remove"]


def duration(seconds: float) -> str:
    if seconds == 0:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "0"
