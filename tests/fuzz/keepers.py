"""The keeper's socket: whoever connects to it is taken for the next broker. The real one must come back, and no junk may become a session."""

from __future__ import annotations

import os
import random
import socket
import time

from mppool.errors import ProtocolError
from mppool.keeper import keeper_path
from mppool.kernel import link
from mppool.wire import RESIDENT, Kind, Message, decode, encode, pack_held
from tests.fuzz.frames import Dice, Frame, Zoo
from tests.fuzz.links import send
from tests.fuzz.rig import CAP, Rig, keeper_pid
from tests.helpers.processes import eventually

__all__ = ["Pest"]


class Pest:
    """Pretends to be a broker, and not a good one."""

    def __init__(self, rig: Rig, zoo: Zoo, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.dice = Dice(self.random, zoo)
        self.frames = 0

    def call(self) -> None:
        """One connection: some messages, answers read or not, and the end. The broker has lost its keeper meanwhile."""
        try:
            sock = link.connect(keeper_path(self.rig.path))
        except OSError:
            return  # there is none just now; the broker starts another
        reads = self.random.random() < 0.6
        with sock:
            for _ in range(self.random.randrange(1, 60)):
                if not send(sock, self.frame()):
                    break
                self.frames += 1
                if reads:
                    self.read(sock)
            if self.random.random() < 0.3:
                time.sleep(self.random.random() / 20)

    def read(self, sock: socket.socket) -> None:
        fd = -1
        try:
            data, fd = link.receive(sock)
            if data:
                decode(data, 1 if fd >= 0 else 0)
        except (OSError, ProtocolError):
            pass  # what it says is the broker's business; here it must only not harm
        finally:
            if fd >= 0:
                os.close(fd)

    def frame(self) -> Frame:
        dice, ground = self.random, self.rig.ground
        kind = dice.choice((Kind.PUT, Kind.PUT, Kind.PUT, Kind.DROP, Kind.DROP, Kind.GIVE_ALL, Kind.LEAVE, None))
        if kind is None:
            return self.dice.garbage()
        self.dice.generations = ground.generations()
        k = dice.randrange(2 * CAP) if dice.random() < 0.8 else dice.randrange(4096)
        ident = (
            ground.ident if dice.random() < 0.7 else dice.choice((ground.ident[:-1] + "x", "", "\0", "../../tmp/x", "mppool-00000000-0000000000", "y" * 255))
        )
        body = pack_held(ident, self.dice.body()[:1000])
        if kind is Kind.PUT:
            return Frame(encode(Message(kind, k, self.dice.serial(k), dice.choice((0, RESIDENT)), body), 1), (self.dice.fd(),))
        return Frame(encode(Message(kind, k, self.dice.serial(k), 0, body)))

    def kill_keeper(self) -> None:
        pid = keeper_pid(self.rig.path)
        if pid:
            os.kill(pid, 9)

    def finish(self) -> None:
        """The broker has a keeper again. Killed now, its follower takes over what that one holds, and nobody notices."""
        eventually(lambda: keeper_pid(self.rig.path), timeout=20, what="there is a keeper again")
        self.rig.check_rest()
        self.rig.restart_broker()
        self.rig.check_rest()
