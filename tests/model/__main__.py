"""Explore everything, and every mutation: python -m tests.model [--long] [--path NAME]"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.model.code import load
from tests.model.explore import explore
from tests.model.mutations import LONG, MUTATIONS, SCENARIOS
from tests.model.steps import Violation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="also larger scenarios: millions of states, many minutes and gigabytes")
    parser.add_argument("--path", metavar="NAME", help="show the steps to the violation that this mutation leads to, and no more")
    options = parser.parse_args()
    if options.path:
        return show(options.path)
    states = violations = caught = 0
    for setting in [*SCENARIOS, *(LONG if options.long else [])]:
        began = time.monotonic()
        try:
            found = explore(setting.build(load()))
            states += found
            print(f"{setting}: {found:,} states, {time.monotonic() - began:.1f} s", flush=True)
        except Violation as violation:
            violations += 1
            print(f"{setting}: {violation}", *violation.path, sep="\n  ", flush=True)
    for mutation, setting in MUTATIONS:
        try:
            explore(setting.build(load(mutation)))
            print(f"NOT CAUGHT: {mutation.name}")
        except Violation as violation:
            caught += 1
            print(f"{mutation.name}: {violation}, after {len(violation.path)} steps", flush=True)
    print(json.dumps({"states": states, "violations": violations, "mutations": len(MUTATIONS), "mutations_caught": caught}))
    return 1 if violations or caught < len(MUTATIONS) else 0


def show(name: str) -> int:
    [(mutation, setting)] = [item for item in MUTATIONS if item[0].name == name]
    try:
        explore(setting.build(load(mutation)))
    except Violation as violation:
        print(*violation.path, f"{violation}", sep="\n")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
