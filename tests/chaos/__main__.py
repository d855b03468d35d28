"""Kill, stop, close, reset, refuse, delay, resize, fork, for so long; exit code 1 if anything was found. The last line is JSON."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time

from tests.chaos.actions import rounds
from tests.chaos.host import Host
from tests.chaos.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0, help="default: 60")
    parser.add_argument("--seed", default="", help="repeats the actions of another run")
    parser.add_argument("--no-broker", action="store_true")
    parser.add_argument("--round-seconds", type=float, default=3.0, help="of trouble, between two reckonings")
    parser.add_argument("--without", action="append", default=[], metavar="KIND", help="leave out actions of this kind, as: reopen")
    parser.add_argument("--mood", default="", help="only rounds of this mood")
    options = parser.parse_args()
    seed = options.seed or str(random.SystemRandom().randrange(10**9))
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all is cleared away
    report = Report()
    host = Host(seed, report, with_broker=not options.no_broker)
    until = time.monotonic() + (options.minutes * 60 + options.seconds or 60)
    try:
        host.start()
        for one in rounds(seed, options.round_seconds, not options.no_broker, options.without):
            if options.mood and one.mood != options.mood:
                continue
            if time.monotonic() > until or report.findings:
                break
            began = report.done.total()
            host.run(one)
            report.say(f"round {one.number}: {one.mood}: {report.done.total() - began} things done; {host.quiet}")
        if not report.findings:
            host.end()
        report.print_table()
        if report.findings:
            host.explain()
    finally:
        host.destroy()
    report.print_json()
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
