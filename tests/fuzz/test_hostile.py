"""A broker that lies, against real workers."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.hostile import LIES, broker, worker
from tests.helpers.processes import fork
from tests.helpers.server import Judge, judge


@pytest.mark.parametrize("lies", [("other_kind", "other_place"), ("wrong_descriptor",), ("garbage", "refuse"), LIES], ids="-".join)
def test_workers_believe_no_liar(server: Judge, socket_path: str, lies: tuple[str, ...]) -> None:
    """Workers fail with mppool's own errors or go on: no foreign socket is lent, no descriptor kept, no call hangs, the cap holds."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    try:
        with judge() as trap, fork(broker(socket_path, "p", trap.port, seed, lies)) as (liar,):
            assert liar.hear() == "listens"
            with fork(*[worker(socket_path, "p", server.port, 1.5)] * 2) as children:
                for child in children:
                    found = child.result(45)
                    print(found["outcomes"])
                    assert found["wrong"] == []
                    assert found["left"] == [], "descriptors are left in a worker that has closed its pool"
                    assert found["outcomes"]["ok"] > 0
            assert trap.counts()["requests"] == 0
            assert server.counts()["peak"] <= 3
    finally:
        os.unlink(socket_path)
