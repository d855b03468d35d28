"""Peers of ours that mean harm, or are mad. Whoever runs as us may write to the table, too; these only use the wire."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import mppool
from mppool.kernel import link
from mppool.wire import Kind, Message, decode, encode
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge, ask
from tests.security.shared import AT_ONCE, send_fds


class Peer:
    """A process of ours with a row in the pool, that says what it likes over links of its own."""

    def __init__(self, server: Judge, path: str, **options: Any) -> None:
        self.path = path
        self.pool = mppool.Pool(server.address, name="web", broker=path, **options)
        self.pool.open()
        worker = self.pool._worker
        assert worker is not None
        self.words, self.table, self.row = worker.words, worker.table, worker.row
        self.hello = encode(Message(Kind.HELLO, worker.row.index, worker.row.incarnation, body=worker.ident.encode()))

    def link(self) -> socket.socket:
        sock = link.connect(self.path)
        sock.setblocking(True)
        sock.settimeout(20)
        sock.send(self.hello)
        assert decode(sock.recv(4096), 0).kind is Kind.WELCOME
        return sock

    def generation(self, k: int) -> int:
        return int(self.words[self.table.generation + k])


def a_descriptor_bomb(peer: Peer) -> None:
    """As many descriptors as a message can carry, with every kind of message."""
    with open(os.devnull, "rb") as null:
        for kind in (Kind.SHARE, Kind.LOOK, Kind.WAIT, Kind.FETCH, Kind.PUT):
            with peer.link() as sock:
                send_fds(sock, Message(kind), [null.fileno()] * 253)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):
                        pass


def shares_of_what_is_no_socket(peer: Peer) -> None:
    """A pipe, a file, a directory, an epoll, in the place of sessions."""
    reader, writer = os.pipe()
    files = [reader, writer, os.open("/", os.O_RDONLY), os.open("/etc/passwd", os.O_PATH), os.eventfd(0) if hasattr(os, "eventfd") else os.dup(reader)]
    with peer.link() as sock:
        for k in range(8):
            for fd in files:
                send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [fd])
    for fd in files:
        os.close(fd)


def shares_of_others_sessions(peer: Peer) -> None:
    """Connections to elsewhere, passed off as the sessions that others have."""
    with peer.link() as sock, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        for k in range(8):
            with socket.create_connection(elsewhere.getsockname()) as wrong:
                send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [wrong.fileno()])


def fetches_without_reading(peer: Peer) -> None:
    """Asks for sessions, as fast as it can, and reads none."""
    with peer.link() as sock:
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            for n in range(20_000):
                sock.send(encode(Message(Kind.FETCH, n % 4, peer.generation(n % 4))))


def cancels_without_reading(peer: Peer) -> None:
    """Fills its own queue with answers."""
    with peer.link() as sock:
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            for _ in range(20_000):
                sock.send(encode(Message(Kind.CANCEL)))


def waits_on_many_links(peer: Peer) -> None:
    """Joins the queue three hundred times, in front, and goes away."""
    links = [peer.link() for _ in range(300)]
    for n, sock in enumerate(links):
        sock.send(encode(Message(Kind.WAIT, n % peer.table.lanes, peer.row.incarnation, 1)))
    for sock in links:
        sock.close()


def opens_a_thousand_links(peer: Peer) -> None:
    """Some of them say who they are, some nothing."""
    links = [peer.link() if n % 2 else link.connect(peer.path) for n in range(1000)]
    for sock in links:
        sock.close()


def sends_links_over_links(peer: Peer) -> None:
    """Its own end of a link as a session: a link that would never end."""
    with peer.link() as sock, peer.link() as other:
        for k in range(8):
            send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [other.fileno()])


MISCHIEF = [
    a_descriptor_bomb,
    shares_of_what_is_no_socket,
    shares_of_others_sessions,
    fetches_without_reading,
    cancels_without_reading,
    waits_on_many_links,
    opens_a_thousand_links,
    sends_links_over_links,
]


@pytest.mark.parametrize("mischief", MISCHIEF)
def test_a_peer_of_ours_harms_only_itself(broker: BrokerProcess, server: Judge, socket_path: str, mischief: Callable[[Peer], None]) -> None:
    """Others check out and return all the time, each gets its own replies from one of the pool's two sessions; the broker lives and keeps no descriptor."""
    process = psutil.Process(broker.pid)

    def victim(child: Child) -> list[int]:
        with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
            seen, rounds = set(), 0
            while not child_hears(child):
                with pool.connection(timeout=30) as first:
                    seen.add(ask(first, f"{os.getpid()} {rounds}".replace(" ", "-")))
                rounds += 1
                if rounds == 20:
                    child.tell()
                time.sleep(0.001)
            return [rounds, *sorted(seen)]

    def attack(child: Child) -> None:
        raise_limit()
        peer = Peer(server, socket_path, max_size=2)
        child.hear()
        mischief(peer)
        child.tell()
        child.hear()
        peer.pool.close()

    with fork(victim, victim, attack) as (one, two, attacker):
        for child in (one, two):
            child.hear()
        before = eventually(lambda: settled(process.num_fds))
        attacker.tell()
        attacker.hear(AT_ONCE * 4)
        eventually(lambda: process.num_fds() <= before + 2, what=f"{before} descriptors in the broker")
        attacker.tell()
        attacker.result()
        for child in (one, two):
            child.tell()
        found = [child.result() for child in (one, two)]
    assert all(rounds > 20 for rounds, *_ in found)
    if mischief is not waits_on_many_links:  # which were granted what they asked for; it ended with them
        assert {number for _, *numbers in found for number in numbers} <= {1, 2}
    assert server.counts()["peak"] <= 2
    assert broker.process.poll() is None


def child_hears(child: Child) -> bool:
    return link.wait_readable(child._in, 0)


def settled(number: Callable[[], int]) -> int:
    """A number that has not changed for a tenth of a second, else 0."""
    first = number()
    time.sleep(0.1)
    return first if number() == first else 0


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
