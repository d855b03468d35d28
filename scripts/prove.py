"""Runs the harnesses that try to break mppool, and writes what they found into the README.

    scripts/prove                                       all, with half an hour of chaos: about an hour in all
    scripts/prove --chaos-minutes 5 --crash-every 40    all, in about twenty minutes
    scripts/prove --crash-every 1                       at every line: many hours
    scripts/prove model crash                           some; the other rows stay as they were
    scripts/prove --table                               only write the table, from the figures of the last runs

Each harness is a module that can be run by itself, says what it does, and ends with its figures as a line of JSON. The
figures of the last run of each are in scripts/prove.json. Exit code 1 if any found a fault; then its row says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "scripts" / "prove.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- scripts/prove writes what follows -->", "<!-- as far as here -->"

Figures = dict[str, Any]


class Part(NamedTuple):
    command: tuple[str, ...]
    rows: Callable[[Figures], list[tuple[str, str, str]]]
    """What was tried, how much of it, what came of it."""


def model(found: Figures) -> list[tuple[str, str, str]]:
    return [
        ("Every order of steps, deaths and interruptions, explored with the real code", f"{found['states']:,} states", f"{found['violations']} violations"),
        ("Defects put into that code on purpose", f"{found['mutations']}", f"{found['mutations_caught']} caught"),
    ]


def crash(found: Figures) -> list[tuple[str, str, str]]:
    return [
        (
            f"SIGKILL, or a handler's exception, at every {found['every']}th line (others in each run) of {found['operations']} operations",
            f"{found['kill_points']:,} kills, {found['exception_points']:,} exceptions",
            f"{found['lost']} lost anything",
        )
    ]


def chaos(found: Figures) -> list[tuple[str, str, str]]:
    trouble = ", ".join(f"{found[what]:,} {what}" for what in ("kills", "stops", "resets", "closes", "refusals", "resizes", "forks"))
    return [
        (
            f"Chaos, {found['seconds'] / 60:.0f} minutes: {trouble}",
            f"{found['requests']:,} requests",
            f"{found['crossed']} crossed, {found['peak_over_cap']} over the cap, {found['lost']} permits lost",
        )
    ]


def fuzz(found: Figures) -> list[tuple[str, str, str]]:
    return [
        (
            "Garbage and wrong conversations on the broker's socket",
            f"{found['frames']:,} frames",
            f"{found['broker_deaths']} deaths, {found['fds_leaked']} descriptors leaked, {found['bystander_failures']} requests of others failed",
        ),
        ("Shared tables damaged under running pools", f"{found['tables']:,} tables", f"{found['tables_shared_twice']} sessions shared"),
    ]


def matrix(found: Figures) -> list[tuple[str, str, str]]:
    return [("fork, spawn, forkserver, multiprocessing, gunicorn, uWSGI, Celery, gevent", f"{found['rows']} combinations", f"{found['rows_ok']} hold")]


def replace(found: Figures) -> list[tuple[str, str, str]]:
    return [
        (
            "Broker replaced under load (`mppool broker --replace`), some killed meanwhile",
            f"{found['replacements']} times, {found['requests']:,} requests",
            f"{found['sessions_lost']} sessions lost, {found['failed_requests']} requests failed",
        )
    ]


def recovery(found: Figures) -> list[tuple[str, str, str]]:
    return [
        (
            f"SIGKILL of a worker that held everything, until another has leased the whole cap, {where} a broker",
            f"{found['rounds']} times",
            f"p50 {found[f'{where}_broker_p50_ms']:.1f} ms, p99 {found[f'{where}_broker_p99_ms']:.1f} ms",
        )
        for where in ("with", "without")
    ]


PARTS = {
    "model": Part(("-m", "tests.model"), model),
    "crash": Part(("-m", "tests.crash", "--every", "{crash_every}"), crash),
    "chaos": Part(("-m", "tests.chaos", "--minutes", "{chaos_minutes}"), chaos),
    "fuzz": Part(("-m", "tests.fuzz", "--frames", "{fuzz_frames}"), fuzz),
    "matrix": Part(("-m", "tests.matrix"), matrix),
    "replace": Part(("-m", "tests.replace"), replace),
    "recovery": Part(("-m", "tests.recovery"), recovery),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--chaos-minutes", type=float, default=30.0)
    parser.add_argument("--crash-every", type=int, default=25, help="1 takes many hours")
    parser.add_argument("--fuzz-frames", type=int, default=1_000_000, help="conversations and tables in proportion")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    faults = []
    for name in () if options.table else options.parts or PARTS:
        began = time.monotonic()
        found, code = run([word.format(**vars(options)) for word in PARTS[name].command])
        print(f"{name}: {'fault' if code else 'no fault'}, {time.monotonic() - began:.0f} s", flush=True)
        if code:
            faults.append(name)
        if found:
            figures[name] = {**found, "every": options.crash_every, "fault": bool(code), "date": time.strftime("%Y-%m-%d")}
            FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    table = render(figures)
    print(table)
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    return 1 if faults else 0


def run(command: list[str]) -> tuple[Figures, int]:
    """Run one harness, show what it says, and take its last line for its figures."""
    last = ""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            print("   ", line, end="", flush=True)
    try:
        found = json.loads(last)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}, process.returncode


def render(figures: dict[str, Figures]) -> str:
    lines = ["| Tried | How much | What came of it |", "|---|---|---|"]
    for name, part in PARTS.items():
        if name in figures:
            fault = " (a fault was found)" if figures[name].get("fault") else ""
            lines += [f"| {what} | {much} | {result}{fault} |" for what, much, result in part.rows(figures[name])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
