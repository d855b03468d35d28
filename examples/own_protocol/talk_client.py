"""The protocol of this example, and a client for it as there are many: it logs in, keeps state, and says goodbye when it is closed.

    client  LOGIN user password     server  +OK session 17
    client  SET name value                  +OK
    client  GET name                        +OK value
    client  ECHO text                       +OK text
    client  WAIT seconds                    +OK, so much later
    client  RESET                           +OK             forgets what was SET
    client  QUIT                            (ends the connection)

What does not work is answered by ``-ERR reason``.
"""

from __future__ import annotations

import socket


class TalkError(Exception):
    """The server said -ERR."""


class Client:
    """Knows nothing of pools. ``sock`` may be one that is connected already; then nothing is said to the server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: socket.socket | None = sock
        self.buffer = b""
        self.session = 0
        self.asking = False  # a question was sent, and its answer was not read to its end

    def login(self, user: str, password: str) -> None:
        self.session = int(self.ask(f"LOGIN {user} {password}").split()[1])

    def ask(self, line: str) -> str:
        """One question, one answer. Raises TalkError; OSError if the connection is lost, and then it is closed."""
        if self.sock is None:
            raise ConnectionError("closed")
        self.asking = True
        try:
            self.sock.sendall(line.encode() + b"\n")
            while b"\n" not in self.buffer:
                data = self.sock.recv(4096)
                if not data:
                    raise ConnectionError("the server has ended the connection")
                self.buffer += data
        except OSError:
            self.disconnect()
            raise
        answer, _, self.buffer = self.buffer.partition(b"\n")
        self.asking = False
        if not answer.startswith(b"+OK"):
            raise TalkError(answer.decode())
        return answer[4:].decode()

    def close(self) -> None:
        """Say goodbye."""
        if self.sock is not None:
            try:
                self.sock.sendall(b"QUIT\n")
            except OSError:
                pass  # it is gone already
            self.disconnect()

    def disconnect(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def __del__(self) -> None:
        self.close()
