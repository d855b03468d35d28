"""Making a session of a descriptor and its baggage."""

from __future__ import annotations

import contextlib
import gc
import os
import time

from mppool.states import Residence
from mppool.testing.kit import Kit
from mppool.testing.must import is_open, must_be, must_be_open, must_hear_nothing, must_not_raise, open_descriptors
from mppool.testing.peer import SilentPeer
from mppool.testing.promises.promise import promise
from mppool.testing.report import DoesNotApply, PromiseBroken

MAX_BAGGAGE = 64 * 1024


@promise(
    "detach() gives the baggage, at most 64 KiB of bytes, and leaves the session as it is",
    "return what describes the login, not the session's socket or its state; do not close or empty anything",
)
def baggage(kit: Kit) -> str:
    with kit.dialed() as session:
        kit.must_move(session)
        before = kit.who(session)
        first = kit.driver.detach(session)
        if not isinstance(first, bytes):
            raise PromiseBroken(f"detach(session) is {type(first).__name__}, not bytes")
        if len(first) > MAX_BAGGAGE:
            raise PromiseBroken(f"{len(first)} bytes of baggage")
        kit.use(session, "after-detach")
        if kit.who(session) != before:
            raise PromiseBroken("the session was another one after detach()")
        return f"{len(first)} bytes of baggage"


@promise(
    "attach() makes an equal session of a duplicate of the descriptor: same connection, no login, non-blocking; what it is given stays open",
    "duplicate fd (mppool.drivers.adopt does it), wrap the duplicate, set a timeout that is a number",
)
def attach(kit: Kit) -> str:
    with kit.dialed() as session, kit.socket_of(session) as given:
        kit.must_move(session)
        before, took = kit.who(session), []
        carried = kit.driver.detach(session)
        kit.end_use(session)
        for n in range(5):
            began = time.perf_counter()
            attached = kit.attach(given.fileno(), carried)
            took.append(time.perf_counter() - began)
            must_be(kit.fd_of(attached) != given.fileno(), "the session uses the pool's own descriptor, which the pool will close")
            must_be(kit.fd_of(attached) != kit.fd_of(session), "the session uses the other session's descriptor")
            must_be(os.path.sameopenfile(kit.fd_of(attached), given.fileno()), "fileno() of the session is another connection than the one it was given")
            kit.must_not_block(attached, "after attach()")
            kit.settle(attached)
            if kit.who(attached) != before:
                raise PromiseBroken(f"the server sees {kit.who(attached)!r} where it saw {before!r} before")
            kit.use(attached, f"attached-{n}")
            kit.must_not_block(attached, "after a round trip in an attached session")
            kit.end_use(attached)
            kit.abort(attached)
            must_be(is_open(given.fileno()), "abort() closed the descriptor that attach() was given")
            kit.settle(session)
            kit.use(session, f"dialed-{n}")
            kit.end_use(session)
        return f"attach takes {sorted(took)[len(took) // 2] * 1e6:.0f} us"


@promise(
    "attach() and is_clean() say nothing to the server, and wait for nothing",
    "attach() makes an object, no more: no login, no ping (transferred() may do round trips); is_clean() looks at what this process knows",
)
def attach_is_silent(kit: Kit) -> None:
    with kit.silent() as (peer, session):
        must_hear_nothing(peer, "attach()")
        kit.run(kit.driver.is_clean, session)
        must_hear_nothing(peer, "is_clean()")
        kit.abort(session)


@promise(
    "abort() lets go without a word: no goodbye, no shutdown(), also when the object is collected later; it never raises, not even when called twice",
    "take the socket out of the client object first, then close the descriptor (mppool.drivers.abandon does); mind the client's close() and __del__",
)
def abort_is_silent(kit: Kit) -> None:
    with kit.silent() as (peer, session):
        fd = kit.fd_of(session)
        must_not_raise("abort()", kit.abort, session)
        must_hear_nothing(peer, "abort()")
        must_be(not is_open(fd), "the session's descriptor is still open after abort()")
        must_not_raise("a second abort()", kit.abort, session)
        del session
        gc.collect()
        must_hear_nothing(peer, "collecting the session after abort()")


@promise(
    "attach() that cannot make sense of its baggage leaves nothing behind",
    "close the duplicate if anything after it fails; never the descriptor that was given",
)
def attach_fails_cleanly(kit: Kit) -> None:
    with kit.dialed() as session, SilentPeer() as peer:
        kit.must_move(session)
        carried = kit.driver.detach(session)
        if not carried:
            raise DoesNotApply("there is no baggage")
        for wrong in (b"", b"\xff" * 16, carried[: len(carried) // 2]):
            before = open_descriptors()
            attached = None
            with contextlib.suppress(Exception):
                attached = kit.attach(peer.ours.fileno(), wrong)
            must_be(is_open(peer.ours.fileno()), "attach() closed the descriptor that it was given")
            if attached is not None:
                kit.abort(attached)
            attached = None
            must_be_open(before, f"an attach() with {len(wrong)} bytes of nonsense as baggage")


@promise(
    "no descriptor is left behind, however often sessions are dialed, attached, closed and let go",
    "each session owns one descriptor, or as many as it closes again; makefile() and duplicates count",
)
def descriptors(kit: Kit) -> None:
    with kit.dialed() as session, kit.socket_of(session) as given:
        moves = kit.driver.residence(session) is Residence.moves
        carried = kit.driver.detach(session) if moves else b""
        kit.close(kit.dial())  # whatever is made once is made now
        if moves:
            kit.abort(kit.attach(given.fileno(), carried))
        before = open_descriptors()
        for _ in range(5):
            kit.close(kit.dial())
        must_be_open(before, "5 x dial() and close()")
        for _ in range(20 if moves else 0):
            kit.abort(kit.attach(given.fileno(), carried))
        must_be_open(before, "20 x attach() and abort()")
