"""Where a connection string leads, as libpq would find out if it knew what we do with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg import pq
from psycopg.conninfo import make_conninfo

from mppool.states import Residence

__all__ = ["password_for", "place_of", "residence_by", "with_defaults", "without_place"]

SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # where servers listen that no host is given for


def place_of(params: Mapping[str, Any]) -> tuple[int, Any, str]:
    """Family, address and name of the one place that these parameters lead to, as psycopg resolved it."""
    host, port = str(params.get("host") or ""), int(params.get("port") or 5432)
    at = str(params.get("hostaddr") or host)
    if at.startswith(("/", "@")):
        path = f"{at}/.s.PGSQL.{port}"
        return socket.AF_UNIX, f"\0{path[1:]}" if at.startswith("@") else path, host
    if not at:
        found = next((d for d in SOCKET_DIRECTORIES if os.path.exists(f"{d}/.s.PGSQL.{port}")), SOCKET_DIRECTORIES[0])
        return socket.AF_UNIX, f"{found}/.s.PGSQL.{port}", found
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    try:
        socket.inet_pton(family, at)
        return family, (at, port), host or at
    except OSError:
        family, _, _, _, address = socket.getaddrinfo(at, port, type=socket.SOCK_STREAM)[0]
        return family, address, host or at


def with_defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, and where they say nothing what the environment says."""
    found = {item.keyword.decode(): item.val.decode() for item in pq.Conninfo.get_defaults() if item.val is not None}
    return {**found, **{name: value for name, value in params.items() if value is not None}}


def password_for(params: Mapping[str, Any], host: str, port: int) -> str | None:
    """libpq's own look-up goes by the host, which it does not know here. See "The Password File" in PostgreSQL's documentation."""
    path = Path(params.get("passfile") or Path.home() / ".pgpass")
    try:
        if path.stat().st_mode & 0o077:
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return None
    wanted = ("localhost" if host.startswith("/") else host, str(port), params.get("dbname") or params.get("user"), params.get("user"))
    for line in lines:
        fields = [field.replace("\\:", ":").replace("\\\\", "\\") for field in split_unescaped(line)]
        if len(fields) == 5 and not line.startswith("#") and all(field in ("*", known) for field, known in zip(fields, wanted, strict=False)):
            return fields[4]
    return None


def split_unescaped(line: str) -> list[str]:
    fields, start, at = [], 0, 0
    while at < len(line):
        if line[at] == "\\":
            at += 1
        elif line[at] == ":":
            fields.append(line[start:at])
            start = at + 1
        at += 1
    return [*fields, line[start:]]


PLACE = ("host", "hostaddr", "port", "sslmode", "gssencmode", "connect_timeout", "load_balance_hosts", "passfile", "service", "sslnegotiation")


def without_place(params: Mapping[str, Any], password: str | None = None) -> str:
    """Connection string of everything but where to connect, for a start-up on a Stage."""
    left = {name: value for name, value in params.items() if name not in PLACE}
    if password is not None:
        left.setdefault("password", password)
    return make_conninfo("", **left)


def residence_by(params: Mapping[str, Any], family: int) -> Residence:
    """Do sessions with these parameters move, as far as can be known before the server is asked?"""
    if params.get("gssencmode") == "require":
        return Residence.gssapi
    if params.get("service"):
        return Residence.no_adapter  # where it leads is libpq's secret
    if family != socket.AF_UNIX and params.get("sslmode") in ("require", "verify-ca", "verify-full"):
        return Residence.tls
    return Residence.moves if pq.version() >= 140000 else Residence.no_adapter  # which knows abstract names
