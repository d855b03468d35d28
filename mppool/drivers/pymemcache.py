"""pymemcache: connections to memcached that move among processes. They carry no login and no state; there is nothing to reset.

What must not travel is half of an answer. A ``Client`` closes its socket after most errors by itself; after those that it
does not see (KeyboardInterrupt, gevent.Timeout) the driver knows that an answer is still owed. With ``raw_command`` nobody
can know where the answer ends: the session is asked for its version before anybody else has it.

A command with ``noreply``, pymemcache's default for writes, is not waited for. If memcached cannot understand such a command
at all it may answer all the same, later; that answer is found as unread bytes when the session is next lent, or, if it
comes later still, by the next command on it, which then fails with that error and closes the session.
"""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Callable
from typing import Any

from pymemcache.client.base import Client, normalize_server_spec
from pymemcache.exceptions import MemcacheIllegalInputError, MemcacheUnexpectedCloseError

from mppool.drivers.base import DriverBase
from mppool.drivers.dialer import FOREVER, Dialer, abandon, adopt, dial_failed
from mppool.errors import OptionError
from mppool.options import Target
from mppool.states import Residence

__all__ = ["PymemcacheDriver"]


class PymemcacheDriver(DriverBase):
    """Connections to ``server`` as ``pymemcache.Client(server, **arguments)`` makes them; lends ``client_class`` objects.

    A lent client does not connect again by itself, as pymemcache's otherwise do after an error: that would be outside the cap.
    Without ``connect_timeout`` a dial is given up after 10 s. With ``tls_context`` connections stay with the process that made them.

    Raises OptionError if pymemcache does not take the arguments.
    """

    name = "pymemcache"

    def __init__(self, server: Any, *, client_class: Any = Client, **arguments: Any) -> None:
        if arguments.get("socket_module", socket) is not socket:
            raise OptionError(f"socket_module={arguments['socket_module']!r}: mppool makes the sockets; under gevent, patch the socket module")
        self.client_class = client_class
        self.arguments = arguments
        try:
            model = self._client(server)
        except (TypeError, ValueError, SystemError) as error:
            raise OptionError(f"pymemcache.Client(): {type(error).__name__}: {error}") from error
        self.server = model.server
        self.target = target_of(self.server)
        self.timeout = min(model.timeout or FOREVER, FOREVER)
        self.dialer = Dialer(self.target, model.connect_timeout or 10.0)

    def _client(self, server: Any) -> Any:
        return session_class(self.client_class)(server, **{**self.arguments, "ignore_exc": False})

    def key(self) -> str:
        return f"pymemcache/1 {self.target}{' tls' if self.arguments.get('tls_context') else ''}"

    def dial(self) -> Any:
        client = self._client(self.server)
        client.sock = self.dialer.dial()
        try:
            if client.socket_keepalive is not None:
                for option in ("idle", "intvl", "cnt"):
                    client.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option.upper()}"), getattr(client.socket_keepalive, option))
            if client.tls_context is not None and self.target.kind == "tcp":
                client.sock.settimeout(self.dialer.connect_timeout)
                client.sock = client.tls_context.wrap_socket(client.sock, server_hostname=self.target.host)
            client.sock.settimeout(self.timeout)
        except BaseException as error:
            client.close()
            if isinstance(error, OSError):
                raise dial_failed(self.target, error) from error
            raise
        return client

    def fileno(self, session: Any) -> int:
        return session.sock.fileno() if session.sock is not None else -1

    def residence(self, session: Any) -> Residence:
        return Residence.tls if isinstance(session.sock, ssl.SSLSocket) else Residence.moves

    def attach(self, fd: int, baggage: bytes) -> Any:
        client = self._client(self.server)
        client.sock = adopt(fd)
        client.sock.settimeout(self.timeout)
        return client

    def is_clean(self, session: Any) -> bool:
        """Not closed, no answer owed, and none of unknown length. Puts the timeout back."""
        if session.sock is None or session.answer_owed or session.answer_unsure:
            return False
        if session.sock.timeout != self.timeout:
            session.sock.settimeout(self.timeout)
        return True

    def tidy(self, session: Any) -> None:
        """After a ``raw_command``: does the server answer to what we ask next?"""
        if session.sock is None or session.answer_owed:
            raise MemcacheUnexpectedCloseError
        session.version()
        session.answer_unsure = False

    def ping(self, session: Any) -> None:
        session.version()

    def close(self, session: Any) -> None:
        session.close()

    def abort(self, session: Any) -> None:
        sock, session.sock = session.sock, None
        if sock is not None:
            abandon(sock)

    def forked(self) -> bool:
        return self.dialer.forked() and self.arguments.get("tls_context") is None


@functools.cache
def session_class(client_class: Any) -> Any:
    """``client_class`` with a memory for answers that are owed, and without connections of its own making."""

    class Session(client_class):  # type: ignore[misc]
        answer_owed = False  # a command did not come to its end
        answer_unsure = False  # nobody knows where the last answer ends

        _fetch_cmd = owing(client_class._fetch_cmd)
        _store_cmd = owing(client_class._store_cmd)
        _misc_cmd = owing(client_class._misc_cmd)

        def _connect(self) -> None:
            raise MemcacheUnexpectedCloseError

        def raw_command(self, *args: Any, **kwargs: Any) -> Any:
            self.answer_unsure = True
            return super().raw_command(*args, **kwargs)

    return Session


def owing(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command of ``Client``'s, which says in ``answer_owed`` if it did not come to its end. Illegal input is found before anything is sent."""

    @functools.wraps(command)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.answer_owed = True
        try:
            result = command(self, *args, **kwargs)
        except MemcacheIllegalInputError:
            self.answer_owed = False
            raise
        self.answer_owed = False
        return result

    return noted


def target_of(server: Any) -> Target:
    server = normalize_server_spec(server)
    return Target("unix", server) if isinstance(server, str) else Target("tcp", server[0], int(server[1]))
