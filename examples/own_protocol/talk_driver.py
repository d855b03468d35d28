"""A driver for the protocol in talk_client.py: everything that mppool has to be told about it.

Read it beside ``mppool.drivers.DriverBase``, which says what each method owes. ``mppool.testing.check_driver`` tries it.
"""

from __future__ import annotations

import socket

from talk_client import Client, TalkError

from mppool import DialFailed
from mppool.drivers import Dialer, DriverBase, Residence, abandon, adopt, parse_target

ANSWER_WITHIN = 30.0
"""Seconds to wait for an answer. A number, never None: that would be a blocking socket, for every process that has the connection."""


class TalkDriver(DriverBase):
    """Sessions of one user. A process finds in a session what it left there itself, and nothing of any other's."""

    name = "talk"
    minds_transfer = True  # call transferred() before lending what another process used since

    def __init__(self, target: object, user: str, password: str) -> None:
        self.dialer = Dialer(parse_target(target))
        self.user, self.password = user, password

    def key(self) -> str:
        # Sessions of two users are not interchangeable. The password makes no difference, and must not be seen.
        return f"talk/1 {self.dialer.target} {self.user}"

    # Opening, and ending.

    def dial(self) -> Client:
        client = self.client(self.dialer.dial())
        try:
            client.login(self.user, self.password)
        except BaseException as error:
            self.abort(client)
            if isinstance(error, TalkError):
                raise DialFailed(f"{self.dialer.target}: {error}", permanent=True) from error  # the password is wrong tomorrow, too
            raise  # an OSError: the server may be back in a moment
        return client

    def client(self, sock: socket.socket) -> Client:
        sock.settimeout(ANSWER_WITHIN)
        return Client(sock)

    def close(self, client: Client) -> None:
        client.close()

    def abort(self, client: Client) -> None:
        # Others go on with this connection, and Client.close(), which __del__ calls, would say QUIT on it. So the socket is
        # taken out of the client first, and closed without a word.
        sock, client.sock = client.sock, None
        if sock is not None:
            abandon(sock)

    def forked(self) -> bool:
        return self.dialer.forked()

    # Moving to another process.

    def fileno(self, client: Client) -> int:
        return client.sock.fileno() if client.sock is not None else -1

    def residence(self, client: Client) -> Residence:
        return Residence.moves

    def detach(self, client: Client) -> bytes:
        return b"%d" % client.session  # all that a client knows of its login

    def attach(self, fd: int, baggage: bytes) -> Client:
        session = int(baggage)  # first: if it is nonsense, there is nothing to undo
        client = self.client(adopt(fd))
        client.session = session
        return client

    # Lending again.

    def is_clean(self, client: Client) -> bool:
        """Cheap, and no I/O: this is asked at every return."""
        if client.sock is None or client.asking or client.buffer:
            return False
        if client.sock.gettimeout() != ANSWER_WITHIN:
            client.sock.settimeout(ANSWER_WITHIN)  # a user had set another
        return True

    def tidy(self, client: Client) -> None:
        """What is_clean() refuses cannot be mended here: half an answer is still to come. So the session is closed."""
        raise ConnectionError("an answer was not read to its end")

    def transferred(self, client: Client) -> None:
        self.reset(client)

    def reset(self, client: Client) -> None:
        client.ask("RESET")

    def ping(self, client: Client) -> None:
        client.ask("ECHO ping")
