"""Other versions, peers that are none, and damage."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

import mppool
from mppool.kernel import link
from mppool.kernel.runtime import pool_id
from mppool.table import VERSION as TABLE_VERSION
from mppool.table import W_SLOTS, W_VERSION, lock_path
from mppool.wire import WIRE_VERSION, Kind, Message, decode, encode
from tests.bad_input.shared import AT_ONCE
from tests.helpers.processes import BrokerProcess, eventually
from tests.helpers.server import Judge, ask


@contextlib.contextmanager
def fake_broker(path: str, answer: bytes) -> Iterator[list[bytes]]:
    """Something that answers the first message of every link so. Yields what it heard."""
    heard: list[bytes] = []
    ended = threading.Event()
    listener = link.listen(path)
    listener.setblocking(True)

    def serve() -> None:
        while not ended.is_set():
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(10)
                heard.append(sock.recv(4096))
                if heard[-1]:
                    sock.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        link.connect(path).close()
        thread.join()
        listener.close()
        os.unlink(path)


def test_a_broker_that_refuses_us(server: Judge, socket_path: str) -> None:
    """BrokerUnavailable at once, with what the broker said; the connection that was dialed is closed, its permit free."""
    refusal = encode(Message(Kind.REFUSED, body=b"this broker serves another version of mppool"))
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool:
        with fake_broker(socket_path, refusal) as heard:
            began = time.monotonic()
            with pytest.raises(mppool.BrokerUnavailable) as caught:
                pool.getconn()
            assert time.monotonic() - began < AT_ONCE
            assert str(caught.value) == f"broker={socket_path!r}: this broker serves another version of mppool"
            assert decode(heard[0], 0).kind is Kind.HELLO
        eventually(lambda: server.counts()["live"] == 0)
        with pool.connection(timeout=5) as sock:  # the permit is back
            ask(sock, "without-that-broker")


def test_a_broker_of_another_version(server: Judge, socket_path: str) -> None:
    """A broker that speaks another version of the wire is BrokerUnavailable, with both versions, as errors.py says."""
    refusal = bytearray(encode(Message(Kind.REFUSED, body=b"a message of wire version 1, this mppool speaks 2")))
    refusal[0] = WIRE_VERSION + 1
    with mppool.Pool(server.address, timeout=3, broker=socket_path) as pool, fake_broker(socket_path, bytes(refusal)):
        said = ""
        try:
            with pool.connection():
                pass
        except mppool.BrokerUnavailable as error:
            said = str(error)
        assert f"version {WIRE_VERSION + 1}" in said


@pytest.mark.parametrize("answer", [b"", b"x", bytes(64), b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "a byte", "zeros", "http"])
def test_a_broker_that_is_none(server: Judge, socket_path: str, answer: bytes) -> None:
    """Whatever answers nonsense on the socket counts as no broker: the pool works, within its cap."""
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool, fake_broker(socket_path, answer):
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "one") == 1
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "two") == 1


def answer_to(path: str, data: bytes) -> Message | None:
    """What the broker at ``path`` answers to a first message, None if it only hangs up."""
    with link.connect(path) as sock:
        sock.setblocking(True)
        sock.settimeout(10)
        sock.send(data)
        answer = sock.recv(4096)
        return decode(answer, 0) if answer else None


def hello(ident: str, row: int = 0, incarnation: int = 1) -> bytes:
    return encode(Message(Kind.HELLO, row, incarnation, body=ident.encode()))


def test_a_worker_of_another_version(broker: BrokerProcess, socket_path: str) -> None:
    """The broker refuses a message of another wire version, says both, and goes on."""
    data = bytes([9]) + hello(pool_id(socket_path, "web"))[1:]
    refusal = answer_to(socket_path, data)
    assert refusal == Message(Kind.REFUSED, body=f"a message of wire version 9, this mppool speaks {WIRE_VERSION}".encode())
    assert broker.process.poll() is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x", "a message of 1 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "wire version 71"),
        (bytes([WIRE_VERSION, 99]) + bytes(14), "unknown kind 99"),
        (encode(Message(Kind.WAIT)), "a link begins with HELLO, not WAIT"),
        (hello("../../etc/passwd"), "one of our pools, not '../../etc/passwd'"),
        (hello("mppool-00000000-0000000000"), "one of our pools, not 'mppool-00000000-0000000000'"),
        (encode(Message(Kind.HELLO, body=b"\xff" * 60_000)), "a link begins with HELLO and one of our pools"),
    ],
    ids=["a byte", "http", "unknown kind", "no hello", "a path", "not this broker's", "long"],
)
def test_a_worker_that_is_none(broker: BrokerProcess, socket_path: str, data: bytes, said: str) -> None:
    """Nonsense costs its link and nothing else; the refusal says what was wrong."""
    refusal = answer_to(socket_path, data)
    assert refusal is not None
    assert refusal.kind is Kind.REFUSED
    assert said in refusal.body.decode()
    assert broker.process.poll() is None


def test_a_worker_with_somebody_elses_row(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A link must name a row and the incarnation that took it; the real worker is not disturbed."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        with pool.connection() as sock:
            session = ask(sock, "before")
        ident = pool_id(socket_path, "web")
        for row, incarnation in ((0, 999), (511, 1), (4000, 1)):
            refusal = answer_to(socket_path, hello(ident, row, incarnation))
            assert refusal == Message(Kind.REFUSED, body=f"row {row} of pool {ident} is not yours".encode())
        with pool.connection() as sock:
            assert ask(sock, "after") == session


@pytest.mark.parametrize(
    ("word", "value", "said"),
    [
        (W_VERSION, 99, rf"has version 99, this mppool speaks {TABLE_VERSION}; end its workers, then mppool gc$"),
        (W_SLOTS, 1 << 60, r"is damaged or from before a reboot; end its workers, then mppool gc$"),
        (W_SLOTS, 0, r"is damaged or from before a reboot; end its workers, then mppool gc$"),
    ],
    ids=["version", "too many slots", "no slots"],
)
def test_a_table_that_is_not_as_it_should_be(socket_path: str, word: int, value: int, said: str) -> None:
    """A worker that finds a table of another version, or a damaged one, in use, says which and what to do, and leaves it."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path) as pool:
        words = pool._worker.words  # type: ignore[union-attr]
        right, words[word] = words[word], value
        try:
            with pytest.raises(mppool.ProtocolError, match=f"^pool table {pool_id(socket_path, 'web')} {said}"):
                mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
        finally:
            words[word] = right


def test_a_lock_file_that_somebody_removed(socket_path: str) -> None:
    """Without its lock file a pool in use cannot be joined: the error says so."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path):
        os.unlink(lock_path(pool_id(socket_path, "web")))
        with pytest.raises(mppool.ProtocolError, match="has lost its lock file"):
            mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
