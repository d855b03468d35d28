"""A server that never says a word."""

from __future__ import annotations

import select
import socket

__all__ = ["SilentPeer"]


class SilentPeer:
    """A connection over TCP to somebody who listens and never says a word: ``ours`` is the client's end."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.ours = socket.create_connection(listener.getsockname())
            self.theirs, _ = listener.accept()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)

    def heard(self) -> str | None:
        """What the peer heard since: None for nothing at all."""
        if not select.select([self.theirs], [], [], 0.03)[0]:
            return None
        try:
            data = self.theirs.recv(4096)
        except OSError as error:
            return f"{error.strerror}"
        return f"{data!r}" if data else "the end of the connection: something called shutdown()"

    def __enter__(self) -> SilentPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()
