"""A broker that lies, against real workers."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.hostile import LIES, expose
from tests.helpers.server import Judge, judge


@pytest.mark.parametrize("lies", [("other_kind", "other_place"), ("wrong_descriptor",), ("garbage", "refuse"), LIES], ids="-".join)
def test_workers_believe_no_liar(server: Judge, socket_path: str, lies: tuple[str, ...]) -> None:
    """Workers fail with mppool's own errors or go on: no foreign socket is lent, no descriptor kept, no hang, the cap holds, the next broker serves all."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    with judge() as trap:
        found = expose(socket_path, server, trap, seed, lies, 1.5)
        print([each["outcomes"] for each in found])
        assert [each["wrong"] for each in found] == [[], []]
        assert [each["left"] for each in found] == [[], []], "descriptors are left in a worker that has closed its pool"
        assert sum(each["outcomes"].get("ok", 0) for each in found) > 0, "not even who dialed had a session"
        assert trap.counts()["requests"] == 0
        assert server.counts()["peak"] <= 3
