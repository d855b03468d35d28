"""The broker process: one loop for all pools of a user. What it does for each pool is in desk.py.

It is not in the path of a checkout that finds an idle session. Killed at any moment it takes nothing with it: workers
go on with what they have, and the next broker takes over the duplicates from the keeper and the truth from the tables.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from mppool.desk import Desk, Duplicate, WorkerLink, shut, take_socket
from mppool.errors import BrokerUnavailable, Error, ProtocolError
from mppool.keeper import keeper_path
from mppool.kernel import link as wires
from mppool.kernel import memory
from mppool.kernel.locks import LockFile
from mppool.kernel.process import check_descriptors
from mppool.kernel.runtime import check_directory, scope_of
from mppool.table import BROKER, IS_BROKER, KEEPER, W_MAX_SIZE, Row, creation_lock, is_in_use, open_table, remove_names
from mppool.wire import RESIDENT, Kind, Message, decode, encode, pack_held, unpack_held

__all__ = ["AlreadyRunning", "Broker"]

log = logging.getLogger("mppool.broker")

TICK = 0.1  # seconds
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class AlreadyRunning(Error):
    """Another broker serves this socket."""


class Broker:
    """Serves one socket until it is told to stop. ``idle_exit``: seconds without any worker after which it ends by itself."""

    def __init__(self, path: str, idle_exit: float | None = None) -> None:
        """Take the socket's lock, the keeper and the tables; then listen. Raises AlreadyRunning, Error."""
        check_directory(path, create=True)
        self.path = path
        self.scope = scope_of(path)
        self.idle_exit = idle_exit
        self.idle_since = time.monotonic()
        self.stopping = False
        self.singleton = take_singleton(path)
        try:
            self.start()
        except BaseException:
            self.let_go()
            raise

    def start(self) -> None:
        """Take over what is there, then listen."""
        check_descriptors(1024, "the broker")
        self.poller = select.epoll()
        self.handlers: dict[int, Callable[[], object]] = {}
        self.desks: dict[str, Desk] = {}
        self.keeper: socket.socket | None = None
        self.unkept: list[tuple[Desk, int, Duplicate]] = []
        self.next_tick = 0.0
        self.keeper_retry = 0.0
        self.adopt_tables()
        self.take_keeper()
        self.listener = wires.listen(self.path)
        self.inode = os.stat(self.path).st_ino
        self.watch(self.listener.fileno(), self.accept)
        log.info("broker of %s, pid %d", self.path, os.getpid())

    # The loop.

    def watch(self, fd: int, handler: Callable[[], object]) -> None:
        self.handlers[fd] = handler
        self.poller.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Before ``fd`` is closed."""
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def run(self) -> None:
        """Serve until ``stop``."""
        while not self.stopping:
            now = time.monotonic()
            until = min([self.next_tick, *(desk.due() for desk in self.desks.values())])
            for fd, _ in self.poller.poll(max(0.0, until - now)):
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler()
            for desk in list(self.desks.values()):
                self.guarded(desk, desk.attend)
            if time.monotonic() >= self.next_tick:
                self.tick()
        self.end()

    def guarded(self, desk: Desk, action: Callable[[], None]) -> None:
        """A damaged table costs its own pool its broker, and nobody else."""
        try:
            action()
        except Error as error:
            log.error("pool %r is given up: %s", desk.name, error)
            self.give_up(desk)

    def tick(self) -> None:
        self.next_tick = time.monotonic() + TICK
        for desk in list(self.desks.values()):
            self.guarded(desk, desk.tick)
            if desk.ident in self.desks:
                self.retire_if_unused(desk)
        if self.keeper is None and time.monotonic() >= self.keeper_retry:
            self.take_keeper()
        self.check_socket()
        if any(desk.links or desk.workers_alive() for desk in self.desks.values()):
            self.idle_since = time.monotonic()
        elif self.idle_exit is not None and time.monotonic() - self.idle_since > self.idle_exit:
            log.info("unused for %g s: ending", self.idle_exit)
            self.stopping = True

    def check_socket(self) -> None:
        """If somebody removed or replaced our socket, nobody can find us: end, so that another broker can come."""
        try:
            if os.stat(self.path).st_ino == self.inode:
                return
        except FileNotFoundError:
            pass
        log.error("%s was removed or replaced: ending", self.path)
        self.stopping = True

    def stop(self, *_: Any) -> None:
        self.stopping = True

    # Links.

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.error("cannot accept: %s", error)
                time.sleep(0.01)  # out of descriptors: do not spin
                return
            sock.setblocking(False)
            if wires.peer_uid(sock) not in (os.geteuid(), 0):
                sock.close()
                continue
            link = WorkerLink(sock)
            self.watch(sock.fileno(), lambda link=link: self.read(link))  # type: ignore[misc]

    def read(self, link: WorkerLink) -> None:
        """One message; if there are more, the poller says so again, after others had their turn."""
        fd = -1
        try:
            data, fd = wires.receive(link.sock)
            if not data:
                self.cut(link)
                return
            message, given, fd = decode(data, 1 if fd >= 0 else 0), fd, -1
            if link.desk is None:
                self.greet(link, message)
            else:
                link.desk.received(link, message, given)
        except BlockingIOError:
            return
        except Error as error:
            log.warning("link of row %d cut: %s", link.row, error)
            if fd >= 0:
                os.close(fd)
            link.send(Message(Kind.REFUSED, body=str(error).encode()))
            self.cut(link)
        except OSError:
            self.cut(link)

    def greet(self, link: WorkerLink, message: Message) -> None:
        """The first message of a link. Raises ProtocolError."""
        ident = message.body.decode(errors="replace")
        if message.kind is not Kind.HELLO or not re.fullmatch(rf"mppool-{self.scope}-[0-9a-f]{{10}}", ident):
            raise ProtocolError(f"a link begins with HELLO and one of our pools, not {message.kind.name} {ident[:40]!r}")
        desk = self.desks.get(ident) or self.adopt(ident)
        if desk is None or not desk.hello(link, message.number, message.serial):
            raise ProtocolError(f"row {message.number} of pool {ident} is not yours")
        desk.look_for_dead()

    def cut(self, link: WorkerLink) -> None:
        """Close a link. What it brought before its end is taken first: a descriptor on its way may be a session's last."""
        if link.sock.fileno() < 0:
            return
        self.unwatch(link.sock.fileno())
        desk, link.desk = link.desk, None
        if desk is not None:
            self.drain(link, desk)
        link.sock.close()
        if desk is not None:
            desk.link_ended(link)

    def drain(self, link: WorkerLink, desk: Desk) -> None:
        while True:
            fd = -1
            try:
                data, fd = wires.receive(link.sock)
                if not data:
                    return
                message = decode(data, 1 if fd >= 0 else 0)
                if message.kind is Kind.SHARE:
                    given, fd = fd, -1
                    desk.received(link, message, given)
            except (OSError, ProtocolError):
                return
            finally:
                if fd >= 0:
                    os.close(fd)

    # Pools.

    def adopt_tables(self) -> None:
        """Pools of this socket that are there already; those whose processes are all gone are removed."""
        prefix = f"mppool-{self.scope}-"
        for file in memory.names(prefix):
            ident, _, kind = file.partition(".")
            if kind == "lock" and ident not in self.desks:
                try:
                    self.adopt(ident)
                except Error as error:
                    log.error("pool %s: %s", ident, error)

    def adopt(self, ident: str) -> Desk | None:
        """Become the broker of a pool. None if there is no such pool, or nobody in it any more (then its names are removed)."""
        try:
            with creation_lock(ident, create=False) as lock:
                if not is_in_use(lock):
                    remove_names(ident)
                    os.unlink(lock.path)
                    lock.close()
                    return None
                table = open_table(ident, lock)
                if table is None or not take_broker_byte(lock):
                    lock.close()
                    return None
                row = Row(table, lock, os.getpid(), IS_BROKER)
        except FileNotFoundError:
            return None
        desk = self.desks[ident] = Desk(table, lock, row, self)
        log.info("pool %r, max_size %d", desk.name, desk.words[W_MAX_SIZE])
        return desk

    def retire_if_unused(self, desk: Desk) -> None:
        """A pool without workers lives on while it has sessions; then its names go."""
        if desk.links or desk.closing or desk.permits.held() or desk.workers_alive():
            desk.unused_since = time.monotonic()
        elif time.monotonic() - desk.unused_since > 1.0:
            self.remove(desk)

    def remove(self, desk: Desk) -> None:
        """Remove a pool's names, unless a worker has come to it in this moment."""
        with creation_lock(desk.ident, create=False) as lock:
            self.give_up(desk)
            until = time.monotonic() + 1.0
            while lock.is_held(KEEPER) and time.monotonic() < until:
                time.sleep(0.001)  # it has yet to read that it may let go
            if not is_in_use(lock):
                remove_names(desk.ident)
                os.unlink(lock.path)
            lock.close()

    def give_up(self, desk: Desk) -> None:
        self.desks.pop(desk.ident, None)
        for link in list(desk.links):
            link.desk = None
            self.cut(link)
        for k in list(desk.duplicates):
            desk.drop(k)
        self.unkept = [item for item in self.unkept if item[0] is not desk]
        desk.leave()

    # The keeper.

    def take_keeper(self) -> None:
        """Connect to the keeper, or start one; take over what it has, give it what it lacks."""
        self.keeper_retry = time.monotonic() + 1.0
        path = keeper_path(self.path)
        try:
            try:
                keeper = wires.connect(path)
            except OSError:
                start_keeper(path)
                keeper = wires.connect(path)
            self.take_over(keeper)
        except (OSError, BrokerUnavailable, ProtocolError) as error:
            log.error("no keeper: %s", error)
            return
        self.keeper = keeper
        self.watch(keeper.fileno(), self.read_keeper)
        self.unkept = [(desk, k, duplicate) for desk in self.desks.values() for k, duplicate in desk.duplicates.items() if not duplicate.kept]
        self.put_unkept()

    def take_over(self, keeper: socket.socket) -> None:
        """All that the keeper holds becomes ours, too. OSError if it does not answer."""
        wires.send(keeper, encode(Message(Kind.GIVE_ALL)))
        while True:
            if not wires.wait_readable(keeper.fileno(), 1.0):
                keeper.close()
                raise TimeoutError("the keeper does not answer")
            data, fd = wires.receive(keeper)
            if not data:
                raise ConnectionError("the keeper has ended")
            message = decode(data, 1 if fd >= 0 else 0)
            if message.kind is Kind.SHOWN:
                return
            self.take_back(keeper, message, fd)

    def take_back(self, keeper: socket.socket, message: Message, fd: int) -> None:
        """One session from the keeper: ours if it is still what the table says, ended otherwise."""
        ident, baggage = unpack_held(message.body)
        desk, k, sock = self.desks.get(ident), message.number, take_socket(fd)
        if sock is None:
            return
        if desk is not None and k < desk.table.slots and desk.words[desk.table.generation + k] == message.serial:
            if desk.current(k) is None and k not in desk.closing:
                duplicate = Duplicate(message.serial, sock, baggage, bool(message.flags & RESIDENT))
                duplicate.kept = True
                desk.adopt(k, duplicate)
            else:
                sock.close()
            return
        shut(sock, socket.SHUT_RDWR)
        sock.close()
        wires.send(keeper, encode(Message(Kind.DROP, k, message.serial, body=pack_held(ident, b""))))

    def put(self, desk: Desk, k: int, duplicate: Duplicate) -> None:
        self.unkept.append((desk, k, duplicate))
        self.put_unkept()

    def put_unkept(self) -> None:
        while self.unkept and self.keeper is not None:
            desk, k, duplicate = self.unkept[0]
            if desk.duplicates.get(k) is duplicate:
                flags = RESIDENT if duplicate.resident else 0
                try:
                    message = Message(Kind.PUT, k, duplicate.generation, flags, pack_held(desk.ident, duplicate.baggage))
                    wires.send(self.keeper, encode(message, 1), duplicate.sock.fileno())
                except BlockingIOError:
                    return  # it is behind: the rest at the next answer or tick
                except OSError:
                    self.lose_keeper()
                    return
            self.unkept.pop(0)

    def drop(self, desk: Desk, k: int, generation: int) -> None:
        if self.keeper is not None:
            try:
                wires.send(self.keeper, encode(Message(Kind.DROP, k, generation, body=pack_held(desk.ident, b""))))
            except OSError:
                self.lose_keeper()

    def read_keeper(self) -> None:
        keeper = self.keeper
        if keeper is None:
            return
        try:
            while True:
                data, fd = wires.receive(keeper)
                if not data:
                    raise ConnectionError
                message = decode(data, 1 if fd >= 0 else 0)
                if message.kind is Kind.KEPT:
                    desk = self.desks.get(unpack_held(message.body)[0])
                    if desk is not None:
                        desk.kept(message.number, message.serial)
        except BlockingIOError:
            self.put_unkept()
        except (OSError, ProtocolError):
            self.lose_keeper()

    def lose_keeper(self) -> None:
        """It died: start another and fill it."""
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            log.warning("the keeper has ended; another is started")
            self.unwatch(keeper.fileno())
            keeper.close()
            self.keeper_retry = 0.0
            for desk in self.desks.values():
                for duplicate in desk.duplicates.values():
                    duplicate.kept = False
            self.next_tick = 0.0

    # The end.

    def end(self) -> None:
        """Orderly: sessions of pools without workers are closed and their names removed; workers of others go on without a broker."""
        for desk in list(self.desks.values()):
            if desk.workers_alive():
                self.keep_for_next(desk)
            else:
                for k in list(desk.duplicates):
                    shut(desk.duplicates[k].sock, socket.SHUT_RDWR)
                self.remove(desk)
        if self.keeper is not None:
            self.keeper.close()
        self.listener.close()
        try:
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.let_go()

    def let_go(self) -> None:
        """Give up the socket's lock, and its file."""
        try:
            os.unlink(self.singleton.path)
        except FileNotFoundError:
            pass  # the whole directory was removed
        self.singleton.close()

    def keep_for_next(self, desk: Desk) -> None:
        """The keeper has the duplicates; the links' ends tell the workers."""
        for link in list(desk.links):
            self.unwatch(link.sock.fileno())
            link.sock.close()
        desk.leave()


def take_singleton(path: str) -> LockFile:
    """The right to serve this socket, for life."""
    while True:
        lock = LockFile(f"{path}.lock")
        if not lock.take(0):
            lock.close()
            raise AlreadyRunning(f"broker={path!r}: a broker serves this socket already")
        if lock.is_current():
            return lock
        lock.close()  # its last holder removed it while we opened it


def take_broker_byte(lock: LockFile) -> bool:
    """A worker in need may be reclaiming just now; that takes milliseconds."""
    for _ in range(200):
        if lock.take(BROKER):
            return True
        time.sleep(0.001)
    return False


def start_keeper(path: str) -> None:
    """Start a keeper and wait until it listens. OSError if it does not within 5 s."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "mppool.keeper", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdout is not None
    with keeper.stdout:
        if not wires.wait_readable(keeper.stdout.fileno(), 5.0) or not keeper.stdout.readline():
            keeper.kill()
            keeper.wait()
            raise OSError(f"the keeper did not start (exit code {keeper.returncode})")
    keeper.returncode = 0  # it is nobody's child to wait for: the loop ignores SIGCHLD


def serve(path: str, idle_exit: float | None, ready: Callable[[], None]) -> None:
    """Run a broker in this process until SIGTERM, SIGINT or SIGHUP. Raises AlreadyRunning, Error."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    early: list[int] = []  # signals that come before the broker is up: it must tidy up after itself then, too
    for number in ENDING:
        signal.signal(number, lambda number, _frame: early.append(number))
    broker = Broker(path, idle_exit)
    for number in ENDING:
        signal.signal(number, broker.stop)
    if early:
        broker.stop()
    broker.watch(reader.fileno(), lambda: bool(reader.recv(64)))
    ready()
    broker.run()
