"""What the workers of every row do: requests that only their own reply can answer, and a line in the tally for each.

The tally is a file that any process may add to, also one that will be killed, or that is not ours (a worker of uWSGI).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import mppool
from tests.helpers.server import ask

__all__ = ["Tally", "from_environment", "in_threads", "keep_using", "use"]

NAME = "matrix"
PATIENCE = 20.0  # seconds a checkout may wait: far more than any row takes, so a timeout means something is lost
_numbers = itertools.count()


class Tally:
    """What happened, one line each: ``ok``, ``failed`` (what no request should meet), ``crossed``, and ``note`` for whatever a row wants to know."""

    def __init__(self, path: str) -> None:
        self.path = path

    def add(self, kind: str, text: str = "") -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{kind}\t{text}".replace("\n", " ").encode() + b"\n")
        finally:
            os.close(fd)

    def lines(self, kind: str) -> list[str]:
        try:
            with open(self.path, encoding="utf-8") as file:
                return [line.rstrip("\n").partition("\t")[2] for line in file if line.startswith(f"{kind}\t")]
        except FileNotFoundError:
            return []


def use(pool: mppool.Pool, tally: Tally, who: str, times: int = 10, milliseconds: float = 0.0) -> bool:
    """So many requests. Were all answered, and answered right?"""
    fine = True
    for _ in range(times):
        nonce = f"{who}-{os.getpid()}-{next(_numbers)}"
        try:
            with pool.connection(timeout=PATIENCE) as sock:
                ask(sock, nonce, milliseconds)
        except AssertionError as error:
            tally.add("crossed", f"{nonce}: {error}")
            fine = False
        except Exception as error:
            tally.add("failed", f"{nonce}: {error!r}")
            fine = False
        else:
            tally.add("ok")
    return fine


def keep_using(pool: mppool.Pool, tally: Tally, who: str, stop: threading.Event, milliseconds: float = 0.0) -> None:
    while not stop.is_set():
        use(pool, tally, who, 1, milliseconds)


def in_threads(threads: int, work: Callable[..., object], *arguments: Any) -> None:
    """The same in so many threads of this process; all have ended then."""
    started = [threading.Thread(target=work, args=arguments) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def from_environment() -> tuple[mppool.Pool, Tally]:
    """The row's pool and tally, in a process that was not forked from the row's; see ``Scene.environment``."""
    pool = mppool.Pool(os.environ["MATRIX_TARGET"], max_size=int(os.environ["MATRIX_CAP"]), name=NAME, broker=os.environ["MPPOOL_BROKER"])
    return pool, Tally(os.environ["MATRIX_TALLY"])
