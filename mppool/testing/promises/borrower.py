"""Other processes with the pool, which borrow its sessions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from mppool.testing.kit import Kit
from mppool.testing.must import open_descriptors
from mppool.testing.processes import Process

__all__ = ["borrower", "hold"]


def hold(kit: Kit, process: Process) -> None:
    pool = kit.pool()
    session = kit.run(pool.getconn)
    process.say(kit.who(session))
    time.sleep(kit.timeout)


class borrower:
    """Another process with the pool, which borrows the one session for whatever it is told to do, and tells what came out."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def __enter__(self) -> Callable[..., Any]:
        self.process = Process(lambda process: serve(self.kit, process))
        return self.order

    def order(self, what: str, argument: str = "") -> Any:
        self.process.say((what, argument))
        return self.process.hear(self.kit.timeout)

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.order("end")
        finally:
            self.process.kill()


def serve(kit: Kit, process: Process) -> None:
    pool = kit.pool()
    fds = 0
    while True:
        what, argument = process.hear(kit.timeout)
        if what == "end":
            kit.run(pool.close)
            return
        if what == "grown":
            process.say(len(open_descriptors()) - fds)
            continue
        session = kit.run(pool.getconn)
        answer: Any = None
        try:
            answer = act(kit, session, what, argument)
        finally:
            kit.run(pool.putconn, session)
        if what == "blocking":
            answer = os.get_blocking(kit.fd_of(session))
        fds = fds or len(open_descriptors())
        process.say(answer)


def act(kit: Kit, session: Any, what: str, argument: str) -> Any:
    if what == "who":
        return kit.who(session)
    if what == "use":
        kit.use(session, argument)
    elif what == "look":
        seen = kit.seen(session)
        return kit.who(session), seen
    elif what == "soil":
        with contextlib.suppress(Exception):
            kit.run(kit.dirty[argument], session)
    return None
