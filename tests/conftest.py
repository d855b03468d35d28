"""Every test has a runtime directory and a server of its own, and must leave nothing behind."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mppool.kernel import memory
from tests.helpers.leftovers import names, processes_of
from tests.helpers.postgres import Database, Postgres, postgres
from tests.helpers.processes import BrokerProcess, broker_process, eventually
from tests.helpers.redis import Server, redis_server
from tests.helpers.server import Judge, judge


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[str]:
    """A broker's socket path in a private directory; afterwards no process, socket or name of it may be left."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    path = str(directory / "b.sock")
    yield path
    try:
        eventually(lambda: not processes_of(path), what="processes left over")
        eventually(lambda: not names(path), what="names left over")
        assert os.listdir(directory) == []
    finally:
        for process in processes_of(path):
            process.send_signal(signal.SIGKILL)
        for name in names(path):
            os.unlink(f"{memory.SHM}/{name}")


@pytest.fixture(autouse=True)
def _beside_others(request: pytest.FixtureRequest) -> Iterator[None]:
    """`mppool gc` takes what any test of this user has left for a moment: a test marked ``alone`` runs while no other one does.

    Two locks, for flock keeps no order: whoever waits for `room` holds `door`, and others wait behind it.
    """
    alone = request.node.get_closest_marker("alone") is not None
    here = Path(__file__)
    with open(here, "rb") as door, open(here.with_name("__init__.py"), "rb") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # a child that the test forked has the same one


@pytest.fixture
def server() -> Iterator[Judge]:
    with judge() as it:
        yield it


@pytest.fixture
def broker(socket_path: str) -> Iterator[BrokerProcess]:
    with broker_process(socket_path) as it:
        yield it


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One PostgreSQL for all tests of a run."""
    with postgres() as it:
        yield it


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[Database]:
    """A database and a login of this test's own."""
    it = Database(postgres_server)
    yield it
    it.drop()


@pytest.fixture(scope="session")
def the_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Redis for all tests of a run."""
    with redis_server(tmp_path_factory.mktemp("redis")) as it:
        yield it


@pytest.fixture
def redis_(the_redis: Server) -> Iterator[Server]:
    """Empty, and without clients; afterwards, too."""
    the_redis.judge.flushall()
    eventually(lambda: not the_redis.count(), what="the server has clients")
    yield the_redis
    eventually(lambda: not the_redis.count(), what="the server has clients left")


def pytest_configure() -> None:
    """A shell starts what is in its background with SIGINT ignored, and all that we start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm-seconds", default=4.0, type=float, help="how long each storm lasts")
