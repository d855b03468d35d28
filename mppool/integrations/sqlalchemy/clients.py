"""Which clients' connections can move between processes, and what makes two connections interchangeable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mppool.drivers.base import DriverBase
from mppool.integrations import names

__all__ = ["Client", "client_for", "digest_of", "name_for"]

Client = Callable[[Sequence[Any], Mapping[str, Any], str], DriverBase]
"""Makes the driver for what a dialect would pass to its DBAPI's ``connect``, and what is to happen when a session changes process."""

SECRETS = frozenset({"password", "passwd", "sslpassword", "ssl_key_password"})


def client_for(dialect: object) -> Client | None:
    """How connections of this dialect are adopted; None: they cannot be, and stay with the process that made them."""
    clients = ASYNC_CLIENTS if getattr(dialect, "is_async", False) else CLIENTS
    return clients.get((getattr(dialect, "name", ""), getattr(dialect, "driver", "")))


def psycopg_client(arguments: Sequence[Any], options: Mapping[str, Any], on_transfer: str) -> DriverBase:
    from mppool.drivers.psycopg import PsycopgDriver

    return PsycopgDriver(*arguments, kwargs=dict(options), on_transfer=on_transfer)


def async_psycopg_client(arguments: Sequence[Any], options: Mapping[str, Any], on_transfer: str) -> DriverBase:
    from mppool.drivers.psycopg import AsyncPsycopgDriver

    return AsyncPsycopgDriver(*arguments, kwargs=dict(options), on_transfer=on_transfer)


def pg8000_client(arguments: Sequence[Any], options: Mapping[str, Any], on_transfer: str) -> DriverBase:
    import pg8000

    from mppool.drivers.pg8000 import Pg8000Driver

    return Pg8000Driver(*arguments, **options, on_transfer=on_transfer, connection_class=pg8000.Connection)


def pymysql_client(arguments: Sequence[Any], options: Mapping[str, Any], on_transfer: str) -> DriverBase:
    from mppool.drivers.pymysql import PyMySQLDriver

    return PyMySQLDriver(**options, on_transfer=on_transfer)


CLIENTS: dict[tuple[str, str], Client] = {
    ("postgresql", "psycopg"): psycopg_client,
    ("postgresql", "pg8000"): pg8000_client,
    ("mysql", "pymysql"): pymysql_client,
    ("mariadb", "pymysql"): pymysql_client,
}


ASYNC_CLIENTS: dict[tuple[str, str], Client] = {
    ("postgresql", "psycopg"): async_psycopg_client,
    ("postgresql", "psycopg_async"): async_psycopg_client,
}


def digest_of(dialect: object, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A digest of server, login and options; not of the password, which does not make a session another one."""
    plain = sorted((name, value) for name, value in options.items() if name not in SECRETS and is_plain(value))
    return names.digest(getattr(dialect, "name", ""), getattr(dialect, "driver", ""), list(map(str, arguments)), plain)


def is_plain(value: object) -> bool:
    """Objects such as psycopg's ``context`` are a process's own, and each process sets them anew on what it adopts."""
    return value is None or isinstance(value, (str, bytes, int, float, bool, tuple, list, dict))


def name_for(arguments: Sequence[Any], options: Mapping[str, Any], digest: str) -> str:
    """A pool's name if none is given: engines with the same server, login and options share one."""
    database = options.get("dbname") or options.get("database") or options.get("db") or ""
    host = options.get("host") or options.get("unix_sock") or options.get("unix_socket") or ""
    return names.readable(f"{database}@{host}" if host else str(database or (arguments[0] if len(arguments) == 1 else "")), digest)
