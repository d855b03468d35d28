"""Lanes that an exception from a signal handler left lying between two hands.

A handler's exception can fall between any two bytecodes: between the call that takes a lane out of a list and the
assignment that keeps it, before a handler's first line. No ``try`` covers that. So, where a process is about to wait, it
counts: a lane that no list, lease or story has, while no thread is in the middle of anything, is stray, and is settled.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

from mppool.claims import Lane
from mppool.worker import Worker

__all__ = ["let_go", "settle_strays"]

PACKAGE = __name__.partition(".")[0]
AT_REST = ("mppool.kernel.link", "mppool.drivers")  # threads in these have all they took in their story's hands


def settle_strays(worker: Worker) -> None:
    """With other threads about, only what was found twice, unchanged, by two calls."""
    strays = {lane: (worker.words[lane.at], lane.owner) for lane in unaccounted(worker)}
    if strays and anybody_in_between():
        strays.clear()
    before, worker.strays = worker.strays, strays
    for lane, found in strays.items():
        if before.get(lane) == found or threading.active_count() == 1:
            worker.settle(lane)


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


def is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == PACKAGE


def unaccounted(worker: Worker) -> list[Lane]:
    known = {*worker.lanes, *worker.unfinished, *worker.limbo}
    known.update(lane for _, lane in [*worker.idle, *worker.leases.values()])
    known.update(lane for _, lane in list(worker.abandoned))
    for hands in list(worker.stories):
        known.update(filter(hands.holds, hands.taken))
    return [lane for lane in worker.all_lanes if lane not in known]


def anybody_in_between() -> bool:
    """Is any thread, or what a signal handler interrupted below us, inside this package, and not waiting for the outside world?"""
    mine = threading.get_ident()
    return any(is_in_between(below_us(frame) if ident == mine else frame) for ident, frame in sys._current_frames().items())


def is_in_between(frame: FrameType | None) -> bool:
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if is_ours(frame):
            return not (module.startswith(AT_REST) or (module == "mppool.pool" and frame.f_code.co_name == "do"))
        frame = frame.f_back
    return False


def below_us(frame: FrameType | None) -> FrameType | None:
    """The first frame below the call into this package that we are part of."""
    while frame is not None and is_ours(frame):
        frame = frame.f_back
    return frame
