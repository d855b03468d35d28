"""Moving between processes, with a real pool."""

from __future__ import annotations

import gc
import os
import signal

from mppool.testing.kit import Kit
from mppool.testing.must import PATIENCE, must_be
from mppool.testing.processes import Process
from mppool.testing.promises.borrower import borrower, hold
from mppool.testing.promises.promise import promise
from mppool.testing.report import DoesNotApply, PromiseBroken


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
        fresh = kit.seen(session)
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
