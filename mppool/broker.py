"""The broker process: one loop for all pools of a user. What it does for each pool is in desk.py.

It is not in the path of a checkout that finds an idle session. Killed at any moment it takes nothing with it: workers
go on with what they have, and the next broker takes over the duplicates from the keeper and the truth from the tables.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mppool import fdstore
from mppool.bond import Bond, put_message
from mppool.desk import Desk, Duplicate, WorkerLink, shut
from mppool.errors import Error, ProtocolError
from mppool.kernel import link as wires
from mppool.kernel import memory
from mppool.kernel.locks import LockFile
from mppool.kernel.process import check_descriptors, raise_descriptors
from mppool.kernel.runtime import check_directory, scope_of
from mppool.kernel.systemd import Service
from mppool.succession import AlreadyRunning, ask_for_place, give_place, is_asking, say_left, say_serving, take_place, was_followed
from mppool.table import BROKER, IS_BROKER, KEEPER, W_MAX_SIZE, Row, creation_lock, is_in_use, open_table, remove_names
from mppool.wire import Kind, Message, decode, is_pool

__all__ = ["AlreadyRunning", "Broker", "serve"]

log = logging.getLogger("mppool.broker")

TICK = 0.1  # seconds
FINE = 0.0015  # seconds; shorter waits are worth a second system call
LEAVE_WITHIN = 3.0  # seconds; the one that asked waits for five
SHUN = 5.0  # seconds before a pool that was given up is tried again
STATUS = 1.0  # seconds between two looks at what systemd shows
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


T = TypeVar("T")


class Busy(Exception):
    """Somebody is reclaiming in this pool just now, or it was given up a moment ago."""


class Broker:
    """Serves one socket until it is told to stop. ``idle_exit``: seconds without any worker after which it ends by itself."""

    def __init__(
        self,
        path: str,
        idle_exit: float | None = None,
        place: LockFile | None = None,
        service: Service | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """Take the socket's ``place``, if it is not given; the keeper and the tables; then listen. Raises AlreadyRunning, Error.

        ``service`` is who started us, ``listener`` is its, if it passed one.
        """
        check_directory(path, create=True)
        self.path = path
        self.scope = scope_of(path)
        self.idle_exit = idle_exit
        self.idle_since = time.monotonic()
        self.stopping = False
        self.place = place or take_place(path)
        self.service = service
        self.successor: socket.socket | None = None  # the link of the broker we make room for
        self.leave_by = 0.0
        try:
            self.start(listener)
        except BaseException:
            give_place(self.place)
            raise

    def start(self, listener: socket.socket | None) -> None:
        """Take over what is there, then listen."""
        check_descriptors(1024, "the broker")
        self.poller = select.epoll()
        self.handlers: dict[int, Callable[[], object]] = {}
        self.newcomers: set[WorkerLink] = set()
        self.desks: dict[str, Desk] = {}
        self.busy: set[str] = set()
        self.shunned: dict[str, float] = {}  # pools that were given up, and until when
        self.bond = Bond(self.path, self.desks, self.busy, self.watch, self.unwatch, self.guarded)
        self.next_tick = 0.0
        self.next_beat = 0.0
        self.next_status = 0.0
        self.status = ""
        self.adopt_tables()
        self.bond.take()
        if not self.desks:  # else somebody may be waiting for us
            self.bond.wait_for_start()
        if self.service is not None:
            self.take_stored(self.service)
        self.listener = listener if listener is not None else wires.listen(self.path)
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
            until = self.next_tick
            for desk in list(self.desks.values()):
                until = min(until, self.guarded(desk, desk.due) or until)
            if self.service is not None:
                until = min(until, self.report(self.service))
            for fd, _ in self.wait(until - now):
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler()
            for desk in list(self.desks.values()):
                self.guarded(desk, desk.attend)
            if time.monotonic() >= self.next_tick:
                self.tick()
            if self.successor is not None:
                self.leave_when_ready(self.successor)
        self.end()

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """What can be read, after so long at most. epoll rounds up to milliseconds; what is due sooner is waited for in select(), which does not."""
        if 0 < seconds < FINE and self.poller.fileno() < 1024:
            select.select((self.poller,), (), (), seconds)
            seconds = 0
        return self.poller.poll(max(0.0, seconds))

    def guarded(self, desk: Desk, action: Callable[[], T]) -> T | None:
        """A damaged table costs its own pool its broker, for a while, and nobody else. What damage leads to may be any exception."""
        try:
            return action()
        except Exception as error:
            self.shun(desk, error)
        return None

    def shun(self, desk: Desk, error: Exception) -> None:
        if self.desks.get(desk.ident) is not desk:
            return  # done: this is what followed
        log.error("pool %r is given up for %g s: %s", desk.name, SHUN, error, exc_info=not isinstance(error, Error))
        self.shunned[desk.ident] = time.monotonic() + SHUN
        self.give_up(desk)

    def report(self, service: Service) -> float:
        """Tell systemd that we are alive, and what there is to show; when it wants to hear again."""
        now = time.monotonic()
        if service.beat_every and now >= self.next_beat:
            self.next_beat = now + (service.beat_every if service.notify("WATCHDOG=1", patience=0.0) else TICK)
        if now >= self.next_status:
            self.next_status = now + STATUS
            status = self.summary()
            if status != self.status and service.notify(f"STATUS={status}", patience=0.0):
                self.status = status
        return self.next_beat if service.beat_every else self.next_status

    def summary(self) -> str:
        workers = sessions = waiting = 0
        for desk in list(self.desks.values()):
            workers += self.guarded(desk, lambda desk=desk: len(desk.table.taken_rows()) - 1 - len(desk.dead)) or 0  # type: ignore[misc]
            sessions += self.guarded(desk, desk.permits.held) or 0
            waiting += len(desk.queue)
        return f"{len(self.desks)} pools, {workers} workers, {sessions} sessions, {waiting} waiting"

    def tick(self) -> None:
        self.next_tick = time.monotonic() + TICK
        for ident in list(self.busy):
            self.try_to_adopt(ident)
        for desk in list(self.desks.values()):
            self.guarded(desk, desk.tick)
            if desk.ident in self.desks:
                self.guarded(desk, partial(self.retire_if_unused, desk))
        self.bond.tick()
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
            self.newcomers.add(link)
            self.watch(sock.fileno(), lambda link=link: self.read(link))  # type: ignore[misc]

    def read(self, link: WorkerLink) -> None:
        """One message; if there are more, the poller says so again, after others had their turn."""
        fd = -1
        try:
            data, fd = wires.receive(link.sock)
            if not data:
                self.cut(link)
                return
            message = decode(data, 1 if fd >= 0 else 0)
            if fd >= 0 and (message.kind is not Kind.SHARE or link.desk is None):
                raise ProtocolError(f"{message.kind.name} with a descriptor is not for a worker to say, or not first")
            if link.desk is None:
                self.greet(link, message)
            else:
                given, fd = fd, -1
                link.desk.received(link, message, given)
        except BlockingIOError:
            return
        except Error as error:
            log.warning("link of row %d cut: %s", link.row, error)
            link.send(Message(Kind.REFUSED, body=str(error).encode()))
            self.cut(link)
        except (OSError, Busy):
            self.cut(link)
        except Exception as error:
            if link.desk is not None:
                self.shun(link.desk, error)
            else:
                log.exception("a pool cannot be adopted")
                self.cut(link)
        finally:
            if fd >= 0:
                os.close(fd)

    def greet(self, link: WorkerLink, message: Message) -> None:
        """The first message of a link. Raises ProtocolError; Busy: it is to come again."""
        if message.kind is Kind.REPLACE:
            self.make_room(link)
            return
        if message.kind is not Kind.HELLO:
            raise ProtocolError(f"a link begins with HELLO, not {message.kind.name}")  # whose body may be baggage
        ident = message.body.decode(errors="replace")
        if not is_pool(ident) or not ident.startswith(f"mppool-{self.scope}-"):
            raise ProtocolError(f"a link begins with HELLO and one of our pools, not {ident[:40]!r}")
        desk = self.desks.get(ident) or self.adopt(ident)
        if desk is None or not self.guarded(desk, partial(desk.hello, link, message.number, message.serial)):
            raise ProtocolError(f"row {message.number} of pool {ident} is not yours")
        self.newcomers.discard(link)

    def make_room(self, link: WorkerLink) -> None:
        """Another broker is to take our place. Raises ProtocolError if that is not for us to give."""
        if self.service:
            raise ProtocolError("systemd runs it; `systemctl restart` of its unit replaces it, without losing a session")
        if self.successor is None and is_asking(link.sock):
            log.info("making room for another broker")
            self.unwatch(link.sock.fileno())
            self.newcomers.discard(link)
            self.successor = link.sock
            self.leave_by = time.monotonic() + LEAVE_WITHIN
        else:
            self.cut(link)

    def leave_when_ready(self, successor: socket.socket) -> None:
        """Everybody is served until the keeper, which may be starting just now, has all that the next broker is to have."""
        if not is_asking(successor):
            successor.close()
            self.successor = None
        elif not self.bond.lacks() or time.monotonic() >= self.leave_by:
            self.stopping = True

    def cut(self, link: WorkerLink) -> None:
        """Close a link. What it brought before its end is taken first: a descriptor on its way may be a session's last."""
        if link.sock.fileno() < 0:
            return
        self.unwatch(link.sock.fileno())
        self.newcomers.discard(link)
        desk, link.desk = link.desk, None
        if desk is not None:
            self.guarded(desk, partial(self.drain, link, desk))
        link.sock.close()
        if desk is not None and self.desks.get(desk.ident) is desk:
            self.guarded(desk, partial(desk.link_ended, link))

    def drain(self, link: WorkerLink, desk: Desk) -> None:
        """Take the duplicates that are on their way to us; no more can follow."""
        shut(link.sock, socket.SHUT_RD)
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
                self.try_to_adopt(ident)

    def try_to_adopt(self, ident: str) -> None:
        try:
            self.adopt(ident)
        except Busy:
            self.busy.add(ident)
            return
        except Exception as error:
            log.error("pool %s: %s", ident, error, exc_info=not isinstance(error, Error))
        self.not_busy(ident)

    def not_busy(self, ident: str) -> None:
        """It is adopted, or not to be had; sessions that we have of it go where they belong, or end."""
        if ident in self.busy:
            self.busy.discard(ident)
            self.bond.take_later(ident)

    def adopt(self, ident: str) -> Desk | None:
        """Become the broker of a pool. None if there is no such pool, or nobody in it any more (then its names are removed). Raises Error, Busy."""
        if ident in self.desks:
            return self.desks[ident]
        if self.shunned.get(ident, 0.0) > time.monotonic():
            raise Busy
        try:
            with creation_lock(ident, create=False) as lock:
                if not is_in_use(lock):
                    remove_names(ident)
                    os.unlink(lock.path)
                    lock.close()
                    return None
                table = open_table(ident, lock)
                if table is None:
                    lock.close()
                    return None
                if not take_broker_byte(lock):
                    raise Busy
                row = Row(table, lock, os.getpid(), IS_BROKER)
        except FileNotFoundError:
            return None
        desk = self.desks[ident] = Desk(table, lock, row, self)
        log.info("pool %r, max_size %d", desk.name, desk.words[W_MAX_SIZE])
        self.not_busy(ident)
        return desk

    def retire_if_unused(self, desk: Desk) -> None:
        """A pool without workers lives on while it has sessions; then its names go."""
        if desk.links or desk.closing or desk.permits.held() or desk.workers_alive():
            desk.unused_since = time.monotonic()
        elif time.monotonic() - desk.unused_since > 1.0:
            self.remove(desk)

    def remove(self, desk: Desk) -> None:
        """Remove a pool's names, unless a worker has come to it in this moment."""
        try:
            with creation_lock(desk.ident, create=False) as lock:
                self.give_up(desk)
                until = time.monotonic() + 1.0
                while lock.is_held(KEEPER) and time.monotonic() < until:
                    time.sleep(0.001)  # it has yet to read that it may let go
                if not is_in_use(lock):
                    remove_names(desk.ident)
                    os.unlink(lock.path)
                lock.close()
        except (FileNotFoundError, Error) as error:
            log.error("pool %r is given up: %s", desk.name, error)
            if desk.ident in self.desks:
                self.give_up(desk)

    def give_up(self, desk: Desk) -> None:
        self.desks.pop(desk.ident, None)
        for link in list(desk.links):
            link.desk = None
            self.cut(link)
        for k in list(desk.duplicates):
            desk.drop(k)
        self.bond.forget(desk)
        try:
            desk.leave()
        finally:
            desk.lock.close()

    # What desks and we ask of the keeper.

    def put(self, desk: Desk, k: int, duplicate: Duplicate) -> None:
        self.bond.put(desk, k, duplicate)

    def drop(self, desk: Desk, k: int, generation: int) -> None:
        self.bond.drop(desk.ident, k, generation)

    def take_stored(self, service: Service) -> None:
        """What systemd kept over a restart. Nothing stays there: it would keep alive what everybody else has closed."""
        for message, fd in fdstore.take(service):
            self.bond.take_back(message, fd, kept=False)
        self.bond.flush()
        fdstore.empty(service)

    # The end.

    def end(self) -> None:
        """Orderly: sessions of pools without workers are closed and their names removed; workers of others go on without a broker.

        With a successor every pool is left as it is: it takes them over in a moment.
        """
        if self.service is not None:
            self.service.notify("STOPPING=1", "STATUS=leaving")
        for desk in list(self.desks.values()):
            self.guarded(desk, partial(self.hang_up, desk))
        staying = []
        for desk in list(self.desks.values()):
            if self.successor is not None or desk.workers_alive():
                staying.append(desk)
            else:
                for k in list(desk.duplicates):
                    shut(desk.duplicates[k].sock, socket.SHUT_RDWR)
                self.guarded(desk, partial(self.remove, desk))
        self.bond.flush()
        if self.service is not None:
            held = [(put_message(desk, k, duplicate), duplicate.sock.fileno()) for desk in staying for k, duplicate in desk.duplicates.items()]
            fdstore.upload(self.service, held)
        for desk in staying:
            if desk.ident in self.desks:
                self.bond.leave(desk)
                self.guarded(desk, desk.leave)
        self.close()
        give_place(self.place)
        if self.successor is not None:
            say_left(self.successor)

    def hang_up(self, desk: Desk) -> None:
        """Nobody waits for us any more; all links end, which tells the workers. Duplicates that were sent already are taken."""
        for link in desk.links:
            desk.strike(link)  # all of them before any link ends: who finds his link ended believes that nobody writes to his lane
        for link in list(desk.links):
            self.unwatch(link.sock.fileno())
            self.drain(link, desk)
            link.sock.close()
            link.desk = None
        desk.links.clear()

    def close(self) -> None:
        """All that is ours alone. The socket's file goes too, unless it is systemd's."""
        for link in list(self.newcomers):
            self.cut(link)
        self.bond.close()
        self.listener.close()
        try:
            if not (self.service is not None and self.service.listens) and os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.poller.close()


def take_broker_byte(lock: LockFile) -> bool:
    """A worker in need may be reclaiming just now; that takes milliseconds."""
    for _ in range(200):
        if lock.take(BROKER):
            return True
        time.sleep(0.001)
    return False


def serve(
    path: str,
    idle_exit: float | None,
    ready: Callable[[], None] | None = None,
    *,
    replace: bool = False,
    service: Service | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Run a broker in this process until SIGTERM, SIGINT or SIGHUP, or until another replaces it. Raises AlreadyRunning, Error."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    told: list[int] = []  # also signals that come before the broker is up: it must tidy up after itself then, too
    brokers: list[Broker] = []

    def tell(number: int, _frame: object) -> None:
        told.append(number)
        for broker in brokers:
            broker.stop()

    for number in ENDING:
        signal.signal(number, tell)
    check_directory(path, create=True)
    check_descriptors(1024, "the broker")
    raise_descriptors()
    place, predecessor = ask_for_place(path, lambda: bool(told)) if replace else (take_place(path), None)
    if told and predecessor is not None:
        give_place(place)
        return  # the one that made room comes back
    while True:
        broker = Broker(path, idle_exit, place, service, listener)
        brokers[:] = [broker]
        if told:
            broker.stop()
        broker.watch(reader.fileno(), lambda: bool(reader.recv(64)))
        if predecessor is not None:
            say_serving(predecessor)
            predecessor = None
        if service is not None:
            service.notify("READY=1", f"STATUS={broker.summary()}")
        if ready is not None:
            ready()
            ready = None
        broker.run()
        if broker.successor is None or was_followed(broker.successor, lambda: bool(told)) or told:
            return
        try:
            place = take_place(path)
        except AlreadyRunning:
            return
        log.warning("the broker that asked for our place did not come up; going on")
