"""The long run: ``python -m tests.fuzz [--frames N] [--seed S] [--minutes M]``. Exit code 1 if anything went wrong."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tests.fuzz.bulk import Bulk
from tests.fuzz.conversation import MOVES, Conversation
from tests.fuzz.damage import any_damage
from tests.fuzz.frames import Zoo
from tests.fuzz.hostile import LIES, expose
from tests.fuzz.keepers import Pest
from tests.fuzz.rig import Rig, rig
from tests.fuzz.tables import MOMENTS, bench
from tests.helpers.server import judge

FRAMES_A_CONVERSATION = 2500  # of the bulk: so many conversations, calls at the keeper's and damaged tables there are
FRAMES_A_CALL = 5000
FRAMES_A_TABLE = 5000
STEPS = 80
SHARED = ("a shared socket", "a crossed reply", "somebody else may have it")


@dataclass
class Figures:
    frames: int = 0
    conversations: int = 0
    keeper_calls: int = 0
    broker_deaths: int = 0
    fds_leaked: int = 0
    bystander_requests: int = 0
    bystander_failures: int = 0
    slowest_request_ms: int = 0
    liars: int = 0
    wrongly_believed: int = 0
    tables: int = 0
    tables_shared_twice: int = 0
    tables_over_cap: int = 0
    faults: int = 0


class Run:
    def __init__(self, seed: int, frames: int, minutes: float) -> None:
        self.random = random.Random(seed)
        self.goal = frames
        self.until = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.figures = Figures()
        self.began = time.monotonic()

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {words}", flush=True)

    def guarded(self, what: str, act: Callable[[], None]) -> None:
        """A fault is said and counted; the next thing is tried all the same."""
        try:
            act()
        except Exception:
            self.figures.faults += 1
            self.say(f"FAULT in {what}:\n{traceback.format_exc()}")

    def over(self) -> bool:
        return time.monotonic() > self.until

    def all(self) -> None:
        self.guarded("the broker's wire", lambda: in_directory(self.wire))
        self.guarded("a broker that lies", lambda: in_directory(self.liars))
        self.guarded("scribbled tables", lambda: in_directory(self.tables))

    # The broker's wire.

    def wire(self, path: str) -> None:
        with rig(path) as it:
            try:
                self.bulk(it)
                self.conversations(it)
                self.keeper(it)
            finally:
                it.end_bystanders()
                figures = self.figures
                figures.broker_deaths += it.deaths()
                figures.bystander_requests += it.requests
                figures.bystander_failures += it.failures
                figures.slowest_request_ms = int(1000 * it.slowest)
                if not it.deaths():
                    figures.fds_leaked = it.leaked()

    def bulk(self, it: Rig) -> None:
        bulk = Bulk(it, self.random.getrandbits(32))
        began, told = time.monotonic(), 0.0

        def progress() -> None:
            nonlocal told
            if time.monotonic() - told > 5:
                told = time.monotonic()
                self.say(f"{bulk.frames} frames, {bulk.frames / (told - began):.0f}/s, {bulk.opened} links; {others(it)}")

        try:
            while bulk.frames < self.goal and not self.over():
                bulk.run(min(20_000, self.goal - bulk.frames), progress)
        finally:
            self.figures.frames += bulk.frames
            bulk.close()
        it.check_rest()
        self.say(f"{bulk.frames} frames, {bulk.frames / (time.monotonic() - began):.0f}/s")

    def conversations(self, it: Rig) -> None:
        zoo = Zoo()
        for _ in range(self.goal // FRAMES_A_CONVERSATION):
            if self.over():
                break
            conversation = Conversation(it, zoo, self.random.getrandbits(32))
            for _ in range(STEPS):
                conversation.move(self.random.choice(MOVES))
            conversation.finish()
            self.figures.conversations += 1
            self.figures.frames += conversation.frames
        zoo.close()
        self.say(f"{self.figures.conversations} conversations")

    def keeper(self, it: Rig) -> None:
        zoo = Zoo()
        pest = Pest(it, zoo, self.random.getrandbits(32))
        for n in range(self.goal // FRAMES_A_CALL):
            if self.over():
                break
            pest.call()
            it.check()
            if n % 50 == 49:
                pest.kill_keeper()
            self.figures.keeper_calls += 1
        self.figures.frames += pest.frames
        pest.finish()
        zoo.close()
        self.say(f"{self.figures.keeper_calls} calls at the keeper's; {others(it)}")

    # The worker's side.

    def liars(self, path: str) -> None:
        for lies in (*[(lie,) for lie in LIES], LIES):
            if self.over():
                break
            with judge() as server, judge() as trap:
                found = expose(path, server, trap, self.random.getrandbits(32), lies, 3.0)
                for each in found:
                    self.figures.liars += 1
                    self.figures.fds_leaked += len(each["left"])
                    for wrong in each["wrong"]:
                        self.figures.faults += 1
                        self.say(f"FAULT with a broker that lies ({', '.join(lies)}):\n{wrong}")
                self.figures.wrongly_believed += trap.counts()["requests"]
                over = server.counts()["peak"] > 3
                self.figures.faults += over
                outcomes = " and ".join(str(each["outcomes"]) for each in found)
                self.say(f"a broker that lies ({', '.join(lies)}): {outcomes}{', MORE CONNECTIONS THAN THE CAP' if over else ''}")

    # Tables.

    def tables(self, path: str) -> None:
        while self.figures.tables < self.goal // FRAMES_A_TABLE and not self.over():
            self.guarded("scribbled tables", lambda: self.some_tables(path))

    def some_tables(self, path: str) -> None:
        """With one broker: until it is hurt, or has had enough of them."""
        figures = self.figures
        with bench(path) as it:
            try:
                while figures.tables < self.goal // FRAMES_A_TABLE and it.rounds < 50 and not self.over():
                    damages, moment, with_broker = any_damage(self.random), self.random.choice(MOMENTS), self.random.random() < 0.6
                    figures.tables += 1
                    try:
                        it.round(damages, moment, with_broker)
                    except AssertionError as error:
                        figures.tables_shared_twice += any(words in str(error) for words in SHARED)
                        raise AssertionError(f"{damages}, {moment!r}, with_broker={with_broker}: {error}") from error
            finally:
                figures.broker_deaths += it.broker.process.poll() is not None
                figures.bystander_requests += it.innocent.requests
                figures.bystander_failures += it.innocent.failures
                figures.tables_over_cap += it.over_cap
                self.say(f"{figures.tables} tables, {figures.tables_over_cap} over the cap; {dict(it.outcomes)}")


def others(it: Rig) -> str:
    return f"bystanders: {it.requests} requests, {it.failures} failures, slowest {it.slowest:.3f} s"


def in_directory(act: Callable[[str], None]) -> None:
    directory = tempfile.mkdtemp(prefix="mppool-fuzz-")
    try:
        act(f"{directory}/b.sock")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long, whatever is done by then")
    options = parser.parse_args()
    logging.disable()
    print(f"seed {options.seed}", flush=True)
    run = Run(options.seed, options.frames, options.minutes)
    run.all()
    figures = run.figures
    wrong = figures.faults + figures.broker_deaths + figures.fds_leaked + figures.bystander_failures + figures.tables_shared_twice + figures.wrongly_believed
    print(json.dumps(asdict(figures)), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
