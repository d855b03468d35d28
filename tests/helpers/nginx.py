"""A real nginx for tests: it echoes nonces, says on which connection it was asked, and counts its connections."""

from __future__ import annotations

import contextlib
import http.client
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.certificates import self_signed
from tests.helpers.daemons import daemon, free_port, needs

__all__ = ["Nginx", "needs_nginx", "nginx"]

needs_nginx = needs("nginx")

CONFIGURATION = """
daemon off;
worker_processes 1;
{user}
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port} backlog=511;
        location /echo {{ return 200 "$connection $arg_nonce"; }}
        location /big {{ root {home}; }}
        location /slow {{ alias {home}/big; limit_rate 1m; }}
        location /close {{ keepalive_timeout 0; return 200 "$connection $arg_nonce"; }}
        location /moved {{ return 302 /echo?nonce=moved; }}
        location /sorry {{ return 503 "$connection"; }}
    }}
    server {{
        listen 127.0.0.1:{short};
        keepalive_requests 7;
        location /echo {{ return 200 "$connection $arg_nonce"; }}
    }}
    server {{
        listen 127.0.0.1:{secure} ssl;
        ssl_certificate {home}/cert.pem;
        ssl_certificate_key {home}/key.pem;
        location /big {{ root {home}; }}
        location /slow {{ alias {home}/big; limit_rate 1m; }}
        location /close {{ keepalive_timeout 0; return 200 "$connection $arg_nonce"; }}
        location /echo {{ return 200 "$connection $arg_nonce"; }}
    }}
    server {{
        listen 127.0.0.1:{status};
        location / {{ stub_status; }}
    }}
}}
"""


class Nginx:
    """``url`` for ordinary use; ``short`` closes each connection after seven requests; ``secure`` is https, with ``certificate``."""

    def __init__(self, home: Path) -> None:
        self.port, short, secure, self._status = free_port(), free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.short = f"http://127.0.0.1:{short}"
        self.secure = f"https://127.0.0.1:{secure}"
        _, self.certificate = self_signed(home)
        (home / "big").mkdir()
        (home / "big" / "file").write_bytes(b"0123456789abcdef" * 200_000)
        text = CONFIGURATION.format(
            home=home, port=self.port, short=short, secure=secure, status=self._status, user="user root;" if home.owner() == "root" else ""
        )
        (home / "nginx.conf").write_text(text)
        self.command = ["nginx", "-p", str(home), "-c", str(home / "nginx.conf")]
        self._judge: http.client.HTTPConnection | None = None

    def connections(self) -> int:
        """How many there are now, as nginx counts them, without the judge's own."""
        if self._judge is None:
            self._judge = http.client.HTTPConnection("127.0.0.1", self._status)
        self._judge.request("GET", "/")
        found = re.search(rb"Active connections: (\d+)", self._judge.getresponse().read())
        assert found is not None
        return int(found[1]) - 1


@contextlib.contextmanager
def nginx() -> Iterator[Nginx]:
    with tempfile.TemporaryDirectory(prefix="mppool-nginx-") as directory:
        server = Nginx(Path(directory))
        with daemon(server.command, server.port, Path(directory) / "log", stop="SIGTERM"):
            try:
                yield server
            finally:
                if server._judge is not None:
                    server._judge.close()
