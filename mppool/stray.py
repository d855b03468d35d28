"""What an exception from a signal handler leaves behind where no ``try`` can be.

Such an exception can fall between any two bytecodes: between the call that takes a lane out of a list and the assignment that
keeps it, before a handler's first line, into the end of a ``with``. So a process counts, after it was interrupted and before
it waits: a lane that no list, lease or story has, while nothing is in the middle of moving one, is stray, and is settled.
"""

from __future__ import annotations

import sys
from types import FrameType

from mppool.claims import Lane
from mppool.worker import Worker

__all__ = ["let_go", "settle_strays"]

PACKAGE = __name__.partition(".")[0]
OUTSIDE = ("mppool.kernel.link", "mppool.drivers", "mppool.integrations")  # called from anywhere, or calling a client that calls us again


def settle_strays(worker: Worker) -> None:
    """Nothing to do where other threads run Python: what they are just moving cannot be told from what is lost. (Handlers run in the main thread.)"""
    if counted(worker) < worker.table.lanes and is_alone():
        strays = unaccounted(worker)
        if is_alone():
            for lane in strays:
                worker.settle(lane)


def counted(worker: Worker) -> int:
    """How many lanes are where they belong? One that is in two places just now may hide a stray until the next."""
    return worker.resting() + sum(sum(map(hands.holds, hands.taken)) for hands in worker.told() if hands.taken)


def unaccounted(worker: Worker) -> list[Lane]:
    known = {*worker.lanes, *worker.unfinished, *worker.limbo}
    known.update(lane for _, lane in [*worker.idle, *worker.leases.values(), *worker.abandoned])
    for hands in worker.told():
        known.update(filter(hands.holds, hands.taken))
    return [lane for lane in worker.all_lanes if lane not in known]


def is_alone() -> bool:
    """Is this the only thread, and in a call that did not come out of a handler that interrupted another one of ours halfway?"""
    frames = sys._current_frames()
    if len(frames) > 1:
        return False
    [frame] = frames.values()
    below: FrameType | None = frame
    while below is not None and is_ours(below):
        below = below.f_back
    while below is not None and (not is_ours(below) or str(below.f_globals["__name__"]).startswith(OUTSIDE)):
        below = below.f_back
    # A story that waits for the outside world has all that it took in its hands.
    return below is None or (below.f_globals["__name__"] in ("mppool.pool", "mppool.aio") and below.f_code.co_name in ("do", "receive", "ended"))


def is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == PACKAGE


def let_go(error: BaseException | None) -> None:
    """Whatever an exception's frames from this package on still hold is gone: a connection that was being made, a section of the dial lock."""
    while error is not None:
        trace, ours = error.__traceback__, False
        while trace is not None:
            ours = ours or is_ours(trace.tb_frame)
            if ours:
                try:
                    trace.tb_frame.clear()
                except RuntimeError:
                    pass  # still at work: our caller
            trace = trace.tb_next
        error = error.__context__
