"""What is struck in a worker: each operation says who holds what before, and what is run, traced.

``before``, ``ready`` and ``meanwhile`` happen in the director: before the worker prepares, when it has, and while it runs.
``prepare``, ``run`` and ``recover`` happen in the worker; only ``run`` is traced.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, Any

import mppool
from tests.crash.peers import CAP, DEADLINE, Peer, Worker
from tests.helpers.processes import eventually
from tests.helpers.server import ask

if TYPE_CHECKING:
    from tests.crash.scene import Scene

__all__ = ["OPERATIONS", "Operation"]

BOTH: tuple[bool, ...] = (True, False)
BROKER: tuple[bool, ...] = (True,)
ALONE: tuple[bool, ...] = (False,)


class Operation:
    """Checkout of an idle session that this process used last."""

    name = "checkout, fast"
    brokers: tuple[bool, ...] = BOTH

    def before(self, scene: Scene) -> None:
        pass

    def prepare(self, worker: Worker) -> None:
        worker.lease()
        worker.give_back()

    def ready(self, scene: Scene) -> None:
        pass

    def run(self, worker: Worker) -> None:
        worker.lent.append(worker.pool.getconn(DEADLINE))

    def meanwhile(self, scene: Scene, victim: Peer) -> None:
        pass

    def recover(self, worker: Worker) -> None:
        """The process lives on: what it has, it gives back."""
        worker.give_back_after_a_strike()
        worker.end_other()

    def check(self, scene: Scene, *others: Peer) -> None:
        """Nothing was lost, for the survivor and ``others``."""
        scene.check(*others)


class Fetch(Operation):
    name = "checkout, fetch"
    brokers: tuple[bool, ...] = BROKER

    def before(self, scene: Scene) -> None:
        scene.renew()

    def prepare(self, worker: Worker) -> None:
        worker.pool.open()


class WaitForGrant(Operation):
    name = "checkout, wait and grant"
    brokers: tuple[bool, ...] = BROKER

    def before(self, scene: Scene) -> None:
        scene.survivor.do("hold", CAP)

    def prepare(self, worker: Worker) -> None:
        worker.pool.open()

    def meanwhile(self, scene: Scene, victim: Peer) -> None:
        scene.wait_for(victim)
        scene.survivor.do("give_back", not scene.has_broker)


class WaitAgain(WaitForGrant):
    name = "checkout, wait again"

    def prepare(self, worker: Worker) -> None:
        worker.give_up_waiting()

    def ready(self, scene: Scene) -> None:
        eventually(lambda: not scene.waiting(), what="a wait that was given up is struck")

    def check(self, scene: Scene, *others: Peer) -> None:
        super().check(scene, *others)
        scene.survivor.do("hold", CAP)
        for victim in others:
            eventually(lambda victim=victim: victim.do("has_no_wait_to_settle"), DEADLINE, "an answer that never comes is waited for")  # type: ignore[misc]
        scene.survivor.do("give_back")


class WaitAlone(WaitForGrant):
    name = "checkout, wait without a broker"
    brokers: tuple[bool, ...] = ALONE


class WaitInVain(WaitForGrant):
    name = "checkout, wait in vain"
    brokers: tuple[bool, ...] = BOTH

    def run(self, worker: Worker) -> None:
        worker.lent.append(worker.pool.getconn(0.02))

    def meanwhile(self, scene: Scene, victim: Peer) -> None:
        pass


class FindDead(Operation):
    name = "checkout, find a session ended"

    def prepare(self, worker: Worker) -> None:
        worker.lease()
        sock = worker.lent[0]
        sock.sendall(b"!close\n")
        select.select([sock], [], [], DEADLINE)
        worker.give_back()


class Dial(Operation):
    name = "checkout, dial"

    def before(self, scene: Scene) -> None:
        scene.clear()

    def prepare(self, worker: Worker) -> None:
        worker.pool.open()


class DialInVain(Dial):
    name = "checkout, dial in vain"

    def prepare(self, worker: Worker) -> None:
        def refuse(_sock: Any) -> None:
            raise ValueError("not this one")

        worker.other = worker.make_pool(configure=refuse)
        worker.other.open()

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        with contextlib.suppress(mppool.DialFailed):
            worker.other.getconn(0.1)


class Return(Operation):
    name = "return"

    def prepare(self, worker: Worker) -> None:
        worker.lease()

    def run(self, worker: Worker) -> None:
        worker.pool.putconn(worker.lent.pop())


class Discard(Return):
    name = "return, discard"

    def prepare(self, worker: Worker) -> None:
        worker.lease()
        worker.lent[0].sendall(b"late 30\n")  # a reply that must reach nobody

    def run(self, worker: Worker) -> None:
        worker.pool.putconn(worker.lent.pop(), discard=True)


class ReturnToWaiter(Return):
    name = "return while others wait"
    brokers: tuple[bool, ...] = BROKER

    def before(self, scene: Scene) -> None:
        scene.survivor.do("hold", CAP - 1)

    def ready(self, scene: Scene) -> None:
        scene.survivor.do("begin_wait")
        eventually(scene.waiting)

    def check(self, scene: Scene, *others: Peer) -> None:
        scene.survivor.do("end_wait")
        super().check(scene, *others)


class DiscardToWaiter(ReturnToWaiter):
    name = "return, discard while others wait"
    brokers: tuple[bool, ...] = BOTH

    def run(self, worker: Worker) -> None:
        worker.pool.putconn(worker.lent.pop(), discard=True)


class Block(Operation):
    name = "with block"

    def run(self, worker: Worker) -> None:
        with worker.pool.connection(DEADLINE) as sock:
            ask(sock, worker.nonce())


class BlockFails(Operation):
    name = "with block that fails"

    def run(self, worker: Worker) -> None:
        with contextlib.suppress(ValueError), worker.pool.connection(DEADLINE):
            raise ValueError


class Hooks(Operation):
    name = "checkout and return, hooks and debug"

    def prepare(self, worker: Worker) -> None:
        worker.other = worker.make_pool(debug=True, check=lambda _: None, reset=lambda _: None)
        worker.other.putconn(worker.other.getconn(DEADLINE))

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        worker.lent.append(worker.other.getconn(DEADLINE))
        worker.other.putconn(worker.lent[0])  # which is not lost if the exception falls before or after
        worker.lent.clear()

    def recover(self, worker: Worker) -> None:
        while worker.lent and worker.other is not None:
            with contextlib.suppress(mppool.Error):  # given back already
                worker.other.putconn(worker.lent[-1])
            worker.lent.pop()
        super().recover(worker)


class Resize(Operation):
    name = "resize, down and up"

    def prepare(self, worker: Worker) -> None:
        worker.lease(CAP)

    def run(self, worker: Worker) -> None:
        worker.pool.resize(1)
        worker.give_back()
        worker.pool.resize(CAP)

    def check(self, scene: Scene, *others: Peer) -> None:
        scene.survivor.do("resize", CAP)
        super().check(scene, *others)


class Create(Operation):
    name = "create a pool"
    brokers: tuple[bool, ...] = ALONE  # with a broker a pool lives on for a while

    def before(self, scene: Scene) -> None:
        scene.clear()

    def prepare(self, worker: Worker) -> None:
        worker.other = worker.make_pool(name="new", min_size=1)

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        worker.other.open()

    def check(self, scene: Scene, *others: Peer) -> None:
        scene.survivor.do("visit", "new")
        scene.check_no_names("new")
        super().check(scene, *others)


class Attach(Operation):
    name = "attach to a pool"

    def before(self, scene: Scene) -> None:
        scene.clear()

    def prepare(self, worker: Worker) -> None:
        worker.other = worker.make_pool(min_size=1)

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        worker.other.open()


class Close(Operation):
    name = "close the pool"

    def prepare(self, worker: Worker) -> None:
        worker.other = worker.make_pool()
        worker.other.putconn(worker.other.getconn(DEADLINE))

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        worker.other.close()


class CloseWhileLent(Hooks):
    name = "close the pool, then return"

    def prepare(self, worker: Worker) -> None:
        worker.other = worker.make_pool()
        worker.lent.append(worker.other.getconn(DEADLINE))

    def run(self, worker: Worker) -> None:
        assert worker.other is not None
        worker.other.close()
        worker.other.putconn(worker.lent[0])
        worker.lent.clear()


class Reclaim(Operation):
    name = "reclaim without a broker"
    brokers: tuple[bool, ...] = ALONE

    def before(self, scene: Scene) -> None:
        scene.clear()
        dead = scene.peer()
        dead.do("lease", CAP)
        dead.do("give_back_one")
        dead.end()

    def prepare(self, worker: Worker) -> None:
        worker.pool.open()


OPERATIONS: list[Operation] = [
    Operation(),
    Fetch(),
    WaitForGrant(),
    WaitAgain(),
    WaitAlone(),
    WaitInVain(),
    FindDead(),
    Dial(),
    DialInVain(),
    Return(),
    Discard(),
    ReturnToWaiter(),
    DiscardToWaiter(),
    Block(),
    BlockFails(),
    Hooks(),
    Resize(),
    Create(),
    Attach(),
    Close(),
    CloseWhileLent(),
    Reclaim(),
]
