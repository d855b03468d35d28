"""The keeper under fire: others connect to it as if they were the broker."""

from __future__ import annotations

import random

from mppool.keeper import keeper_path
from mppool.kernel import link
from mppool.wire import Kind, Message, encode
from tests.fuzz.frames import Frame, Zoo
from tests.fuzz.keepers import Pest
from tests.fuzz.links import send
from tests.fuzz.rig import CAP, descriptors, keeper_pid, rig
from tests.helpers.processes import eventually


def test_a_pestered_keeper(socket_path: str) -> None:
    """Garbage, junk for real sessions, and kills: bystanders notice nothing, and the next broker finds true sessions with a keeper that leaks nothing."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    with rig(socket_path) as it:
        zoo = Zoo()
        pest = Pest(it, zoo, seed)
        fresh = descriptors(keeper_pid(socket_path))
        for n in range(40):
            pest.call()
            if n == 20:
                pest.kill_keeper()
            it.check()
        pest.finish()
        keeper = keeper_pid(socket_path)
        eventually(lambda: descriptors(keeper) <= fresh + CAP + 2 + 2, what="the keeper holds the sessions of two pools, and nothing else")
        print(f"{pest.frames} frames; {it.requests} requests of bystanders, the slowest {it.slowest:.3f} s")
        zoo.close()


def test_a_caller_that_never_reads(socket_path: str) -> None:
    """Somebody asks the keeper for everything, again and again, and takes none of it: the broker gets a keeper back, and sessions survive a broker's death."""
    with rig(socket_path) as it:
        with link.connect(keeper_path(socket_path)) as sock:
            while send(sock, Frame(encode(Message(Kind.GIVE_ALL)))):
                pass
            before = it.requests
            eventually(lambda: it.requests > before + 200 or it.failures, timeout=30, what="bystanders get on")
            it.check()
        it.restart_broker()
        it.check_rest()
