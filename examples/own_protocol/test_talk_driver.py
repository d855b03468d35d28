"""What the author of a driver runs: the pool's own checks, against the real server.  $ pytest examples/own_protocol"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from talk_client import Client
from talk_driver import TalkDriver
from talk_server import Server, Session

from mppool.testing import check_driver


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Session) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def a_value(client: Client) -> None:
    client.ask("SET colour blue")


def an_answer_that_is_not_read(client: Client) -> None:
    assert client.sock is not None
    client.sock.sendall(b"GET colour\n")


def an_answer_that_was_given_up(client: Client) -> None:
    assert client.sock is not None
    client.sock.settimeout(0.01)
    client.ask("WAIT 0.2")


def test_the_driver_keeps_its_promises(server: Server) -> None:
    """Whatever one process leaves in a session, the next does not meet."""
    report = check_driver(
        TalkDriver(server.server_address, "app", "secret"),
        identity=lambda client: client.ask("SESSION"),
        ask=lambda client, nonce: client.ask(f"ECHO {nonce}"),
        look=lambda client: client.ask("GET colour"),
        dirty=[a_value, an_answer_that_is_not_read, an_answer_that_was_given_up],
        secrets=["secret"],
        unreachable=TalkDriver(("127.0.0.1", 1), "app", "secret"),
    )
    print(report)
    assert not report.skipped
