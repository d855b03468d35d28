"""A real MariaDB for tests: a directory of its own, small and careless with its disk."""

from __future__ import annotations

import contextlib
import getpass
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest

from tests.helpers.certificates import self_signed
from tests.helpers.daemons import daemon, free_port, needs
from tests.helpers.processes import eventually

__all__ = ["MariaDB", "mariadb", "needs_mariadb", "sessions_of"]

needs_mariadb = needs("mariadbd")

SMALL = (
    "--innodb-buffer-pool-size=8M",
    "--innodb-log-file-size=4M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--performance-schema=0",
    "--skip-name-resolve",
    "--max-connections=200",
)


class MariaDB:
    """One server, which can be restarted. Its user ``app`` may everything in databases ``shop`` and ``other`` and needs a password; ``root`` needs none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.socket = str(directory / "s.sock")
        self._running: contextlib.AbstractContextManager[Any] | None = None
        # A directory for temporary tables, too: two installs at once delete each other's in a shared one.
        own = ["--no-defaults", f"--datadir={directory}/data", f"--tmpdir={directory}", f"--user={getpass.getuser()}"]
        install = ["mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db", "--innodb-log-file-size=4M"]
        done = subprocess.run(install, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        self.command = ["mariadbd", *own, "--bind-address=127.0.0.1", *SMALL]
        key, certificate = self_signed(directory)
        self.command += [f"--ssl-key={key}", f"--ssl-cert={certificate}"]
        self.command += [f"--port={self.port}", f"--socket={self.socket}", f"--pid-file={directory}/pid"]

    @property
    def login(self) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": self.port, "user": "app", "password": "secret", "database": "shop", "ssl_disabled": True}

    def start(self) -> None:
        self._running = daemon(self.command, self.port, self.directory / "log")
        self._process = self._running.__enter__()
        eventually(self._answers, what="MariaDB does not answer")

    def _answers(self) -> bool:
        """Does it listen on its Unix socket, too? (PyMySQL leaves its own open if it does not.)"""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.socket) == 0

    def stop(self) -> None:
        """In good order: the server says goodbye to its clients."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    def root(self) -> Any:
        """A connection that looks on."""
        return pymysql.connect(unix_socket=self.socket, user="root", ssl_disabled=True, autocommit=True)

    def ask(self, statement: str, *args: Any) -> Any:
        with contextlib.closing(self.root()) as conn, conn.cursor() as cursor:
            cursor.execute(statement, args or None)
            return cursor.fetchall()


def sessions_of(cursor: Any, user: str = "app") -> list[int]:
    """The server's own list of the user's connections."""
    cursor.execute("select id from information_schema.processlist where user = %s order by id", (user,))
    return [row[0] for row in cursor.fetchall()]


@contextlib.contextmanager
def mariadb() -> Iterator[MariaDB]:
    with tempfile.TemporaryDirectory(prefix="mppool-mariadb-") as directory:
        server = MariaDB(Path(directory))
        server.start()
        try:
            server.ask("create database shop")
            server.ask("create database other")
            server.ask("create user app@'127.0.0.1' identified by 'secret'")
            server.ask("grant all on shop.* to app@'127.0.0.1'")
            server.ask("grant all on other.* to app@'127.0.0.1'")
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def database() -> Iterator[MariaDB]:
    with mariadb() as server:
        yield server
