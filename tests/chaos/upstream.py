"""The server behind. It counts its connections, and knows of each which lease is using it.

A connection begins with the line ``login``, which is welcomed after some milliseconds. A request is a line,
``lease turn turns milliseconds``; the reply, after so long, ``connection lease turn``. The turns of a lease come one after the
other and on one connection; a client that gives up in between ends the connection. So a lease that begins where
another has not come to its end means that two had the connection at the same time.
Killed and started again it goes on with its counts, which are on the board.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import selectors
import signal
import socket
import time

from tests.chaos.board import MOOD, UPSTREAM_DIALS, UPSTREAM_LIVE, UPSTREAM_PEAK, UPSTREAM_REQUESTS, Board, Teller

__all__ = ["run"]


class Connection:
    __slots__ = ("asked", "buffer", "lease", "number", "sock", "turn", "turns")

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.buffer = b""
        self.lease = ""
        self.turn = self.turns = 0
        self.asked = False  # and not answered yet


class Upstream:
    def __init__(self, listener: socket.socket, board: Board, tell: Teller) -> None:
        self.listener = listener
        self.board = board
        self.tell = tell
        self.selector = selectors.DefaultSelector()
        self.due: list[tuple[float, int, Connection, bytes]] = []
        self.planned = 0
        self.connections: set[Connection] = set()
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        board[UPSTREAM_LIVE] = 0

    def run(self) -> None:
        while True:
            until = self.due[0][0] if self.due else time.monotonic() + 1
            ready = self.selector.select(max(0.0, until - time.monotonic()))
            for key, _ in ready:
                if key.fileobj is not self.listener:
                    self.read(key.data)
            if any(key.fileobj is self.listener for key, _ in ready):
                self.accept()
            self.reply()

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        for key, _ in self.selector.select(0):  # what ended before this one began does not count beside it
            if key.fileobj is not self.listener:
                self.read(key.data)
        sock.setblocking(False)
        board = self.board
        board[UPSTREAM_DIALS] += 1
        board[UPSTREAM_LIVE] += 1
        board[UPSTREAM_PEAK] = max(board[UPSTREAM_PEAK], board[UPSTREAM_LIVE])
        connection = Connection(sock, board[UPSTREAM_DIALS])
        self.connections.add(connection)
        self.selector.register(sock, selectors.EVENT_READ, connection)

    def read(self, connection: Connection) -> None:
        while connection in self.connections:
            try:
                data = connection.sock.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.end(connection)
                return
            *lines, connection.buffer = (connection.buffer + data).split(b"\n")
            for line in lines:
                if line == b"login":
                    self.plan(connection, random.choice((0.0, 1.0, 4.0)), b"welcome\n")
                else:
                    self.request(connection, line.decode())

    def request(self, connection: Connection, line: str) -> None:
        lease, turn, turns, milliseconds = line.split()
        if connection not in self.connections:
            return
        self.board[UPSTREAM_REQUESTS] += 1
        first = int(turn) == 1
        expected = (connection.lease, connection.turn + 1) if not first else (lease, 1)
        unfinished = first and connection.turn < connection.turns
        if connection.asked or unfinished or (lease, int(turn)) != expected:
            before = f"{connection.lease} {connection.turn}/{connection.turns}{' unanswered' if connection.asked else ''}"
            self.tell("upstream", "finding", text=f"two holders: connection {connection.number} is used by {before}, and now by {lease} {turn}/{turns}")
        connection.lease, connection.turn, connection.turns = lease, int(turn), int(turns)
        if random.random() * 1000 < self.board[MOOD]:
            self.tell("upstream", "moody", number=connection.number, lease=lease)
            self.end(connection)
            return
        connection.asked = True
        self.plan(connection, float(milliseconds), f"{connection.number} {lease} {turn}\n".encode())

    def plan(self, connection: Connection, milliseconds: float, reply: bytes) -> None:
        self.planned += 1
        heapq.heappush(self.due, (time.monotonic() + milliseconds / 1000, self.planned, connection, reply))

    def reply(self) -> None:
        while self.due and self.due[0][0] <= time.monotonic():
            _, _, connection, reply = heapq.heappop(self.due)
            if connection in self.connections:
                connection.asked = False
                with contextlib.suppress(OSError):
                    connection.sock.send(reply)

    def end(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.selector.unregister(connection.sock)
        connection.sock.close()
        self.board[UPSTREAM_LIVE] -= 1


def run(listener: socket.socket, board: Board, tell: Teller) -> None:
    """Serve until killed; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Upstream(listener, board, tell).run()
    finally:
        os._exit(1)
