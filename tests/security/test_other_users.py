"""Another user reaches nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import pytest

from mppool.kernel import memory
from mppool.wire import Kind, Message, encode
from tests.helpers.leases import lease_all
from tests.helpers.processes import Child, eventually, fork
from tests.helpers.server import Judge, ask
from tests.helpers.users import ALICE, BOB, Home, as_root, as_user, broker_of, home_of, names_of
from tests.security.shared import pool_of, tried


@as_root
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
def test_another_user_can_do_nothing(home: Home, server: Judge, umask: int) -> None:
    """Whatever the umask of their makers: sockets, lock file, table and semaphores let no other user connect, read, write or remove, but their owner."""

    def work(child: Child) -> int:
        os.umask(umask)
        with pool_of(home, server, max_size=2) as pool:
            with pool.connection() as sock:
                ask(sock, "mine")
            eventually(lambda: "sem." in "".join(names_of(home)))
            child.tell(names_of(home))
            child.hear()
            with fork(second) as (other,):
                return int(other.result())

    def second(_: Child) -> int:
        """It can open what the first one made."""
        with pool_of(home, server, max_size=2) as pool:
            return len(lease_all(pool, 2))

    def intrude(child: Child) -> list[str]:
        files = [f"{memory.SHM}/{name}" for name in child.hear()]
        found = []
        for path in (home.socket, f"{home.socket}.keeper"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                found += tried(lambda path=path, sock=sock: sock.connect(path))  # type: ignore[misc]
        for file in files:
            found += tried(
                lambda file=file: os.open(file, os.O_RDONLY),  # type: ignore[misc]
                lambda file=file: os.open(file, os.O_WRONLY),  # type: ignore[misc]
                lambda file=file: os.open(file, os.O_RDONLY | os.O_CREAT, 0o600),  # type: ignore[misc]
                lambda file=file: os.chmod(file, 0o666),  # type: ignore[misc]
                lambda file=file: os.chown(file, BOB, BOB),  # type: ignore[misc]
                lambda file=file: os.unlink(file),  # type: ignore[misc]
                lambda file=file: os.rename(file, f"{file}.gone"),  # type: ignore[misc]
                lambda file=file: os.truncate(file, 0),  # type: ignore[misc]
            )
        found += tried(lambda: os.listdir(home.run), lambda: os.rmdir(home.run), lambda: os.rename(home.run, home.path / "gone"))
        return found

    with broker_of(ALICE, home.socket, umask=umask), fork(as_user(ALICE, work), as_user(BOB, intrude)) as (worker, intruder):
        files = worker.hear()
        for file in files:
            info = os.stat(f"{memory.SHM}/{file}")
            assert info.st_uid == ALICE, file
            assert stat.S_IMODE(info.st_mode) & ~0o600 == 0, file
        assert stat.S_IMODE(os.stat(home.socket).st_mode) == 0o600
        eventually(lambda: os.path.exists(f"{home.socket}.keeper"))
        intruder.tell(files)
        assert set(intruder.result()) <= {"EACCES", "EPERM"}
        worker.tell()
        assert worker.result() == 2


@as_root
def test_a_directory_that_the_broker_makes(server: Judge) -> None:
    """The directory that a broker makes is its own, 0700, whatever its umask."""
    with home_of(ALICE) as home:
        os.chown(home.path, ALICE, ALICE)
        home.run.rmdir()
        with broker_of(ALICE, home.socket, umask=0o777):
            assert stat.S_IMODE(home.run.stat().st_mode) == 0o700
        home.run.rmdir()
        with broker_of(ALICE, home.socket, umask=0):
            assert stat.S_IMODE(home.run.stat().st_mode) == 0o700


@as_root
@pytest.mark.parametrize("message", [Message(Kind.GIVE_ALL), Message(Kind.HELLO, body=b"mppool")], ids=["GIVE_ALL", "HELLO"])
def test_a_link_of_another_user_gets_nothing(home: Home, server: Judge, message: Message) -> None:
    """Should directory and sockets ever be open to all: keeper and broker look at who comes, and neither answer nor hand out a session."""

    def work(child: Child) -> None:
        with pool_of(home, server) as pool:
            with pool.connection() as sock:
                ask(sock, "mine")
            child.tell()
            child.hear()

    def intrude(child: Child) -> list[int]:
        child.hear()
        heard = []
        for path in (home.socket, f"{home.socket}.keeper"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(10)
                sock.connect(path)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.send(encode(message))
                with contextlib.suppress(ConnectionResetError):
                    data, ancillary, _, _ = sock.recvmsg(4096, 1024)
                    heard.append(len(data) + len(ancillary))
        return heard

    with broker_of(ALICE, home.socket), fork(as_user(ALICE, work), as_user(BOB, intrude)) as (worker, intruder):
        worker.hear()
        eventually(lambda: os.path.exists(f"{home.socket}.keeper"))
        os.chmod(home.run, 0o711)
        for path in (home.socket, f"{home.socket}.keeper"):
            os.chmod(path, 0o666)
        intruder.tell()
        assert set(intruder.result()) <= {0}
        os.chmod(home.run, 0o700)
        worker.tell()
        worker.result()
