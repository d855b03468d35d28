"""The README's code is run as it stands, but for the address."""

from __future__ import annotations

import contextlib
import io
import re
import socketserver
import threading
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


class Pong(socketserver.StreamRequestHandler):
    """Answers PING, as Redis does."""

    def handle(self) -> None:
        while self.rfile.readline():
            self.wfile.write(b"+PONG\r\n")


def test_the_first_example_prints_what_it_says(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first screen's code runs, and prints the output in its comment."""
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.setenv("MPPOOL_BROKER", socket_path)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Pong) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names: dict[str, object] = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code[1].replace("6379", str(server.server_address[1])), names)
        names["pool"].close()  # type: ignore[attr-defined]
        server.shutdown()
    assert f"# {printed.getvalue().strip()}" in code[1]
