"""Killed or interrupted at any line of the package, a worker or a broker takes nothing with it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest

from tests.crash.brokers import BROKER_OPERATIONS, BrokerOperation
from tests.crash.operations import OPERATIONS, Operation
from tests.crash.scene import Scene
from tests.crash.series import BrokerSeries, Series, WorkerSeries

SEED = random.randrange(1 << 32)


class Stage:
    """One scene after the other; each series goes on where the last one ended."""

    def __init__(self, has_broker: bool, traced: bool) -> None:
        self.kind = has_broker, traced
        self.scene: Scene | None = None

    def run(self, series: type[Series], operation: Operation | BrokerOperation, kind: str = "kill") -> None:
        self.scene = self.scene or Scene(*self.kind)
        chance = random.Random(f"{SEED} {operation.name}")
        print("seed", SEED)
        done = series(operation, self.scene, 0, chance, kind)
        done.run()
        self.scene = done.scene
        assert done.losses == []
        assert done.points >= 1

    def end(self) -> None:
        if self.scene is not None:
            self.scene.end()


@pytest.fixture(scope="module")
def with_broker() -> Iterator[Stage]:
    stage = Stage(has_broker=True, traced=False)
    yield stage
    stage.end()


@pytest.fixture(scope="module")
def alone() -> Iterator[Stage]:
    stage = Stage(has_broker=False, traced=False)
    yield stage
    stage.end()


@pytest.fixture(scope="module")
def with_traced_broker() -> Iterator[Stage]:
    stage = Stage(has_broker=True, traced=True)
    yield stage
    stage.end()


def operations(has_broker: bool) -> pytest.MarkDecorator:
    chosen = [operation for operation in OPERATIONS if has_broker in operation.brokers]
    return pytest.mark.parametrize("operation", chosen, ids=[operation.name for operation in chosen])


# CPython 3.10 looks for signals in more places: what is thrown there can cost a permit.
SIGNAL = pytest.param(
    "signal", marks=pytest.mark.xfail(sys.version_info < (3, 11), reason="CPython 3.10 does not bear an exception at every line", strict=False)
)
KINDS = ["kill", SIGNAL]


@pytest.mark.xdist_group("crash beside a broker")  # one scene for all of them
@operations(has_broker=True)
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_struck_beside_a_broker(with_broker: Stage, operation: Operation, kind: str) -> None:
    """A worker killed, or interrupted by a signal handler's exception, at any line: the cap is whole, nothing is left open."""
    with_broker.run(WorkerSeries, operation, kind)


@pytest.mark.xdist_group("crash without a broker")
@operations(has_broker=False)
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_struck_without_a_broker(alone: Stage, operation: Operation, kind: str) -> None:
    """The same where no broker is: the next worker in need puts it right."""
    alone.run(WorkerSeries, operation, kind)


@pytest.mark.xdist_group("crash of a broker")
@pytest.mark.parametrize("operation", BROKER_OPERATIONS, ids=[operation.name for operation in BROKER_OPERATIONS])
def test_a_broker_killed(with_traced_broker: Stage, operation: BrokerOperation) -> None:
    """A broker killed at any line: whoever wanted something gets it, the next broker finds everything."""
    with_traced_broker.run(BrokerSeries, operation)
