from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.cli.shared import ENVIRONMENT, MPPOOL, Start
from tests.helpers.processes import die_with_parent


@pytest.fixture
def start(socket_path: str) -> Iterator[Start]:
    """Start ``mppool ...`` in the background; what is still running afterwards is killed, before ``socket_path`` looks what is left."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([*MPPOOL, *arguments], stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, preexec_fn=die_with_parent))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()  # not read to its end: a child that should have ended may have it, too
