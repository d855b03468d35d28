"""Brokers, links and names of other users."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mppool
from mppool.kernel import link, memory
from mppool.kernel.runtime import pool_id
from mppool.table import lock_path
from tests.bad_input.shared import AT_ONCE, NOBODY
from tests.helpers.leftovers import names, processes_of
from tests.helpers.processes import Child, broker_process, eventually, fork
from tests.helpers.server import Judge
from tests.helpers.users import as_root


def as_nobody(work: Callable[[Child], Any]) -> Callable[[Child], Any]:
    """A child's work, as a user without any rights."""

    def drop_and_work(child: Child) -> Any:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return work(child)

    return drop_and_work


@as_root
def test_a_broker_of_another_user(directory: Path, server: Judge) -> None:
    """A socket in somebody else's directory is refused before anything is dialed, with both users."""
    path = f"{directory}/run/b.sock"
    os.mkdir(f"{directory}/run")
    os.chown(f"{directory}/run", NOBODY, NOBODY)

    def listen(child: Child) -> None:
        with link.listen(path) as listener:
            os.chmod(path, 0o666)
            child.tell("listening")
            child.hear()
            listener.close()

    with fork(as_nobody(listen)) as (child,):
        child.hear()
        began = time.monotonic()
        with pytest.raises(mppool.BrokerUnavailable) as caught:
            mppool.Pool(server.address, broker=path).getconn()
        assert time.monotonic() - began < AT_ONCE
        assert str(caught.value) == f"broker={path!r}: the directory {directory}/run belongs to uid {NOBODY}, we are 0"
        assert server.counts()["dials"] == 0
        child.tell()
        child.result()


@as_root
def test_a_broker_that_is_not_for_this_user(directory: Path, server: Judge) -> None:
    """A worker without rights meets another user's broker: BrokerUnavailable, with the path."""
    path = f"{directory}/run/b.sock"

    def work(child: Child) -> str:
        pool = mppool.Pool(server.address, broker=path)
        try:
            pool.getconn(timeout=5)
        except mppool.BrokerUnavailable as error:
            return str(error)
        finally:
            pool.close()
        return "lent"

    with broker_process(path):
        os.chmod(f"{directory}/run", 0o711)  # as if it had been opened by hand
        with fork(as_nobody(work)) as (child,):
            assert child.result() == f"broker={path!r}: this socket belongs to another user"
    eventually(lambda: not processes_of(path))


@as_root
def test_a_broker_cuts_links_of_other_users(directory: Path) -> None:
    """Should the socket's mode let another user in, the broker looks at who it is and says nothing."""
    path = f"{directory}/run/b.sock"

    def work(child: Child) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(path)
            return len(sock.recv(100))

    with broker_process(path):
        os.chmod(f"{directory}/run", 0o711)
        os.chmod(path, 0o666)
        with fork(as_nobody(work)) as (child,):
            assert child.result() == 0
    eventually(lambda: not processes_of(path))


@as_root
@pytest.mark.parametrize("ending", [".lock", ".table", ".cap"])
def test_names_that_another_user_took(socket_path: str, ending: str) -> None:
    """/dev/shm is a public directory: a pool's name that somebody else made is refused, with the path, and left as it is."""
    ident = pool_id(socket_path, "web")
    file = f"{memory.SHM}/{ident}{ending}" if ending != ".cap" else f"{memory.SHM}/sem.{ident}.cap"
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.chown(file, NOBODY, NOBODY)
    try:
        with pytest.raises(mppool.Error) as caught:
            mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
        assert file in str(caught.value)
        assert os.stat(file).st_uid == NOBODY
    finally:
        os.unlink(file)
        for name in names(socket_path):
            os.unlink(f"{memory.SHM}/{name}")


def test_a_lock_file_that_is_a_link(socket_path: str, tmp_path: Path) -> None:
    """A symbolic link in the place of a pool's lock file is refused; what it points to is not touched."""
    precious = tmp_path / "precious"
    precious.write_text("x")
    path = lock_path(pool_id(socket_path, "web"))
    os.symlink(precious, path)
    try:
        with pytest.raises(mppool.Error, match=f"^{path} belongs to another user or is a link; it is not ours to use"):
            mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
        assert precious.read_text() == "x"
    finally:
        os.unlink(path)


def test_a_lock_file_that_others_may_open(socket_path: str) -> None:
    """A lock file that others could lock is refused, with its mode."""
    path = lock_path(pool_id(socket_path, "web"))
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.chmod(path, 0o666)
    try:
        with pytest.raises(mppool.Error, match=f"^{path} must be ours alone: owner {os.geteuid()} mode 666, expected {os.geteuid()} 600$"):
            mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
    finally:
        os.unlink(path)
