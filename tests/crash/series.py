"""A series: one operation, struck at one line after the other until it runs through; after each strike everything is back."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.crash.brokers import BrokerOperation
from tests.crash.operations import Operation
from tests.crash.peers import DEADLINE, Peer
from tests.crash.scene import COMING, Broker, Lost, Scene
from tests.helpers.processes import eventually

__all__ = ["BrokerSeries", "Series", "WorkerSeries"]

FAILURES = (AssertionError, EOFError, TimeoutError, OSError, Lost)


@dataclass
class Series:
    """Strikes at every ``every``-th line from a random one on. 0: so that there are about ``few``."""

    operation: Any
    scene: Scene  # another one after each loss
    every: int = 1
    random: random.Random = field(default_factory=random.Random)
    kind: str = "kill"
    opcodes: bool = False
    points: int = 0
    lines: int = 0
    losses: list[str] = field(default_factory=list)
    few: ClassVar[int] = 16

    @property
    def name(self) -> str:
        return f"{self.operation.name}, {'broker' if self.scene.has_broker else 'alone'}, {self.kind}"

    def run(self) -> None:
        try:
            self.begin()
        except FAILURES as error:
            self.lose("without a strike", error)
            return
        every = self.every or max(1, self.lines // (self.few if self.kind == "kill" else 3 * self.few))  # an interruption costs a few milliseconds
        at = self.random.randint(1, every)
        struck = self.strike(at)
        while not struck and at > 1:
            at //= 2  # it had more lines the first time
            struck = self.strike(at)
        while struck:
            self.points += 1
            at += every
            struck = self.strike(at)
        self.finish()

    def begin(self) -> None:
        """How many descriptors there are at rest; then once without a strike: how many lines."""
        self.scene.rest()
        self.descriptors = self.scene.descriptors()
        self.point(0)

    def strike(self, at: int) -> bool:
        """False: it ran through before that."""
        self.where = ""
        try:
            self.point(at)
        except FAILURES as error:
            where = self.where
            self.lose(f"at {where or 'its end'}", error)
            self.begin()
            return bool(where)
        return bool(self.where)

    def point(self, at: int) -> None:
        """Run the operation, strike at a line (0: at none), see that nothing is lost. Says in ``where`` which line it was, "" if none."""
        raise NotImplementedError

    def let_go(self, orderly: bool) -> None:
        """End what is not the scene's."""
        raise NotImplementedError

    def lose(self, when: str, error: BaseException) -> None:
        """Write it down, and go on in another scene."""
        self.losses.append(f"{self.name}, {when}: {(str(error).splitlines() or [repr(error)])[-1]}")
        print("   ", self.losses[-1], flush=True)
        self.let_go(orderly=False)
        self.scene = self.scene.again()

    def finish(self) -> None:
        """Nothing may have piled up."""

        def leaked() -> dict[str, int]:
            now = self.scene.descriptors()
            return {process: now[process] - before for process, before in self.descriptors.items() if now[process] > before}

        try:
            self.let_go(orderly=True)
            self.scene.check()
            self.scene.rest()
            with contextlib.suppress(AssertionError):
                eventually(lambda: not leaked(), DEADLINE)
            if leaked():
                raise Lost(f"descriptors leaked: {leaked()}")
        except FAILURES as error:
            self.lose("at the end of the series", error)


@dataclass
class WorkerSeries(Series):
    """A worker is killed, a new one each time; or it is thrown at, and lives on."""

    operation: Operation
    victim: Peer | None = None
    stray: dict[str, str] = field(default_factory=dict)  # descriptors of the victim that nothing explains, as they were at the last point

    def point(self, at: int) -> None:
        operation, scene = self.operation, self.scene
        operation.before(scene)
        victim = self.victim = self.victim or scene.peer(operation)
        victim.do("prepare")
        operation.ready(scene)
        victim.trigger.arm(at)
        victim.send("run", self.kind, self.opcodes)
        operation.meanwhile(scene, victim)
        came_out = ""
        try:
            came_out = victim.answer()
        except EOFError:
            if self.kind != "kill":
                raise
        self.lines, self.where = victim.trigger.count, victim.trigger.where
        if self.kind == "kill":
            self.let_go(orderly=not self.where)
            operation.check(scene)
            return
        if self.where and not came_out:
            raise Lost("the exception was swallowed")
        if came_out != self.where:
            self.where += f", raised at {came_out}"
        victim.do("recover")
        operation.check(scene, victim)
        twice = victim.do("twice")
        if twice:
            raise Lost(f"in two places at once: {twice}")
        stray, before = victim.do("stray_descriptors"), self.stray
        self.stray = stray
        if at and len(stray) > len(before):
            raise Lost(f"descriptors leaked in the worker: {[what for fd, what in stray.items() if before.get(fd) != what]}")

    def let_go(self, orderly: bool) -> None:
        victim, self.victim = self.victim, None
        if victim is not None:
            if orderly:
                victim.do("recover")
                victim.do("close")
            victim.end()


@dataclass
class BrokerSeries(Series):
    """The broker is killed, and another one started. A second worker wants something of it, too."""

    operation: BrokerOperation
    other: Peer | None = None
    few: ClassVar[int] = 6  # each takes some tenths of a second: workers look for the next broker with pauses

    def point(self, at: int) -> None:
        operation, scene = self.operation, self.scene
        assert scene.broker is not None
        other = self.other = self.other or scene.peer()
        operation.before(scene, other)
        trigger = scene.broker.trigger
        assert trigger is not None
        trigger.arm(at)
        operation.begin(scene, other)
        eventually(lambda: scene.ended() or operation.done(scene, other), COMING, "the operation has come about")
        trigger.disarm()
        scene.let_broker_pass()  # it may have been about to strike at that moment
        self.lines, self.where = trigger.count, trigger.where
        if self.where:
            eventually(scene.ended)
        elif scene.ended() and not operation.ends:
            raise Lost(f"the broker ended by itself: {scene.broker.last_words()}")
        if scene.ended():
            scene.broker.kill()
            scene.broker = Broker(scene.path, trigger)
        operation.finish(scene, other)
        scene.come_by(other)
        scene.check(other)

    def let_go(self, orderly: bool) -> None:
        other, self.other = self.other, None
        if other is not None:
            if orderly:
                other.do("close")
            other.end()
