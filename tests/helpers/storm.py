"""Workers that come and go: always so many, some of them SIGKILLed all the time, whatever client they use."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.helpers.processes import PATIENCE, Child

__all__ = ["Peak", "Storm"]

Ask = Callable[[str], None]  # one request with a nonce that the reply must carry; raises whatever a user would see


class Storm:
    """``workers`` forked processes; each calls ``begin()`` once, which returns what does one request, and asks without end.

    An AssertionError in a request, and any other exception that ``allowed`` does not name, is a failure.
    """

    def __init__(self, begin: Callable[[], Ask], workers: int = 12, allowed: tuple[type[BaseException], ...] = ()) -> None:
        self.begin = begin
        self.workers = workers
        self.allowed = allowed
        self.born = self.kills = 0
        self.asked: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.children: list[tuple[int, Child]] = []
        self.failures: list[str] = []

    def fill(self) -> None:
        while len(self.children) < self.workers:
            self.born += 1
            self.children.append((self.born, Child(self._work(self.born))))

    def _work(self, number: int) -> Callable[[Child], None]:
        def work(child: Child) -> None:
            ask, n, errors = self.begin(), 0, Counter[str]()
            told = time.monotonic()
            while True:
                n += 1
                try:
                    ask(f"w{number}-{n}")
                except self.allowed as error:
                    errors[type(error).__name__] += 1
                if time.monotonic() - told > 0.1:
                    told = time.monotonic()
                    child.tell([n, errors])

        return work

    def kill_one(self) -> None:
        """SIGKILL a worker, wherever it is."""
        number, child = self.children[random.randrange(len(self.children))]
        if not self.may_kill(child):
            return
        self.children.remove((number, child))
        self.listen(number, child)
        child.kill()
        child.wait()
        self.kills += 1

    def may_kill(self, child: Child) -> bool:
        """Asked before each kill, by those who want it judged or spared."""
        return True

    def listen(self, number: int, child: Child) -> None:
        try:
            while True:
                n, errors = child.hear(timeout=0)
                self.errors.update(errors)
                self.asked[number] = n
        except TimeoutError:
            return
        except (AssertionError, EOFError) as error:
            self.failures.append(str(error))

    def run(self, seconds: float, kill_every: float | None = 0.1) -> None:
        """For so long; ``kill_every`` seconds (at random around it) one is killed, and another comes.

        If few requests were made by then, on a slow machine, those who are alive go on until there are more than a hundred.
        """
        until = time.monotonic() + seconds
        self.fill()
        while time.monotonic() < until:
            time.sleep(random.uniform(0.5, 1.5) * (kill_every or 0.05))
            if kill_every is not None:
                self.kill_one()
            for number, child in list(self.children):
                self.listen(number, child)
            self.fill()
        until = time.monotonic() + PATIENCE
        while self.requests <= 100 and not self.failures and time.monotonic() < until:
            time.sleep(0.05)
            for number, child in self.children:
                self.listen(number, child)

    def end(self) -> None:
        for number, child in self.children:
            self.listen(number, child)
            child.end()
        self.children.clear()

    @property
    def requests(self) -> int:
        return sum(self.asked.values())

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()


class Peak:
    """A thread that asks the server again and again how many connections it has. ``with Peak(count) as peak: ...; peak.most``."""

    def __init__(self, count: Callable[[], int], every: float = 0.005) -> None:
        self.count = count
        self.every = every
        self.most = self.samples = 0
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self.most = max(self.most, self.count())
                self.samples += 1
            except Exception as error:
                self.failure = error
                return
            self._stop.wait(self.every)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        assert self.failure is None, f"the server could not be asked: {self.failure!r}"
