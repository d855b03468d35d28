"""A TCP server in a process of its own that is the judge: it counts its connections and tags every reply.

Protocol: a request is a line, ``nonce [milliseconds]``. The reply is ``connection nonce``: the number of the connection it came
in on, after so long. A line beginning with ``!`` is an order: ``!close`` ends this connection, ``!extra`` sends a reply nobody asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Judge", "ask", "judge"]


class _Server:
    """One thread, no framework: a test that kills things wants no surprises here."""

    def __init__(self, listener: socket.socket, control: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.control = control
        self.numbers: dict[socket.socket, int] = {}
        self.pending: list[tuple[float, socket.socket, bytes]] = []
        self.counts = {"live": 0, "peak": 0, "dials": 0, "requests": 0}
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            until = min((moment for moment, _, _ in self.pending), default=time.monotonic() + 1)
            events = self.selector.select(max(0.0, until - time.monotonic()))
            # Ends before beginnings: a connection that was closed before another was opened does not count beside it.
            for key, _ in sorted(events, key=lambda event: event[0].fileobj is self.listener):
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj is self.control:
                    self.answer()
                else:
                    self.read(key.fileobj)  # type: ignore[arg-type]
            self.reply_due()

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        self.read_ends()
        sock.setblocking(False)
        counts = self.counts
        counts["dials"] += 1
        counts["live"] += 1
        counts["peak"] = max(counts["peak"], counts["live"])
        self.numbers[sock] = counts["dials"]
        self.selector.register(sock, selectors.EVENT_READ)

    def read_ends(self) -> None:
        for key, _ in self.selector.select(0):
            if key.fileobj not in (self.listener, self.control):
                self.read(key.fileobj)  # type: ignore[arg-type]

    def read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end(sock)
            return
        for line in data.splitlines():
            if line == b"!close":
                self.end(sock)
                return
            if line == b"!extra":
                sock.send(b"nobody asked\n")
                continue
            nonce, _, delay = line.partition(b" ")
            self.counts["requests"] += 1
            reply = b"%d %s\n" % (self.numbers[sock], nonce)
            self.pending.append((time.monotonic() + float(delay or 0) / 1000, sock, reply))

    def reply_due(self) -> None:
        now = time.monotonic()
        due = [item for item in self.pending if item[0] <= now]
        if due:
            self.pending = [item for item in self.pending if item[0] > now]
            for _, sock, reply in due:
                if sock in self.numbers:
                    with contextlib.suppress(OSError):
                        sock.send(reply)

    def end(self, sock: socket.socket) -> None:
        self.selector.unregister(sock)
        del self.numbers[sock]
        sock.close()
        self.counts["live"] -= 1

    def answer(self) -> None:
        order = self.control.recv(4096)
        if not order:
            os._exit(0)  # the test has ended, or was killed
        if order == b"close all":
            for sock in list(self.numbers):
                self.end(sock)
        elif order == b"forget peak":
            self.counts["peak"] = self.counts["live"]
        self.control.send(json.dumps(self.counts).encode())


class Judge:
    """The test's side of the server."""

    def __init__(self, port: int, control: socket.socket, pid: int) -> None:
        self.port = port
        self.address = ("127.0.0.1", port)
        self._control = control
        self.pid = pid

    def _order(self, order: bytes) -> dict[str, int]:
        self._control.send(order)
        counts: dict[str, int] = json.loads(self._control.recv(4096))
        return counts

    def counts(self) -> dict[str, int]:
        """live, peak and dials of connections, and requests, as the server saw them."""
        return self._order(b"counts")

    def close_all(self) -> None:
        """The server ends every connection, as a restart would."""
        self._order(b"close all")

    def forget_peak(self) -> None:
        self._order(b"forget peak")


@contextlib.contextmanager
def judge(port: int = 0) -> Iterator[Judge]:
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _Server(listener, theirs).run()
        finally:
            os._exit(1)
    theirs.close()
    port = listener.getsockname()[1]
    listener.close()
    try:
        yield Judge(port, ours, pid)
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def ask(sock: Any, nonce: str, milliseconds: float = 0) -> int:
    """One request; the number of the connection. AssertionError if the reply is not ours."""
    sock.sendall(f"{nonce} {milliseconds}\n".encode())
    reply = b""
    while not reply.endswith(b"\n"):
        data = sock.recv(4096)
        if not data:
            raise ConnectionError("the server has ended the connection")
        reply += data
    number, _, echoed = reply.decode().strip().partition(" ")
    assert echoed == nonce, f"a crossed reply: asked {nonce!r}, got {reply!r}"
    return int(number)
