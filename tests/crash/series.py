"""A series: one operation, struck at one line after the other until it runs through."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field

from tests.crash.operations import Operation
from tests.crash.peers import DEADLINE, Peer
from tests.crash.scene import Lost, Scene
from tests.helpers.processes import eventually

__all__ = ["Series"]

POINTS = 18  # of a series, about, unless it is told to take every k-th line
FAILURES = (AssertionError, EOFError, TimeoutError, OSError, Lost)


@dataclass
class Series:
    """Strikes at every ``every``-th line from a random one on. 0: so that there are about POINTS."""

    operation: Operation
    kind: str
    scene: Scene
    every: int = 0
    opcodes: bool = False
    random: random.Random = field(default_factory=random.Random)
    points: int = 0
    losses: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.operation.name}, {'broker' if self.scene.has_broker else 'alone'}, {self.kind}"

    def run(self) -> None:
        """``scene`` is another one afterwards if something was lost."""
        self.victim: Peer | None = None
        self.stray = 0  # descriptors of the victim that nothing explains, since ``begin``
        try:
            self.begin()
        except FAILURES as error:
            self.lose("without a strike", error)
            return
        every = self.every or max(1, self.lines // POINTS)
        at = self.random.randint(1, every)
        while self.strike(at):
            at += every
            self.points += 1
        self.finish()

    def begin(self) -> None:
        """Once without a strike: how many lines there are, and how many descriptors."""
        self.point(0)
        self.descriptors = self.scene.descriptors()

    def strike(self, at: int) -> bool:
        """False: it ran through before that."""
        self.where = ""
        try:
            return self.point(at)
        except FAILURES as error:
            where = self.where
            self.lose(f"at {where or 'its end'}", error)
            self.begin()
            return bool(where)

    def point(self, at: int) -> bool:
        operation, scene = self.operation, self.scene
        lives_on = self.kind != "kill"
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
            if lives_on:
                raise
        self.lines, self.where = victim.trigger.count, victim.trigger.where
        if not lives_on:
            self.end_victim()
            operation.check(scene, None)
            return bool(self.where)
        if came_out != self.where:
            self.where = f"{self.where}, raised at {came_out}"
        if self.where and not came_out:
            raise Lost("the exception was swallowed")
        victim.do("recover")
        operation.check(scene, victim)
        stray = victim.do("stray_descriptors")
        if at and stray > self.stray:
            raise Lost(f"{stray - self.stray} descriptors leaked in the worker")
        self.stray = stray
        return bool(self.where)

    def end_victim(self) -> None:
        victim, self.victim = self.victim, None
        if victim is not None:
            if not victim.trigger.where:
                victim.do("recover")
                victim.do("close")
            victim.end()

    def lose(self, when: str, error: BaseException) -> None:
        """Write it down, and go on in another scene."""
        self.losses.append(f"{self.name}, {when}: {(str(error).splitlines() or [repr(error)])[-1]}")
        print("   ", self.losses[-1], flush=True)
        victim, self.victim = self.victim, None
        if victim is not None:
            victim.end()
        self.scene.abandon()
        self.scene = Scene(self.scene.has_broker)

    def finish(self) -> None:
        """Nothing may have piled up."""
        self.end_victim()

        def leaked() -> dict[str, int]:
            now = self.scene.descriptors()
            return {process: now[process] - before for process, before in self.descriptors.items() if now[process] > before}

        try:
            self.scene.check(None)
            with contextlib.suppress(AssertionError):
                eventually(lambda: not leaked(), DEADLINE)
            if leaked():
                raise Lost(f"descriptors leaked: {leaked()}")
        except FAILURES as error:
            self.lose("at the end of the series", error)
