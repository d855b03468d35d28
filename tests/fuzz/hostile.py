"""A broker that lies, and workers that must not be harmed by it.

It sits at the right path with the right uid, is polite enough to be talked to, and then answers with garbage, with answers to
other questions, with descriptors of other things, with too much or not at all. Workers may fail with mppool's own errors, or go
on without a broker. They may not lend what is no session, hang, crash, or keep a descriptor; and what they believed must not harm
them once an honest broker is in its place.

Beside a liar nobody is promised a session: it beats, so workers wait for it, and without help sessions stay with whoever dialed them.
"""

from __future__ import annotations

import array
import contextlib
import gc
import logging
import os
import random
import select
import socket
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import mppool
from mppool.errors import ProtocolError
from mppool.kernel import link
from mppool.kernel.locks import LockFile
from mppool.kernel.runtime import pool_id
from mppool.table import W_BEAT, Table, lock_path, open_table
from mppool.wire import Kind, Message, decode, encode
from tests.fuzz.frames import Dice, Zoo
from tests.helpers.processes import Child, broker_process, fork
from tests.helpers.server import Judge

__all__ = ["LIES", "expose"]

POLITE = {Kind.HELLO: Kind.WELCOME, Kind.FETCH: Kind.SESSION, Kind.WAIT: Kind.DIAL, Kind.CANCEL: Kind.STRUCK}
LIES = ("other_kind", "other_place", "wrong_descriptor", "garbage", "flood", "silence", "close", "refuse")
HONEST = 15.0  # seconds within which an honest broker has everybody served


class Liar:
    """The broker's side of all links. ``lies`` are those it tells, each time with some probability."""

    def __init__(self, path: str, name: str, trap: int, seed: int, lies: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        self.zoo = Zoo()
        self.dice = Dice(self.random, self.zoo)
        self.lies = lies
        self.trap = socket.create_connection(("127.0.0.1", trap))
        self.listener = link.listen(path)
        self.ident = pool_id(path, name)
        self.table: Table | None = None
        self.links: list[socket.socket] = []
        self.held: dict[tuple[int, int], int] = {}

    def run(self) -> None:
        while True:
            for sock in select.select([self.listener, *self.links], [], [], 0.02)[0]:
                if sock is self.listener:
                    self.links.append(sock.accept()[0])
                else:
                    self.serve(sock)
            self.beat()

    def beat(self) -> None:
        """As a broker that serves: workers wait for it."""
        if self.table is None and os.path.exists(lock_path(self.ident)):
            lock = LockFile(lock_path(self.ident), create=False)
            self.table = open_table(self.ident, lock)
            lock.close()
        if self.table is not None:
            self.table.words[W_BEAT] = time.monotonic_ns()

    def serve(self, sock: socket.socket) -> None:
        try:
            data, fd = link.receive(sock)
            if not data:
                raise ConnectionError
            message = decode(data, 1 if fd >= 0 else 0)
            if message.kind is Kind.SHARE:
                self.keep(message, fd)
            elif message.kind in POLITE:
                self.answer(sock, message)
        except (OSError, ProtocolError):
            self.drop(sock)

    def keep(self, message: Message, fd: int) -> None:
        self.held[message.number, message.serial] = fd
        if self.table is not None:
            self.table.words[self.table.shared_flag + message.number] = message.serial + 1

    def answer(self, sock: socket.socket, message: Message) -> None:
        polite = self.random.random() < 0.6
        getattr(self, "tell_truth" if polite else self.random.choice(self.lies))(sock, message)

    def drop(self, sock: socket.socket) -> None:
        if sock in self.links:
            self.links.remove(sock)
            sock.close()

    def send(self, sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
        sock.setblocking(False)
        if fds:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], socket.MSG_NOSIGNAL)
        else:
            sock.send(data, socket.MSG_NOSIGNAL)

    def tell_truth(self, sock: socket.socket, message: Message) -> None:
        fd = self.held.get((message.number, message.serial))
        if message.kind is not Kind.FETCH:
            self.send(sock, encode(Message(POLITE[message.kind], serial=1)))
        elif fd is None:
            self.send(sock, encode(Message(Kind.GONE, message.number)))
        else:
            self.send(sock, encode(Message(Kind.SESSION, message.number, message.serial), 1), (fd,))

    # Lies.

    def descriptor(self) -> int:
        """Of something else: not a socket, a socket of no use, another server's, another session's."""
        return self.random.choice((*self.zoo.fds, self.trap.fileno(), self.trap.fileno(), *self.held.values()))

    def other_kind(self, sock: socket.socket, message: Message) -> None:
        """An answer to a question that was not asked, perhaps with a descriptor; then, perhaps, the right one."""
        kind = self.random.choice(
            (Kind.SESSION, Kind.GRANT, Kind.GRANT, Kind.DIAL, Kind.STRUCK, Kind.WELCOME, Kind.GONE, Kind.PUT, Kind.SHARE, Kind.LOOK, Kind.TOO_MANY)
        )
        given = kind in (Kind.SESSION, Kind.PUT, Kind.SHARE) or (kind is Kind.GRANT and self.random.random() < 0.7)
        answer = Message(kind, self.random.randrange(70), self.random.randrange(4))
        self.send(sock, encode(answer, int(given)), (self.descriptor(),) if given else ())
        if self.random.random() < 0.5:
            self.tell_truth(sock, message)

    def other_place(self, sock: socket.socket, message: Message) -> None:
        """The right kind of answer, about another slot or generation."""
        if message.kind is Kind.FETCH:
            answer = Message(Kind.SESSION, message.number + self.random.choice((0, 1)), message.serial + 1)
            self.send(sock, encode(answer, 1), (self.descriptor(),))
        else:
            self.send(sock, encode(Message(Kind.GRANT, self.random.randrange(64), 1)))

    def wrong_descriptor(self, sock: socket.socket, message: Message) -> None:
        """What was asked for, to the letter, with something else in it."""
        if message.kind is Kind.FETCH:
            fd = self.random.choice((*self.zoo.fds, self.trap.fileno()))
            self.send(sock, encode(Message(Kind.SESSION, message.number, message.serial, body=self.dice.body()), 1), (fd,))
        else:
            self.send(sock, encode(Message(Kind.GRANT, self.random.randrange(3), 0), 1), (self.descriptor(),))

    def garbage(self, sock: socket.socket, message: Message) -> None:
        frame = self.dice.garbage()
        self.send(sock, frame.data, frame.fds)

    def flood(self, sock: socket.socket, message: Message) -> None:
        """Answers without end, as long as the other side reads them."""
        until = time.monotonic() + 1.5
        kinds = self.random.choice(((Kind.WELCOME,), (Kind.DIAL,), (Kind.STRUCK, Kind.GRANT), (Kind.GONE, Kind.LOOK)))
        while time.monotonic() < until:
            try:
                self.send(sock, encode(Message(self.random.choice(kinds))))
            except BlockingIOError:
                if not select.select([], [sock], [], 0.05)[1]:
                    return
            self.beat()

    def silence(self, sock: socket.socket, message: Message) -> None:
        """Beats, and says nothing."""

    def close(self, sock: socket.socket, message: Message) -> None:
        self.drop(sock)

    def refuse(self, sock: socket.socket, message: Message) -> None:
        self.send(sock, encode(Message(Kind.REFUSED, body=self.random.choice((b"no", b"\xff\xfe", bytes(60000))))))


def broker(path: str, name: str, trap: int, seed: int, lies: tuple[str, ...]) -> Callable[[Child], None]:
    """The lying broker as a child's work; it lives until it is killed."""

    def work(child: Child) -> None:
        liar = Liar(path, name, trap, seed, lies)
        child.tell("listens")
        liar.run()

    return work


def expose(path: str, server: Judge, trap: Judge, seed: int, lies: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    """Two workers beside a lying broker, then beside an honest one until it has served every thread of theirs; what each found."""
    with fork(broker(path, "p", trap.port, seed, lies)) as (liar,):
        assert liar.hear() == "listens"
        with fork(*[worker(path, "p", server.port, seconds)] * 2) as children:
            try:
                for child in children:
                    child.hear(seconds + 20)
            finally:
                liar.end()
                os.unlink(path)
            with broker_process(path):
                for word in ("honest", "end"):
                    for child in children:
                        child.tell(word)
                    for child in children:
                        child.hear(HONEST + 20)
                return [child.result(45) for child in children]


def worker(path: str, name: str, port: int, seconds: float) -> Callable[[Child], dict[str, object]]:
    """Three threads on a pool of three. Returns how often each outcome was seen beside the liar; what must not be, as tracebacks; descriptors left."""

    def work(child: Child) -> dict[str, object]:
        pool = mppool.Pool(("127.0.0.1", port), max_size=3, name=name, broker=path, max_lifetime=0.5, close_timeout=0.2)
        logging.disable()
        warnings.simplefilter("ignore", ResourceWarning)  # descriptors that nobody wants are closed with the last reference, on purpose
        gc.collect()  # what the parent left to be collected
        before = open_files()
        outcomes: Counter[str] = Counter()
        wrong: list[str] = []
        honest, through = threading.Event(), threading.Event()
        served: set[int] = set()

        def use() -> None:
            n = 0
            while not through.is_set():
                n += 1
                began = time.monotonic()
                asked_honest = honest.is_set()
                try:
                    request(pool, port, f"{os.getpid()}-{threading.get_ident()}-{n}")
                    outcome = "ok"
                except mppool.Error as error:
                    outcome = type(error).__name__
                except BaseException:
                    outcome = "wrong"
                    wrong.append(traceback.format_exc())
                took = time.monotonic() - began
                if took > 8:
                    wrong.append(f"a checkout with a timeout of 2 s took {took:.1f} s ({outcome})")
                if not asked_honest:
                    outcomes[outcome] += 1
                elif outcome == "ok":
                    served.add(threading.get_ident())
                time.sleep(random.choice((0, 0.002, 0.01, 0.03)))  # so that sessions lie idle, and others fetch them

        threads = [threading.Thread(target=use, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        child.tell()
        child.hear(60)
        honest.set()
        until = time.monotonic() + HONEST
        while len(served) < len(threads) and time.monotonic() < until:
            time.sleep(0.005)
        if len(served) < len(threads):
            wrong.append(f"an honest broker served {len(served)} of {len(threads)} threads within {HONEST:g} s")
        child.tell()
        child.hear(60)
        through.set()
        child.tell()
        for thread in threads:
            thread.join(15)
            if thread.is_alive():
                return {"outcomes": outcomes, "wrong": [*wrong, "a thread hangs"], "left": []}
        outcomes["fetches"] = pool.get_stats()["fetches"]
        pool.close()
        gc.collect()
        return {"outcomes": outcomes, "wrong": wrong[:5], "left": sorted((open_files() - before).elements())}

    return work


def open_files() -> Counter[str]:
    """What this process has open, by kind; sockets' and pipes' numbers are left out."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[os.readlink(f"/proc/self/fd/{fd}").partition("[")[0]] += 1
    return found


def request(pool: mppool.Pool, port: int, nonce: str) -> None:
    sock = pool.getconn(timeout=2)
    try:
        check_is_session(sock, port)
        sock.sendall(f"{nonce} 2\n".encode())
        reply = sock.recv(4096)
        if reply.split()[1:] != [nonce.encode()]:
            raise AssertionError(f"a crossed reply: asked {nonce!r}, got {reply!r}")
    finally:
        pool.putconn(sock)


def check_is_session(sock: socket.socket, port: int) -> None:
    try:
        peer = sock.getpeername()
    except OSError as error:
        raise AssertionError(f"lent what is no session: {sock!r}: {error}") from error
    if not isinstance(peer, tuple) or peer[1] != port:
        raise AssertionError(f"lent a connection to somebody else: {sock!r}")
