"""What was done, what was found; and on a finding all that helps to find its cause."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from mppool.claims import named
from mppool.inspect import Inspected, find_pool
from mppool.permits import Permits
from mppool.states import State
from mppool.table import FIRST_ROW, R_INCARNATION, R_PID, R_ROLE, W_ATTENTION, W_BEAT, W_EPOCH, W_MAX_SIZE, W_REPAIRS

__all__ = ["Report", "inspected"]

SHOWN = 20  # findings; more say nothing new
KINDS = ("FREE", "TRYING", "HELD", "GRANTED", "LIMBO")


class Report:
    def __init__(self) -> None:
        self.began = time.monotonic()
        self.done: Counter[str] = Counter()
        self.figures: Counter[str] = Counter()
        self.longest: dict[str, float] = {"whole_ms": 0.0, "quiet_ms": 0.0, "fin_ms": 0.0}
        self.findings: list[str] = []
        self.last: deque[tuple[float, str]] = deque(maxlen=400)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:8.2f} s  {text}", flush=True)

    def note(self, text: str, at: float | None = None) -> None:
        """For the history that a finding prints."""
        self.last.append((at if at is not None else time.monotonic(), text))

    def find(self, text: str) -> None:
        self.findings.append(text)
        self.note(f"FOUND {text}")
        if len(self.findings) <= SHOWN:
            self.say(f"FOUND: {text}")

    def took(self, what: str, seconds: float) -> None:
        self.longest[what] = max(self.longest[what], seconds * 1000)

    def summary(self) -> dict[str, Any]:
        done, figures = self.done, self.figures
        return {
            "seconds": round(time.monotonic() - self.began),
            "rounds": figures["rounds"],
            "kills": sum(count for kind, count in done.items() if kind.startswith("killed")),
            "killed_workers": done["killed workers"],
            "killed_brokers": done["killed brokers"],
            "killed_keepers": done["killed keepers"],
            "killed_servers": done["killed servers"],
            "stops": sum(count for kind, count in done.items() if kind.startswith("stopped")),
            "resets": done["resets"],
            "closes": done["closes"],
            "cuts": done["cuts"],
            "server_closes": done["server closes"],
            "refusals": done["refusals"],
            "delays": done["delays"],
            "resizes": done["resizes"],
            "forks": done["forks"],
            "reopens": done["reopens"],
            "bursts": done["bursts"],
            "requests": figures["requests"],
            "dials": figures["dials"],
            "repairs": figures["repairs"],
            "explained_failures": figures["explained"],
            "unexplained_failures": figures["unexplained"],
            "crossed": figures["crossed"],
            "two_holders": figures["two_holders"],
            "fin_travels": figures["fin_travels"],
            "peak_over_cap": figures["peak_over_cap"],
            "lost": figures["lost"],
            "left_over": figures["left_over"],
            "findings": len(self.findings),
            **{name: round(value, 1) for name, value in self.longest.items()},
        }

    def print_table(self) -> None:
        print()
        for name, value in self.summary().items():
            print(f"  {name.replace('_', ' '):24} {value:>12}")
        for finding in self.findings[:SHOWN]:
            print(f"  FOUND: {finding}")
        print(flush=True)

    def print_cause(self, path: str, logs: Path, pids: dict[int, str]) -> None:
        """The last of what happened, the table, the logs."""
        print("\n--- what happened last")
        for at, text in self.last:
            print(f"{at - self.began:10.4f}  {text}")
        print("\n--- processes")
        for pid, name in pids.items():
            print(f"{pid:8} {name:16} {sockets(pid)}")
        print("\n--- mppool status --json")
        print(subprocess.run([sys.executable, "-m", "mppool", "status", "--socket", path, "--json"], capture_output=True, text=True).stdout)
        print("--- the table")
        try:
            with inspected(path) as pool:
                print("no pool" if pool is None else dump(pool))
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
        for log in sorted(logs.glob("*.log")):
            print(f"--- the end of {log.name}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
        sys.stdout.flush()

    def print_json(self) -> None:
        print(json.dumps(self.summary()), flush=True)


@contextlib.contextmanager
def inspected(path: str) -> Any:
    """The pool called chaos, looked at from outside; None if it is not there."""
    pool = find_pool(path, "chaos")
    try:
        yield pool
    finally:
        if pool is not None:
            pool.lock.close()


def dump(pool: Inspected) -> str:
    """The raw words of header, slots and rows that are not as in a fresh table."""
    table, words = pool.table, pool.table.words
    header = {"max_size": W_MAX_SIZE, "repairs": W_REPAIRS, "attention": W_ATTENTION, "epoch": W_EPOCH, "beat": W_BEAT}
    lines = [", ".join(f"{name} {words[at]:#x}" for name, at in header.items())]
    lines.append(f"units {Permits(table, pool.lock).cap.value}, permits held {sum(table.array(table.permit))}, now {time.monotonic_ns():#x}")
    naming: dict[int, list[str]] = {}
    rows = []
    for row in table.taken_rows():
        at, alive = table.row_at(row), pool.lock.is_held(FIRST_ROW + row)
        lanes = {index: word for index, word in enumerate(table.lanes_of(row)) if word}
        for index, word in lanes.items():
            naming.setdefault(named(word), []).append(f"row {row}{'' if alive else ' (dead)'} lane {index} {KINDS[word & 7]}")
        role = {1: "worker", 2: "broker"}.get(words[at + R_ROLE], "?")
        rows.append(f"row {row}: pid {words[at + R_PID]} {role} incarnation {words[at + R_INCARNATION]} {'alive' if alive else 'DEAD'} lanes {lanes}")
    for k in range(table.slots):
        token = table.open_token(k).value
        if any((table.mem[table.states_byte + k], words[table.generation + k], words[table.permit + k], not token, k in naming)):
            fields = {"generation": table.generation, "uses": table.uses, "shared": table.shared_flag, "spread": table.spread, "permit": table.permit}
            said = ", ".join(f"{name} {words[at + k]}" for name, at in fields.items())
            home = words[table.home + k]
            lines.append(
                f"slot {k}: {State(table.mem[table.states_byte + k]).name}, token {token}, {said}, home row {home >> 32} incarnation {home & 0xFFFFFFFF}"
                f", since {words[table.since + k]:#x}, named by {naming.get(k, [])}"
            )
    return "\n".join(lines + rows)


def sockets(pid: int) -> list[str]:
    """The TCP sockets that a process has open: local and remote port, state."""
    inodes = socket_inodes()
    found = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
                if link.startswith("socket:[") and link[8:-1] in inodes:
                    found.append(inodes[link[8:-1]])
    except OSError:
        return ["gone"]
    return sorted(found)


STATES = {"01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV", "04": "FIN_WAIT1", "05": "FIN_WAIT2", "06": "TIME_WAIT", "07": "CLOSE", "08": "CLOSE_WAIT"}


def socket_inodes() -> dict[str, str]:
    found = {}
    with open("/proc/net/tcp", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            parts = line.split()
            local, remote = (int(part.split(":")[1], 16) for part in parts[1:3])
            found[parts[9]] = f"{local}>{remote} {STATES.get(parts[3], parts[3])}"
    return found
