"""All points of all operations; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from tests.crash.operations import OPERATIONS
from tests.crash.scene import Scene
from tests.crash.series import Series
from tests.crash.tracing import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="strike at every K-th line only, from a random one on")
    parser.add_argument("--operation", default="", metavar="NAME", help="only operations whose name contains this")
    parser.add_argument(
        "--kind", choices=[*KINDS], action="append", help="kill, signal (a handler that raises), throw (at that very line); default: kill and signal"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--opcodes", action="store_true", help="throw before every bytecode, not only at every line")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    chance = random.Random(options.seed)
    killed = thrown = lost = 0
    operations = [operation for operation in OPERATIONS if options.operation in operation.name]
    for has_broker in (True, False):
        scene = Scene(has_broker)
        try:
            for operation in operations:
                for kind in options.kind or ("kill", "signal"):
                    if has_broker in operation.brokers:
                        series = Series(operation, kind, scene, options.every, options.opcodes and kind != "kill", chance)
                        began = time.monotonic()
                        series.run()
                        scene = series.scene
                        killed += series.points if kind == "kill" else 0
                        thrown += series.points if kind != "kill" else 0
                        lost += len(series.losses)
                        seconds = time.monotonic() - began
                        print(f"{series.name}: {series.points} points, {seconds:.1f} s, {len(series.losses)} lost", flush=True)
        finally:
            scene.end()
    print(json.dumps({"kill_points": killed, "exception_points": thrown, "lost": lost, "operations": len(operations)}))
    return 1 if lost else 0


sys.exit(main())
