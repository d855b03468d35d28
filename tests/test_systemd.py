"""The broker as a service of systemd: a stand-in plays the service manager; broker, workers and server are real."""

from __future__ import annotations

import array
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import mppool
from mppool.cli import broker as broker_command
from mppool.fdstore import INDEX, name_of, read_index
from mppool.keeper import keeper_path
from mppool.kernel import link
from mppool.wire import Kind, Message, decode, encode, pack_held
from tests.helpers.leases import lease_all, leave_sessions
from tests.helpers.leftovers import processes_of
from tests.helpers.processes import Child, answers, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask
from tests.replace import TRACER, keeper_of

EXAMPLES = Path(__file__).parent.parent / "examples" / "systemd"


class Manager:
    """As much of systemd as a unit like examples/systemd/mppool.service sees of it."""

    def __init__(self, path: str, directory: Path) -> None:
        self.path = path
        self.address = str(directory / "notify")
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notices.bind(self.address)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        os.chmod(path, 0o600)
        self.listener.listen(1024)
        self.said: list[str] = []
        self.store: list[tuple[str, int]] = []
        self.pid = 0
        self.thread = threading.Thread(target=self.hear)
        self.thread.start()

    # What the service says.

    def hear(self) -> None:
        while True:
            data, ancillary, _, _ = self.notices.recvmsg(65536, 8192, socket.MSG_CMSG_CLOEXEC)
            sender, fds = 0, array.array("i")
            for _, kind, raw in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(raw)
                else:
                    sender = struct.unpack("3i", raw)[0]
            if data == b"the test is over":
                return
            if sender == self.pid:  # NotifyAccess=main
                self.heard(data.decode(), list(fds))
            else:
                self.said.append(f"somebody else says {data!r}")

    def heard(self, message: str, fds: list[int]) -> None:
        lines = dict(line.split("=", 1) for line in message.splitlines())
        name = lines.get("FDNAME", "stored")
        if "FDSTORE" in lines:
            self.store += [(name, fd) for fd in fds]
            return
        if "FDSTOREREMOVE" in lines:
            for item in [item for item in self.store if item[0] == name]:
                self.store.remove(item)
                os.close(item[1])
        self.said += message.splitlines()
        for fd in fds:
            os.close(fd)  # BARRIER=1

    # What is done to it.

    def start(self, *options: str, watchdog: int = 0, program: tuple[str, ...] = ("-m", "mppool"), listener: socket.socket | None = None) -> None:
        self.said.clear()
        passed = [("mppool.socket", (listener or self.listener).fileno()), *self.store]
        environment = {**os.environ, "NOTIFY_SOCKET": self.address, "LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": ":".join(name for name, _ in passed)}
        if watchdog:
            environment["WATCHDOG_USEC"] = str(watchdog)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_with_parent()
                high = [os.dup2(fd, 500 + n) for n, (_, fd) in enumerate(passed)]
                for n, fd in enumerate(high):
                    os.dup2(fd, 3 + n)
                environment["LISTEN_PID"] = environment["WATCHDOG_PID"] = str(os.getpid())
                os.closerange(3 + len(passed), 600)
                os.execve(sys.executable, [sys.executable, *program, "broker", *(options or ("--socket", self.path))], environment)
            finally:
                os._exit(99)

    def wait(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def stop(self, kill_mode: str = "mixed") -> int:
        keeper = keeper_of(self.path)
        os.kill(self.pid, signal.SIGTERM)
        if keeper is not None and kill_mode == "control-group":
            keeper.terminate()
        code = self.wait()
        if keeper is not None and kill_mode == "mixed" and keeper.is_running():
            keeper.kill()
        return code

    def end(self) -> None:
        if self.pid:
            self.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"the test is over", self.address)
        self.thread.join()
        self.notices.close()
        self.listener.close()
        for _, fd in self.store:
            os.close(fd)
        for path in (self.path, keeper_path(self.path)):
            if os.path.exists(path):
                os.unlink(path)


@pytest.fixture
def manager(socket_path: str, tmp_path: Path) -> Iterator[Manager]:
    it = Manager(socket_path, tmp_path)
    try:
        yield it
    finally:
        it.end()


def ready(manager: Manager) -> None:
    eventually(lambda: "READY=1" in manager.said, 20)


def test_readiness_status_watchdog_and_end(server: Judge, manager: Manager) -> None:
    """READY when it serves the listener it was given, STATUS with numbers, WATCHDOG from its loop, STOPPING; the socket stays systemd's."""
    waiting = link.connect(manager.path)  # before there is a broker: in line, not refused
    manager.start(watchdog=300_000)
    ready(manager)
    assert manager.said[0] == "READY=1"
    link.send(waiting, encode(Message(Kind.LOOK)))
    assert link.wait_readable(waiting.fileno(), 10)
    assert decode(link.receive(waiting)[0], 0).kind is Kind.REFUSED
    waiting.close()
    with mppool.Pool(server.address, max_size=2, name="p", broker=manager.path) as pool:
        lease_all(pool, 2)
        eventually(lambda: "STATUS=1 pools, 1 workers, 2 sessions, 0 waiting" in manager.said)
        eventually(lambda: manager.said.count("WATCHDOG=1") > 3)
        os.kill(manager.pid, signal.SIGSTOP)
        beats = manager.said.count("WATCHDOG=1")
        lease_all(pool, 2)
        assert manager.said.count("WATCHDOG=1") <= beats + 1
        os.kill(manager.pid, signal.SIGCONT)
        keeper = eventually(lambda: keeper_of(manager.path))
        assert not {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC"} & keeper.environ().keys()
    inode = os.stat(manager.path).st_ino
    assert manager.stop() == 0
    assert "STOPPING=1" in manager.said
    assert os.stat(manager.path).st_ino == inode
    assert [line for line in manager.said if "somebody else" in line] == []


@pytest.mark.parametrize("kill_mode", ["mixed", "control-group", "process"])
def test_a_restart_loses_no_session(server: Judge, manager: Manager, kill_mode: str) -> None:
    """Restarted under load, whatever becomes of the keeper: no request fails, all sessions are there, the store is empty; what is closed later really ends."""
    busy = mppool.Pool(server.address, max_size=2, name="busy", broker=manager.path)
    quiet = mppool.Pool(server.address, max_size=3, name="quiet", broker=manager.path)

    def work(child: Child) -> int:
        n = 0
        while not (n % 50 == 0 and child_was_told(child)):
            n += 1
            with busy.connection(timeout=5) as sock:
                ask(sock, f"{os.getpid()}-{n}")
        return n

    manager.start()
    ready(manager)
    quiet.open()
    leave_sessions(quiet, 3)
    with fork(work, work, work) as workers:
        eventually(lambda: server.counts()["requests"] > 100 and server.counts()["dials"] == 5, 20)
        dials = 5
        for _ in range(2):
            before = server.counts()["requests"]
            assert manager.stop(kill_mode) == 0
            names = [name for name, _ in manager.store]
            assert len(names) == len(set(names)) == dials + 1
            [index] = [fd for name, fd in manager.store if name == INDEX]
            assert os.readlink(f"/proc/self/fd/{index}").startswith("/memfd:")
            assert {INDEX, *read_index(index)} == set(names)
            manager.start()
            ready(manager)
            eventually(lambda: not manager.store)
            eventually(lambda before=before: server.counts()["requests"] > before + 100)  # type: ignore[misc]
        assert server.counts()["dials"] == dials
        for worker in workers:
            worker.tell()
        assert all(worker.result() >= 50 for worker in workers)
    assert len(lease_all(quiet, 3)) == 3
    assert server.counts()["dials"] == dials
    live = server.counts()["live"]
    quiet.resize(1)
    eventually(lambda: server.counts()["live"] == live - 2)  # nobody keeps alive what the broker closes
    busy.close()
    quiet.close()


def child_was_told(child: Child) -> bool:
    try:
        child.hear(0)
    except TimeoutError:
        return False
    return True


def test_what_the_table_does_not_know_is_ended(server: Judge, manager: Manager) -> None:
    """A stored session of another generation, of no pool or of no name is shut down; one without a record is let go, and its holder keeps it."""
    manager.start()
    ready(manager)
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=manager.path)
    held = pool.getconn()
    ask(held, "mine")
    ident = pool._worker.ident  # type: ignore[union-attr]
    assert manager.stop() == 0
    others = [socket.create_connection(server.address) for _ in range(3)]
    for n, other in enumerate(others):
        ask(other, f"o{n}")
    records = [Message(Kind.PUT, 0, 77, body=pack_held(ident, b"")), Message(Kind.PUT, 5, 0, body=pack_held("mppool-01234567-0123456789", b""))]
    index = os.memfd_create("index")
    os.write(index, b"".join(struct.pack("<I", len(data)) + data for data in (encode(record, 1) for record in records)))
    for name, fd in manager.store:
        if name == INDEX:
            os.close(fd)
    manager.store = [
        (INDEX, index),
        *((name_of(record), os.dup(other.fileno())) for record, other in zip(records, others, strict=False)),
        ("of no name", os.dup(others[2].fileno())),
        *(item for item in manager.store if item[0] != INDEX),
    ]
    manager.start()
    ready(manager)
    eventually(lambda: not manager.store)
    for other in others:
        assert other.recv(1) == b""
        other.close()
    ask(held, "still-mine")
    pool.putconn(held)
    assert lease_all(pool, 1) == {1}
    pool.close()


@pytest.mark.parametrize("fatal", [1, 20, 45, 70, 120])
def test_killed_while_it_stores(server: Judge, manager: Manager, fatal: int) -> None:
    """SIGKILL at any line of the upload: what was stored is taken, the rest comes back with its worker; no lease is disturbed, the cap is whole."""
    manager.start("--socket", manager.path, program=("-c", TRACER, "fdstore.py:upload", str(fatal)))
    ready(manager)
    pool = mppool.Pool(server.address, max_size=4, name="p", broker=manager.path)
    lease_all(pool, 4)
    held = pool.getconn()
    ask(held, "mine")
    manager.stop()
    manager.start()
    ready(manager)
    ask(held, "still-mine")
    pool.putconn(held)
    assert lease_all(pool, 4) == {1, 2, 3, 4}
    assert server.counts()["dials"] == 4
    pool.close()


def test_the_path_is_the_listeners(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --socket the listener says where; with another path, or another kind of socket, it is an error that names both."""
    monkeypatch.delenv("MPPOOL_BROKER", raising=False)
    manager.start("--verbose")
    ready(manager)
    assert psutil.Process(manager.pid).is_running()
    assert manager.stop() == 0
    manager.start("--socket", f"{manager.path}2")
    assert manager.wait() == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(f"{manager.path}3")
        stream.listen()
        manager.start(listener=stream)
        assert manager.wait() == 1
    os.unlink(f"{manager.path}3")


def test_it_is_not_replaced_from_outside(manager: Manager) -> None:
    """``mppool broker --replace`` beside systemd's: refused, and what to do instead is said."""
    manager.start()
    ready(manager)
    command = [sys.executable, "-m", "mppool", "broker", "--socket", manager.path, "--replace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "systemctl restart" in done.stderr
    assert answers(manager.path)
    assert manager.stop() == 0


def test_only_whom_systemd_means_speaks_to_it(server: Judge, socket_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker of ``mppool run`` and one that a worker starts are not the service: they say nothing to systemd, and take nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(0)
        for name, value in {"NOTIFY_SOCKET": str(tmp_path / "notify"), "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "WATCHDOG_USEC": "100000"}.items():
            monkeypatch.setenv(name, value)
        code = f"import mppool; p = mppool.Pool({server.address!r}); p.putconn(p.getconn())"
        subprocess.run([sys.executable, "-m", "mppool", "run", "--socket", socket_path, "--", sys.executable, "-c", code], timeout=30, check=True)
        with mppool.Pool(server.address, name="auto", broker=socket_path, autostart=True) as pool:
            lease_all(pool, 1)
        for process in processes_of(socket_path):
            if "broker" in process.cmdline():
                process.terminate()
        eventually(lambda: not processes_of(socket_path))
        with pytest.raises(BlockingIOError):
            notices.recv(4096)


# The unit files.


def options_of(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (EXAMPLES / unit).read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_units_say_what_the_broker_needs() -> None:
    """Service and socket name one path, and every option of ExecStart exists."""
    service, sock = options_of("mppool.service"), options_of("mppool.socket")
    [start] = service["ExecStart"]
    program, command, *arguments = start.split()
    assert (program, command) == ("/usr/bin/mppool", "broker")
    known = {name for parameter in broker_command.params for name in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= known
    assert arguments[arguments.index("--socket") + 1] == sock["ListenSequentialPacket"][0]
    assert service["Type"] == ["notify"]
    assert service["RuntimeDirectoryPreserve"] == ["yes"]
    assert service["User"] == sock["SocketUser"]
    assert int(service["FileDescriptorStoreMax"][0]) >= 1024
    assert "ExecReload" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there")
def test_systemd_itself_likes_them(tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say about either unit."""
    for unit in ("mppool.service", "mppool.socket"):
        text = (EXAMPLES / unit).read_text(encoding="utf-8")
        (tmp_path / unit).write_text(re.sub("/usr/bin/mppool", sys.executable, text), encoding="utf-8")  # any program that is there
    units = [str(tmp_path / unit) for unit in ("mppool.service", "mppool.socket")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "mppool" in line]) == (0, [])
