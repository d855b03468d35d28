"""How a session is dialed, in place of psycopg's ``_connect_gen``, and what is known of one that libpq does not know."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from mppool.drivers.postgres import is_greeting
from mppool.drivers.psycopg.conninfo import effective, for_dialing, place_of, residence_by
from mppool.drivers.psycopg.libpq import Waits, by_itself, connected, offers_tls, relayed, remember
from mppool.states import Residence

__all__ = ["Login", "movable_gen"]


class Login(NamedTuple):
    """What we know of a connection and libpq does not: the recorded greeting, and where the server is."""

    greeting: bytes = b""
    family: int = 0
    address: Any = None
    host: str = ""
    residence: Residence = Residence.tls

    def __repr__(self) -> str:
        return f"Login({self.host!r}, {self.address!r}, {self.residence.name})"  # the greeting holds a secret


def movable_gen(cls: Any, plain: Callable[..., Any], conninfo: str, options: dict[str, Any]) -> Waits[Any]:
    """One attempt to connect to one place. ``plain`` is psycopg's own, for what cannot move. Raises OperationalError."""
    params = effective(conninfo)
    family, address, host = place_of(params)
    mode = "" if family == socket.AF_UNIX else params.get("sslmode") or "prefer"
    residence = residence_by(params, family)
    if residence is Residence.moves:
        where = f'on socket "{address}"' if family == socket.AF_UNIX else f'at "{host}", port {address[1]}'
        try:
            real = yield from opened(family, address, params, may_secure=mode == "prefer")
        except OSError as error:
            raise psycopg.OperationalError(f"connection failed: connection to server {where} failed: {error}") from error
        if real is not None:
            with real:  # libpq has a duplicate in the end, or nobody
                try:
                    pgconn, greeting = yield from relayed(for_dialing(conninfo, params.get("password")), real, where)
                except psycopg.OperationalError:
                    if mode != "allow":
                        raise  # else libpq goes on with TLS
                else:
                    return known(cls(pgconn), Login(greeting, family, address, host, Residence.moves if is_greeting(greeting) else Residence.no_adapter))
    conn = yield from by_itself(plain(conninfo, **options))
    secured = Residence.tls if conn.pgconn.ssl_in_use else Residence.no_adapter
    return known(conn, Login(residence=residence if residence is Residence.gssapi else secured))


def opened(family: int, address: Any, params: dict[str, str], *, may_secure: bool) -> Waits[socket.socket | None]:
    """A connection for a login in the clear; None if it ``may_secure``, and the server offers TLS. Raises OSError."""
    real = yield from connected(family, address, params)
    try:
        if may_secure and (yield from offers_tls(real)):
            real.close()
            return None
    except BaseException:
        real.close()
        raise
    return real


def known(conn: Any, login: Login) -> Any:
    remember(conn)
    conn._mppool = login
    return conn
