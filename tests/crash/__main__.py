"""All points of all operations; the last line is JSON."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import signal
import sys
import time
from types import FrameType

from tests.crash.brokers import BROKER_OPERATIONS
from tests.crash.operations import OPERATIONS
from tests.crash.scene import Scene
from tests.crash.series import BrokerSeries, Series, WorkerSeries
from tests.crash.tracing import KINDS


def end_at_once(_number: int, _frame: FrameType | None) -> None:
    """Leave nothing behind. (SystemExit would be swallowed where the signal meets a hook of a fork.)"""
    atexit._run_exitfuncs()
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="strike at every K-th line only, from a random one on")
    parser.add_argument("--operation", default="", metavar="NAME", help="only operations whose name contains this")
    parser.add_argument("--kind", choices=[*KINDS], action="append", help="default: kill and signal")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--opcodes", action="store_true", help="signals arrive before every bytecode, not only at every line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end_at_once)
    print(f"seed {options.seed}", flush=True)
    chance = random.Random(options.seed)
    kinds = options.kind or ["kill", "signal"]
    done: list[Series] = []

    def run(series: Series) -> Scene:
        began = time.monotonic()
        series.run()
        done.append(series)
        print(f"{series.name}: {series.points} points, {time.monotonic() - began:.1f} s, {len(series.losses)} lost", flush=True)
        return series.scene

    chosen = [operation for operation in OPERATIONS if options.operation in operation.name]
    for has_broker in (True, False):
        todo = [(operation, kind) for operation in chosen for kind in kinds if has_broker in operation.brokers]
        if todo:
            scene = Scene(has_broker)
            for operation, kind in todo:
                scene = run(WorkerSeries(operation, scene, options.every, chance, kind, options.opcodes and kind == "signal"))
            scene.end()
    of_broker = [operation for operation in BROKER_OPERATIONS if options.operation in operation.name and "kill" in kinds]
    if of_broker:
        scene = Scene(has_broker=True, traced=True)
        for wanted in of_broker:
            scene = run(BrokerSeries(wanted, scene, options.every, chance))
        scene.end()

    lost = sum(len(series.losses) for series in done)
    figures = {
        "kill_points": sum(series.points for series in done if series.kind == "kill"),
        "exception_points": sum(series.points for series in done if series.kind != "kill"),
        "lost": lost,
        "operations": len({series.operation.name for series in done}),
    }
    print(json.dumps(figures))
    return 1 if lost else 0


sys.exit(main())
