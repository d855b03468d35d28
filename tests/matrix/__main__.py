"""``python -m tests.matrix``: all rows, a table, and as its last line one JSON object of figures."""

from __future__ import annotations

import argparse
import json
import sys

from tests.matrix.scene import Result, rows, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Run the fork and server matrix.")
    parser.add_argument("--row", action="append", metavar="NAME", help="only rows whose name contains this; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each phase of load lasts in rows that have phases (1)")
    parser.add_argument("--times", type=int, default=1, help="run every row so many times (1)")
    options = parser.parse_args()
    chosen = [it for it in rows().values() if not options.row or any(part in it.name for part in options.row)]
    if not chosen:
        parser.error(f"no row is called so; there are: {', '.join(rows())}")
    width = max(len(it.name) for it in chosen)
    print(f"{'row':{width}} | workers | cap | requests | peak | dials | failed | crossed | verdict", flush=True)
    results = []
    for _ in range(options.times):
        for it in chosen:
            results.append(run(it, options.seconds))
            show(results[-1], width)
    fine = [it for it in results if not it.faults and not it.skipped]
    figures = {"rows": len(results), "rows_ok": len(fine), "rows_skipped": sum(bool(it.skipped) for it in results)}
    figures |= {"requests": sum(it.requests for it in results), "failed": sum(it.failed for it in results), "crossed": sum(it.crossed for it in results)}
    print(json.dumps(figures))
    return 1 if any(it.faults for it in results) else 0


def show(it: Result, width: int) -> None:
    numbers = f"{it.workers:7} | {it.cap:3} | {it.requests:8} | {it.peak:4} | {it.dials:5} | {it.failed:6} | {it.crossed:7}"
    print(f"{it.row:{width}} | {numbers} | {it.verdict} ({it.seconds} s{''.join('; ' + note for note in it.notes[:5])})", flush=True)
    for fault in it.faults:
        print("    " + fault.replace("\n", "\n    "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
