"""Rows about gevent: many greenlets of a monkey-patched process over a cap that one of them can exhaust."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from mppool.kernel.runtime import pool_id
from mppool.table import creation_lock
from tests.helpers.processes import eventually, fork
from tests.matrix.forks import busy
from tests.matrix.scene import Scene, row
from tests.matrix.webs import missing
from tests.matrix.work import NAME, Tally, from_environment, use

GREENLETS = 6


def in_interpreters(scene: Scene, count: int, *arguments: object) -> None:
    """So many new interpreters that run ``green`` at once, beside an ordinary process that uses the pool."""
    code = f"from tests.matrix.greens import green; green({', '.join(map(repr, arguments))})"
    with fork(lambda child: busy(scene.pool(), scene.tally, "beside", 20)) as (child,):
        processes = [scene.start(sys.executable, "-c", code) for _ in range(count)]
        try:
            codes = [process.wait(40) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        child.result()
    assert codes == [0] * count, f"exit codes {codes}"


def green(early: bool) -> None:
    """What one interpreter does. ``early``: patched before mppool is imported and the pool is made, as gevent wants it; else after."""
    gevent: Any = patch() if early else None
    pool, tally = from_environment()
    gevent = gevent or patch()
    stalls: list[float] = []
    tally.add("begins")
    users = [gevent.spawn(use, pool, tally, f"green{n}", 6, 3) for n in range(GREENLETS)]
    ticker = gevent.spawn(tick, tally, stalls)
    gevent.joinall(users, raise_error=True)
    while not stalls:
        gevent.sleep(0.005)
    ticker.kill()
    pool.close()
    tally.add("note", f"longest stall {max(stalls) * 1000:.0f} ms")


def patch() -> Any:
    import gevent
    from gevent import monkey

    monkey.patch_all()
    return gevent


def tick(tally: Tally, stalls: list[float]) -> None:
    """How late a greenlet wakes that only sleeps. It comes after the others; its first word says that none of them keeps the thread."""
    time.sleep(0.005)
    tally.add("ticks")
    while True:
        before = time.monotonic()
        time.sleep(0.005)
        stalls.append(time.monotonic() - before - 0.005)


@row("gevent, one session for all greenlets", workers=GREENLETS + 1, cap=1, why_not=missing("gevent"))
def one_session(scene: Scene) -> None:
    """Whoever waits must let the greenlet that has the session go on."""
    in_interpreters(scene, 1, True)


@row("gevent", workers=3 * GREENLETS + 1, cap=2, why_not=missing("gevent"))
def processes(scene: Scene) -> None:
    in_interpreters(scene, 3, True)


@row("gevent, patched late", workers=3 * GREENLETS + 1, cap=2, why_not=missing("gevent"))
def patched_late(scene: Scene) -> None:
    """mppool was imported and the pool was made before monkey-patching: gunicorn --preload."""
    in_interpreters(scene, 3, False)


@row("gevent, patched late, first use held up", workers=GREENLETS, cap=2, why_not=missing("gevent"))
def opening(scene: Scene) -> None:
    """Several greenlets open the pool while another process is just making it."""
    code = "from tests.matrix.greens import green; green(False)"
    with creation_lock(pool_id(scene.path, NAME)) as lock:
        process = scene.start(sys.executable, "-c", code)
        eventually(lambda: scene.tally.lines("begins"), 20, what="its greenlets begin")
        with contextlib.suppress(AssertionError):
            eventually(lambda: scene.tally.lines("ticks"), 3)
    lock.close()
    try:
        ended = process.wait(15)
    finally:
        process.kill()
        process.wait()
    assert ended == 0, f"exit code {ended}"
