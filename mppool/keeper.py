"""The keeper: a tiny process that only holds duplicates of sessions, so that a broker's death loses none of them.

    python -m mppool.keeper SOCKET        started by a broker; not for users

It holds what the broker puts, forgets what the broker drops, and gives all to the next broker. It ends when no broker is
connected and no worker of the pools it has sessions of is alive; after a broker that left in good order it waits for the next
one some moments longer. It holds the KEEPER byte of those pools' lock files, so that nobody takes the pools for abandoned, and
removes the names of those it is the last process of.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

from mppool.errors import Error, ProtocolError
from mppool.kernel import link
from mppool.kernel.locks import LockFile
from mppool.kernel.process import raise_descriptors
from mppool.table import FIRST_ROW, KEEPER, ROWS, lock_path, remove_if_unused
from mppool.wire import Kind, Message, decode, encode, is_pool, pack_held, unpack_held

__all__ = ["keeper_path", "main"]

TICK = 0.5  # seconds
ALONE = 2.0  # seconds a keeper waits for a broker: for its first one, and for the next after one that left in good order
MOST = 2000  # messages of one link in a row; its queue holds some hundreds
PATIENCE = 1.0  # seconds a broker may be too busy to take an answer; then it is cut, and comes again


def keeper_path(broker: str) -> str:
    return f"{broker}.keeper"


class Keeper:
    """Holds descriptors by (pool, slot). The newest connection is the broker; an older one is dead."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = link.listen(path)
        self.inode = os.stat(path).st_ino
        self.broker: socket.socket | None = None
        self.held: dict[tuple[str, int], tuple[Message, int]] = {}
        self.locks: dict[str, LockFile] = {}
        self.lonely = 0.0

    def run(self) -> None:
        while True:
            poller = select.poll()  # (select() cannot look at descriptors above 1023, and there are as many as sessions)
            for sock in (self.listener, self.broker):
                if sock is not None:
                    poller.register(sock, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(TICK * 1000)}
            broker = self.broker.fileno() if self.broker is not None else -1
            if self.listener.fileno() in ready:
                self.accept()
            if self.broker is not None and self.broker.fileno() == broker and broker in ready:
                self.serve(self.broker)
            if self.is_done(bool(ready)):
                return

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        sock.settimeout(PATIENCE)
        if link.peer_uid(sock) not in (os.geteuid(), 0):
            sock.close()
            return
        self.drain()
        if self.broker is not None:
            self.broker.close()
        self.broker = sock
        self.lonely = ALONE  # it has been spoken to: from now on it need not wait for a first broker

    def drain(self) -> None:
        """What the last broker put before it died."""
        for _ in range(MOST):
            if self.broker is None or not link.wait_readable(self.broker.fileno(), 0):
                return
            self.serve(self.broker)

    def serve(self, broker: socket.socket) -> None:
        """One message of the broker's, or its end."""
        fd = -1
        try:
            data, fd = link.receive(broker)
            if not data:
                raise EOFError
            message = decode(data, 1 if fd >= 0 else 0)
            ident = pool_of(message)
            given, fd = fd, -1
            self.received(broker, message, ident, given)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died; there may be more that it put before
        except (OSError, EOFError, ProtocolError):
            broker.close()
            self.broker = None
        finally:
            if fd >= 0:
                os.close(fd)

    def received(self, broker: socket.socket, message: Message, ident: str, fd: int) -> None:
        """Owns ``fd``, which only PUT comes with. Raises OSError."""
        if message.kind is Kind.GIVE_ALL:
            self.give_all(broker)
            return
        place = ident, message.number
        if message.kind is Kind.PUT:
            self.forget(place)
            self.watch(ident)
            self.held[place] = message, fd
            link.send(broker, encode(Message(Kind.KEPT, message.number, message.serial, body=pack_held(ident, b""))))
        elif message.kind is Kind.LEAVE:
            self.watch(ident)
            self.lonely = 0.0
        elif place in self.held and self.held[place][0].serial == message.serial:
            self.forget(place)
            if not any(pool == ident for pool, _ in self.held):
                self.let_go(ident)

    def give_all(self, broker: socket.socket) -> None:
        for ident in self.locks.keys() - {pool for pool, _ in self.held}:
            self.unwatch(ident)  # the last broker left it to us; the new one has it
        for held, duplicate in self.held.values():
            link.send(broker, encode(held, 1), duplicate)
        link.send(broker, encode(Message(Kind.SHOWN)))

    def forget(self, place: tuple[str, int]) -> None:
        if place in self.held:
            os.close(self.held.pop(place)[1])

    def watch(self, ident: str) -> None:
        if ident not in self.locks:
            try:
                lock = LockFile(lock_path(ident), create=False)
            except (OSError, Error):
                return
            lock.take(KEEPER)
            self.locks[ident] = lock

    def unwatch(self, ident: str) -> None:
        lock = self.locks.pop(ident, None)
        if lock is not None:
            lock.close()

    def let_go(self, ident: str) -> None:
        """Of a pool. Its last broker may have gone without waiting for us: then we are the last process it had."""
        self.unwatch(ident)
        remove_if_unused(ident)

    def is_done(self, active: bool) -> bool:
        if self.broker is not None:
            return False
        self.lonely += 0.0 if active else TICK
        try:
            replaced = os.stat(self.path).st_ino != self.inode
        except FileNotFoundError:
            replaced = True
        needed = any(lock.is_held(FIRST_ROW, ROWS) for lock in self.locks.values())
        return replaced or (not needed and self.lonely >= ALONE)

    def close(self) -> None:
        """End the sessions; where this was the last process of a pool, its names go with it."""
        try:
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        for place in list(self.held):
            self.forget(place)
        for ident in list(self.locks):
            self.let_go(ident)


def pool_of(message: Message) -> str:
    """The pool a message is about, "" for all. Raises ProtocolError for what no broker says."""
    if message.kind is Kind.GIVE_ALL:
        return ""
    ident, _ = unpack_held(message.body)
    if message.kind not in (Kind.PUT, Kind.DROP, Kind.LEAVE) or not is_pool(ident):
        raise ProtocolError(f"a broker does not say {message.kind.name} of {ident[:40]!r}")
    return ident


def main(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it outlives its broker; see the module's first lines for its own end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise_descriptors()
    starter = select.poll()
    starter.register(1, 0)
    if starter.poll(0):
        return  # it died meanwhile: the socket may be another keeper's by now
    keeper = Keeper(path)
    try:
        try:
            os.write(1, b"ready\n")
        except BrokenPipeError:
            return  # the broker died while it started us
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        keeper.run()
    finally:
        keeper.close()


if __name__ == "__main__":
    main(sys.argv[1])
