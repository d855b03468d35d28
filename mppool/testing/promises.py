"""The promises: what the pool relies on, how each is tried, and what to look at if it is not kept.

Each check runs in a process of its own, raises PromiseBroken with what it saw, and may return a note for the report.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mppool.kernel import link
from mppool.states import Residence
from mppool.testing.kit import Kit, SilentPeer, open_descriptors
from mppool.testing.processes import Process
from mppool.testing.report import DoesNotApply, PromiseBroken

__all__ = ["PROMISES", "Promise"]

MAX_BAGGAGE = 64 * 1024
PATIENCE = 3.0  # seconds for things that should take no time


class Promise(NamedTuple):
    name: str
    says: str
    advice: str
    check: Callable[[Kit], str | None]
    pooled: bool  # it needs a broker


PROMISES: list[Promise] = []


def promise(says: str, advice: str, pooled: bool = False) -> Callable[[Callable[[Kit], str | None]], Callable[[Kit], str | None]]:
    def keep(check: Callable[[Kit], str | None]) -> Callable[[Kit], str | None]:
        PROMISES.append(Promise(check.__name__, says, advice, check, pooled))
        return check

    return keep


# What a driver says of itself.


@promise(
    "key() says which sessions are interchangeable: 'name/version ...', with no secrets in it",
    "begin it with f'{self.name}/{self.baggage_version}', then server, login and options that make a difference; of secrets at most a digest; 255 bytes",
)
def key(kit: Kit) -> None:
    said = kit.driver.key()
    if not isinstance(said, str) or not kit.driver.name:
        raise PromiseBroken(f"name is {kit.driver.name!r}, key() is {said!r}")
    prefix = f"{kit.driver.name}/{kit.driver.baggage_version}"
    if said != prefix and not said.startswith((f"{prefix} ", f"{prefix}/", f"{prefix}?", f"{prefix}:", f"{prefix};")):
        raise PromiseBroken(f"key() is {said!r}, which does not begin with {prefix!r}: pools of two versions of the baggage would share sessions")
    if said != kit.driver.key():
        raise PromiseBroken(f"key() is {said!r} at first, and {kit.driver.key()!r} then")
    if len(said.encode()) > 255:
        raise PromiseBroken(f"key() has {len(said.encode())} bytes; what is beyond 255 is not compared")
    for secret in kit.secrets:
        if secret in said:
            raise PromiseBroken("key() shows a secret; it stands in shared memory, in messages and in what `mppool status` prints")


@promise(
    "dial() opens a new session, whose fileno() is its socket, non-blocking and not inherited by programs that are started",
    "give back the descriptor that the driver reads from; settimeout() to a number, never None (a long one is as good); make the socket with socket.socket",
)
def dial(kit: Kit) -> None:
    with kit.dialed() as one, kit.dialed() as two:
        kit.must_not_block(one, "after dial()")
        if os.get_inheritable(kit.fd_of(one)):
            raise PromiseBroken("the descriptor is inherited by programs that this process starts")
        if kit.who(one) == kit.who(two):
            raise PromiseBroken(f"two dials, one identity: {kit.who(one)!r} (does identity() ask the server?)")
        kit.use(one, "first-1")
        kit.use(two, "second-2")


@promise(
    "dial() raises DialFailed (or another OSError) if there is no server",
    "turn what your client raises into DialFailed(message), with permanent=True where waiting will not help",
)
def dial_failed(kit: Kit) -> None:
    if kit.unreachable is None:
        raise DoesNotApply("no unreachable= driver was given")
    before = open_descriptors()
    try:
        kit.run(kit.unreachable.dial)
    except OSError:
        pass
    except Exception as error:
        raise PromiseBroken(f"dial() raised {type(error).__name__}: {error}") from error
    else:
        raise PromiseBroken("dial() succeeded where it should not have")
    must_be_open(before, "a dial that failed")


@promise(
    "residence() says Residence.moves, or why a session stays with its process",
    "return a Residence; sessions over TLS are Residence.tls, whatever cannot be attached elsewhere is Residence.no_adapter (the default)",
)
def residence(kit: Kit) -> str:
    with kit.dialed() as session:
        said = kit.driver.residence(session)
        if not isinstance(said, Residence):
            raise PromiseBroken(f"residence(session) is {said!r}")
        return "sessions move" if said is Residence.moves else f"sessions are resident: {said.name}"


# Making a session of a descriptor and its baggage.


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
        end_use(kit, session)
        for n in range(5):
            began = time.perf_counter()
            attached = kit.attach(given.fileno(), carried)
            took.append(time.perf_counter() - began)
            must_be(kit.fd_of(attached) != given.fileno(), "the session uses the pool's own descriptor, which the pool will close")
            must_be(kit.fd_of(attached) != kit.fd_of(session), "the session uses the other session's descriptor")
            must_be(os.path.sameopenfile(kit.fd_of(attached), given.fileno()), "fileno() of the session is another connection than the one it was given")
            kit.must_not_block(attached, "after attach()")
            settle(kit, attached)
            if kit.who(attached) != before:
                raise PromiseBroken(f"the server sees {kit.who(attached)!r} where it saw {before!r} before")
            kit.use(attached, f"attached-{n}")
            kit.must_not_block(attached, "after a round trip in an attached session")
            end_use(kit, attached)
            kit.abort(attached)
            must_be(is_open(given.fileno()), "abort() closed the descriptor that attach() was given")
            settle(kit, session)
            kit.use(session, f"dialed-{n}")
            end_use(kit, session)
        return f"attach takes {sorted(took)[len(took) // 2] * 1e6:.0f} us"


@promise(
    "attach() and is_clean() say nothing to the server, and wait for nothing",
    "attach() makes an object, no more: no login, no ping (transferred() may do round trips); is_clean() looks at what this process knows",
)
def attach_is_silent(kit: Kit) -> None:
    with silent(kit) as (peer, session):
        must_hear_nothing(peer, "attach()")
        kit.run(kit.driver.is_clean, session)
        must_hear_nothing(peer, "is_clean()")
        kit.abort(session)


@promise(
    "abort() lets go without a word: no goodbye, no shutdown(), also when the object is collected later; it never raises, not even when called twice",
    "take the socket out of the client object first, then close the descriptor (mppool.drivers.abandon does); mind the client's close() and __del__",
)
def abort_is_silent(kit: Kit) -> None:
    with silent(kit) as (peer, session):
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


# Using it and giving it back.


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
    with silent(kit) as (_, session):
        began = time.monotonic()
        must_not_raise("close()", kit.close, session)
        must_be(time.monotonic() - began < PATIENCE, f"close() took {time.monotonic() - began:.1f} s with a server that says nothing")


# Moving between processes, with a real pool.


@promise(
    "a session goes from process to process and stays the same: the server sees one, every answer is its own, nothing is left behind",
    "see `attach`; if the server sees another session, is_clean(), tidy() or transferred() refuse what they should not",
    pooled=True,
)
def moves(kit: Kit) -> str:
    with kit.dialed() as session:
        kit.must_move(session)
    with borrower(kit) as one, borrower(kit) as two:
        first = one("who")
        for n in range(kit.moves):
            for side in (two, one):
                found = side("who")
                must_be(found == first, f"after {n} moves the server sees {found!r} where it saw {first!r} at first: the session was closed, not moved")
                side("use", f"move-{n}-{side is one}")
                must_be(not side("blocking"), "the connection is in blocking mode after its return")
        for side in (one, two):
            grown = side("grown")
            must_be(not grown, f"{grown} more descriptors in a process after {kit.moves} moves than after the first")
    return f"{2 * kit.moves} moves, one session"


@promise(
    "what one process leaves in a session, the next does not meet: the session is reset or closed",
    "report it in is_clean() (then tidy() is called), or forget it in transferred() with minds_transfer = True; raise where that cannot be",
    pooled=True,
)
def dirt(kit: Kit) -> str:
    if not kit.dirty:
        raise DoesNotApply("no dirty= ways were given")
    with kit.dialed() as session:
        fresh = kit.run(kit.look, session) if kit.look is not None else None
    became = []
    for name in kit.dirty:
        with borrower(kit) as one, borrower(kit) as two:
            before = one("who")
            one("soil", name)
            try:
                found, seen = two("look")
                two("use", f"after-{name}")
            except PromiseBroken as error:
                raise PromiseBroken(f"after {name}, the next process meets it: {error}") from error
            must_be(seen == fresh, f"after {name}, look(session) in the next process is {seen!r}; in a new session it is {fresh!r}")
            became.append(f"{name} {'reset' if found == before else 'closed'}")
    return ", ".join(became)


@promise(
    "reset() brings a session back to how it was after dial(), or raises",
    "undo all that a user may have set; where the protocol has no way to, raise",
)
def reset(kit: Kit) -> str:
    if not kit.is_overridden("reset") or not kit.dirty:
        raise DoesNotApply("there is no reset()" if kit.dirty else "no dirty= ways were given")
    with kit.dialed() as session:
        fresh = kit.run(kit.look, session) if kit.look is not None else None
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
            seen = kit.run(kit.look, session) if kit.look is not None else None
            must_be(seen == fresh, f"after {name} and reset(), look(session) is {seen!r}; in a new session it is {fresh!r}")
            kit.use(session, f"after-reset-{name}")
            became.append(f"{name} undone")
    return ", ".join(became)


@promise(
    "a forked child says nothing on its parent's sessions, lent or idle, however it ends",
    "what the pool calls there is abort(); mind what the client itself does at its end: __del__, atexit, weakref.finalize",
    pooled=True,
)
def forked(kit: Kit) -> None:
    pool = kit.pool(max_size=2)
    lent, idle = kit.run(pool.getconn), kit.run(pool.getconn)
    before = kit.who(lent), kit.who(idle)
    kit.run(pool.putconn, idle)

    def child(_: Process) -> None:
        nonlocal lent, idle
        del lent, idle
        gc.collect()

    with Process(child) as process:
        process.hear(PATIENCE)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    kit.use(lent, "parent-1")
    again = kit.run(pool.getconn)
    kit.use(again, "parent-2")
    must_be((kit.who(lent), kit.who(again)) == before, "the parent's sessions are others after a child was forked and ended")
    kit.run(pool.putconn, lent)
    kit.run(pool.putconn, again)
    kit.run(pool.close)


@promise(
    "a process that is killed with a session lent loses nothing: its permit comes back",
    "fileno() must be the connection that the session uses, so that it can be ended from outside",
    pooled=True,
)
def killed(kit: Kit) -> None:
    with borrower(kit) as other:
        other("who")
        with Process(lambda process: hold(kit, process)) as holder:
            held = holder.hear(kit.timeout / 2)
            os.kill(holder.pid, signal.SIGKILL)
        other("use", "after-kill")
        must_be(other("who") != held, "the session of a process that was killed while it used it was lent on")


# Helpers.


def must_be(true: bool, else_seen: str) -> None:
    if not true:
        raise PromiseBroken(else_seen)


def must_not_raise(what: str, call: Callable[..., object], *args: Any) -> None:
    try:
        call(*args)
    except Exception as error:
        raise PromiseBroken(f"{what} raised {type(error).__name__}: {error}") from error


def must_hear_nothing(peer: SilentPeer, after: str) -> None:
    heard = peer.heard()
    if heard is not None:
        raise PromiseBroken(f"after {after} the server heard {heard}")


def must_be_open(before: set[int], after: str) -> None:
    left = open_descriptors() - before
    if left:
        raise PromiseBroken(f"{len(left)} descriptors are left open after {after}")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def pause() -> None:
    """Transports close their sockets in the loop's next round."""
    import asyncio

    await asyncio.sleep(0.05)


class silent:
    """A session attached to a server that never says a word; at the end it hears what it hears."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def __enter__(self) -> tuple[SilentPeer, Any]:
        with self.kit.dialed() as session:
            self.kit.must_move(session)
            carried = self.kit.driver.detach(session)
        self.peer = SilentPeer()
        return self.peer, self.kit.attach(self.peer.ours.fileno(), carried)

    def __exit__(self, *_: object) -> None:
        self.peer.__exit__()


def settle(kit: Kit, session: Any) -> None:
    """As the pool does before it lends what another process used."""
    kit.resume(session)
    if kit.driver.minds_transfer:
        kit.run(kit.driver.transferred, session)


def end_use(kit: Kit, session: Any) -> None:
    """As the pool does at a return; and reading stops."""
    if kit.driver.tidies_always or not kit.clean(session):
        kit.run(kit.driver.tidy, session)
    must_be(bool(kit.run(kit.driver.is_clean, session)), "is_clean(session) is false after a round trip and tidy()")


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
        seen = kit.run(kit.look, session) if kit.look is not None else None
        return kit.who(session), seen
    elif what == "soil":
        with contextlib.suppress(Exception):
            kit.run(kit.dirty[argument], session)
    return None
