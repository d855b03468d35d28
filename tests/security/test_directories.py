"""Runtime directories in which others have a say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.helpers.processes import Child, fork
from tests.helpers.server import Judge
from tests.helpers.users import ALICE, BOB, Home, as_root, as_user, broker_of, run_as
from tests.security.shared import AT_ONCE, pool_of, said_by


def made_by_another(home: Home) -> str:
    """As in a public directory, by somebody who was there first."""
    os.chown(home.run, BOB, BOB)
    return f"the directory {home.run} belongs to uid {BOB}, we are {ALICE}"


def a_link_of_another(home: Home) -> str:
    real = home.path / "real"
    home.run.rename(real)
    home.run.symlink_to(real)
    os.chown(home.run, BOB, BOB, follow_symlinks=False)
    return f"{home.run} is a symbolic link of uid {BOB}, we are {ALICE}"


def a_link_above_it(home: Home) -> str:
    """Everything is ours, but on the way there is a link that its owner may point elsewhere."""
    above = home.path.parent / f"{home.path.name}-link"
    above.symlink_to(home.path)
    os.chown(above, BOB, BOB, follow_symlinks=False)
    home.socket = f"{above}/run/b.sock"
    return f"{above} is a symbolic link of uid {BOB}, we are {ALICE}"


def others_may_write(home: Home) -> str:
    home.run.chmod(0o770)
    return f"the directory {home.run} is open to others (mode 770); chmod 700 it"


def nothing_sticks(home: Home) -> str:
    """Whoever may write above can put a directory of his in the place of ours."""
    home.path.chmod(0o777)
    return f"anybody may replace what is in {home.path} (mode 777 without the sticky bit); chmod +t it"


hostile = pytest.mark.parametrize("trouble", [made_by_another, a_link_of_another, a_link_above_it, others_may_write, nothing_sticks])


@contextlib.contextmanager
def troubled(home: Home, trouble: Callable[[Home], str]) -> Iterator[str]:
    try:
        yield trouble(home)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(home.path.parent / f"{home.path.name}-link")


@as_root
@hostile
def test_a_broker_does_not_serve_in_a_hostile_directory(home: Home, trouble: Callable[[Home], str]) -> None:
    """Where others could replace its socket, a broker does not start, says why, and leaves nothing there."""
    with troubled(home, trouble) as why:
        done = run_as(ALICE, "broker", "--socket", home.socket)
        assert done.returncode == 1
        # A link as the last part is refused whoever owns it.
        assert why in done.stderr or (trouble is a_link_of_another and f"{home.run} is not a directory" in done.stderr)


@as_root
@hostile
def test_a_worker_does_not_talk_in_a_hostile_directory(home: Home, server: Judge, trouble: Callable[[Home], str]) -> None:
    """The same when the trouble comes later, and a broker of ours listens there: BrokerUnavailable with the reason, and nothing is lent."""

    def work(_: Child) -> dict[str, str]:
        with contextlib.closing(pool_of(home, server)) as pool:
            return said_by(pool)

    with broker_of(ALICE, home.socket) as pid:
        with troubled(home, trouble) as why:
            if trouble is made_by_another:
                home.run.chmod(0o711)  # else it is not even seen
                os.chmod(home.socket, 0o666)
            with fork(as_user(ALICE, work)) as (worker,):
                assert why in worker.result(AT_ONCE)["BrokerUnavailable"]
        assert psutil.Process(pid).is_running()
        if trouble is a_link_of_another:
            home.run.unlink()
            (home.path / "real").rename(home.run)
        os.chown(home.run, ALICE, ALICE)  # for the broker's own end
        home.run.chmod(0o700)
    assert server.counts()["live"] == 0


@as_root
@hostile
def test_nobody_names_a_pool_by_a_hostile_directory(home: Home, server: Judge, trouble: Callable[[Home], str]) -> None:
    """What a stranger's link says at the moment must not decide which pool is meant: worker and command line refuse also where no broker is."""

    def work(_: Child) -> str:
        with contextlib.closing(pool_of(home, server)) as pool:
            return said_by(pool).get("BrokerUnavailable", "")

    with troubled(home, trouble) as why:
        with fork(as_user(ALICE, work)) as (worker,):
            assert why in worker.result(AT_ONCE)
        for command in (["status"], ["resize", "web", "3"]):
            done = run_as(ALICE, command[0], "--socket", home.socket, *command[1:])
            assert (done.returncode, why in done.stderr) == (1, True)


@as_root
def test_the_default_directory_was_made_by_somebody_else(server: Judge) -> None:
    """/tmp/mppool-UID is a name that others can take: then there is no broker at it, and the message says whose it is."""
    directory = f"/tmp/mppool-{ALICE}"
    os.mkdir(directory, 0o700)
    os.chown(directory, BOB, BOB)
    try:
        done = run_as(ALICE, "broker")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"mppool: broker='{directory}/broker.sock': the directory {directory} belongs to uid {BOB}, we are {ALICE}\n"
    finally:
        os.rmdir(directory)
