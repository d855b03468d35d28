"""Using a session, giving it back, ending it."""

from __future__ import annotations

import contextlib
import socket
import time

from mppool.kernel import link
from mppool.states import Residence
from mppool.testing.kit import Kit
from mppool.testing.must import PATIENCE, is_open, must_be, must_not_raise
from mppool.testing.promises.promise import promise
from mppool.testing.report import DoesNotApply, PromiseBroken


@promise(
    "a session that was used as usual may be lent again: is_clean() says so, or does after tidy()",
    "is_clean() must be true of a session between two requests; else every return closes a connection",
)
def clean_after_use(kit: Kit) -> str:
    with kit.dialed() as session:
        must_be(kit.clean(session), "is_clean(session) is false right after dial()")
        kit.use(session, "used")
        if kit.clean(session):
            return "is clean after use without a round trip" if not kit.driver.tidies_always else "is tidied at every return"
        kit.run(kit.driver.tidy, session)
        must_be(kit.clean(session), "is_clean(session) is false after a round trip and tidy()")
        return "is tidied after use, with a round trip"


@promise(
    "ping() raises if the connection is gone, close() and abort() never do",
    "let what ping() meets pass; in close() and abort() suppress it",
)
def dead_connection(kit: Kit) -> None:
    for last in ("close", "abort"):
        session = kit.dial()
        with kit.socket_of(session) as ours:
            ours.shutdown(socket.SHUT_RDWR)
            if kit.is_overridden("ping"):
                try:
                    kit.run(kit.driver.ping, session)
                except Exception:
                    pass
                else:
                    raise PromiseBroken("ping(session) returned, on a connection that had ended")
            must_not_raise("is_clean() of a session that had ended", kit.clean, session)
            must_not_raise(f"{last}() of a session that had ended", getattr(kit, last), session)


@promise(
    "close() ends the session, soon and quietly, whatever the server does",
    "say goodbye if the protocol has one, do not wait for the answer (or not for long), close the descriptor, suppress errors",
)
def close(kit: Kit) -> None:
    session = kit.dial()
    with kit.socket_of(session) as ours:
        fd = kit.fd_of(session)
        must_not_raise("close()", kit.close, session)
        if kit.is_async:
            kit.run(pause)
        must_be(not is_open(fd), "the session's descriptor is still open after close()")
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)  # as the pool does then
        until = time.monotonic() + PATIENCE
        while not link.has_ended(ours):
            must_be(time.monotonic() < until, "the server has not ended the connection after close()")
            link.wait_readable(ours.fileno(), 0.1)
    with kit.dialed() as session:
        if kit.driver.residence(session) is not Residence.moves:
            return
    with kit.silent() as (_, session):
        began = time.monotonic()
        must_not_raise("close()", kit.close, session)
        must_be(time.monotonic() - began < PATIENCE, f"close() took {time.monotonic() - began:.1f} s with a server that says nothing")


@promise(
    "reset() brings a session back to how it was after dial(), or raises",
    "undo all that a user may have set; where the protocol has no way to, raise",
)
def reset(kit: Kit) -> str:
    if not kit.is_overridden("reset") or not kit.dirty:
        raise DoesNotApply("there is no reset()" if kit.dirty else "no dirty= ways were given")
    with kit.dialed() as session:
        fresh = kit.seen(session)
    became = []
    for name, leave in kit.dirty.items():
        with kit.dialed() as session:
            with contextlib.suppress(Exception):
                kit.run(leave, session)
            try:
                if not kit.clean(session):
                    kit.run(kit.driver.tidy, session)
                if kit.is_readable(session):
                    raise PromiseBroken  # for the pool, which looks before it lends
                kit.run(kit.driver.reset, session)
            except Exception:
                became.append(f"{name} refused")
                continue
            seen = kit.seen(session)
            must_be(seen == fresh, f"after {name} and reset(), look(session) is {seen!r}; in a new session it is {fresh!r}")
            kit.use(session, f"after-reset-{name}")
            became.append(f"{name} undone")
    return ", ".join(became)


async def pause() -> None:
    """Transports close their sockets in the loop's next round."""
    import asyncio

    await asyncio.sleep(0.05)
