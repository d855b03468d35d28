"""The examples, run for real: they say that all is well, and leave nothing behind however they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mppool.kernel import memory
from tests.helpers.leftovers import names
from tests.helpers.nginx import needs_nginx, nginx
from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import eventually
from tests.helpers.site import Load, site
from tests.helpers.storm import Peak

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--workers", "4", "--clients", "8", "--seconds", "2.5", "--kills", "2")


class Example:
    """An example in a session of its own. Its runtime directory is made in ours, which is how its processes and names are found."""

    def __init__(self, home: Path, script: str, *options: str) -> None:
        self.home = home
        home.mkdir()
        self.output = home.parent / "output"
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / script), *options],
                env={**os.environ, "TMPDIR": str(home)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.directory = eventually(lambda: [entry.name for entry in os.scandir(home) if entry.is_dir()], what="its runtime directory")[0]

    def said(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        """All that have our directory in their environment: children, brokers and keepers alike. Zombies have none."""
        return [process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get("TMPDIR") == str(self.home)]

    def names(self) -> list[str]:
        """In /dev/shm."""
        return names(str(self.home / self.directory / "broker.sock"))

    def ends(self) -> int:
        code = self.process.wait(40)
        eventually(lambda: not self.processes(), what="processes left over")
        return code

    def signal(self, number: int) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with one that it watched
                process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        for name in self.names():
            os.unlink(f"{memory.SHM}/{name}")


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's own: with that the path of a broker's socket would be too long."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "home")


@pytest.fixture
def demo(home: Path) -> Iterator[Example]:
    demo = Example(home, "prefork_echo.py", *SMALL)
    yield demo
    demo.kill()


@pytest.fixture
def ten_consumers(home: Path) -> Iterator[Example]:
    example = Example(home, "ten_consumers.py")
    yield example
    example.kill()


def test_the_demo_holds_what_it_promises(demo: Example) -> None:
    """Workers and broker killed under load: the cap holds, nothing is crossed or lost, nothing is left."""
    assert demo.ends() == 0, demo.said()
    said = demo.said()
    found = dict(re.findall(r"^([a-z ]+): +(\d+)", said, re.MULTILINE))
    assert found["peak connections"] in ("3", "4")
    assert found["crossed replies"] == found["failed requests"] == found["workers that died by themselves"] == "0"
    assert found["dead workers not settled"] == found["permits lost"] == "0"
    assert found["workers at the end"] == "4"
    assert int(found["requests"]) > 100
    assert len(re.findall(r"worker \d+ killed: all it had settled (?:after|not within) [\d.]+ ms, all sessions leased at once after [\d.]+ ms", said)) == 2
    assert re.search(r"dials: +\d+ \([12] sessions ended with a killed worker\)", said)
    assert "broker killed: all sessions leased at once" in said
    assert re.search(r"broker \d+ started: it answers after [\d.]+ ms", said)
    assert said.endswith("left behind: nothing\nall is well\n")
    assert demo.names() == os.listdir(demo.home) == []


def test_ten_consumers_wait_and_are_woken(ten_consumers: Example) -> None:
    """Everybody is served, whoever waits is woken, the broken connection is replaced, five is never exceeded."""
    assert ten_consumers.ends() == 0, ten_consumers.said()
    said = ten_consumers.said()
    waited = re.findall(r"^consumer (\d+) waits$", said, re.MULTILINE)
    woken = re.findall(r"^consumer (\d+) is woken after \d+ ms and has connection \d$", said, re.MULTILINE)
    assert len(waited) >= 5  # ten, unless some come so late that others have gone
    assert sorted(waited) == sorted(woken)
    assert len(woken) + len(re.findall(r"has at once connection \d$", said, re.MULTILINE)) == 20
    assert "{'peer_closed': 1}; the server has connections [1, 3, 4, 5, 6], had 5 at most and 6 in all" in said
    assert ten_consumers.names() == os.listdir(ten_consumers.home) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_nothing(demo: Example, number: signal.Signals) -> None:
    """In mid-load: no process, no socket, no directory, no name in /dev/shm remains, not even after SIGKILL."""
    eventually(lambda: "nobody was killed yet" in demo.said(), what="load")
    assert demo.names() != []
    demo.process.send_signal(number)
    assert demo.ends() == (-number if number == signal.SIGKILL else 128 + number)
    assert demo.names() == os.listdir(demo.home) == []
    assert "Traceback" not in demo.said()


@pytest.mark.alone
def test_a_demo_killed_as_a_group_leaves_no_process(demo: Example) -> None:
    """Without the one that cleans up: broker and keeper end, too, and take their sockets along; what names are left, ``mppool gc`` removes."""
    eventually(lambda: "nobody was killed yet" in demo.said(), what="load")
    os.killpg(demo.process.pid, signal.SIGKILL)
    assert demo.ends() == -signal.SIGKILL
    assert os.listdir(demo.home / demo.directory) == []
    collect_garbage()
    assert demo.names() == []


@pytest.mark.alone
def test_gc_removes_what_is_left_when_all_are_killed(demo: Example) -> None:
    """Every process killed at once, broker and keeper among them: names are left, and ``mppool gc`` removes them."""
    eventually(lambda: "nobody was killed yet" in demo.said(), what="load")
    for number in (signal.SIGSTOP, signal.SIGKILL):
        demo.signal(number)
    assert demo.ends() == -signal.SIGKILL
    left = {name.removeprefix("sem.").partition(".")[0] for name in demo.names()}
    assert len(left) == 1
    assert left <= collect_garbage()
    assert demo.names() == []


@needs_nginx
@pytest.mark.storm
def test_gunicorn_workers_share_connections_to_a_service(socket_path: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Six workers on three connections, killed all the time: nginx never counts more (one more while a FIN travels), no reply crosses."""
    cap, seconds = 3, float(request.config.getoption("--storm-seconds")) / 2

    def ask(get: Callable[[str], tuple[int, str]], client: int, n: int) -> None:
        status, text = get(f"/echo?nonce=c{client}-{n}")
        assert (status, text.split()[1:]) == (200, [f"c{client}-{n}"])
        assert get("/sorry")[0] == 503

    with (
        nginx() as web,
        site(EXAMPLES / "requests_app", "workers.py", "front:app", socket_path, tmp_path, 6, UPSTREAM=web.url, UPSTREAM_CONNECTIONS=str(cap)) as it,
    ):
        with Load(it, ask) as load, Peak(web.connections) as peak:
            it.kill_workers(seconds)
        assert peak.most <= cap + 1
        status, said = it.get("/")
        assert (status, json.loads(said)["max_size"]) == (200, cap)
        assert json.loads(said)["pid"] in [worker.pid for worker in it.workers()]
    assert load.wrong == []
    assert sum(load.rounds) > 10


def collect_garbage() -> set[str]:
    """Run ``mppool gc``; the pools whose names it removed."""
    done = subprocess.run([sys.executable, "-m", "mppool", "gc", "--json"], stdout=subprocess.PIPE, check=True, timeout=10)
    return {removed["pool"] for removed in json.loads(done.stdout)["removed"]}


@needs_postgres
def test_prefork_psycopg(database: Database, socket_path: str) -> None:
    """Twelve workers on four connections: never a fifth, nobody starves, and a backend each for the whole run."""
    command = [sys.executable, str(EXAMPLES / "prefork_psycopg.py"), database.conninfo]
    run = subprocess.run([sys.executable, "-m", "mppool", "run", "--socket", socket_path, "--", *command], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^  \d+  active +prefork worker \d+$", run.stdout, re.MULTILINE)
    assert re.search(r"^12 workers made \d+ transactions, \d+ to \d+ each, on 4 backends, at most 4 at a time$", run.stdout, re.MULTILINE)
    assert database.logins() == 5, "four, and the one that watches"
