"""A worker's link to the broker, and descriptors that come over it."""

from __future__ import annotations

import logging
import os
import socket
import stat
from io import FileIO

from mppool.errors import BrokerUnavailable, ProtocolError
from mppool.kernel import link
from mppool.wire import GIVEN_UP, Kind, Message, OtherVersion, decode, encode

__all__ = ["Descriptor", "Line", "LineLost"]

log = logging.getLogger("mppool")


Descriptor = FileIO
"""A received descriptor, closed when nobody has the object any more: whatever is thrown wherever, none is left open. (Not by a
``__del__`` of ours: what a signal handler throws in there is swallowed.)"""


class LineLost(Exception):
    """The broker has gone, or has closed this link."""


Received = tuple[Message, Descriptor | None]


class Line:
    """One link to the broker, used for one conversation at a time. Owns its socket."""

    __slots__ = ("epoch", "given_up", "poll", "said", "sock", "struck")

    def __init__(self, path: str) -> None:
        self.sock = link.connect(path)
        self.poll = link.poller(self.sock.fileno())
        self.epoch = 0
        self.said = self.struck = 0  # how often CANCEL was said; which of them the last STRUCK answered
        self.given_up = False

    @property
    def due(self) -> bool:
        """Is a STRUCK still to come?"""
        return self.struck != self.said

    def cancel(self) -> None:
        """Ask to be struck, once."""
        if not self.due:
            self.say_cancel(0)

    def give_up(self) -> None:
        """Ask to be struck, and to have taken back what may have been granted: we do not look before the answer."""
        if not self.given_up:
            self.say_cancel(GIVEN_UP)
            self.given_up = True

    def say_cancel(self, flags: int) -> None:
        """Said in any case. If it cannot be, our side of the line ends, which says as much: the broker has heard it when it ends its own."""
        try:
            self.said += 1
            link.send_beyond(self.sock, encode(Message(Kind.CANCEL, serial=self.said, flags=flags)))
        except BaseException as error:
            self.hang_up()
            if not isinstance(error, OSError):
                raise

    def hang_up(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has ended already

    def was_struck(self, serial: int) -> bool:
        """After a STRUCK: is it the answer to the last CANCEL? None is due then. (One may have been lost here, to an exception.)"""
        self.struck = serial
        if self.due:
            return False
        self.given_up = False
        return True

    def send(self, message: Message, fd: int = -1) -> None:
        """Raises LineLost if the broker is gone or so far behind that its queue is full."""
        self.say(encode(message, 1 if fd >= 0 else 0), fd)

    def say(self, data: bytes, fd: int = -1) -> None:
        """The same with a message as bytes."""
        try:
            link.send(self.sock, data, fd)
        except OSError as error:
            self.close()
            raise LineLost from error

    def receive(self) -> Received | None:
        """The next message and its descriptor, None if there is none yet. Raises LineLost."""
        fd = -1
        given: list[Descriptor] = []
        try:
            data, fd = link.receive(self.sock)
            if fd >= 0:
                if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                    raise ProtocolError("a descriptor that is no socket")
                given.extend(map(Descriptor, (fd,), ("rb+",)))  # made and kept in one step of the interpreter
            if not data:
                raise LineLost
            return decode(data, len(given)), given[0] if given else None
        except BlockingIOError:
            return None
        except BaseException as error:
            if given:
                given[0].close()
            elif fd >= 0:
                os.close(fd)
            if not isinstance(error, (OSError, ProtocolError, LineLost)):
                raise
            self.close()
            if isinstance(error, OtherVersion):
                raise BrokerUnavailable(f"the broker is of another version: {error}; use the same mppool for both") from error
            if isinstance(error, ProtocolError):
                log.error("link to the broker closed: %s", error)
            raise LineLost from error

    def close(self) -> None:
        self.sock.close()
