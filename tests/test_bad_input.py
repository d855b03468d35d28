"""Whatever is wrong is said: a clear error that names the option and the value, at once, with nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mppool
from mppool.kernel import link, memory
from mppool.kernel.runtime import pool_id, scope_of
from mppool.options import MAX_SLOTS
from mppool.table import VERSION as TABLE_VERSION
from mppool.table import W_SLOTS, W_VERSION, lock_path, slots_for
from mppool.table import _size as size_of_table
from mppool.wire import WIRE_VERSION, Kind, Message, decode, encode
from tests.conftest import processes_of
from tests.helpers.namespace import in_private_shm
from tests.helpers.processes import BrokerProcess, Child, broker_process, eventually, fork
from tests.helpers.server import Judge, ask

AT_ONCE = 1.0  # seconds; the timeouts below are far longer
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


def names(path: str) -> list[str]:
    prefix = f"mppool-{scope_of(path)}-"
    return memory.names(prefix) + memory.names(f"sem.{prefix}")


def say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# Options.


@pytest.mark.parametrize(
    "target",
    ["localhost:80", "tcp://localhost", "http://localhost:80", "tcp://localhost:99999", "unix://x", ("localhost", "80"), ("localhost", 0), 80, b"x"],
    ids=repr,
)
def test_targets_that_cannot_be_parsed(target: object) -> None:
    """A target that makes no sense is refused by the constructor, with the value. (All forms: unit/test_options.py.)"""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool(target)
    assert str(caught.value).startswith(f"target={target!r}: ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_size": 0}, "max_size=0: expected a whole number from 1 to 1024"),
        ({"max_size": -3}, "max_size=-3: expected a whole number from 1 to 1024"),
        ({"max_size": MAX_SLOTS + 1}, "max_size=1025: expected a whole number from 1 to 1024"),
        ({"max_size": 2.5}, "max_size=2.5: expected a whole number from 1 to 1024"),
        ({"max_size": "4"}, "max_size='4': expected a whole number from 1 to 1024"),
        ({"max_size": None}, "max_size=None: expected a whole number from 1 to 1024"),
        ({"max_size": 2, "min_size": 3}, "min_size=3: expected a whole number from 0 to 2"),
        ({"max_waiting": -1}, "max_waiting=-1: expected a whole number from 0 to 1073741824"),
        ({"timeout": -1}, "timeout=-1: expected seconds, 0 or more"),
        ({"timeout": math.nan}, "timeout=nan: expected seconds, 0 or more"),
        ({"timeout": "soon"}, "timeout='soon': expected seconds, 0 or more"),
        ({"max_idle": -0.5}, "max_idle=-0.5: expected seconds, 0 or more"),
        ({"max_lifetime": math.nan}, "max_lifetime=nan: expected seconds, 0 or more"),
        ({"check": "SELECT 1"}, "check='SELECT 1': expected a function of one session, or None"),
        ({"name": ""}, "name='': expected 1 to 63 letters, digits and . _ : @ + - (beginning with a letter or digit)"),
        ({"name": "../../etc/passwd"}, "name='../../etc/passwd': expected 1 to 63 letters"),
        ({"name": "a\0b"}, r"name='a\x00b': expected 1 to 63 letters"),
        ({"name": "naïve"}, "name='naïve': expected 1 to 63 letters"),
        ({"name": "x" * 64}, f"name='{'x' * 64}': expected 1 to 63 letters"),
        ({"name": 7}, "name=7: expected 1 to 63 letters"),
        ({"max_sise": 4}, "max_sise=4: there is no such option; there are check, close_timeout, "),
        ({"maxconn": 4, "host": "db"}, "host='db': there is no such option; there are "),
        ({"dial": print}, "target='tcp://localhost:80', dial=<built-in function print>, driver=None: expected a target, or dial=, or driver="),
        ({"broker": "/tmp/" + "x" * 100}, f"broker='/tmp/{'x' * 100}': a socket path may have at most 96 bytes"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    """Each is refused by the constructor, before any I/O, with option, value and what was expected."""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool("tcp://localhost:80", **options)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "target=None, dial=None, driver=None: expected a target, or dial=, or driver="),
        ({"dial": 5, "name": "x"}, "dial=5: expected a function without arguments"),
        ({"dial": print}, "name=None: a pool without a target needs a name; workers that give the same share it"),
    ],
    ids=str,
)
def test_pools_of_nothing(options: dict[str, Any], said: str) -> None:
    """Without a target there must be a function to dial, and a name."""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool(**options)
    assert str(caught.value) == said


@pytest.mark.parametrize("broker", [5, b"/tmp/b.sock", "/tmp/a\0b"], ids=repr)
def test_a_broker_that_is_no_path(broker: Any) -> None:
    """``broker=`` is checked at construction as every option is."""
    with pytest.raises(mppool.OptionError, match="broker="):
        mppool.Pool("tcp://localhost:80", broker=broker)


@pytest.mark.parametrize("host", ["höst", "my host", "_x", "a\nb", "-x"])
def test_an_odd_host_is_not_blamed_on_the_name(host: str) -> None:
    """A host that no default name can be made of is accepted, or refused as what the user gave: the target."""
    try:
        mppool.Pool((host, 80))
    except mppool.OptionError as error:
        if not str(error).startswith("target="):
            raise


def test_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPPOOL_BROKER counts where ``broker=`` is not given, with the same bounds."""
    monkeypatch.setenv("MPPOOL_BROKER", "/tmp/" + "x" * 100)
    with pytest.raises(mppool.OptionError, match=r"broker='/tmp/x+': a socket path may have at most 96 bytes"):
        mppool.Pool("tcp://localhost:80")


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True], ids=repr)
def test_timeouts_of_a_checkout(socket_path: str, timeout: Any) -> None:
    """A checkout's own timeout is checked as the option is; nothing is dialed."""
    with mppool.Pool(("127.0.0.1", 1), broker=socket_path) as pool:
        for checkout in (pool.getconn, lambda timeout: pool.connection(timeout).__enter__()):
            with pytest.raises(mppool.OptionError) as caught:
                checkout(timeout)
            assert str(caught.value) == f"timeout={timeout!r}: expected seconds, 0 or more"
        assert pool.get_stats()["dial_failures"] == 0


@pytest.mark.parametrize("timeout", [-1, math.nan, "1"], ids=repr)
def test_timeouts_of_open(socket_path: str, timeout: Any) -> None:
    """``open(wait=True)`` checks its timeout like every other."""
    with mppool.Pool(("127.0.0.1", 1), broker=socket_path) as pool, pytest.raises(mppool.OptionError, match="timeout="):
        pool.open(wait=True, timeout=timeout)


def test_open_says_when_it_had_to_give_up(socket_path: str) -> None:
    """``open(wait=True)`` raises PoolTimeout when ``min_size`` sessions are not to be had in time."""
    with mppool.Pool(("127.0.0.1", 1), min_size=1, broker=socket_path) as pool, pytest.raises(mppool.PoolTimeout, match="min_size=1"):
        pool.open(wait=True, timeout=0.05)


@pytest.mark.parametrize("max_size", [0, -1, slots_for(4) + 1, 2.0, "8", True, None], ids=repr)
def test_caps_of_a_resize(socket_path: str, max_size: Any) -> None:
    """A new cap below 1, above the table's room, or no number, is refused with value and bounds; the old one stays."""
    with mppool.Pool(("127.0.0.1", 1), max_size=4, broker=socket_path) as pool:
        with pytest.raises(mppool.OptionError) as caught:
            pool.resize(max_size)
        assert str(caught.value).startswith(f"max_size={max_size!r}: expected a whole number from 1 to {slots_for(4)}")
        assert pool.get_stats()["max_size"] == 4


# Servers that are not there.


@pytest.mark.parametrize("target", ["tcp://no-such-host.invalid:80", "tcp://[fe80::1%nosuch]:80"])
def test_a_host_that_does_not_exist(socket_path: str, target: str) -> None:
    """DialFailed at once, not after the timeout: waiting will not help. The permit is free again."""
    host = "no-such-host.invalid" if "invalid" in target else "fe80::1%nosuch"
    with pytest.raises(socket.gaierror) as why:
        socket.getaddrinfo(host, 80)
    if why.value.errno != socket.EAI_NONAME:
        pytest.skip(f"this machine's resolver does not say that {host} does not exist: {why.value}")
    with mppool.Pool(target, timeout=30, broker=socket_path) as pool:
        began = time.monotonic()
        with pytest.raises(mppool.DialFailed) as caught:
            pool.getconn()
        assert time.monotonic() - began < AT_ONCE
        assert str(caught.value) == f"target={target!r}: cannot resolve {host!r}: {why.value.strerror}"
        assert caught.value.permanent
        assert isinstance(caught.value.__cause__, socket.gaierror)
        stats = pool.get_stats()
        assert [stats[key] for key in ("size", "dialing", "waiting", "dial_failures")] == [0, 0, 0, 1]


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
def test_a_host_that_cannot_be_a_name(socket_path: str, host: str) -> None:
    """A host name that the resolver cannot even be asked for is DialFailed at once, too."""
    with mppool.Pool((host, 80), name="x", timeout=0.3, broker=socket_path) as pool, pytest.raises(mppool.DialFailed, match=re.escape(host)):
        pool.getconn()


def test_a_server_that_refuses(socket_path: str) -> None:
    """A refused connection is tried again until the timeout; the error says the numbers and, as its cause, what the server said."""
    with mppool.Pool("tcp://127.0.0.1:1", broker=socket_path) as pool:
        with pytest.raises(mppool.PoolTimeout, match=r"no session within 0.1 s \(max_size=4, in_use=0, idle=0, dialing=0, ") as caught:
            pool.getconn(timeout=0.1)
        assert isinstance(caught.value.__cause__, mppool.DialFailed)
        assert str(caught.value.__cause__) == "target='tcp://127.0.0.1:1': [Errno 111] Connection refused"


def test_a_unix_socket_that_is_not_there(socket_path: str) -> None:
    """The same for a Unix socket; the error says its path."""
    with mppool.Pool("unix:///no/such.sock", broker=socket_path) as pool:
        with pytest.raises(mppool.PoolTimeout) as caught:
            pool.getconn(timeout=0.05)
        assert str(caught.value.__cause__) == "target='unix:///no/such.sock': [Errno 2] No such file or directory"


def test_a_dial_function_of_something_without_close(socket_path: str) -> None:
    """What ``dial=`` makes must have ``close()``: DialFailed at once says what it made."""

    def seven() -> int:
        return 7

    with mppool.Pool(dial=seven, name="x", broker=socket_path) as pool:
        began = time.monotonic()
        with pytest.raises(mppool.DialFailed, match=r"dial=<function .*seven at .*> made 7, which has no close\(\)"):
            pool.getconn()
        assert time.monotonic() - began < AT_ONCE


# One name, two meanings.


def test_one_name_two_targets(server: Judge, socket_path: str) -> None:
    """A name in use for another target is refused; the error says both. The running pool goes on."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool, pool.connection() as sock:
        other = mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path)
        with pytest.raises(mppool.ConfigMismatch) as caught:
            other.open()
        assert str(caught.value) == (
            "name='web': declared here with target tcp://127.0.0.1:1 and driver raw/1, "
            f"but the running pool has target tcp://127.0.0.1:{server.port} and driver raw/1"
        )
        assert ask(sock, "goes-on") == 1
        assert len(pool.get_stats()["workers"]) == 1


def test_one_name_two_drivers(server: Judge, socket_path: str) -> None:
    """A name in use with another driver is refused; the error says both."""
    with mppool.Pool(server.address, name="web", broker=socket_path):
        with pytest.raises(mppool.ConfigMismatch) as caught:
            mppool.Pool(dial=lambda: socket.create_connection(server.address), name="web", broker=socket_path).open()
        assert "declared here with target  and driver closeable/1, but the running pool has target " in str(caught.value)
        assert "driver raw/1" in str(caught.value)


def test_a_name_is_free_again_when_its_pool_is_gone(server: Judge, socket_path: str) -> None:
    """What a name meant is forgotten with the last worker."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path):
        pass
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool, pool.connection() as sock:
        ask(sock, "hello")


def test_another_cap_is_logged_and_the_running_one_stays(server: Judge, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that declares other numbers is warned with both, once each, and meets those that run."""
    first = mppool.Pool(server.address, max_size=2, max_idle=60, name="web", broker=socket_path)
    second = mppool.Pool(server.address, max_size=9, max_idle=0.5, name="web", broker=socket_path)
    with first, caplog.at_level(logging.WARNING, "mppool"), second:
        assert [record.getMessage() for record in caplog.records] == [
            "pool 'web': max_size=9 declared here, 2 is running and stays",
            "pool 'web': max_idle=0.5 declared here, 60 is running and stays",
        ]
        assert first.get_stats()["max_size"] == second.get_stats()["max_size"] == 2


def test_the_same_declaration_is_not_logged(server: Judge, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Workers that agree, or differ in what is each worker's own, hear nothing."""
    with mppool.Pool(server.address, name="web", broker=socket_path), mppool.Pool(server.address, name="web", timeout=1, debug=True, broker=socket_path):
        assert caplog.records == []


# Runtime directories.


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users can reach, as the runtime directory's parent is."""
    path = Path(tempfile.mkdtemp(prefix="mppool-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def too_open(directory: Path) -> tuple[str, str]:
    run = directory / "run"
    run.mkdir()
    run.chmod(0o770)
    return f"{run}/b.sock", f"the directory {run} is open to others (mode 770); chmod 700 it"


def a_symlink(directory: Path) -> tuple[str, str]:
    (directory / "real").mkdir(mode=0o700)
    (directory / "run").symlink_to("real")
    return f"{directory}/run/b.sock", f"{directory}/run is not a directory (a symbolic link is refused too)"


def a_file(directory: Path) -> tuple[str, str]:
    (directory / "run").write_text("")
    return f"{directory}/run/b.sock", f"{directory}/run is not a directory (a symbolic link is refused too)"


def without_parent(directory: Path) -> tuple[str, str]:
    return f"{directory}/no/such/b.sock", f"cannot make the runtime directory {directory}/no/such: No such file or directory"


def of_another_user(directory: Path) -> tuple[str, str]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of another user")
    run = directory / "run"
    run.mkdir(mode=0o700)
    os.chown(run, NOBODY, NOBODY)
    return f"{run}/b.sock", f"the directory {run} belongs to uid {NOBODY}, we are 0"


Trouble = Callable[[Path], "tuple[str, str]"]
troubles = pytest.mark.parametrize("trouble", [too_open, a_symlink, a_file, without_parent, of_another_user])


@troubles
def test_a_broker_refuses_a_directory_it_cannot_trust(directory: Path, trouble: Trouble) -> None:
    """Whoever may write there could put a socket of his own: exit code 1, the option, the path and what to do."""
    path, why = trouble(directory)
    done = subprocess.run([sys.executable, "-m", "mppool", "broker", "--socket", path], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"mppool: broker={path!r}: {why}\n")


@troubles
def test_autostart_that_cannot_work(directory: Path, trouble: Trouble, server: Judge) -> None:
    """BrokerUnavailable passes on why no broker could be started, and nothing is left behind."""
    path, why = trouble(directory)
    pool = mppool.Pool(server.address, broker=path, autostart=True)
    with pytest.raises(mppool.BrokerUnavailable) as caught:
        pool.getconn()
    assert str(caught.value) == f"broker={path!r}: autostart failed with exit code 1: mppool: broker={path!r}: {why}"
    assert names(path) == []
    assert server.counts()["dials"] == 0


def test_autostart_works_once_the_trouble_is_gone(directory: Path, server: Judge) -> None:
    """A pool whose autostart failed is not spoilt: the next checkout tries again."""
    path, _ = too_open(directory)
    pool = mppool.Pool(server.address, broker=path, autostart=True)
    with pytest.raises(mppool.BrokerUnavailable):
        pool.getconn()
    os.chmod(directory / "run", 0o700)
    try:
        with pool, pool.connection() as sock:
            assert ask(sock, "hello") == 1
            assert pool.get_stats()["broker_alive"]
    finally:
        end_brokers(path)
    assert names(path) == []


def end_brokers(path: str) -> None:
    for process in processes_of(path):
        process.terminate()
    eventually(lambda: not processes_of(path))


def test_a_runtime_directory_is_made_for_us_alone(directory: Path) -> None:
    """A broker makes the directory of its socket if it can, for nobody else to enter; the socket is ours alone."""
    path = f"{directory}/run/b.sock"
    with broker_process(path):
        assert stat.S_IMODE(os.stat(f"{directory}/run").st_mode) == 0o700
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    eventually(lambda: not processes_of(path))


# Other users.


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


# Other versions, and damage.


@contextlib.contextmanager
def fake_broker(path: str, answer: bytes) -> Iterator[list[bytes]]:
    """Something that answers the first message of every link so. Yields what it heard."""
    heard: list[bytes] = []
    ended = threading.Event()
    listener = link.listen(path)
    listener.setblocking(True)

    def serve() -> None:
        while not ended.is_set():
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(10)
                heard.append(sock.recv(4096))
                if heard[-1]:
                    sock.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        link.connect(path).close()
        thread.join()
        listener.close()
        os.unlink(path)


def test_a_broker_that_refuses_us(server: Judge, socket_path: str) -> None:
    """BrokerUnavailable at once, with what the broker said; the connection that was dialed is closed, its permit free."""
    refusal = encode(Message(Kind.REFUSED, body=b"this broker serves another version of mppool"))
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool:
        with fake_broker(socket_path, refusal) as heard:
            began = time.monotonic()
            with pytest.raises(mppool.BrokerUnavailable) as caught:
                pool.getconn()
            assert time.monotonic() - began < AT_ONCE
            assert str(caught.value) == f"broker={socket_path!r}: this broker serves another version of mppool"
            assert decode(heard[0], 0).kind is Kind.HELLO
        eventually(lambda: server.counts()["live"] == 0)
        with pool.connection(timeout=5) as sock:  # the permit is back
            ask(sock, "without-that-broker")


def test_a_broker_of_another_version(server: Judge, socket_path: str) -> None:
    """A broker that speaks another version of the wire is BrokerUnavailable, with both versions, as errors.py says."""
    refusal = bytearray(encode(Message(Kind.REFUSED, body=b"a message of wire version 1, this mppool speaks 2")))
    refusal[0] = WIRE_VERSION + 1
    with mppool.Pool(server.address, timeout=3, broker=socket_path) as pool, fake_broker(socket_path, bytes(refusal)):
        said = ""
        try:
            with pool.connection():
                pass
        except mppool.BrokerUnavailable as error:
            said = str(error)
        assert f"version {WIRE_VERSION + 1}" in said


@pytest.mark.parametrize("answer", [b"", b"x", bytes(64), b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "a byte", "zeros", "http"])
def test_a_broker_that_is_none(server: Judge, socket_path: str, answer: bytes) -> None:
    """Whatever answers nonsense on the socket counts as no broker: the pool works, within its cap."""
    with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool, fake_broker(socket_path, answer):
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "one") == 1
        with pool.connection(timeout=5) as sock:
            assert ask(sock, "two") == 1


def answer_to(path: str, data: bytes) -> Message | None:
    """What the broker at ``path`` answers to a first message, None if it only hangs up."""
    with link.connect(path) as sock:
        sock.setblocking(True)
        sock.settimeout(10)
        sock.send(data)
        answer = sock.recv(4096)
        return decode(answer, 0) if answer else None


def hello(ident: str, row: int = 0, incarnation: int = 1) -> bytes:
    return encode(Message(Kind.HELLO, row, incarnation, body=ident.encode()))


def test_a_worker_of_another_version(broker: BrokerProcess, socket_path: str) -> None:
    """The broker refuses a message of another wire version, says both, and goes on."""
    data = bytes([9]) + hello(pool_id(socket_path, "web"))[1:]
    refusal = answer_to(socket_path, data)
    assert refusal == Message(Kind.REFUSED, body=f"a message of wire version 9, this mppool speaks {WIRE_VERSION}".encode())
    assert broker.process.poll() is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x", "a message of 1 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "wire version 71"),
        (bytes([WIRE_VERSION, 99]) + bytes(14), "unknown kind 99"),
        (encode(Message(Kind.WAIT)), "a link begins with HELLO, not WAIT"),
        (hello("../../etc/passwd"), "one of our pools, not '../../etc/passwd'"),
        (hello("mppool-00000000-0000000000"), "one of our pools, not 'mppool-00000000-0000000000'"),
        (encode(Message(Kind.HELLO, body=b"\xff" * 60_000)), "a link begins with HELLO and one of our pools"),
    ],
    ids=["a byte", "http", "unknown kind", "no hello", "a path", "not this broker's", "long"],
)
def test_a_worker_that_is_none(broker: BrokerProcess, socket_path: str, data: bytes, said: str) -> None:
    """Nonsense costs its link and nothing else; the refusal says what was wrong."""
    refusal = answer_to(socket_path, data)
    assert refusal is not None
    assert refusal.kind is Kind.REFUSED
    assert said in refusal.body.decode()
    assert broker.process.poll() is None


def test_a_worker_with_somebody_elses_row(broker: BrokerProcess, server: Judge, socket_path: str) -> None:
    """A link must name a row and the incarnation that took it; the real worker is not disturbed."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        with pool.connection() as sock:
            session = ask(sock, "before")
        ident = pool_id(socket_path, "web")
        for row, incarnation in ((0, 999), (511, 1), (4000, 1)):
            refusal = answer_to(socket_path, hello(ident, row, incarnation))
            assert refusal == Message(Kind.REFUSED, body=f"row {row} of pool {ident} is not yours".encode())
        with pool.connection() as sock:
            assert ask(sock, "after") == session


@pytest.mark.parametrize(
    ("word", "value", "said"),
    [
        (W_VERSION, 99, rf"has version 99, this mppool speaks {TABLE_VERSION}; end its workers, then mppool gc$"),
        (W_SLOTS, 1 << 60, r"is damaged or from before a reboot; end its workers, then mppool gc$"),
        (W_SLOTS, 0, r"is damaged or from before a reboot; end its workers, then mppool gc$"),
    ],
    ids=["version", "too many slots", "no slots"],
)
def test_a_table_that_is_not_as_it_should_be(socket_path: str, word: int, value: int, said: str) -> None:
    """A worker that finds a table of another version, or a damaged one, in use, says which and what to do, and leaves it."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path) as pool:
        words = pool._worker.words  # type: ignore[union-attr]
        right, words[word] = words[word], value
        try:
            with pytest.raises(mppool.ProtocolError, match=f"^pool table {pool_id(socket_path, 'web')} {said}"):
                mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()
        finally:
            words[word] = right


def test_a_lock_file_that_somebody_removed(socket_path: str) -> None:
    """Without its lock file a pool in use cannot be joined: the error says so."""
    with mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path):
        os.unlink(lock_path(pool_id(socket_path, "web")))
        with pytest.raises(mppool.ProtocolError, match="has lost its lock file"):
            mppool.Pool("tcp://127.0.0.1:1", name="web", broker=socket_path).open()


# No room.

CHECKOUT = """
import os, sys, mppool
pool = mppool.Pool(("127.0.0.1", int(sys.argv[1])), broker=sys.argv[2])
try:
    with pool.connection(timeout=5) as sock:
        sock.sendall(b"hello\\n")
        assert sock.recv(100).endswith(b" hello\\n")
        print("lent")
except mppool.Error as error:
    print(type(error).__name__, error)
print("size", pool.get_stats()["size"] if pool._worker else None)
pool.close()
print("left", *os.listdir("/dev/shm"))
"""


def checkout_with(pages: int, server: Judge, path: str) -> dict[str, str]:
    """A checkout with so many pages of shared memory: what it said."""
    done = in_private_shm(f"{pages * 4}k", sys.executable, "-c", CHECKOUT, str(server.port), path)
    assert done.returncode == 0, f"with {pages} pages: exit code {done.returncode}\n{done.stderr}"
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


TABLE = -(-size_of_table(slots_for(4)) // 4096)  # pages


def test_no_room_for_the_table(server: Judge, socket_path: str) -> None:
    """On a full /dev/shm the first use is an Error that says how much is needed and what to do; nothing is dialed."""
    said = checkout_with(TABLE // 2, server, socket_path)
    assert (
        said["Error"] == f"no room in /dev/shm: the shared table needs {size_of_table(slots_for(4))} bytes; enlarge it (docker: --shm-size) or run `mppool gc`"
    )
    assert server.counts()["dials"] == 0


def test_no_room_leaves_nothing(server: Judge, socket_path: str) -> None:
    """A pool that could not be made leaves no name."""
    assert checkout_with(TABLE // 2, server, socket_path)["left"] == ""


def test_hardly_any_room(server: Judge, socket_path: str) -> None:
    """With every amount of room around what the table needs, a checkout works or is an Error about room: never a signal, never a lost permit."""
    said = [checkout_with(pages, server, socket_path) for pages in range(TABLE - 1, TABLE + 4)]
    for outcome in said:
        assert "lent" in outcome or "/dev/shm" in outcome.get("Error", ""), outcome
        assert outcome["size"] in (("1",) if "lent" in outcome else ("0", "None")), outcome
    assert "Error" in said[0]
    assert "lent" in said[-1]
    eventually(lambda: server.counts()["live"] == 0)


# Too few descriptors.


def test_too_few_descriptors(server: Judge, socket_path: str) -> None:
    """Where RLIMIT_NOFILE cannot be raised far enough, the first use is an Error that says by how much."""
    pool = mppool.Pool(server.address, name="web", max_size=100, broker=socket_path)

    def work(child: Child) -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            pool.getconn()
        except mppool.Error as error:
            return say(error)
        return "lent"

    with fork(work) as (child,):
        assert re.fullmatch(
            r"Error: too few file descriptors: pool 'web' with max_size=100 needs ([12]\d\d), RLIMIT_NOFILE allows 64; raise it \(ulimit -n \1\)",
            child.result(),
        )


def test_a_soft_limit_is_raised(server: Judge, socket_path: str) -> None:
    """Where only the soft limit is low it is raised, and the whole cap can be lent."""
    pool = mppool.Pool(server.address, max_size=60, broker=socket_path)

    def work(child: Child) -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 1024))
        leases = [pool.getconn(timeout=10) for _ in range(60)]
        for sock in leases:
            pool.putconn(sock)
        pool.close()
        return len(leases)

    with fork(work) as (child,):
        assert child.result() == 60


def start_with(limit: int, path: str) -> subprocess.CompletedProcess[str]:
    command = f'ulimit -n {limit} && exec "$@"'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "mppool", "broker", "--socket", path], capture_output=True, text=True, timeout=30, check=False
    )


def test_too_few_descriptors_for_a_broker(directory: Path) -> None:
    """A broker that may not open enough does not start: exit code 1 and by how much."""
    done = start_with(256, f"{directory}/run/b.sock")
    assert done.returncode == 1
    assert re.fullmatch(r"mppool: too few file descriptors: the broker needs (1\d{3}), RLIMIT_NOFILE allows 256; raise it \(ulimit -n \1\)\n", done.stderr)


def test_a_broker_that_does_not_start_leaves_nothing(directory: Path) -> None:
    """A broker that fails after it took the socket's lock removes the lock file again."""
    start_with(256, f"{directory}/run/b.sock")
    assert os.listdir(f"{directory}/run") == []


# Sessions that are not what they should be.


def test_returning_what_was_never_lent(server: Judge, socket_path: str) -> None:
    """Whatever is not a lease of this pool is refused by name, also before the first use; nothing changes."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    with socket.socket() as stranger:
        for thing in (stranger, None, 7, object()):
            with pytest.raises(mppool.Error, match=r"^.* is not lent by pool 'web' in this process: "):
                pool.putconn(thing)
        with pool:
            before = pool.get_stats()
            with pytest.raises(mppool.Error, match="is not lent by pool 'web'"):
                pool.putconn(stranger)
            assert pool.get_stats() == before


def test_returning_twice(server: Judge, socket_path: str) -> None:
    """The second return of a lease is refused; the session is there once."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        sock = pool.getconn()
        pool.putconn(sock)
        for discard in (False, True):
            with pytest.raises(mppool.Error, match=r"is not lent by pool 'web' in this process: returned already, or lent before a fork or by another pool"):
                pool.putconn(sock, discard=discard)
        assert [pool.get_stats()[key] for key in ("size", "in_use", "idle")] == [1, 0, 1]
        again = pool.getconn()
        assert ask(again, "still-good") == 1
        pool.putconn(again)


def test_returning_to_another_pool(server: Judge, socket_path: str) -> None:
    """A lease goes back to the pool it is from; the other one refuses it, and the right one takes it then."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as web, mppool.Pool(server.address, name="jobs", broker=socket_path) as jobs:
        sock = web.getconn()
        with pytest.raises(mppool.Error, match="is not lent by pool 'jobs'"):
            jobs.putconn(sock)
        assert web.get_stats()["in_use"] == 1
        web.putconn(sock)
        assert web.get_stats()["in_use"] == 0


def test_returning_the_parents_lease(server: Judge, socket_path: str) -> None:
    """A lease that was made before a fork is the parent's: the child's return is refused, the parent's is taken."""
    with mppool.Pool(server.address, name="web", broker=socket_path) as pool:
        sock = pool.getconn()

        def work(child: Child) -> str:
            try:
                pool.putconn(sock)
            except mppool.Error as error:
                return say(error)
            return "taken"

        with fork(work) as (child,):
            assert "is not lent by pool 'web' in this process" in child.result()
        assert ask(sock, "mine") == 1
        pool.putconn(sock)


def test_using_a_lease_after_its_return_with_debug(server: Judge, socket_path: str) -> None:
    """With ``debug=True`` use after return fails at once, and the session is unharmed."""
    with mppool.Pool(server.address, debug=True, broker=socket_path) as pool:
        with pool.connection() as sock:
            ask(sock, "within")
        with pytest.raises(OSError, match="Bad file descriptor"):
            sock.sendall(b"after\n")
        with pool.connection() as sock:
            assert ask(sock, "again") == 1


@pytest.mark.parametrize("was_open", [True, False], ids=["open", "never open"])
def test_use_after_close(server: Judge, socket_path: str, was_open: bool) -> None:
    """A closed pool says so by name, whatever is asked of it; closing again is no error; nothing is dialed."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    if was_open:
        pool.open()
    pool.close()
    uses: list[Callable[[], object]] = [pool.getconn, pool.connection().__enter__, pool.open, pool.__enter__, pool.get_stats, lambda: pool.resize(2)]
    for use in uses:
        with pytest.raises(mppool.PoolClosed, match=r"^pool 'web' is closed$"):
            use()
    pool.close()
    assert pool.closed
    assert repr(pool) == "<Pool 'web' closed>"
    assert server.counts()["dials"] == 0


def test_returning_after_close(server: Judge, socket_path: str) -> None:
    """A lease outlives ``close()``; its return is taken, a second one refused."""
    pool = mppool.Pool(server.address, name="web", broker=socket_path)
    sock = pool.getconn()
    pool.close()
    assert ask(sock, "still-mine") == 1
    pool.putconn(sock)
    with pytest.raises(mppool.Error, match="is not lent by pool 'web'"):
        pool.putconn(sock)
    eventually(lambda: server.counts()["live"] == 0)


# Platforms.


def import_with(statement: str) -> str:
    """``import mppool`` in a fresh interpreter after a statement: the last line of what it said."""
    done = subprocess.run([sys.executable, "-c", f"import sys; {statement}; import mppool"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_a_platform_that_is_not_linux(platform: str) -> None:
    """The import fails with one clear sentence that names the platform."""
    expected = f"ImportError: mppool runs on Linux only (this is {platform}): it needs SCM_RIGHTS, SOCK_SEQPACKET and F_OFD_SETLK"
    assert import_with(f"sys.platform = {platform!r}") == expected


@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        ("darwin", "import socket; del socket.MSG_CMSG_CLOEXEC"),
        ("win32", "sys.modules.update(fcntl=None, resource=None, posix_ipc=None)"),
    ],
)
def test_a_platform_that_lacks_what_linux_has(platform: str, missing: str) -> None:
    """The same where modules and names of Linux really are missing."""
    assert import_with(f"{missing}; sys.platform = {platform!r}").startswith(f"ImportError: mppool runs on Linux only (this is {platform})")
