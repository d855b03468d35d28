"""``mppool.testing`` and the example of a driver of one's own: the example keeps its promises, and each promise can be seen to be broken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mppool.drivers import Dialer, DriverBase, Residence, Target, abandon, adopt
from mppool.drivers.base import AsyncDriverBase
from mppool.drivers.raw import RawDriver
from mppool.drivers.streams import AsyncRawDriver
from mppool.testing import BrokenDriver, check_driver
from tests.helpers.processes import eventually
from tests.helpers.server import Judge, ask

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_protocol"
sys.path.append(str(EXAMPLE))

import talk_server  # noqa: E402
from talk_client import Client  # noqa: E402
from talk_driver import TalkDriver  # noqa: E402


@pytest.fixture(scope="module")
def talk() -> Iterator[tuple[str, int]]:
    with talk_server.Server(("127.0.0.1", 0), talk_server.Session) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address  # type: ignore[misc]
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process that a check started outlives it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    eventually(lambda: not set(psutil.Process().children(recursive=True)) - before, what="processes left over")


# The example, as its reader runs it.


def test_the_example_runs() -> None:
    """Four processes share two sessions of the example's server, and two logins are enough."""
    done = subprocess.run([sys.executable, EXAMPLE / "talk_app.py"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 processes, 2 sessions: 400 leases, ")
    assert int(done.stdout.split()[-2]) <= 2


def test_the_examples_own_test_passes() -> None:
    """The test that comes with the example, as an author runs it."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout


# The kit on drivers that are right.


def ask_raw(sock: socket.socket, nonce: str) -> str:
    ask(sock, nonce)
    return nonce


def an_extra_reply(sock: socket.socket) -> None:
    sock.sendall(b"!extra\n")


def test_raw_sockets_keep_their_promises(server: Judge) -> None:
    """The driver that ``Pool(target)`` uses."""
    report = check_driver(
        RawDriver(Target("tcp", *server.address)),
        identity=lambda sock: ask(sock, "who"),
        ask=ask_raw,
        dirty=[an_extra_reply],
        unreachable=RawDriver(Target("tcp", "127.0.0.1", 1)),
    )
    assert set(report.skipped) == {"attach_fails_cleanly", "reset"}  # no baggage, no state


def test_asynchronous_drivers_are_checked_too(server: Judge) -> None:
    """The driver that ``AsyncPool(target)`` uses, with coroutine functions for everything."""
    import asyncio

    async def echo(sock: socket.socket, nonce: str) -> bytes:
        loop, reply = asyncio.get_running_loop(), b""
        await loop.sock_sendall(sock, f"{nonce}\n".encode())
        while not reply.endswith(b"\n"):
            reply += await loop.sock_recv(sock, 4096)
        return reply

    async def who(sock: socket.socket) -> int:
        return int((await echo(sock, "who")).split()[0])

    async def extra(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, b"!extra\n")

    report = check_driver(AsyncRawDriver(Target("tcp", *server.address)), identity=who, ask=echo, dirty={"extra": extra})
    assert "moves" in report.kept
    assert isinstance(AsyncRawDriver(Target("tcp", "x", 1)), AsyncDriverBase)


def test_resident_sessions_need_not_move(talk: tuple[str, int]) -> None:
    """What does not apply to them is skipped, with the reason; the rest is tried."""

    class Resident(TalkDriver):
        def residence(self, client: Client) -> Residence:
            return Residence.by_choice

    report = check(Resident(talk, "app", "secret"))
    assert {"baggage", "attach", "moves"} <= set(report.skipped)
    assert "by_choice" in report.skipped["moves"]
    assert {"dirt", "forked", "killed", "close"} <= set(report.kept)


def test_a_promise_that_there_is_not_is_an_error(talk: tuple[str, int]) -> None:
    """A misspelt name would try nothing, and find nothing broken."""
    with pytest.raises(ValueError, match="moovs"):
        check(TalkDriver(talk, "app", "secret"), "moves", "moovs")


# The kit on drivers that are wrong: each breaks one promise (and perhaps others with it), and the report says which.


def a_value(client: Client) -> None:
    client.ask("SET colour blue")


def an_answer_that_is_not_read(client: Client) -> None:
    assert client.sock is not None
    client.sock.sendall(b"GET colour\n")


def check(driver: DriverBase, *only: str, **more: Any) -> Any:
    given: dict[str, Any] = {
        "identity": lambda client: client.ask("SESSION"),
        "ask": lambda client, nonce: client.ask(f"ECHO {nonce}"),
        "look": lambda client: client.ask("GET colour"),
        "dirty": [a_value, an_answer_that_is_not_read],
        "secrets": ["secret"],
        "timeout": 8,
        "moves": 3,
    }
    return check_driver(driver, only=only, **{**given, **more})


class Versionless(TalkDriver):
    def key(self) -> str:
        return f"talk {self.user}"


class Indiscreet(TalkDriver):
    def key(self) -> str:
        return f"talk/1 {self.user}:{self.password}"


class Moody(TalkDriver):
    def key(self) -> str:
        return f"talk/1 {time.monotonic_ns()}"


class Blocking(TalkDriver):
    def client(self, sock: socket.socket) -> Client:
        sock.settimeout(None)
        return Client(sock)


class BlockingAttach(TalkDriver):
    def attach(self, fd: int, baggage: bytes) -> Client:
        client = super().attach(fd, baggage)
        client.sock.settimeout(None)  # type: ignore[union-attr]
        return client


class Inherited(TalkDriver):
    def client(self, sock: socket.socket) -> Client:
        os.set_inheritable(sock.fileno(), True)
        return super().client(sock)


class SameAgain(TalkDriver):
    """Dials once, and gives that out again and again."""

    one: Client | None = None

    def dial(self) -> Client:
        self.one = self.one or super().dial()
        return self.one

    def close(self, client: Client) -> None:
        pass


class Stubborn(TalkDriver):
    """Lets something through that is no OSError, and a socket stay open."""

    def dial(self) -> Client:
        left_open.append(socket.socket())
        try:
            return super().dial()
        except OSError as error:
            raise RuntimeError("no server") from error


class LeavesOpen(TalkDriver):
    def dial(self) -> Client:
        left_open.append(socket.socket())
        return super().dial()


left_open: list[socket.socket] = []


class Shrugging(TalkDriver):
    def residence(self, client: Client) -> Any:
        return "moves"


class Verbose(TalkDriver):
    def detach(self, client: Client) -> bytes:
        return super().detach(client) + b" " * 70000


class Departing(TalkDriver):
    """As if the descriptor were given away."""

    def detach(self, client: Client) -> bytes:
        carried = super().detach(client)
        client.close()
        return carried


class Borrowing(TalkDriver):
    """Wraps the descriptor that it is given, instead of a duplicate."""

    def attach(self, fd: int, baggage: bytes) -> Client:
        return self.client(socket.socket(fileno=fd))


class LoggingIn(TalkDriver):
    """Opens another connection to log in on."""

    def attach(self, fd: int, baggage: bytes) -> Client:
        return self.dial()


class Greeting(TalkDriver):
    """Says something in attach()."""

    def attach(self, fd: int, baggage: bytes) -> Client:
        client = super().attach(fd, baggage)
        client.sock.sendall(b"ECHO hello\n")  # type: ignore[union-attr]
        client.sock.recv(100)  # type: ignore[union-attr]
        return client


class Asking(TalkDriver):
    """Asks the server in is_clean()."""

    def is_clean(self, client: Client) -> bool:
        if client.sock is not None:
            client.sock.settimeout(0.5)
            try:
                client.ask("ECHO clean")
            except OSError:
                return False
        return super().is_clean(client)


class Polite(TalkDriver):
    """Says goodbye in abort()."""

    def abort(self, client: Client) -> None:
        client.close()


class Slamming(TalkDriver):
    """Ends the connection in abort(), for everybody."""

    def abort(self, client: Client) -> None:
        if client.sock is not None:
            try:
                client.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        super().abort(client)


class PoliteLater(TalkDriver):
    """Forgets what the client's __del__ does."""

    def abort(self, client: Client) -> None:
        pass


class Once(TalkDriver):
    def abort(self, client: Client) -> None:
        sock, client.sock = client.sock, None
        abandon(sock)  # type: ignore[arg-type]


class Careless(TalkDriver):
    """Duplicates before it reads the baggage, and keeps the duplicate if that fails."""

    def attach(self, fd: int, baggage: bytes) -> Client:
        copies.append(os.dup(fd))
        client = self.client(adopt(copies[-1]))
        try:
            client.session = int(baggage)
        except ValueError:
            self.abort(client)
            raise
        os.close(copies.pop())
        return client


copies: list[int] = []


class Hoarding(TalkDriver):
    """A makefile() too many in every attached session."""

    def attach(self, fd: int, baggage: bytes) -> Client:
        copies.append(os.dup(fd))
        return super().attach(fd, baggage)


class Suspicious(TalkDriver):
    def is_clean(self, client: Client) -> bool:
        return False


class Untidy(TalkDriver):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked = 0

    def is_clean(self, client: Client) -> bool:
        self.asked += 1
        return self.asked == 1

    def tidy(self, client: Client) -> None:
        pass


class Optimistic(TalkDriver):
    def ping(self, client: Client) -> None:
        pass


class Panicking(TalkDriver):
    """Raises in close() if the connection is gone."""

    def close(self, client: Client) -> None:
        client.ask("ECHO bye")
        client.close()


class Lingering(TalkDriver):
    """Does not close its descriptor."""

    def close(self, client: Client) -> None:
        if client.sock is not None:
            client.sock.detach()
            client.sock = None


class Waiting(TalkDriver):
    """Waits for an answer to its goodbye."""

    def close(self, client: Client) -> None:
        if client.sock is not None:
            client.sock.settimeout(4)
            try:
                client.ask("ECHO goodbye")
            except Exception:
                pass
        client.close()


class Trusting(TalkDriver):
    """Leaves what users set."""

    def transferred(self, client: Client) -> None:
        pass


class Unaware(TalkDriver):
    minds_transfer = False


class Forgetful(TalkDriver):
    """A reset that resets nothing."""

    def reset(self, client: Client) -> None:
        client.ask("ECHO reset")


class Refusing(TalkDriver):
    """No session of another process is good enough."""

    def transferred(self, client: Client) -> None:
        raise ConnectionError("never mind")


class BlockingAtRest(BlockingAttach):
    def is_clean(self, client: Client) -> bool:
        return client.sock is not None and not client.asking


class Sticky(TalkDriver):
    """Reads ahead: what was in its hands when it was given back is the next one's."""

    def is_clean(self, client: Client) -> bool:
        return client.sock is not None

    def transferred(self, client: Client) -> None:
        client.sock.sendall(b"ECHO of another\n")  # type: ignore[union-attr]


BROKEN: list[tuple[type[TalkDriver], str, str]] = [
    (Versionless, "key", "talk/1"),
    (Indiscreet, "key", "secret"),
    (Moody, "key", "then"),
    (Blocking, "dial", "blocking mode"),
    (BlockingAttach, "attach", "blocking mode"),
    (BlockingAtRest, "moves", "blocking mode"),
    (Inherited, "dial", "inherited"),
    (SameAgain, "dial", "one identity"),
    (Stubborn, "dial_failed", "RuntimeError"),
    (LeavesOpen, "dial_failed", "left open"),
    (Shrugging, "residence", "'moves'"),
    (Verbose, "baggage", "bytes of baggage"),
    (Departing, "baggage", "closed"),
    (Borrowing, "attach", "the pool's own descriptor"),
    (LoggingIn, "attach", "another connection"),
    (LoggingIn, "moves", "the server sees"),
    (Greeting, "attach_is_silent", "hangs"),
    (Asking, "attach_is_silent", "after is_clean() the server heard b'ECHO clean"),
    (Polite, "abort_is_silent", "heard b'QUIT"),
    (Slamming, "abort_is_silent", "shutdown()"),
    (PoliteLater, "abort_is_silent", "still open"),
    (Once, "abort_is_silent", "a second abort()"),
    (Careless, "attach_fails_cleanly", "left open"),
    (Hoarding, "descriptors", "20 descriptors are left open"),
    (LeavesOpen, "descriptors", "5 descriptors are left open"),
    (Suspicious, "clean_after_use", "right after dial()"),
    (Untidy, "clean_after_use", "after a round trip and tidy()"),
    (Optimistic, "dead_connection", "ping(session) returned"),
    (Panicking, "dead_connection", "close() of a session that had ended raised"),
    (Lingering, "close", "still open"),
    (Waiting, "close", "took"),
    (Trusting, "dirt", "'blue'"),
    (Unaware, "dirt", "'blue'"),
    (Forgetful, "dirt", "'blue'"),
    (Forgetful, "reset", "'blue'"),
    (Refusing, "moves", "closed, not moved"),
    (Sticky, "moves", "the server sees 'of another'"),
    (Polite, "forked", "the server has ended the connection"),
    (SameAgain, "killed", "at talk_client.py"),
]


@pytest.mark.parametrize(("kind", "name", "said"), BROKEN, ids=[f"{kind.__name__}-{name}" for kind, name, _ in BROKEN])
def test_a_broken_promise_is_found(talk: tuple[str, int], kind: type[TalkDriver], name: str, said: str) -> None:
    """The promise is named, with what was seen and what to do about it."""
    with pytest.raises(BrokenDriver) as failure:
        check(kind(talk, "app", "secret"), name, timeout=2 if said == "hangs" else 15, unreachable=kind(("127.0.0.1", 1), "app", "secret"))
    report = failure.value.report
    (broken,) = report.broken
    assert broken.name == name
    assert said in broken.seen, broken.seen
    assert broken.advice
    assert str(broken) in str(failure.value)
    assert report.kept == []


def test_every_promise_is_seen_to_be_broken() -> None:
    """For each that can be tried there is a driver above that breaks it."""
    from mppool.testing.promises import PROMISES

    assert {name for _, name, _ in BROKEN} == {promise.name for promise in PROMISES}


def test_a_driver_that_crashes_breaks_one_promise(talk: tuple[str, int]) -> None:
    """A crash, or a hang, ends with the process of that promise; the others are tried all the same."""

    class Crashing(TalkDriver):
        def ping(self, client: Client) -> None:
            os._exit(3)

    with pytest.raises(BrokenDriver) as failure:
        check(Crashing(talk, "app", "secret"), "dead_connection", "close")
    assert [broken.name for broken in failure.value.report.broken] == ["dead_connection"]
    assert "crash" in failure.value.report.broken[0].seen
    assert failure.value.report.kept == ["close"]


def test_the_public_names_are_there() -> None:
    """What the README tells authors to import; and importing them loads nothing heavy."""
    code = "import sys, mppool.drivers, mppool.drivers as d; d.DriverBase, d.AsyncDriverBase, d.Residence, d.Dialer, d.adopt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout.split()
    assert not {"asyncio", "ssl", "subprocess", "multiprocessing", "mppool.testing"} & set(loaded)
    assert issubclass(AsyncDriverBase, DriverBase)
    assert Dialer(Target("tcp", "x", 1)).target.port == 1
