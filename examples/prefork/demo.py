"""What is done to the server while it is under load, how it is measured, and what is shown."""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import mppool
from prefork.echo import ask
from prefork.processes import Broker, Helper, wait_until

PATIENCE = 10  # seconds


@dataclass
class Demo:
    """What is running, and what was found out about it."""

    options: argparse.Namespace
    pool: mppool.Pool
    judge: Helper
    load: Helper
    deaths: socket.socket
    broker: Broker
    console: Console = field(default_factory=lambda: Console(highlight=False))
    live: Live | None = None
    began: float = field(default_factory=time.monotonic)
    kills: int = 0
    died: int = 0
    last_kill: float = float("-inf")
    last_look: float = float("-inf")  # at the upstream's counts
    peak: int = 0
    above_cap: int = 0  # connections above what is allowed at the moment
    late: int = 0  # sessions that could not be leased within PATIENCE under load
    missing: int = 0  # sessions that could not be leased the last time when all were asked for
    upstream: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.began:6.2f} s  {text}", soft_wrap=True)

    # What happens.

    def run(self) -> None:
        """The load goes on all the time; this is what is done to the server meanwhile."""
        seconds, kills = self.options.seconds, self.options.kills
        wait_until(lambda: self.load.counts()["answered"] > 0)
        self.watch(0.1 * seconds)
        self.say(f"nobody was killed yet: all {self.options.cap} sessions leased at once after {self.lease_all():.1f} ms of queueing with the workers")
        for _ in range(kills):
            self.kill_worker()
            self.watch(0.45 * seconds / kills)
        self.kill_broker()
        self.watch(0.15 * seconds)
        self.start_broker()
        self.watch(0.3 * seconds)

    def kill_worker(self) -> None:
        """SIGKILL a worker that holds a session just now: it is stopped first, so that it cannot give it back in the last moment.

        (Or was about to take or had just given it: shared memory cannot tell. Then the session goes on.)
        """
        while True:
            victim = random.choice(self.workers())["pid"]
            os.kill(victim, signal.SIGSTOP)
            if any(worker["pid"] == victim and worker["leases"] for worker in self.workers()):
                break
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.001)
        self.judged()
        killed = self.last_kill = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self.kills += 1
        settled = wait_until(lambda: all(worker["pid"] != victim for worker in self.workers()), 0.5)
        settled_after = f"{'after' if settled else 'not within'} {(time.monotonic() - killed) * 1000:.1f} ms"
        self.say(f"worker {victim} killed: all it had settled {settled_after}, all sessions leased at once after {self.lease_all(killed):.1f} ms")

    def kill_broker(self) -> None:
        """Without a broker there is no queue: whoever waits looks again and again, in this process as in the workers."""
        killed = time.monotonic()
        self.broker.end(signal.SIGKILL)
        self.say(f"broker killed: all sessions leased at once, with no broker and so no queue, after {self.lease_all(killed):.1f} ms")

    def start_broker(self) -> None:
        began = time.monotonic()
        pid = self.broker.start()
        up = (time.monotonic() - began) * 1000
        self.say(f"broker {pid} started: it answers after {up:.1f} ms, all sessions leased at once after {self.lease_all(began):.1f} ms")

    def lease_all(self, since: float | None = None) -> float:
        """Lease every session in this process, all at the same time; milliseconds until the last one was had, since ``since``.

        Under load each lease waits its turn in the queue with the workers, one after the other, and that is part of the time:
        compare it with the time when nobody was killed.
        """
        since = time.monotonic() if since is None else since
        connections = set()
        with ExitStack() as leases:
            sessions: list[socket.socket] = []
            with suppress(mppool.PoolTimeout):  # found missing below
                while len(sessions) < self.options.cap:
                    sessions.append(leases.enter_context(self.pool.connection(timeout=PATIENCE)))
            milliseconds = (time.monotonic() - since) * 1000
            for number, session in enumerate(sessions):
                connection, _, echoed = ask(session, f"all.{number}").partition(" ")
                if echoed == f"all.{number}":
                    connections.add(connection)
        self.missing = self.options.cap - len(connections)
        self.late += self.missing
        return milliseconds

    def workers(self) -> list[dict[str, Any]]:
        """Those of the server: this process uses the pool, too."""
        return [worker for worker in self.pool.get_stats()["workers"] if worker["pid"] != os.getpid()]

    # What is shown.

    def judged(self) -> dict[str, Any]:
        """The upstream's counts, its peak since the last look. One connection above the cap is allowed for half a second after a worker's
        kill, while the FIN travels."""
        allowed = self.options.cap + (self.last_look - self.last_kill < 0.5)
        self.last_look = time.monotonic()
        self.upstream = self.judge.counts()
        self.peak = max(self.peak, self.upstream["peak"])
        self.above_cap = max(self.above_cap, self.upstream["peak"] - allowed)
        return self.upstream

    def watch(self, seconds: float) -> None:
        """Show what goes on for so long."""
        until = time.monotonic() + seconds
        next_line = time.monotonic() + 0.5
        while time.monotonic() < until:
            if self.live or time.monotonic() > next_line:
                self.show()
                next_line += 1.0
            else:
                self.judged()
            time.sleep(max(0.0, min(0.1, until - time.monotonic())))

    def show(self) -> None:
        """One table; one line instead where there is no terminal."""
        with suppress(BlockingIOError):
            while self.deaths.recv(64, socket.MSG_DONTWAIT):
                self.died += 1
        stats, upstream, load = self.pool.get_stats(), self.judged(), self.load.counts()
        wait = stats["wait_percentiles_us"]
        waits = f"waits p50 {wait['p50'] / 1000:.1f} p99 {wait['p99'] / 1000:.1f} ms"
        lines = (
            f"pool: {stats['size']} of {stats['max_size']} sessions, {stats['in_use']} in use, {stats['idle']} idle, {stats['waiting']} waiting, "
            f"{stats['checkouts']} checkouts, {waits}, {'a' if stats['broker_alive'] else 'NO'} broker",
            f"upstream: {upstream['live']} connections now, {self.peak} at most, {upstream['dials']} dials, {upstream['requests']} requests",
            f"clients: {load['answered']} answered, {load['crossed']} crossed, {load['failed']} failed, {load['broken']} broken with a killed worker",
        )
        if self.live is None:
            self.say("; ".join(lines))
            return
        table = Table("worker", "leases", "idle cached", "state", title=f"{self.options.workers} workers, one pool")
        for worker in self.workers():
            state = "dead" if not worker["alive"] else "asks" if worker["leases"] else "waits" if worker["waiting"] else "accepts"
            table.add_row(str(worker["pid"]), str(worker["leases"]), str(worker["idle_cached"]), state)
        self.live.update(Group(table, *lines), refresh=True)

    def finish(self) -> bool:
        """Stop the clients, lease the whole cap once more, and say what was found. True if all is well."""
        load = self.load.counts(b"stop")
        until = time.monotonic() + 20
        while load["running"] and time.monotonic() < until:
            time.sleep(0.02)
            load = self.load.counts()
        late, last = self.late, self.lease_all()
        unsettled = not wait_until(lambda: all(worker["alive"] for worker in self.workers()))
        self.show()
        judged, closed = self.upstream, self.pool.get_stats()["closed"]
        lost, failed = min(load["broken"], self.kills), load["failed"] + max(0, load["broken"] - self.kills) + load["running"]
        rows = {
            "peak connections": f"{self.peak} (cap {self.options.cap}; one more is allowed for half a second after a worker's kill, while the FIN travels)",
            "dials": f"{judged['dials']} ({closed.get('owner_died', 0)} sessions ended with a killed worker)",
            "requests": f"{judged['requests']}, {load['answered']} answers had by clients",
            "crossed replies": load["crossed"],
            "failed requests": f"{failed} {load['first_error']}".strip(),
            "requests lost with the killed worker": f"{lost} (at most one for each of {self.kills} kills)",
            "dead workers not settled": sum(not worker["alive"] for worker in self.workers()),
            "workers that died by themselves": self.died - self.kills,
            "workers at the end": f"{len(self.workers())} (of {self.options.workers})",
            "leases that took too long": f"{late} (more than {PATIENCE} s)",
            "permits lost": f"{self.missing} (all {self.options.cap} leased at once in {last:.1f} ms at the end)",
        }
        for name, value in rows.items():
            self.console.print(f"{name + ':':<38} {value}", soft_wrap=True)
        if load["crossed"] or failed or self.late or unsettled:
            return False
        return not self.above_cap and self.died == self.kills and len(self.workers()) == self.options.workers
