"""What SECURITY.md promises: other users reach nothing of ours, take nothing over, and learn no baggage; peers of ours that speak nonsense harm nobody else.

Other users are real: children and brokers that gave root's rights up. What any frame at all can do is tests/fuzz; modes, owners and versions that
are simply wrong are test_bad_input.py.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import resource
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import mppool
from mppool.drivers.raw import RawDriver
from mppool.inspect import collect_garbage
from mppool.kernel import link, memory, semaphores
from mppool.kernel.runtime import pool_id
from mppool.options import parse_target
from mppool.story import Attach
from mppool.wire import Kind, Message, decode, encode
from tests.helpers.processes import BrokerProcess, Child, broker_process, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask
from tests.helpers.users import ALICE, BOB, Home, as_root, as_user, broker_of, home_of, names_of, run_as

AT_ONCE = 10.0  # seconds, of a busy machine


@pytest.fixture
def home() -> Iterator[Home]:
    with home_of(ALICE) as it:
        yield it


def pool_of(home: Home, server: Judge, **options: Any) -> mppool.Pool:
    return mppool.Pool(server.address, name="web", broker=home.socket, **options)


def said_by(pool: mppool.Pool) -> dict[str, str]:
    """What a checkout comes to: the error and its words, or that it lent."""
    try:
        pool.putconn(pool.getconn(timeout=3))
    except mppool.Error as error:
        return {type(error).__name__: str(error)}
    return {"lent": ""}


def tried(*actions: Callable[[], object]) -> list[str]:
    """What each of these came to: the name of an errno, or "done"."""
    found = []
    for action in actions:
        try:
            action()
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
        else:
            found.append("done")
    return found


# Another user reaches nothing.


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
            with fork(lambda _: lease_all(home, server, 2)) as (other,):  # a second process can open what the first one made
                return int(other.result())

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


def lease_all(home: Home, server: Judge, size: int) -> int:
    """A process of its own leases the whole cap; how many different sessions those were."""
    with pool_of(home, server, max_size=size) as pool:
        leases = [pool.getconn(timeout=10) for _ in range(size)]
        numbers = {ask(sock, f"lease-{n}") for n, sock in enumerate(leases)}
        for sock in leases:
            pool.putconn(sock)
        return len(numbers)


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


# Names taken before the pool is there.


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


# Runtime directories.


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


# Somebody else listens.


def listen_as_bob(path: str) -> Callable[[Child], list[int]]:
    """Listens where anybody may come, and counts the bytes and descriptors that it is sent by each who does."""

    def work(child: Child) -> list[int]:
        listener = link.listen(path)
        os.chmod(path, 0o666)
        child.tell()
        heard: list[int] = []
        listener.setblocking(True)
        listener.settimeout(0.2)
        while not heard:
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                sock.settimeout(10)
                data, ancillary, _, _ = sock.recvmsg(65536, 1024)
                heard.append(len(data) + len(ancillary))
        child.hear()
        return heard

    return as_user(BOB, work)


@pytest.fixture
def trap() -> Iterator[str]:
    """A path at which Bob may listen and to which Alice may connect."""
    with home_of(BOB) as bobs:
        bobs.run.chmod(0o755)
        yield f"{bobs.run}/trap.sock"


@as_root
def test_a_worker_tells_a_stranger_nothing(home: Home, server: Judge, trap: str) -> None:
    """Should the socket's name lead to somebody else's, a worker sees who it is before it says a word."""
    os.symlink(trap, home.socket)
    os.chown(home.socket, ALICE, ALICE, follow_symlinks=False)

    def work(_: Child) -> dict[str, str]:
        with contextlib.closing(pool_of(home, server)) as pool:
            return said_by(pool)

    with fork(listen_as_bob(trap)) as (stranger,):
        stranger.hear()
        with fork(as_user(ALICE, work)) as (worker,):
            assert worker.result(AT_ONCE) == {"BrokerUnavailable": f"broker={home.socket!r}: its broker runs as uid {BOB}, we are {ALICE}"}
        stranger.tell()
        assert stranger.result() == [0]
    eventually(lambda: server.counts()["live"] == 0)


@as_root
def test_a_broker_tells_a_strange_keeper_nothing(home: Home, server: Judge, trap: str) -> None:
    """The same for what a broker gives its keeper: every session and its baggage."""
    os.symlink(trap, f"{home.socket}.keeper")

    def work(_: Child) -> int:
        with pool_of(home, server) as pool, pool.connection() as sock:
            return ask(sock, "mine")

    with fork(listen_as_bob(trap)) as (stranger,):
        stranger.hear()
        with broker_of(ALICE, home.socket):
            with fork(as_user(ALICE, work)) as (worker,):
                assert worker.result() == 1
            os.unlink(f"{home.socket}.keeper")
        stranger.tell()
        assert set(stranger.result()) == {0}


# Root, and others.


@as_root
def test_root_does_not_join_a_users_pool(home: Home, server: Judge) -> None:
    """Root's workers have their own pools: a user's broker is refused, and the user's pool is not even named."""
    with broker_of(ALICE, home.socket):
        with contextlib.closing(pool_of(home, server)) as pool, pytest.raises(mppool.BrokerUnavailable) as caught:
            pool.getconn(timeout=3)
        assert str(caught.value) in {
            f"broker={home.socket!r}: its broker runs as uid {ALICE}, we are 0",
            f"broker={home.socket!r}: the directory {home.run} belongs to uid {ALICE}, we are 0",
        }
        assert names_of(home) == []
    eventually(lambda: server.counts()["live"] == 0)


@as_root
def test_a_user_does_not_join_roots_pool(server: Judge) -> None:
    """Root's broker, opened by hand to all, still serves root's pools only: a user's worker is cut, and does its work within a cap of its own user."""
    with home_of(0) as home, broker_process(home.socket) as broker:

        def work(_: Child) -> dict[str, str]:
            with contextlib.closing(pool_of(home, server)) as pool:
                return said_by(pool)

        home.run.chmod(0o711)
        os.chmod(home.socket, 0o666)
        with fork(as_user(ALICE, work)) as (worker,):
            assert worker.result(AT_ONCE) == {"lent": ""}
        eventually(lambda: server.counts()["live"] == 0)  # the broker has no duplicate
        assert broker.process.poll() is None
        home.run.chmod(0o700)


# Peers of ours that mean harm, or are mad. Whoever runs as us may write to the table, too; these only use the wire.


class Peer:
    """A process of ours with a row in the pool, that says what it likes over links of its own."""

    def __init__(self, server: Judge, path: str, **options: Any) -> None:
        self.path = path
        self.pool = mppool.Pool(server.address, name="web", broker=path, **options)
        self.pool.open()
        worker = self.pool._worker
        assert worker is not None
        self.words, self.table, self.row = worker.words, worker.table, worker.row
        self.hello = encode(Message(Kind.HELLO, worker.row.index, worker.row.incarnation, body=worker.ident.encode()))

    def link(self) -> socket.socket:
        sock = link.connect(self.path)
        sock.setblocking(True)
        sock.settimeout(20)
        sock.send(self.hello)
        assert decode(sock.recv(4096), 0).kind is Kind.WELCOME
        return sock

    def generation(self, k: int) -> int:
        return int(self.words[self.table.generation + k])


def send_fds(sock: socket.socket, message: Message, fds: list[int], announced: int = 1) -> None:
    sock.sendmsg([encode(message, announced)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def a_descriptor_bomb(peer: Peer) -> None:
    """As many descriptors as a message can carry, with every kind of message."""
    with open(os.devnull, "rb") as null:
        for kind in (Kind.SHARE, Kind.LOOK, Kind.WAIT, Kind.FETCH, Kind.PUT):
            with peer.link() as sock:
                send_fds(sock, Message(kind), [null.fileno()] * 253)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):
                        pass


def shares_of_what_is_no_socket(peer: Peer) -> None:
    """A pipe, a file, a directory, an epoll, in the place of sessions."""
    reader, writer = os.pipe()
    files = [reader, writer, os.open("/", os.O_RDONLY), os.open("/etc/passwd", os.O_PATH), os.eventfd(0) if hasattr(os, "eventfd") else os.dup(reader)]
    with peer.link() as sock:
        for k in range(8):
            for fd in files:
                send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [fd])
    for fd in files:
        os.close(fd)


def shares_of_others_sessions(peer: Peer) -> None:
    """Connections to elsewhere, passed off as the sessions that others have."""
    with peer.link() as sock, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        for k in range(8):
            with socket.create_connection(elsewhere.getsockname()) as wrong:
                send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [wrong.fileno()])


def fetches_without_reading(peer: Peer) -> None:
    """Asks for sessions, as fast as it can, and reads none."""
    with peer.link() as sock:
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            for n in range(20_000):
                sock.send(encode(Message(Kind.FETCH, n % 4, peer.generation(n % 4))))


def cancels_without_reading(peer: Peer) -> None:
    """Fills its own queue with answers."""
    with peer.link() as sock:
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            for _ in range(20_000):
                sock.send(encode(Message(Kind.CANCEL)))


def waits_on_many_links(peer: Peer) -> None:
    """Joins the queue three hundred times, in front, and goes away."""
    links = [peer.link() for _ in range(300)]
    for n, sock in enumerate(links):
        sock.send(encode(Message(Kind.WAIT, n % peer.table.lanes, peer.row.incarnation, 1)))
    for sock in links:
        sock.close()


def opens_a_thousand_links(peer: Peer) -> None:
    """Some of them say who they are, some nothing."""
    links = [peer.link() if n % 2 else link.connect(peer.path) for n in range(1000)]
    for sock in links:
        sock.close()


def sends_links_over_links(peer: Peer) -> None:
    """Its own end of a link as a session: a link that would never end."""
    with peer.link() as sock, peer.link() as other:
        for k in range(8):
            send_fds(sock, Message(Kind.SHARE, k, peer.generation(k)), [other.fileno()])


MISCHIEF = [
    a_descriptor_bomb,
    shares_of_what_is_no_socket,
    shares_of_others_sessions,
    fetches_without_reading,
    cancels_without_reading,
    waits_on_many_links,
    opens_a_thousand_links,
    sends_links_over_links,
]


@pytest.mark.parametrize("mischief", MISCHIEF)
def test_a_peer_of_ours_harms_only_itself(broker: BrokerProcess, server: Judge, socket_path: str, mischief: Callable[[Peer], None]) -> None:
    """Others check out and return all the time, each gets its own replies from one of the pool's two sessions; the broker lives and keeps no descriptor."""
    process = psutil.Process(broker.pid)

    def victim(child: Child) -> list[int]:
        with mppool.Pool(server.address, name="web", max_size=2, broker=socket_path) as pool:
            seen, rounds = set(), 0
            while not child_hears(child):
                with pool.connection(timeout=30) as first:
                    seen.add(ask(first, f"{os.getpid()} {rounds}".replace(" ", "-")))
                rounds += 1
                if rounds == 20:
                    child.tell()
                time.sleep(0.001)
            return [rounds, *sorted(seen)]

    def attack(child: Child) -> None:
        raise_limit()
        peer = Peer(server, socket_path, max_size=2)
        child.hear()
        mischief(peer)
        child.tell()
        child.hear()
        peer.pool.close()

    with fork(victim, victim, attack) as (one, two, attacker):
        for child in (one, two):
            child.hear()
        before = eventually(lambda: settled(process.num_fds))
        attacker.tell()
        attacker.hear(AT_ONCE * 4)
        eventually(lambda: process.num_fds() <= before + 2, what=f"{before} descriptors in the broker")
        attacker.tell()
        attacker.result()
        for child in (one, two):
            child.tell()
        found = [child.result() for child in (one, two)]
    assert all(rounds > 20 for rounds, *_ in found)
    if mischief is not waits_on_many_links:  # which were granted what they asked for; it ended with them
        assert {number for _, *numbers in found for number in numbers} <= {1, 2}
    assert server.counts()["peak"] <= 2
    assert broker.process.poll() is None


def child_hears(child: Child) -> bool:
    return link.wait_readable(child._in, 0)


def settled(number: Callable[[], int]) -> int:
    """A number that has not changed for a tenth of a second, else 0."""
    first = number()
    time.sleep(0.1)
    return first if number() == first else 0


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))


# Baggage is said to nobody.

SECRET = "s3cret-b4ggage-marker"


class Secretive(RawDriver):
    """Sessions with a password in their baggage."""

    trouble = ""

    def detach(self, session: socket.socket) -> bytes:
        return SECRET.encode() * 20

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        assert baggage == SECRET.encode() * 20
        if Secretive.trouble:
            raise mppool.Error(Secretive.trouble)
        return super().attach(fd, baggage)


def test_baggage_is_never_said(server: Judge, socket_path: str, tmp_path: Path) -> None:
    """It passes through broker and keeper, over their deaths too, and is in no log, message, status, name, argument or shared memory."""
    log, said = tmp_path / "log", tmp_path / "said"

    def work(child: Child) -> None:
        sys.stdout = sys.stderr = open(said, "a")  # noqa: SIM115 (it ends with the process)
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        pool = mppool.Pool(driver=Secretive(parse_target(server.address)), name="web", max_size=2, broker=socket_path)
        for message in iter(child.hear, "end"):
            Secretive.trouble = "cannot attach" if message == "trouble" else ""
            held = []
            try:
                held = [pool.getconn(timeout=3) for _ in range(2)]
                for n, sock in enumerate(held):
                    ask(sock, f"secret-{n}")
            except mppool.Error:
                traceback.print_exc()
            print(repr(pool), pool.get_stats(), flush=True)
            for sock in held:
                pool.putconn(sock)
            child.tell(len(held))
        pool.close()

    with open(log, "wb") as file:

        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "mppool", "broker", "-v", "--socket", socket_path], stdout=file, stderr=file, preexec_fn=die_with_parent
            )
            eventually(lambda: os.path.exists(socket_path))
            return process

        broker = start()
        try:
            with fork(work, work) as (one, two):
                for child, order in ((one, "lease"), (two, "trouble"), (two, "lease"), (one, "lease")):
                    child.tell(order)
                    child.hear()
                shown = [show(socket_path), *names_and_arguments(socket_path)]
                broker.kill()
                broker.wait()
                os.unlink(socket_path)
                broker = start()
                for child in (one, two):
                    child.tell("lease")
                    assert child.hear() == 2
                say_nonsense(socket_path)
                shown += [show(socket_path), *names_and_arguments(socket_path)]
                for child in (one, two):
                    child.tell("end")
                    child.result()
        finally:
            broker.terminate()
            broker.wait()
    for text in (*shown, log.read_bytes(), said.read_bytes()):
        assert SECRET.encode() not in text
    assert b"cannot attach" in said.read_bytes()  # it was said what went wrong


def show(path: str) -> bytes:
    found = b""
    for options in ([], ["--json"]):
        found += subprocess.run([sys.executable, "-m", "mppool", "status", "--socket", path, *options], capture_output=True, check=True).stdout
    return found


def names_and_arguments(path: str) -> list[bytes]:
    """The contents of shared memory, its names, and what processes were started with."""
    ident = pool_id(path, "web")
    files = [name for name in os.listdir(memory.SHM) if ident in name]
    assert f"{ident}.table" in files
    processes = [" ".join(process.info["cmdline"] or []).encode() for process in psutil.process_iter(["cmdline"])]
    return [Path(memory.SHM, name).read_bytes() for name in files] + [" ".join(files).encode(), *(line for line in processes if path.encode() in line)]


def say_nonsense(path: str) -> None:
    """Messages that carry baggage, where none is expected or none is allowed."""
    body = (SECRET * 20).encode()
    with socket.socket() as session:
        for message in (Message(Kind.SHARE, body=body), Message(Kind.PUT, body=body), Message(Kind.SHARE, 9999, body=body), Message(Kind.SESSION, body=body)):
            with link.connect(path) as sock:
                sock.setblocking(True)
                sock.settimeout(10)
                send_fds(sock, message, [session.fileno()])
                answer = sock.recv(65536)
                assert SECRET.encode() not in answer


def test_a_message_does_not_show_its_baggage() -> None:
    """What a traceback with locals, or a log of requests, would print of a message or a request is not the baggage."""
    assert SECRET not in repr(Message(Kind.SHARE, 1, 2, 0, SECRET.encode()))
    assert SECRET not in repr(Attach(3, SECRET.encode()))
