"""A last word to a server, on a connection of its own: what ends a request whose asker has died."""

from __future__ import annotations

import _socket
import errno
import socket
import time

__all__ = ["Farewell"]


class Farewell:
    """Says ``word`` to the other end of ``sock``, without waiting: call ``is_said`` until it is true. Owns a socket of its own meanwhile.

    It may fail, quietly: the server then finds out by itself that nobody wants the answer.
    """

    def __init__(self, sock: _socket.socket, word: bytes, until: float) -> None:
        """``until``: the moment of the monotonic clock at which it is given up."""
        self.word = word
        self.until = until
        self.own: socket.socket | None = None
        try:
            self.own = socket.socket(sock.family, socket.SOCK_STREAM)
            self.own.setblocking(False)  # (gevent's do not know of SOCK_NONBLOCK)
            self.own.connect(sock.getpeername())
        except BlockingIOError:
            pass  # under way
        except OSError:
            self.close()

    def is_said(self) -> bool:
        """Nothing is left to do: the kernel has the word, or it cannot be said."""
        try:
            if self.own is not None:
                self.own.send(self.word, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            if time.monotonic() < self.until:
                return False
        except OSError as error:
            if error.errno == errno.ENOTCONN and time.monotonic() < self.until:
                return False  # not yet connected
        self.close()
        return True

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
            self.own = None
