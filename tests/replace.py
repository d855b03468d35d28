"""Is a session lost, or does a request fail, when the broker is replaced under load? And when somebody dies meanwhile?

    python -m tests.replace [--rounds N] [--deaths SHARE] [--seed S]

Every round starts ``mppool broker --replace`` beside the running broker, or two of them at once. Workers ask all the time, with
timeouts of one and two seconds; two more pools have sessions that no living worker has, only broker and keeper. The
server's count of dials says whether a session was lost. In a share of the rounds somebody is killed: the one that leaves or
the one that comes at its n-th line (traced from outside), the keeper, or broker and keeper together at any moment.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil

import mppool
from mppool.succession import is_taken
from tests.helpers.processes import Child, answers, die_with_parent, eventually
from tests.helpers.server import Judge, ask, judge

STALL = 0.3  # seconds without an answer of the server's to somebody who uses no pool

__all__ = ["TRACER", "Rig", "keeper_of"]

# Runs the command line; SIGKILLs itself at the n-th line of the package after a function was entered for the first time.
TRACER = """
import os, sys
first, fatal = sys.argv[1], int(sys.argv[2])
count = None
def line(frame, event, arg):
    global count
    if event == "line":
        count += 1
        if count == fatal:
            os.kill(os.getpid(), 9)
    return line
def call(frame, event, arg):
    global count
    if "/mppool/" not in frame.f_code.co_filename:
        return None
    if count is None and frame.f_code.co_filename.rpartition("/")[2] + ":" + frame.f_code.co_name == first:
        count = 0
    return None if count is None else line
sys.argv[:] = ["mppool", *sys.argv[3:]]
from mppool.cli import main
sys.settrace(call)
main()
"""


class Broker:
    """A broker that was started to replace another. ``fate``: the function from which on its lines are counted, and its last line."""

    def __init__(self, path: str, *options: str, fate: tuple[str, int] | None = None) -> None:
        self.fate = fate
        program = ["-m", "mppool"] if fate is None else ["-c", TRACER, fate[0], str(fate[1])]
        command = [sys.executable, *program, "broker", "--socket", path, *options]
        self.output = os.memfd_create("output")  # no pipe: the keeper that it starts has it, too
        self.process = subprocess.Popen(command, stderr=self.output, preexec_fn=die_with_parent)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def killed(self) -> bool:
        return self.process.poll() == -signal.SIGKILL

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """The last one is ended in good order, others are dead already; what it said."""
        if self.running:
            self.process.terminate()
        self.process.wait(20)
        if self.output < 0:
            return ""
        output, self.output = self.output, -1
        with open(output, encoding="utf-8") as file:
            file.seek(0)
            return file.read()


def keeper_of(path: str) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        if f"{path}.keeper" in (process.info["cmdline"] or []):
            return process
    return None


class Rig:
    """The workers, the pools that nobody uses, and the brokers of one socket."""

    def __init__(self, server: Judge, path: str, workers: int = 6, cap: int = 3, seed: int | None = None) -> None:
        self.server = server
        self.path = path
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.brokers: list[Broker] = []
        self.start("--replace")
        eventually(lambda: answers(path))
        self.memory = mmap.mmap(-1, 16 * (workers + 2))  # requests of each worker; first: end, does somebody die, which round, last death; last: stall
        self.pool = mppool.Pool(server.address, max_size=cap, name="busy", broker=path)
        self.left = mppool.Pool(server.address, max_size=2, name="left", broker=path)
        self.children = [Child(self.work(n + 1)) for n in range(workers)]
        self.watcher = Child(self.watch)
        self.watcher.hear()
        self.quiet = self.open_quiet()
        self.quiet_numbers = self.see(self.quiet)
        self.left_numbers = self.see(self.left)
        eventually(lambda: self.requests() > 20 * workers)
        self.dials = server.counts()["dials"]

    def open_quiet(self) -> mppool.Pool:
        """A pool with a worker, ours, that has none of its sessions. (The third pool has no worker at all.)"""
        pool = mppool.Pool(self.server.address, max_size=2, name="quiet", broker=self.path)
        pool.open()
        return pool

    # The load.

    def work(self, place: int) -> Callable[[Child], None]:
        def work(child: Child) -> None:
            dice = random.Random(place)
            done = 0
            while not self.memory[0]:
                try:
                    with self.pool.connection(timeout=dice.choice((1.0, 2.0))) as sock:
                        ask(sock, f"{place}.{done}", dice.choice((0, 0, 1, 2)))
                except Exception as error:
                    child.tell([bool(self.memory[1]) or self.was_lately(8), self.was_lately(-16), f"round {self.memory[2]}: {type(error).__name__}: {error}"])
                done += 1
                struct.pack_into("<Q", self.memory, 16 * place, done)

        return work

    def watch(self, child: Child) -> None:
        """Asks the server without any pool: when that takes long, the machine stands still, and not the pool."""
        with socket.create_connection(self.server.address) as sock:
            ask(sock, "w")
            child.tell()
            while not self.memory[0]:
                began = time.monotonic()
                ask(sock, "w", 1)
                if time.monotonic() - began > STALL:
                    self.note(-16)

    def note(self, place: int) -> None:
        """Write the time there."""
        self.memory[place : place + 8] = struct.pack("d", time.monotonic())

    def was_lately(self, place: int) -> bool:
        (moment,) = struct.unpack("d", self.memory[place : place + 8])
        return time.monotonic() - float(moment) < 3

    def requests(self) -> int:
        return sum(struct.unpack_from("<Q", self.memory, 16 * (n + 1))[0] for n in range(len(self.children)))

    def see(self, pool: mppool.Pool) -> list[int]:
        """A worker that comes, uses both sessions and is gone: which connections were they?"""

        def look(child: Child) -> list[int]:
            sessions = [pool.getconn(timeout=10) for _ in range(2)]
            numbers = [ask(session, "see") for session in sessions]
            for session in sessions:
                pool.putconn(session)
            worker: Any = pool._worker
            table = worker.table
            shared = lambda: all(worker.words[table.shared_flag + k] for k in range(2))  # noqa: E731
            eventually(shared, what="sessions are with the keeper")
            return sorted(numbers)

        child = Child(look)
        try:
            found: list[int] = child.result()
            return found
        finally:
            child.end()

    # The brokers.

    def start(self, *options: str, fate: tuple[str, int] | None = None) -> Broker:
        broker = Broker(self.path, *options, fate=fate)
        self.brokers.append(broker)
        return broker

    def serving(self) -> list[Broker]:
        return [broker for broker in self.brokers if broker.running]

    def settled(self) -> bool:
        """One broker is left, and serves; or none."""
        running = self.serving()
        return not running or (len(running) == 1 and answers(self.path) and is_taken(self.path))

    def settle(self) -> None:
        """Wait for that. A broker that does not come back although one side lived on is a finding."""
        eventually(self.settled, 30, "one broker, or none")
        if self.serving():
            return
        dead = [broker for broker in self.brokers[-2:] if broker.killed]
        if not dead:
            self.complaints.append("no broker is left, and none was killed")
        self.counts["started_again"] += 1  # as a supervisor would: the last that served was killed
        self.start()
        eventually(lambda: answers(self.path))

    def round(self, number: int, deaths: float) -> None:
        """One replacement; without a death nothing may be lost, and the one that leaves says that all is well."""
        old = self.serving()[0]
        what = self.dice.choice(("old", "new", "keeper", "broker and keeper")) if self.dice.random() < deaths else ""
        if old.fate is not None and what == "new":
            what = "old"  # else it would come back, and meet its fate while it serves
        self.memory[1] = bool(what) or old.fate is not None
        fatal = int(1.0045 ** self.dice.uniform(0, 1750))  # up to some 2500 lines, more often early
        coming = self.start(
            "--replace",
            fate=("succession.py:ask_for_place", fatal) if what == "new" else ("broker.py:end", fatal) if self.dice.random() < deaths / 2 else None,
        )
        also = self.start("--replace") if self.dice.random() < 0.2 else None
        if what == "old":
            time.sleep(self.dice.uniform(0.1, 0.4))
            old.kill()
        if what in ("keeper", "broker and keeper"):
            time.sleep(self.dice.uniform(0.1, 0.4))
            keeper = keeper_of(self.path)
            if keeper is not None:
                keeper.kill()
            if what != "keeper":
                self.dice.choice((old, coming)).kill()
        eventually(lambda: not coming.running or not old.running, 20, "either has ended")
        self.settle()
        died = what in ("keeper", "broker and keeper") or any(broker.killed for broker in (old, coming))
        self.memory[2] = number % 256
        if died:
            print(
                f"round {number}: {what}, ended with {old.process.returncode}; the new one {'serves' if coming.running else coming.process.returncode}",
                flush=True,
            )
            self.note(8)
        self.counts["replacements"] += 1
        self.counts["deaths_during_replacement"] += died
        self.counts["at_once"] += also is not None
        self.counts[f"died: {what or 'old'}"] += died
        if not died and old.process.returncode != 0:
            self.complaints.append(f"round {number}: the old broker ended with {old.process.returncode}")
        for broker in (coming, also):
            if broker is not None and broker.process.poll() not in (None, 0, -signal.SIGKILL):
                self.complaints.append(f"round {number}: a new broker ended with {broker.process.returncode}: {broker.end()}")
        self.judge(number, died)

    def judge(self, number: int, died: bool) -> None:
        """Are all sessions there? Those that only the keeper had, too, unless it was killed in the middle: then who sleeps has to come by."""
        if died:
            with self.quiet.connection(timeout=20) as one, self.quiet.connection(timeout=20) as other:
                ask(one, "by"), ask(other, "by")
            self.quiet.close()
            self.quiet = self.open_quiet()
        for pool, before in ((self.quiet, self.quiet_numbers), (self.left, self.left_numbers)):
            now = self.see(pool)
            before[:], lost = now, len(set(before) - set(now))
            if lost and not died:
                self.complaints.append(f"round {number}: {lost} sessions of pool {pool.name!r} were lost")
        dials = self.server.counts()["dials"]
        self.counts["sessions_lost_to_deaths" if died else "sessions_lost"] += dials - self.dials
        self.dials = dials
        for broker in self.brokers:
            if not broker.running:
                broker.end()
        self.brokers = self.serving() + [broker for broker in self.brokers if not broker.running and broker.killed][-1:]

    def finish(self) -> None:
        """End the load and all brokers; add up."""
        self.memory[0] = 1
        for child in self.children:
            try:
                while True:
                    heard = child.hear(20)
                    if not isinstance(heard, list):
                        break
                    died, stalled, error = heard
                    name = "failed_requests_with_deaths" if died else "failed_requests_in_stalls" if stalled else "failed_requests"
                    self.counts[name] += 1
                    print(f"{name}: {error}", flush=True)
                    if name == "failed_requests":
                        self.complaints.append(f"a request failed: {error}")
            finally:
                child.end()
        self.counts["requests"] = self.requests()
        self.counts["peak"] = self.server.counts()["peak"]

    def end(self) -> None:
        for child in (*self.children, self.watcher):
            child.end()
        self.pool.close()
        self.quiet.close()
        for broker in self.brokers:
            print(broker.end(), end="", file=sys.stderr)
        if any(broker.killed for broker in self.brokers):  # one that met its fate just now left its files
            last = Broker(self.path)
            eventually(lambda: answers(self.path))
            last.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--deaths", type=float, default=0.5, help="share of the rounds in which somebody is killed")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory, judge() as server:
        rig = Rig(server, f"{directory}/b.sock", seed=options.seed)
        try:
            for number in range(options.rounds):
                rig.round(number, options.deaths)
                if number % 10 == 9:
                    print(f"round {number + 1}: {rig.requests()} requests, {dict(rig.counts)}", flush=True)
            rig.finish()
        finally:
            rig.end()
    for complaint in rig.complaints[:20]:
        print(complaint)
    kinds = ", ".join(f"{count} of {kind.removeprefix('died: ')}" for kind, count in sorted(rig.counts.items()) if kind.startswith("died: ") and count)
    print(f"deaths: {kinds or 'none'}; {rig.counts['at_once']} times two came at once; the server saw at most {rig.counts['peak']} connections")
    figures = (
        "replacements",
        "sessions_lost",
        "failed_requests",
        "requests",
        "deaths_during_replacement",
        "sessions_lost_to_deaths",
        "failed_requests_with_deaths",
        "failed_requests_in_stalls",
        "started_again",
    )
    print(json.dumps({name: rig.counts[name] for name in figures}))
    return 1 if rig.complaints or rig.counts["sessions_lost"] or rig.counts["failed_requests"] else 0


if __name__ == "__main__":
    sys.exit(main())
