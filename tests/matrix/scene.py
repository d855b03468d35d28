"""One row: a server that judges, a broker or none, a cap far below workers x threads; and what must be true at the end of every row.

A row is a function of a ``Scene``. It raises (AssertionError) if its own claim does not hold; what every row must
show is checked by ``look_back``: no crossed reply, nothing failed, the peak at the server within the cap, the whole cap to be
leased by a new process, as many connections at the server as the table has permits, nobody waiting or dead in the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mppool
from mppool.inspect import find_pool
from tests.helpers.processes import BrokerProcess, Child, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask, judge
from tests.matrix.guard import contained
from tests.matrix.work import NAME, PATIENCE, Tally

__all__ = ["Result", "Row", "Scene", "row", "rows", "run"]


@dataclass
class Result:
    """What is printed of a row. ``faults`` is empty if all was as it must be."""

    row: str
    workers: int = 0
    cap: int = 0
    requests: int = 0
    peak: int = 0
    dials: int = 0
    failed: int = 0
    crossed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        return f"skipped: {self.skipped}" if self.skipped else "FAULTS" if self.faults else "ok"


@dataclass(frozen=True)
class Row:
    """``kills``: a process is ended under a lease, and the server may count one more for the instant a FIN travels."""

    name: str
    work: Callable[[Scene], None]
    broker: bool
    workers: int
    cap: int
    kills: bool
    why_not: Callable[[], str]


class Scene:
    """What a row has. Made in the row's own process."""

    def __init__(self, it: Row, home: Path, server: Judge, broker: BrokerProcess | None, seconds: float) -> None:
        self.row = it
        self.home = home
        self.path = str(home / "run" / "b.sock")
        self.server = server
        self.broker = broker
        self.cap = it.cap
        self.workers = it.workers
        self.seconds = seconds  # how long load goes on where a row has phases
        self.tally = Tally(str(home / "tally"))
        self.notes: list[str] = []
        self.peak = 0

    def pool(self, target: object = None, **options: Any) -> mppool.Pool:
        """The row's pool, as this process and its forks use it."""
        return mppool.Pool(target or self.target, max_size=self.cap, name=NAME, broker=self.path, **options)

    @property
    def target(self) -> str:
        return f"tcp://127.0.0.1:{self.server.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are not forked from ours."""
        ours = {"MATRIX_TARGET": self.target, "MATRIX_CAP": str(self.cap), "MPPOOL_BROKER": self.path, "MATRIX_TALLY": self.tally.path}
        # uWSGI starts itself anew by the name of the real interpreter, without the environment (venv) it was started in.
        paths = [os.getcwd(), os.environ.get("PYTHONPATH", ""), sysconfig.get_path("purelib")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **ours}

    def start(self, *command: str, name: str = "log", **environment: str) -> subprocess.Popen[bytes]:
        """A process whose output goes to a file in the row's home, shown if the row has faults."""
        with (self.home / name).open("ab") as log:
            return subprocess.Popen(
                command, env={**self.environment, **environment}, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
            )

    def python(self, code: str, timeout: float = 30.0) -> int:
        """Run some code in a new interpreter; its exit code."""
        process = self.start(sys.executable, "-c", code)
        try:
            return process.wait(timeout)
        finally:
            process.kill()
            process.wait()

    def numbers(self) -> dict[str, Any]:
        """What the table says; empty if there is none."""
        found = find_pool(self.path, NAME)
        if found is None:
            return {}
        try:
            return found.snapshot()
        finally:
            found.table.close()
            found.lock.close()

    def load(self) -> None:
        """Nothing but time, in which what was started goes on."""
        time.sleep(self.seconds)


_rows: dict[str, Row] = {}


def row(
    name: str, *, workers: int, cap: int, alone: bool = False, broker: bool = True, kills: bool = False, why_not: Callable[[], str] = lambda: ""
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Register a row, with the broker and, where ``alone`` says that it means something, without as well."""

    def register(work: Callable[[Scene], None]) -> Callable[[Scene], None]:
        for with_broker in ([True] if broker else []) + ([False] if alone else []):
            full = name if with_broker else f"{name}, alone"
            _rows[full] = Row(full, work, with_broker, workers, cap, kills, why_not)
        return work

    return register


def rows() -> dict[str, Row]:
    """All of them, in the order of the files."""
    from tests.matrix import endings, forks, greens, meanwhile, orphans, programs, queues, webs  # noqa: F401 (they register theirs)

    return _rows


def run(it: Row, seconds: float = 0.5) -> Result:
    """Run one row, contained."""
    reason = it.why_not()
    if reason:
        return Result(it.name, skipped=reason)
    began = time.monotonic()
    answer = contained(lambda home: _perform(it, home, seconds), 60 + 10 * seconds)
    result = Result(**answer["result"]) if "result" in answer else Result(it.name, it.workers, it.cap)
    if "fault" in answer:
        result.faults.append(answer["fault"])
    result.faults += [f"left over: {what}" for what in answer.get("left", [])]
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _perform(it: Row, home: Path, seconds: float) -> dict[str, Any]:
    result = Result(it.name, it.workers, it.cap)
    (home / "run").mkdir(mode=0o700)
    with judge() as server, contextlib.ExitStack() as stack:
        broker = BrokerProcess(str(home / "run" / "b.sock")) if it.broker else None
        if broker is not None:
            stack.callback(broker.stop)
        scene = Scene(it, home, server, broker, seconds)
        try:
            it.work(scene)
        except Exception as error:
            result.faults.append(_in_words(error))
        try:
            result.faults += look_back(scene)
        except Exception as error:
            result.faults.append(_in_words(error))
        try:
            counts = server.counts()
        except OSError:
            counts = {"requests": 0, "peak": 0, "dials": 0}
            result.faults.append("the server is gone")
        result.requests, result.peak, result.dials = counts["requests"], max(scene.peak, counts["peak"]), counts["dials"]
        result.failed, result.crossed = len(scene.tally.lines("failed")), len(scene.tally.lines("crossed"))
        result.notes = scene.notes + scene.tally.lines("note")
        if result.faults:
            result.faults += [f"{file.name}: {file.read_text(errors='replace')[-3000:]}" for file in home.glob("log*")]
    return {"result": asdict(result)}


def _in_words(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__)[-6:])


def look_back(scene: Scene) -> list[str]:
    """What is wrong after the row's processes have ended."""
    faults = [f"{kind}: {line}" for kind in ("crossed", "failed") for line in scene.tally.lines(kind)[:5]]
    scene.peak = peak = scene.server.counts()["peak"]
    if peak > scene.cap + scene.row.kills:
        faults.append(f"{peak} connections at the server at once, the cap is {scene.cap}")
    if scene.broker is not None:
        try:
            eventually(lambda: is_at_rest(scene.numbers()), 5, what="the table at rest")
        except AssertionError:
            faults.append(f"the table is not at rest: {in_short(scene.numbers())}")
    scene.server.forget_peak()
    with fork(lambda child: whole_cap(child, scene)) as (child,):
        faults += child.result()
    return faults


def is_at_rest(numbers: dict[str, Any]) -> bool:
    """Nobody holds, waits, dials or closes, and nobody dead is left to be settled."""
    busy = [numbers.get(what, 0) for what in ("in_use", "waiting", "dialing", "closing")]
    return not any(busy) and all(worker["alive"] for worker in numbers.get("workers", []))


def in_short(numbers: dict[str, Any]) -> str:
    shown = ("size", "in_use", "idle", "dialing", "closing", "waiting", "closed", "workers")
    return json.dumps({what: numbers.get(what) for what in shown})


def whole_cap(child: Child, scene: Scene) -> list[str]:
    """In a process of its own: lease the whole cap at once, and not one more; what the server and the table then say."""
    pool = scene.pool()
    faults = []
    sessions = []
    try:
        for n in range(scene.cap):
            sessions.append(pool.getconn(timeout=PATIENCE / 2))
            ask(sessions[-1], f"whole-{n}")
    except mppool.Error as error:
        faults.append(f"only {len(sessions)} of {scene.cap} were to be leased: {error!r}; {in_short(scene.numbers())}")
    try:
        pool.putconn(pool.getconn(timeout=0.05))
        faults.append("one more than the cap was to be leased")
    except mppool.PoolTimeout:
        pass
    counts, size = scene.server.counts(), scene.numbers()["size"]
    if not counts["live"] == size <= scene.cap or counts["peak"] > scene.cap:
        faults.append(f"the whole cap of {scene.cap} lent: {counts['live']} connections at the server (peak {counts['peak']}), {size} permits in the table")
    for session in sessions:
        pool.putconn(session)
    pool.close()
    return faults
