"""Who one is at the server, and how one becomes that again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import redis
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection

from mppool.drivers.base import policy
from mppool.drivers.redis.connections import pooled
from mppool.options import Target

__all__ = ["Login", "greeted", "prepare_parser"]


class Login:
    """Where a server is and who one is there, from what redis-py's connections are told."""

    def __init__(self, connection_class: Any, kwargs: Mapping[str, Any], on_transfer: str) -> None:
        self.connection_class = connection_class
        self.kwargs = dict(kwargs)
        self.on_transfer = policy(on_transfer, "reset", "trust")
        self.is_tls = issubclass(connection_class, (redis.SSLConnection, AsyncSSLConnection))
        path = self.kwargs.get("path")
        self.target = Target("unix", path) if path else Target("tcp", self.kwargs.get("host", "localhost"), int(self.kwargs.get("port", 6379)))
        self.db = int(self.kwargs.get("db") or 0)

    def digest(self) -> str:
        """Of everything that the server knows a session by. What only the client minds (decoding, timeouts, retries) is not in it."""
        kwargs, provider = self.kwargs, self.kwargs.get("credential_provider")
        who = [kwargs.get("username"), kwargs.get("password"), kwargs.get("client_name"), type(provider).__qualname__ if provider is not None else None]
        how = [kwargs.get("protocol"), self.is_tls, kwargs.get("redis_connect_func") is not None]
        return hashlib.blake2b(json.dumps([str(self.target), self.db, who, how], default=str).encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def pooled(self) -> type[Any]:
        return pooled(self.connection_class)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """What every new connection would look up in the metadata of installed packages, ten times slower than attaching."""
        if {"driver_info", "lib_name", "lib_version"} & self.kwargs.keys():
            return {}
        try:
            from redis.driver_info import DriverInfo
        except ImportError:  # before redis-py 7
            return {}
        return {"driver_info": DriverInfo()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("pooled", "defaults")}

    def make(self) -> Any:
        """A connection object that is not connected."""
        return self.pooled(**self.defaults, **self.kwargs)

    def commands(self, session: Any) -> list[tuple[Any, ...]]:
        """RESET and the login again, but for a login of the user's own."""
        if session.redis_connect_func is not None:
            return [("RESET",)]
        provider = session.credential_provider
        if provider is not None:
            login = tuple(provider.get_credentials())
        elif session.username or session.password:
            login = (session.username, session.password) if session.username else (session.password or "",)
        else:
            login = ()
        commands: list[tuple[Any, ...]] = [("RESET",)]
        if is_resp3(session):
            full = ("default", *login) if len(login) == 1 else login
            commands.append(("HELLO", 3, *(("AUTH", *full) if full else ())))
        elif login:
            commands.append(("AUTH", *login))
        if session.client_name:
            commands.append(("CLIENT", "SETNAME", session.client_name))
        if session.db:
            commands.append(("SELECT", session.db))
        return commands


def is_resp3(session: Any) -> bool:
    return str(session.protocol) == "3"


def greeted(session: Any, replies: list[Any]) -> None:
    """The login's replies have come; what redis-py keeps of a connection is as after a login."""
    if is_resp3(session):
        session.handshake_metadata = replies[1]
    forget = getattr(session, "_reset_himport_state", None)
    if forget is not None:
        forget()


def prepare_parser(session: Any) -> None:
    """As redis-py does at a login, but without one."""
    if is_resp3(session):
        from redis._parsers import _AsyncRESP2Parser, _AsyncRESP3Parser, _RESP2Parser, _RESP3Parser

        for old, new in ((_RESP2Parser, _RESP3Parser), (_AsyncRESP2Parser, _AsyncRESP3Parser)):
            if isinstance(session._parser, old) and not isinstance(session._parser, new):
                session.set_parser(new)
    session._parser.on_connect(session)
