"""Where a connection string leads. libpq is asked, which knows its environment, service files and password files."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mppool.states import Residence

__all__ = ["UNCHECKED", "effective", "for_adopting", "for_dialing", "place_of", "residence_by"]

PLACE = ("host", "hostaddr", "port", "sslmode", "gssencmode", "connect_timeout", "load_balance_hosts", "passfile", "password", "sslnegotiation")
UNCHECKED = {"channel_binding": "disable", "require_auth": "", "target_session_attrs": "any", "requirepeer": "", "passfile": os.devnull + "/none"}
"""At an adoption there is nothing to check, whatever the environment says."""
TOLD = ("user", "dbname", "options", "application_name", "fallback_application_name", "client_encoding")
"""What users may ask libpq for, of an adopted connection, too."""

_known = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())


def effective(conninfo: str) -> dict[str, str]:
    """All that libpq would use for a connection, also what it finds elsewhere; of several servers the first one's password.

    Nothing is connected: the question is spoilt, and refused after everything was looked up.
    """
    spoilt = pq.PGconn.connect_start(make_conninfo(conninfo, target_session_attrs="nothing").encode())
    try:
        found = {option.keyword.decode(): option.val.decode() for option in spoilt.info if option.val}
        del found["target_session_attrs"]
        for name, value in (("host", spoilt.host), ("port", spoilt.port), ("password", spoilt.password)):
            if value:
                found.setdefault(name, value.decode())
    finally:
        spoilt.finish()
    given = conninfo_to_dict(conninfo).get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS")
    return {**found, "target_session_attrs": str(given)} if given else found


def place_of(params: Mapping[str, Any]) -> tuple[int, Any, str]:
    """Family, address and name of the one place that these parameters lead to; psycopg has resolved names, but for those in service files."""
    host, port = str(params.get("host") or ""), int(params.get("port") or 5432)
    at = str(params.get("hostaddr") or host)
    if at.startswith(("/", "@")):
        path = f"{at}/.s.PGSQL.{port}"
        return socket.AF_UNIX, f"\0{path[1:]}" if at.startswith("@") else path, host
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    try:
        socket.inet_pton(family, at)
        return family, (at, port), host or at
    except OSError:
        family, _, _, _, address = socket.getaddrinfo(at, port, type=socket.SOCK_STREAM)[0]
        return family, address, host or at


def for_dialing(conninfo: str, password: str | None) -> str:
    """Connection string of everything but where to connect, for a start-up on a Stage. What else libpq finds by itself is for it to find."""
    left = {name: value for name, value in conninfo_to_dict(conninfo).items() if name not in PLACE}
    return make_conninfo("", **left, **({"password": password} if password else {}))


def for_adopting(params: Mapping[str, str]) -> str:
    """The same for a start-up that is shown a login: what libpq tells those who ask, and nothing that it would look up."""
    told = {name: params[name] for name in TOLD if name in params}
    return make_conninfo("", **told, password=params.get("password") or "-", **{name: value for name, value in UNCHECKED.items() if name in _known})


def residence_by(params: Mapping[str, Any], family: int) -> Residence:
    """Do sessions with these parameters move, as far as can be known before the server is asked?"""
    if family == socket.AF_UNIX:
        if params.get("requirepeer"):
            return Residence.no_adapter  # it looks at its own socket
    elif params.get("gssencmode") == "require":
        return Residence.gssapi
    elif params.get("sslmode") in ("require", "verify-ca", "verify-full"):
        return Residence.tls
    return Residence.moves if pq.version() >= 140000 else Residence.no_adapter  # which knows abstract names
