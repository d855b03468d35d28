"""Who has a session next while others wait: turns are handed on, first come first served."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import mppool
import mppool.worker
from mppool.table import H_WAITERS
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        pytest.param(1e9, "xaaaaab", id="within its turn a worker takes the session again"),
        pytest.param(0, "xabaaaa", id="then the next one has it"),
    ],
)
def test_turns(turn: float, expected: str, server: Judge, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """One session, for which x, a and b wait, in this order; a wants it five times, at once again. Its last return it tells nobody: b gets it all the same."""
    for name in ("SHORT", "PROMPT"):  # however slow the machine is, all leases are short and the next follows at once
        monkeypatch.setattr(mppool.worker, name, 1 << 62)
    pool = mppool.Pool(server.address, max_size=1, name="turns", broker=broker.path, turn=turn)
    log, write = os.pipe()

    def leases(name: str, count: int) -> Callable[[Child], None]:
        def work(child: Child) -> None:
            pool.open()
            child.hear()
            for _ in range(count):
                conn = pool.getconn(timeout=20)
                os.write(write, name.encode())
                pool.putconn(conn)
            child.tell()
            child.hear()  # it stays, and wants nothing more

        return work

    held = pool.getconn()
    with fork(leases("x", 1), leases("a", 5), leases("b", 1)) as children:
        for place, child in enumerate(children, start=1):
            child.tell()
            eventually(lambda place=place: pool._worker.table.halves[H_WAITERS] == place)  # type: ignore[misc, union-attr]
        pool.putconn(held)
        for child in children:
            child.hear()
        for child in children:
            child.tell()
    assert os.read(log, 100).decode() == expected
    os.close(log)
    os.close(write)
    pool.close()
