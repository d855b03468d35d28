"""What a driver has to say to the server when a session's holder died in the middle of a request."""

from __future__ import annotations

import socket
import time

import pytest

import mppool
from mppool.drivers.raw import RawDriver
from mppool.options import parse_target
from tests.helpers.processes import BrokerProcess, Child, fork
from tests.helpers.server import Judge, ask


class Polite(RawDriver):
    """Its word is a request, which the judge counts."""

    def farewell(self, session: socket.socket) -> bytes:
        return b"farewell\n"


@pytest.mark.parametrize("with_broker", [True, False], ids=["broker", "no-broker"])
def test_the_farewell_is_said_for_a_dead_holder(server: Judge, socket_path: str, with_broker: bool) -> None:
    """A holder is SIGKILLed in mid-request: the server hears the farewell once, on a connection of its own, and the permit comes back.

    Without a broker it is said by the process in need, if that has the session, too.
    """
    broker = BrokerProcess(socket_path) if with_broker else None
    pool = mppool.Pool(driver=Polite(parse_target(server.address)), name="polite", max_size=1, broker=socket_path)
    if not with_broker:
        helper = BrokerProcess(socket_path)  # for as long as it takes to have the session in both processes

    def holder(child: Child) -> None:
        sock = pool.getconn()
        ask(sock, "mine")
        if not with_broker:
            pool.putconn(sock)
            child.tell("ready")
            child.hear()
            sock = pool.getconn()
        sock.sendall(b"long 60000\n")
        child.tell("asked")
        child.hear(60)

    try:
        with fork(holder) as (child,), pool:
            if not with_broker:
                assert child.hear() == "ready"
                with pool.connection() as sock:
                    ask(sock, "fetched")
                helper.stop()
                child.tell()
            assert child.hear() == "asked"
            before = server.counts()
            child.kill()
            with pool.connection(timeout=5) as sock:
                ask(sock, "next")
            until = time.monotonic() + 5
            while server.counts()["requests"] < before["requests"] + 2:
                assert time.monotonic() < until, "the farewell was not heard"
            counts = server.counts()
            assert counts["requests"] == before["requests"] + 2  # the farewell, and "next"
            assert counts["dials"] == before["dials"] + 2
    finally:
        if broker is not None:
            broker.stop()
