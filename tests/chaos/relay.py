"""The TCP relay between workers and server: the strict judge of the cap, and the place of network trouble.

It counts a connection from its accept until the client's end of it arrives (or it ends it itself), and takes in what has
ended before it counts what begins. Every end is passed on at once, whatever is delayed meanwhile; a client's end
as the half it is, so that the server's own end still comes back. Each end is told with its cause, by the client's port:
a worker's failure is explained only if its very connection was ended by somebody else.
"""

from __future__ import annotations

import ast
import contextlib
import heapq
import os
import selectors
import signal
import socket
import struct
import time

from tests.chaos.board import CAP, OLDER_CAP, RELAY_ACCEPTED, RELAY_LIVE, RELAY_PEAK, SHRUNK_AT, Board, Teller

__all__ = ["SHRINKS", "run"]

SHRINKS = 5.0  # seconds after a shrink in which dials that began before it may arrive: workers are stopped for up to 3
LINGER = struct.pack("ii", 1, 0)


class Pair:
    """A client's connection and ours to the server. ``counted`` until the client has ended it, or we have."""

    __slots__ = ("client", "counted", "last_due", "number", "port", "server")

    def __init__(self, client: socket.socket, port: int, server: socket.socket, number: int) -> None:
        self.client = client
        self.port = port
        self.server = server
        self.number = number
        self.counted = True
        self.last_due = 0.0


class Relay:
    def __init__(self, listener: socket.socket, control: socket.socket, upstream: tuple[str, int], board: Board, tell: Teller) -> None:
        self.listener: socket.socket | None = None
        self.address = listener.getsockname()
        self.control = control
        self.upstream = upstream
        self.board = board
        self.tell = tell
        self.selector = selectors.DefaultSelector()
        self.pairs: dict[int, Pair] = {}  # in order of their numbers
        self.due: list[tuple[float, int, Pair, socket.socket, bytes]] = []
        self.sent = 0
        self.cuts = 0
        self.delay = 0.0
        self.over = False
        self.selector.register(control, selectors.EVENT_READ)
        self.listen(listener)

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            until = self.due[0][0] if self.due else time.monotonic() + 1
            ready = [key for key, _ in self.selector.select(max(0.0, until - time.monotonic()))]
            for key in ready:
                if key.data is not None:
                    self.read(key.data, key.fileobj)  # type: ignore[arg-type]
            if any(key.fileobj is self.listener for key in ready):
                self.accept()
            if any(key.fileobj is self.control for key in ready):
                self.obey()
            self.send_due()

    # Connections.

    def accept(self) -> None:
        try:
            assert self.listener is not None
            client, (_, port) = self.listener.accept()
        except OSError:
            return
        board = self.board
        for key, _ in self.selector.select(0):  # ends before beginnings
            if key.data is not None:
                self.read(key.data, key.fileobj)  # type: ignore[arg-type]
        board[RELAY_ACCEPTED] += 1
        client.setblocking(False)
        try:
            server = socket.create_connection(self.upstream, timeout=5)
        except OSError as error:
            self.tell("relay", "ended", port=port, cause=f"no upstream: {error}")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            client.close()
            return
        pair = Pair(client, port, server, board[RELAY_ACCEPTED])
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(sock, selectors.EVENT_READ, pair)
        self.pairs[pair.number] = pair
        board[RELAY_LIVE] += 1
        self.read(pair, client)  # a dialer that died at once has never counted
        board[RELAY_PEAK] = max(board[RELAY_PEAK], board[RELAY_LIVE])
        shrinks = time.monotonic() - board[SHRUNK_AT] / 1e9 < SHRINKS
        cap = max(board[CAP], board[OLDER_CAP]) if shrinks else board[CAP]
        if board[RELAY_LIVE] > cap and pair.counted:
            self.over = True
            self.tell("relay", "over", live=board[RELAY_LIVE], cap=cap, port=pair.port)

    def read(self, pair: Pair, sock: socket.socket) -> None:
        while pair.number in self.pairs:
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
                if sock is pair.client:
                    self.uncount(pair, "client")
                    self.end(pair, "client")
                    return
            if sock is pair.client:
                if not data:
                    self.client_ended(pair)
                    return
                self.pass_on(pair, pair.server, data)
            elif not data:
                self.end(pair, "upstream")
            elif pair.counted:
                if self.cuts:
                    self.cuts -= 1
                    pair.client.send(data[: len(data) // 2])
                    self.end(pair, "cut")
                else:
                    self.pass_on(pair, pair.client, data)

    def client_ended(self, pair: Pair) -> None:
        """Its half is passed on; the pair ends when the server has ended its own."""
        self.selector.unregister(pair.client)
        self.uncount(pair, "client")
        with contextlib.suppress(OSError):
            pair.server.shutdown(socket.SHUT_WR)

    def uncount(self, pair: Pair, cause: str) -> None:
        if pair.counted:
            pair.counted = False
            self.board[RELAY_LIVE] -= 1
            self.tell("relay", "ended", port=pair.port, cause=cause)
            if self.over and self.board[RELAY_LIVE] <= self.board[CAP]:
                self.over = False
                self.tell("relay", "under", live=self.board[RELAY_LIVE])

    def end(self, pair: Pair, cause: str, *, reset: bool = False) -> None:
        if self.pairs.pop(pair.number, None) is None:
            return
        self.uncount(pair, cause)
        for sock in (pair.client, pair.server):
            with contextlib.suppress(KeyError):
                self.selector.unregister(sock)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            sock.close()

    # Bytes.

    def pass_on(self, pair: Pair, to: socket.socket, data: bytes) -> None:
        now = time.monotonic()
        if self.delay or pair.last_due > now:
            pair.last_due = max(now + self.delay, pair.last_due)
            self.sent += 1
            heapq.heappush(self.due, (pair.last_due, self.sent, pair, to, data))
        else:
            self.send(pair, to, data)

    def send_due(self) -> None:
        while self.due and self.due[0][0] <= time.monotonic():
            _, _, pair, to, data = heapq.heappop(self.due)
            if pair.number in self.pairs and pair.counted:
                self.send(pair, to, data)

    def send(self, pair: Pair, to: socket.socket, data: bytes) -> None:
        try:
            to.send(data)
        except OSError:
            pass  # its end is read in a moment, and told then

    # Trouble.

    def obey(self) -> None:
        data = self.control.recv(4096)
        if not data:
            os._exit(0)  # the host is gone
        order = ast.literal_eval(data.decode())
        what, done = order["do"], 0
        if what in ("close", "reset"):
            counted = [pair for pair in self.pairs.values() if pair.counted]
            for _ in range(min(order["count"], len(counted))):
                done += 1
                self.end(counted.pop(int(order["share"] * len(counted))), what, reset=what == "reset")
        elif what == "cut":
            self.cuts += order["count"]
        elif what == "refuse" and self.listener is not None:
            self.selector.unregister(self.listener)
            self.listener.close()
            self.listener = None
        elif what == "accept" and self.listener is None:
            self.listen(socket.create_server(self.address, backlog=512))
        elif what == "delay":
            self.delay = order["seconds"]
        elif what == "calm":
            self.cuts = 0
            self.delay = 0.0
        self.control.send(repr(done).encode())


def run(listener: socket.socket, control: socket.socket, upstream: tuple[str, int], board: Board, tell: Teller) -> None:
    """Relay until the host closes ``control``; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Relay(listener, control, upstream, board, tell).run()
    finally:
        os._exit(1)
