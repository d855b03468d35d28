"""Root does not join a user's pool, nor a user root's."""

from __future__ import annotations

import contextlib
import os

import pytest

import mppool
from tests.helpers.processes import Child, broker_process, eventually, fork
from tests.helpers.server import Judge
from tests.helpers.users import ALICE, Home, as_root, as_user, broker_of, home_of, names_of
from tests.security.shared import AT_ONCE, pool_of, said_by


@as_root
def test_root_does_not_join_a_users_pool(home: Home, server: Judge) -> None:
    """Root's workers have their own pools: a user's broker is refused, and the user's pool is not even named."""
    with broker_of(ALICE, home.socket):
        with contextlib.closing(pool_of(home, server)) as pool, pytest.raises(mppool.BrokerUnavailable) as caught:
            pool.getconn(timeout=3)
        assert str(caught.value) in {
            f"broker={home.socket!r}: its broker runs as uid {ALICE}, we are 0",
            f"broker={home.socket!r}: the directory {home.run} belongs to uid {ALICE}, we are 0",
        }
        assert names_of(home) == []
    eventually(lambda: server.counts()["live"] == 0)


@as_root
def test_a_user_does_not_join_roots_pool(server: Judge) -> None:
    """Root's broker, opened by hand to all, still serves root's pools only: a user's worker is cut, and does its work within a cap of its own user."""
    with home_of(0) as home, broker_process(home.socket) as broker:

        def work(_: Child) -> dict[str, str]:
            with contextlib.closing(pool_of(home, server)) as pool:
                return said_by(pool)

        home.run.chmod(0o711)
        os.chmod(home.socket, 0o666)
        with fork(as_user(ALICE, work)) as (worker,):
            assert worker.result(AT_ONCE) == {"lent": ""}
        eventually(lambda: server.counts()["live"] == 0)  # the broker has no duplicate
        assert broker.process.poll() is None
        home.run.chmod(0o700)
