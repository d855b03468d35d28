"""uvicorn for real: four workers on redis.asyncio and raw sockets, and clients that go away in the middle of their requests.

The application is examples/asgi_redis, started as its docstring says. Redis' own list of clients is the judge.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemons import free_port, listens, needs
from tests.helpers.processes import die_with_parent, ended, eventually
from tests.helpers.redis import Server, redis_server
from tests.helpers.site import get
from tests.helpers.storm import Peak

EXAMPLE = Path(__file__).parent.parent / "examples" / "asgi_redis"
CAP = 3
WORKERS = 4

pytestmark = [
    needs("redis-server"),
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed"),
]


@contextlib.contextmanager
def site(server: Server, path: str, home: Path) -> Iterator[int]:
    """``mppool run -- uvicorn ...`` as an operator would start it: its port. Ended by SIGTERM, with exit code 0."""
    port = free_port()
    uvicorn = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        str(EXAMPLE),
        "--workers",
        str(WORKERS),
        "--port",
        str(port),
        "--log-level",
        "warning",
        "asgi_app:app",
    ]
    environment = {**os.environ, "REDIS_URL": server.url, "REDIS_CONNECTIONS": str(CAP)}
    log = home / "uvicorn.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "mppool", "run", "--socket", path, "--", *uvicorn]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, preexec_fn=die_with_parent)
    try:
        eventually(lambda: process.poll() is not None or listens(port), 20, what="uvicorn listens")
        assert process.poll() is None, log.read_text()
        yield port
        assert "not the reply" not in log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        ended(process)


def leave(port: int, path: str, after: float) -> None:
    """Ask, and go away without waiting for the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(after)


@pytest.mark.storm
def test_clients_that_go_away_never_poison_a_session(tmp_path: Path, socket_path: str, request: pytest.FixtureRequest) -> None:
    """Hundreds of requests are cancelled half-way; every one that is answered gets its own word, and Redis never has more connections than the caps."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    until = 0.0

    def visit(port: int, number: int) -> None:
        chance = random.Random(number)
        n = 0
        while time.monotonic() < until:
            n += 1
            word = f"v{number}-{n}"
            path = f"/{chance.choice(('redis', 'raw'))}/{word}?ms={chance.choice((0, 0, 5, 10))}"
            try:
                if chance.random() < 0.6:
                    leave(port, path, chance.choice((0.0, 0.001, 0.003, 0.008)))
                    outcomes["left"] += 1
                else:
                    status, text = get(port, path)
                    outcomes[f"{status}"] += 1
                    if status != 200 or text != word:
                        failures.append(f"{path}: {status} {text!r}")
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{path}: {error!r}")

    with redis_server(tmp_path) as server, site(server, socket_path, tmp_path) as port:
        eventually(lambda: get(port, "/redis/x") == (200, "x") and get(port, "/raw/x") == (200, "x"), 20)
        made = server.made()
        until = time.monotonic() + float(request.config.getoption("--storm-seconds"))
        with Peak(server.count) as peak:
            visitors = [threading.Thread(target=visit, args=(port, number)) for number in range(12)]
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join()
            for n in range(20):
                assert get(port, f"/redis/after{n}") == (200, f"after{n}")
                assert get(port, f"/raw/after{n}") == (200, f"after{n}")
        cancelled = server.made() - made
        print(f"\n{dict(outcomes)}, connections closed by cancellations about {cancelled}, peak {peak.most} of {peak.samples} looks")
        assert failures == []
        assert peak.most <= 2 * CAP
        assert outcomes["left"] > 200
        assert outcomes["200"] > 100
