"""Names that others took before the pool was there."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import mppool
from mppool.inspect import collect_garbage
from mppool.kernel import memory, semaphores
from tests.helpers.processes import Child, fork
from tests.helpers.server import Judge, ask
from tests.helpers.users import ALICE, BOB, Home, as_root, as_user
from tests.security.shared import AT_ONCE, pool_of, said_by


def a_file(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.chmod(path, 0o666)
    os.truncate(path, 4096)


def a_closed_file(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def a_link(path: str) -> None:
    os.symlink("/etc/passwd", path)


def a_link_to_nothing(path: str) -> None:
    os.symlink(f"{memory.SHM}/mppool-is-not-there", path)


def a_fifo(path: str) -> None:
    os.mkfifo(path)
    os.chmod(path, 0o666)


def a_directory(path: str) -> None:
    os.mkdir(path)
    os.chmod(path, 0o777)


@as_root
@pytest.mark.parametrize("squat", [a_file, a_closed_file, a_link, a_link_to_nothing, a_fifo, a_directory])
@pytest.mark.parametrize("which", ["lock", "table", "cap", "0"])
def test_a_name_that_another_user_took_first(home: Home, server: Judge, which: str, squat: Callable[[str], None]) -> None:
    """Whatever somebody put at a pool's name: an Error at once that says where; it is neither used nor removed, and once it is gone the pool works."""
    file = f"{home.ident('web')}.{which}" if which in ("lock", "table") else f"sem.{home.ident('web')}.{which}"
    path = f"{memory.SHM}/{file}"

    def take(_: Child) -> None:
        squat(path)

    def work(child: Child) -> int:
        pool = pool_of(home, server)
        said = said_by(pool)
        collect_garbage()
        child.tell(said)
        child.hear()
        with pool, pool.connection(timeout=3) as sock:
            return ask(sock, "mine")

    with fork(as_user(BOB, take)) as (thief,):
        thief.result()
    before = os.lstat(path)
    try:
        with fork(as_user(ALICE, work)) as (worker,):
            assert path in worker.hear(AT_ONCE)["Error"]
            assert server.counts()["dials"] == 0
            after = os.lstat(path)
            assert (after.st_ino, after.st_uid, after.st_mtime_ns) == (before.st_ino, BOB, before.st_mtime_ns)
            (os.rmdir if squat is a_directory else os.unlink)(path)
            worker.tell()
            assert worker.result() == 1
    finally:
        with contextlib.suppress(FileNotFoundError):
            (os.rmdir if squat is a_directory else os.unlink)(path)


@as_root
@pytest.mark.parametrize("which", ["lock", "table", "cap"])
def test_a_name_that_is_a_hard_link(home: Home, server: Judge, which: str) -> None:
    """A second name for a file of ours (without fs.protected_hardlinks anybody can make one) is refused or replaced, and the file is not touched."""
    file = f"{home.ident('web')}.{which}" if which != "cap" else f"sem.{home.ident('web')}.cap"
    path, precious = f"{memory.SHM}/{file}", f"{memory.SHM}/mppool-test-precious-{os.getpid()}"
    Path(precious).write_bytes(b"x" * 4096)
    os.chmod(precious, 0o600)
    os.chown(precious, ALICE, ALICE)
    os.link(precious, path)

    def work(_: Child) -> dict[str, str]:
        with contextlib.closing(pool_of(home, server)) as pool:
            return said_by(pool)

    try:
        with fork(as_user(ALICE, work)) as (worker,):
            refused = {"Error": f"{path} is a hard link to a file with 2 names; it is not ours to use"}
            assert worker.result(AT_ONCE) == ({"lent": ""} if which == "cap" else refused)
        assert Path(precious).read_bytes() == b"x" * 4096
        assert stat.S_IMODE(os.stat(precious).st_mode) == 0o600
    finally:
        for name in (path, precious):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


@as_root
def test_a_semaphore_that_appears_in_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's file that comes between looking and making is not opened."""
    name = f"/mppool-test-{os.getpid()}.cap"
    path = f"{memory.SHM}/sem.{name[1:]}"
    looks = 0
    lstat = os.lstat

    def look(file: str) -> os.stat_result:
        nonlocal looks
        looks += 1
        try:
            return lstat(file)
        except FileNotFoundError:
            Path(path).write_bytes(bytes(32))
            os.chown(path, BOB, BOB)
            raise

    monkeypatch.setattr(os, "lstat", look)
    try:
        with pytest.raises(mppool.Error, match=f"^{path} must be ours alone: owner {BOB} "):
            semaphores.open_semaphore(name, 4)
        assert looks >= 2
        assert Path(path).read_bytes() == bytes(32)
    finally:
        os.unlink(path)


def test_a_semaphore_that_its_maker_did_not_finish() -> None:
    """Killed in the C library's sem_open, its maker leaves it with a second name; that is no hard link of a stranger's, any other second name is."""
    name = f"/mppool-test-{os.getpid()}.cap"
    semaphores.open_semaphore(name, 4)
    other = f"{memory.SHM}/sem.{os.getpid() % 10**6:06}"
    os.link(f"{memory.SHM}/sem.{name[1:]}", other)
    try:
        assert semaphores.open_semaphore(name, 9).value == 4
        os.rename(other, f"{other}-elsewhere")
        with pytest.raises(mppool.Error, match="is a hard link to a file with 2 names"):
            semaphores.open_semaphore(name, 9)
    finally:
        for path in (other, f"{other}-elsewhere"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        semaphores.unlink(name)
