"""An HTTP server that says what a test wants it to, byte by byte; it numbers its connections and remembers what it was asked."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import parse_qs, urlsplit

__all__ = ["Script", "Speaker", "Talk", "digest", "reply", "speaker"]


class Talk:
    """One request on one connection, for a script to answer. What comes next on the connection is the next request."""

    def __init__(self, sock: socket.socket, number: int, go: threading.Event) -> None:
        self.sock = sock
        self.number = number
        self.go = go
        self.file = sock.makefile("rb")

    def read_request(self) -> bool:
        line = self.file.readline().split()
        if len(line) < 3:
            return False
        self.method = line[0].decode()
        parts = urlsplit(line[1].decode())
        self.path = parts.path if self.method != "CONNECT" else line[1].decode()
        self.nonce = parse_qs(parts.query).get("nonce", [""])[0]
        self.headers = {}
        while header := self.file.readline().strip().decode():
            name, _, value = header.partition(":")
            self.headers[name.lower()] = value.strip()
        return True

    def read_body(self) -> bytes:
        """All of it. EOFError if the client ends before."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self._exactly(int(self.headers.get("content-length", "0")))
        body = b""
        while size := int(self.file.readline() or b"!", 16):
            body += self._exactly(size + 2)[:-2]
        self.file.readline()
        return body

    def _exactly(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def say(self, text: str | bytes) -> None:
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def end(self) -> None:
        """No more from here; what the client still sends is read."""
        self.sock.shutdown(socket.SHUT_WR)
        while self.sock.recv(65536):
            pass

    def hear(self) -> bool:
        """Wait until the client says more. False: it has ended."""
        select.select([self.sock], [], [], 20)
        return bool(self.sock.recv(1, socket.MSG_PEEK))


Script = Callable[[Talk], None]


class Speaker:
    """``scripts`` by path. ``asked`` are the requests that came in: (connection, method, path); ``finished`` the paths that were answered; ``go`` is
    for scripts to wait for.
    """

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self.scripts = scripts
        self.asked: list[tuple[int, str, str]] = []
        self.finished: queue.Queue[str] = queue.Queue()
        self.go = threading.Event()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what was said is there
            self.connections += 1
            self._socks.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=(Talk(sock, self.connections, self.go),), daemon=True))
            self._threads[-1].start()

    def _serve(self, talk: Talk) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError), talk.sock, talk.file:  # (ValueError: not a size of a chunk, but the end)
            while talk.read_request():
                self.asked.append((talk.number, talk.method, talk.path))
                self.scripts[talk.path if talk.method != "CONNECT" else "CONNECT"](talk)
                self.finished.put(talk.path)

    def close(self) -> None:
        self.go.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def speaker(scripts: Mapping[str, Script]) -> Iterator[Speaker]:
    it = Speaker(scripts)
    try:
        yield it
    finally:
        it.close()


def reply(talk: Talk, *headers: str, status: str = "200 OK", version: str = "1.1") -> str:
    """A whole reply that says on which connection it was asked for what."""
    body = f"{talk.number} {talk.nonce}"
    return "\r\n".join([f"HTTP/{version} {status}", *headers, f"Content-Length: {len(body)}", "", body])


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
