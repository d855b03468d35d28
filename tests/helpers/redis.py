"""A real Redis, and its own list of clients as the judge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.helpers.certificates import self_signed
from tests.helpers.daemons import daemon, free_port

__all__ = ["PASSWORD", "Server", "redis_server", "redis_server_with_tls"]

PASSWORD = "s3cret"


class Server:
    def __init__(self, port: int, directory: Path, tls_port: int = 0) -> None:
        self.port = port
        self.tls_port = tls_port
        self.directory = directory
        self.socket = str(directory / "redis.sock")
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{port}"
        self.judge: Any = redis.Redis(port=port, password=PASSWORD, decode_responses=True, single_connection_client=True, socket_timeout=20)

    def clients(self) -> list[dict[str, str]]:
        """All but the judge."""
        own = str(self.judge.client_id())
        return [client for client in self.judge.client_list() if client["id"] != own]

    def count(self) -> int:
        return len(self.clients())

    def made(self) -> int:
        """Connections that were ever opened."""
        return int(self.judge.info("stats")["total_connections_received"])


@contextlib.contextmanager
def redis_server(directory: Path, *options: str, tls_port: int = 0) -> Iterator[Server]:
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(directory)]
    command += ["--requirepass", PASSWORD, "--unixsocket", str(directory / "redis.sock"), *options]
    with daemon(command, port, directory / "log"):
        server = Server(port, directory, tls_port)
        try:
            yield server
        finally:
            server.judge.close()


@contextlib.contextmanager
def redis_server_with_tls(directory: Path) -> Iterator[tuple[Server, str]]:
    """One that offers TLS as well, and the URL for that, to which options may be added."""
    key, certificate = self_signed(directory)
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    with redis_server(directory, *options) as server:
        yield server, f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}&ssl_check_hostname=false"
