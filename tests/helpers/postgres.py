"""A real PostgreSQL for tests: SCRAM logins, its data in a directory of its own, a database and a login for each test."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.helpers.daemons import daemon, free_port
from tests.helpers.processes import eventually

__all__ = ["Database", "Login", "Postgres", "needs_postgres", "postgres"]

ADMIN_PASSWORD = "admin-secret"
OPTIONS = {
    "fsync": "off",  # what it writes survives it, if not the machine; commits do write, or a restart could undo the role a test has just made
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "superuser_reserved_connections": "5",
    "log_connections": "on",
    "log_line_prefix": "%p ",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
    "autovacuum": "off",
}


def program(name: str) -> str:
    """Debian keeps those of each version in a directory of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name) or ""


needs_postgres = pytest.mark.skipif(not program("initdb"), reason="PostgreSQL is not installed")
_numbers = itertools.count(1)


class Postgres:
    """A running server. ``options`` are settings of postgresql.conf."""

    def __init__(self, home: Path, **options: str) -> None:
        self.home = home
        self.data = home / "data"
        self.log = home / "log"
        self.port = free_port()
        self.options = {**OPTIONS, "port": str(self.port), **options}
        self.user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        self._running = contextlib.ExitStack()

    def initialize(self) -> None:
        if self.user is not None:
            shutil.chown(self.home, self.user)
        secret = self.home / "secret"
        secret.write_text(ADMIN_PASSWORD)
        secret.chmod(0o644)
        command = [program("initdb"), "-D", str(self.data), "-U", "admin", "-A", "scram-sha-256", "-N", "-E", "UTF8", "--locale=C", f"--pwfile={secret}"]
        subprocess.run(command, user=self.user, group=self.user, check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        settings = [part for name, value in self.options.items() for part in ("-c", f"{name}={value}")]
        self.process = self._running.enter_context(
            daemon([program("postgres"), "-D", str(self.data), *settings], self.port, self.log, user=self.user, stop="SIGQUIT")
        )
        eventually(self._answers, what="PostgreSQL does not answer")

    def _answers(self) -> bool:
        try:
            self.ask("select 1")
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """At once: every session ends."""
        self._running.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def ask(self, sql: str, *parameters: Any, dbname: str = "postgres") -> list[tuple[Any, ...]]:
        """As the administrator, in a session of its own."""
        with psycopg.connect(self.conninfo(dbname, "admin", ADMIN_PASSWORD), autocommit=True, application_name="judge") as conn:
            cursor = conn.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def conninfo(self, dbname: str, user: str, password: str) -> str:
        return f"host=127.0.0.1 port={self.port} dbname={dbname} user={user} password={password}"


class Database:
    """A database and a login of a test's own; the server is the judge of what goes on there."""

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.name = self.user = f"app{next(_numbers)}"
        self.password = f"secret of {self.user}".replace(" ", "-")
        self.port = server.port
        self.conninfo = server.conninfo(self.name, self.user, self.password)
        server.ask(f"create role {self.user} login password '{self.password}'")
        server.ask(f"create database {self.name} owner {self.user}")
        self._judge = self._connect()

    def ask(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """As the administrator, in this database, in a session of its own that no count includes."""
        return self.server.ask(sql, *parameters, dbname=self.name)

    def backends(self) -> list[dict[str, Any]]:
        """pid, state and query of this login's backends, as pg_stat_activity has them. One session of the judge's own asks, again and again."""
        try:
            rows = self._activity()
        except psycopg.OperationalError:  # the server was restarted
            self._judge.close()
            self._judge = self._connect()
            rows = self._activity()
        return [{"pid": pid, "state": state, "query": query} for pid, state, query in rows]

    def _activity(self) -> list[tuple[Any, ...]]:
        return self._judge.execute("select pid, state, query from pg_stat_activity where usename = %s", (self.user,)).fetchall()

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.server.conninfo("postgres", "admin", ADMIN_PASSWORD), autocommit=True)

    def count(self) -> int:
        """How many backends this login has."""
        return len(self.backends())

    def logins(self) -> int:
        """How often this login logged in, by the server's log."""
        return self.server.log.read_text(errors="replace").count(f"connection authorized: user={self.user} ")

    def drop(self) -> None:
        self._judge.close()
        self.server.ask(f"drop database {self.name} with (force)")
        self.server.ask(f"drop role {self.user}")


class Login(Database):
    """A login of a test's own, with a schema of its own in a database that all of these share: made ten times as fast."""

    def __init__(self, server: Postgres, user: str = "") -> None:
        self.server = server
        self.name = "shared"
        self.user = user or f"app{next(_numbers)}"
        self.password = f"secret-of-{self.user}"
        self.port = server.port
        self.conninfo = server.conninfo(self.name, self.user, self.password)
        if not server.ask("select 1 from pg_database where datname = %s", self.name):
            server.ask(f"create database {self.name}")
        self.ask(f"create role {self.user} login password '{self.password}'")
        self.ask(f"create schema authorization {self.user}")
        self.ask(f"grant temporary on database {self.name} to {self.user}")
        self._judge = self._connect()

    def ask(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """As the administrator, who looks into this login's schema."""
        with psycopg.connect(self.server.conninfo(self.name, "admin", ADMIN_PASSWORD), autocommit=True, options=f"-c search_path={self.user}") as conn:
            cursor = conn.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def drop(self) -> None:
        self._judge.close()
        self.ask("select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = %s", self.user)
        self.ask(f"drop owned by {self.user} cascade")
        self.ask(f"drop role {self.user}")


@contextlib.contextmanager
def postgres(**options: str) -> Iterator[Postgres]:
    """A server with these settings; afterwards nothing of it is left."""
    home = Path(tempfile.mkdtemp(prefix="mppool-postgres-"))
    home.chmod(0o755)
    server = Postgres(home, **options)
    try:
        server.initialize()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home)
