"""What is struck in the broker: something that workers want of it. It is killed on the way, and another one is started.

``before`` puts everybody in position; ``begin`` sets off what the broker has to do, ``done`` says if that has come about; in
``finish`` everybody must have got what he wanted, though with the help of another broker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct

from mppool.keeper import keeper_path
from mppool.kernel import link
from tests.crash.peers import CAP, Peer
from tests.crash.scene import Broker, Scene
from tests.helpers.processes import answers, eventually

__all__ = ["BROKER_OPERATIONS", "BrokerOperation"]


class BrokerOperation:
    """A new session's duplicate arrives, and goes to the keeper."""

    name = "broker: share"
    ends = False  # by itself

    def before(self, scene: Scene, other: Peer) -> None:
        scene.clear()

    def begin(self, scene: Scene, other: Peer) -> None:
        scene.survivor.send("lease")

    def done(self, scene: Scene, other: Peer) -> bool:
        return scene.survivor.has_spoken() and scene.all_shared()

    def finish(self, scene: Scene, other: Peer) -> None:
        scene.survivor.answer()


class Fetch(BrokerOperation):
    name = "broker: fetch"

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew()

    def begin(self, scene: Scene, other: Peer) -> None:
        other.send("lease")

    def done(self, scene: Scene, other: Peer) -> bool:
        return other.has_spoken()

    def finish(self, scene: Scene, other: Peer) -> None:
        other.answer()


class WaitAndGrant(Fetch):
    name = "broker: wait and grant"
    discard = False

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew_held()

    def begin(self, scene: Scene, other: Peer) -> None:
        other.send("lease")
        eventually(lambda: scene.waiting() or scene.ended())
        scene.survivor.send("give_back", self.discard)

    def done(self, scene: Scene, other: Peer) -> bool:
        return other.has_spoken() and scene.survivor.has_spoken()

    def finish(self, scene: Scene, other: Peer) -> None:
        scene.survivor.answer()
        other.answer()


class WaitAndDial(WaitAndGrant):
    name = "broker: wait, right to dial"
    discard = True


class WaitInVain(Fetch):
    name = "broker: wait in vain"

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew_held()

    def begin(self, scene: Scene, other: Peer) -> None:
        other.send("wait_in_vain")


class FindDead(BrokerOperation):
    name = "broker: an idle session ends"

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew()

    def begin(self, scene: Scene, other: Peer) -> None:
        scene.survivor.send("spoil_one")

    def done(self, scene: Scene, other: Peer) -> bool:
        return scene.survivor.has_spoken() and scene.held() < CAP


class Evict(BrokerOperation):
    name = "broker: evict after a shrink"

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew()

    def begin(self, scene: Scene, other: Peer) -> None:
        scene.survivor.send("resize", 1)

    def done(self, scene: Scene, other: Peer) -> bool:
        return scene.survivor.has_spoken() and scene.held() == 1

    def finish(self, scene: Scene, other: Peer) -> None:
        scene.survivor.answer()
        scene.survivor.do("resize", CAP)


class Reclaim(BrokerOperation):
    name = "broker: reclaim"

    def before(self, scene: Scene, other: Peer) -> None:
        scene.clear()
        self.dead = scene.peer()
        self.dead.do("lease", CAP)
        self.dead.do("give_back_one")
        eventually(scene.all_shared)

    def begin(self, scene: Scene, other: Peer) -> None:
        self.dead.end()

    def done(self, scene: Scene, other: Peer) -> bool:
        return not scene.has_row(self.dead)

    def finish(self, scene: Scene, other: Peer) -> None:
        pass


class Start(BrokerOperation):
    name = "broker: start"

    def before(self, scene: Scene, other: Peer) -> None:
        assert scene.broker is not None
        scene.renew()
        scene.broker.kill()

    def begin(self, scene: Scene, other: Peer) -> None:
        assert scene.broker is not None
        scene.broker = Broker(scene.path, scene.broker.trigger, wait=False)

    def done(self, scene: Scene, other: Peer) -> bool:
        return answers(scene.path)

    def finish(self, scene: Scene, other: Peer) -> None:
        pass


class StartAnew(Start):
    name = "broker: start, and a keeper"

    def before(self, scene: Scene, other: Peer) -> None:
        super().before(scene, other)
        kill_keeper(scene.path)


class End(Start):
    name = "broker: end"
    ends = True

    def before(self, scene: Scene, other: Peer) -> None:
        scene.renew()

    def begin(self, scene: Scene, other: Peer) -> None:
        assert scene.broker is not None
        scene.broker.tell_to_end()

    def done(self, scene: Scene, other: Peer) -> bool:
        return scene.ended()


class Adopt(Fetch):
    name = "broker: adopt a pool"

    def __init__(self) -> None:
        self.count = 0

    def before(self, scene: Scene, other: Peer) -> None:
        scene.clear()
        self.count += 1

    def begin(self, scene: Scene, other: Peer) -> None:
        other.send("visit", f"new{self.count}")


def kill_keeper(path: str) -> None:
    """That nobody speaks to: whoever connects is its broker."""
    try:
        sock = link.connect(keeper_path(path))
    except OSError:
        return
    with sock:
        pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        os.kill(pid, signal.SIGKILL)
        sock.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1):
                pass  # until it is dead


BROKER_OPERATIONS: list[BrokerOperation] = [
    BrokerOperation(),
    Fetch(),
    WaitAndGrant(),
    WaitAndDial(),
    WaitInVain(),
    FindDead(),
    Evict(),
    Reclaim(),
    Start(),
    StartAnew(),
    End(),
    Adopt(),
]
