"""One name, two meanings: who declares a pool otherwise than it is."""

from __future__ import annotations

import logging
import socket

import pytest

import mppool
from tests.helpers.server import Judge, ask


def test_one_name_two_targets(server: Judge, socket_path: str) -> None:
    """A name in use for another target is refused; the error says both. The running pool goes on."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool, pool.connection() as sock:
        other = mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path)
        with pytest.raises(mppool.ConfigMismatch) as caught:
            other.open()
        assert str(caught.value) == (
            "name='web': declared here with target tcp://127.0.0.1:1 and driver raw/1, "
            f"but the running pool has target tcp://127.0.0.1:{server.port} and driver raw/1"
        )
        assert ask(sock, "goes-on") == 1
        assert len(pool.get_stats()["workers"]) == 1


def test_one_name_two_drivers(server: Judge, socket_path: str) -> None:
    """A name in use with another driver is refused; the error says both."""
    with mppool.Pool(server.address, name="web", broker=socket_path):
        with pytest.raises(mppool.ConfigMismatch) as caught:
            mppool.Pool(dial=lambda: socket.create_connection(server.address), name="web", broker=socket_path).open()
        assert "declared here with target  and driver closeable/1, but the running pool has target " in str(caught.value)
        assert "driver raw/1" in str(caught.value)


def test_a_name_is_free_again_when_its_pool_is_gone(server: Judge, socket_path: str) -> None:
    """What a name meant is forgotten with the last worker."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path):
        pass
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool, pool.connection() as sock:
        ask(sock, "hello")


def test_another_cap_is_logged_and_the_running_one_stays(server: Judge, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that declares other numbers is warned with both, once each, and meets those that run."""
    first = mppool.Pool(server.address, max_size=2, max_idle=60, name="web", broker=socket_path)
    second = mppool.Pool(server.address, max_size=9, max_idle=0.5, name="web", broker=socket_path)
    with first, caplog.at_level(logging.WARNING, "mppool"), second:
        assert [record.getMessage() for record in caplog.records] == [
            "pool 'web': max_size=9 declared here, 2 is running and stays",
            "pool 'web': max_idle=0.5 declared here, 60 is running and stays",
        ]
        assert first.get_stats()["max_size"] == second.get_stats()["max_size"] == 2


def test_the_same_declaration_is_not_logged(server: Judge, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Workers that agree, or differ in what is each worker's own, hear nothing."""
    with mppool.Pool(server.address, name="web", broker=socket_path), mppool.Pool(server.address, name="web", timeout=1, debug=True, broker=socket_path):
        assert caplog.records == []
