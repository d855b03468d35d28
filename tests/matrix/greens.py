"""Rows about gevent: many greenlets of a monkey-patched process over a cap that one of them can exhaust."""

from __future__ import annotations

import sys
import time
from typing import Any

from mppool.kernel.runtime import pool_id
from mppool.table import creation_lock
from tests.helpers.processes import fork
from tests.matrix.forks import busy
from tests.matrix.scene import Scene, row
from tests.matrix.webs import missing
from tests.matrix.work import NAME, from_environment, use

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


def green(early: bool, held: float = 0.0) -> None:
    """What one interpreter does. ``early``: patched before mppool is imported and the pool is made, as gevent wants it; else after."""
    patched: Any = None
    if early:
        patched = patch()
    pool, tally = from_environment()
    gevent = patched or patch()
    stalls: list[float] = []
    ticker = gevent.spawn(tick, stalls)
    gevent.joinall([gevent.spawn(use, pool, tally, f"green{n}", 6, 3) for n in range(GREENLETS)], raise_error=True)
    ticker.kill()
    pool.close()
    tally.add("note", f"longest stall {max(stalls) * 1000:.0f} ms")


def patch() -> Any:
    import gevent
    from gevent import monkey

    monkey.patch_all()
    return gevent


def tick(stalls: list[float]) -> None:
    """How late a greenlet wakes that only sleeps."""
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
        time.sleep(1.0)
    lock.close()
    try:
        code_ = process.wait(15)
    finally:
        process.kill()
        process.wait()
    assert code_ == 0, f"exit code {code_}"
