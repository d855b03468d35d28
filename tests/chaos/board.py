"""What do all processes of the chaos share? Some 8-byte words: one writer each, read by anybody."""

from __future__ import annotations

import mmap
import os
import socket
import time
from typing import Any

from tests.helpers.processes import die_with_parent

__all__ = ["FULL", "PLACES", "SILENT", "SLOW", "THREADS", "Board", "Teller", "become"]

FULL, SLOW, SILENT = 0, 1, 2  # paces of the load

PLACES, THREADS = 24, 4

(
    PACE,
    CAP,  # the bystander, which resizes
    SHRUNK_AT,  # monotonic nanoseconds; until a while after, dials begun under the older cap may arrive
    OLDER_CAP,
    HIGHEST_CAP,  # of this round
    MOOD,  # of the upstream: of a thousand requests so many are answered by closing the connection
    RELAY_LIVE,
    RELAY_PEAK,
    RELAY_ACCEPTED,
    UPSTREAM_LIVE,
    UPSTREAM_PEAK,
    UPSTREAM_DIALS,
    UPSTREAM_REQUESTS,
) = range(13)
BUSY = 16  # one word for each thread of each place: in the middle of a request?


class Board:
    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, 4096)).cast("Q")

    def __getitem__(self, at: int) -> int:
        return int(self.words[at])

    def __setitem__(self, at: int, value: int) -> None:
        self.words[at] = value

    def busy(self, place: int, thread: int) -> int:
        """Where a thread says that it is in the middle of a request."""
        return BUSY + place * THREADS + thread

    def is_busy(self) -> bool:
        return any(self.words[BUSY : BUSY + PLACES * THREADS])

    def forget(self, place: int) -> None:
        """Whoever was at this place is dead."""
        for thread in range(THREADS):
            self.words[self.busy(place, thread)] = 0


class Teller:
    """The end of a datagram socket on which any process tells the host what happened to it, one Python literal a message."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def __call__(self, who: str, what: str, **more: Any) -> None:
        try:
            self.sock.send(repr({"at": time.monotonic(), "who": who, "what": what, **more}).encode())
        except OSError:
            os._exit(3)  # the host is gone


def become(*closing: socket.socket | int) -> None:
    """The first thing a forked actor does: it dies with the host, and holds open nothing of the host's that it should not."""
    die_with_parent()
    for one in closing:
        if isinstance(one, int):
            os.close(one)
        else:
            one.close()
