"""Servers that are not there."""

from __future__ import annotations

import re
import socket
import time

import pytest

import mppool
from tests.bad_input.shared import AT_ONCE


@pytest.mark.parametrize("target", ["tcp://no-such-host.invalid:80", "tcp://[fe80::1%nosuch]:80"])
def test_a_host_that_does_not_exist(socket_path: str, target: str) -> None:
    """DialFailed at once, not after the timeout: waiting will not help. The permit is free again."""
    host = "no-such-host.invalid" if "invalid" in target else "fe80::1%nosuch"
    with pytest.raises(socket.gaierror) as why:
        socket.getaddrinfo(host, 80)
    if why.value.errno != socket.EAI_NONAME:
        pytest.skip(f"this machine's resolver does not say that {host} does not exist: {why.value}")
    with mppool.Pool(target, timeout=30, broker=socket_path) as pool:
        began = time.monotonic()
        with pytest.raises(mppool.DialFailed) as caught:
            pool.getconn()
        assert time.monotonic() - began < AT_ONCE
        assert str(caught.value) == f"target={target!r}: cannot resolve {host!r}: {why.value.strerror}"
        assert caught.value.permanent
        assert isinstance(caught.value.__cause__, socket.gaierror)
        stats = pool.get_stats()
        assert [stats[key] for key in ("size", "dialing", "waiting", "dial_failures")] == [0, 0, 0, 1]


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
def test_a_host_that_cannot_be_a_name(socket_path: str, host: str) -> None:
    """A host name that the resolver cannot even be asked for is DialFailed at once, too."""
    with mppool.Pool((host, 80), name="x", timeout=0.3, broker=socket_path) as pool, pytest.raises(mppool.DialFailed, match=re.escape(host)):
        pool.getconn()


def test_a_server_that_refuses(socket_path: str) -> None:
    """A refused connection is tried again until the timeout; the error says the numbers and, as its cause, what the server said."""
    with mppool.Pool("tcp://127.0.0.1:1", broker=socket_path) as pool:
        with pytest.raises(mppool.PoolTimeout, match=r"no session within 0.1 s \(max_size=4, in_use=0, idle=0, dialing=0, ") as caught:
            pool.getconn(timeout=0.1)
        assert isinstance(caught.value.__cause__, mppool.DialFailed)
        assert str(caught.value.__cause__) == "target='tcp://127.0.0.1:1': [Errno 111] Connection refused"


def test_a_unix_socket_that_is_not_there(socket_path: str) -> None:
    """The same for a Unix socket; the error says its path."""
    with mppool.Pool("unix:///no/such.sock", broker=socket_path) as pool:
        with pytest.raises(mppool.PoolTimeout) as caught:
            pool.getconn(timeout=0.05)
        assert str(caught.value.__cause__) == "target='unix:///no/such.sock': [Errno 2] No such file or directory"


def test_a_dial_function_of_something_without_close(socket_path: str) -> None:
    """What ``dial=`` makes must have ``close()``: DialFailed at once says what it made."""

    def seven() -> int:
        return 7

    with mppool.Pool(dial=seven, name="x", broker=socket_path) as pool:
        began = time.monotonic()
        with pytest.raises(mppool.DialFailed, match=r"dial=<function .*seven at .*> made 7, which has no close\(\)"):
            pool.getconn()
        assert time.monotonic() - began < AT_ONCE
