"""The broker's bond with its keeper: what it gives, what it takes over, and another keeper where one is gone or silent.

A keeper that has to be started is waited for by the broker's loop, which meanwhile serves everybody. Invariant: what is
in ``held`` the keeper that we have a link to now has confirmed.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from mppool.desk import Desk, Duplicate, shut, take_socket
from mppool.errors import BrokerUnavailable, ProtocolError
from mppool.keeper import keeper_path
from mppool.kernel import link as wires
from mppool.kernel.systemd import without_service
from mppool.wire import RESIDENT, Kind, Message, decode, encode, pack_held, unpack_held

__all__ = ["Bond", "put_message"]

log = logging.getLogger("mppool.broker")

ANSWER = 1.0  # seconds we wait at our end for what the keeper still lacks
SILENT = 3.0  # seconds without any answer after which it is given up
START = 5.0  # seconds a new one may take to start
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds before another is started where one did not come, doubled: without one no new session can move

Key = tuple[str, int, int]  # pool, slot, generation


class Bond:
    """``desks`` are the broker's, and so are ``busy``, its pools that it cannot adopt yet; ``watch`` and ``unwatch`` are its loop's.

    ``guarded`` is how it lets a desk look at its table, which may be damaged.
    """

    def __init__(
        self,
        path: str,
        desks: dict[str, Desk],
        busy: set[str],
        watch: Callable[[int, Callable[[], object]], None],
        unwatch: Callable[[int], None],
        guarded: Callable[[Desk, Callable[[], object]], object],
    ) -> None:
        self.path = keeper_path(path)
        self.desks = desks
        self.busy = busy
        self.watch = watch
        self.unwatch = unwatch
        self.guarded = guarded
        self.link: socket.socket | None = None
        self.starting: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.retry_at, self.retry_pause = 0.0, FIRST_PAUSE
        self.held: set[Key] = set()
        self.lacking: list[tuple[Desk, int, Duplicate]] = []  # to be put
        self.later: list[tuple[Message, socket.socket]] = []  # sessions of busy pools
        self.undropped: list[bytes] = []
        self.unanswered = 0
        self.answered_at = 0.0
        self.blocked_at = 0.0  # since when there has been no room for what we have to say; 0: there is

    # A keeper to talk to.

    def take(self) -> None:
        """Take over from the keeper that is there; if none answers, begin to start one."""
        if not self.reach():
            self.begin()

    def tick(self) -> None:
        now = time.monotonic()
        if self.starting is not None and now - self.started_at > START:
            log.error("no keeper: it does not start")
            self.starting.kill()
            self.end_start()
            self.try_later()
        if (self.unanswered and now - self.answered_at > SILENT) or (self.blocked_at and now - self.blocked_at > SILENT):
            self.lose()
            self.begin()  # in its place: this one may be stopped
        if self.link is None and self.starting is None and now >= self.retry_at:
            self.take()
        self.put_lacking()  # also if there was no room for what it does not answer

    def reach(self) -> bool:
        """Link to the keeper and take over all that it holds. False: there is none that answers."""
        try:
            sock = wires.connect(self.path)
        except (OSError, BrokerUnavailable):
            return False
        self.held.clear()
        self.undropped.clear()
        try:
            self.take_over(sock)
        except (OSError, ProtocolError) as error:
            log.error("the keeper is given up: %s", error)
            sock.close()
            return False
        self.link = sock
        self.unanswered = 0
        self.watch(sock.fileno(), self.read)
        everything = [(desk, k, duplicate) for desk in self.desks.values() for k, duplicate in desk.duplicates.items()]
        self.lacking = [(desk, k, duplicate) for desk, k, duplicate in everything if (desk.ident, k, duplicate.generation) not in self.held]
        self.put_lacking()
        return True

    def begin(self) -> None:
        """Start a keeper; ``started`` is called when it listens, or has ended."""
        self.started_at = time.monotonic()
        command = [sys.executable, "-m", "mppool.keeper", self.path]
        try:
            keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True, env=without_service())
        except OSError as error:
            log.error("no keeper: %s", error)
            self.try_later()
            return
        keeper.returncode = 0  # it is nobody's child to wait for: the loop ignores SIGCHLD
        self.starting = keeper
        self.watch(self.pipe(), self.started)

    def pipe(self) -> int:
        assert self.starting is not None
        assert self.starting.stdout is not None
        return self.starting.stdout.fileno()

    def started(self) -> None:
        listens = bool(os.read(self.pipe(), 64))
        self.end_start()
        if listens and self.reach():
            self.retry_pause = FIRST_PAUSE
        else:
            log.error("no keeper: it did not start")
            self.try_later()

    def try_later(self) -> None:
        self.retry_at = time.monotonic() + self.retry_pause
        self.retry_pause = min(2 * self.retry_pause, LONGEST_PAUSE)

    def wait_for_start(self) -> None:
        """Until the keeper that is being started, if there is one, listens or has ended."""
        while self.starting is not None and time.monotonic() < self.started_at + START:
            if wires.wait_readable(self.pipe(), START):
                self.started()

    def end_start(self) -> None:
        if self.starting is not None and self.starting.stdout is not None:
            self.unwatch(self.pipe())
            self.starting.stdout.close()
        self.starting = None

    def lose(self) -> None:
        """It died, or is silent."""
        sock, self.link = self.link, None
        if sock is not None:
            log.warning("the keeper has ended; another is started")
            self.unwatch(sock.fileno())
            sock.close()
        self.held.clear()
        self.unanswered = 0
        self.blocked_at = 0.0
        self.retry_at = 0.0

    # What it has.

    def take_over(self, sock: socket.socket) -> None:
        """All that the keeper holds becomes ours, too. Raises OSError, ProtocolError."""
        wires.send(sock, encode(Message(Kind.GIVE_ALL)))
        until = time.monotonic() + START
        while time.monotonic() < until and wires.wait_readable(sock.fileno(), SILENT):
            fd = -1
            try:
                data, fd = wires.receive(sock)
                if not data:
                    raise ConnectionError("it has ended")
                message = decode(data, 1 if fd >= 0 else 0)
                if message.kind is Kind.SHOWN:
                    return
                if message.kind is Kind.PUT:
                    given, fd = fd, -1
                    if self.take_back(message, given, kept=True):
                        self.held.add((unpack_held(message.body)[0], message.number, message.serial))
                    else:
                        self.undropped.append(encode(Message(Kind.DROP, message.number, message.serial, body=message.body)))  # later: it does not read now
            finally:
                if fd >= 0:
                    os.close(fd)
        raise TimeoutError("it does not answer")

    def take_back(self, message: Message, fd: int, *, kept: bool) -> bool:
        """One session from the keeper or a store: ours if it is still what the table says; else it is ended, and this is False. Owns ``fd``.

        That of a pool that is busy waits for the table.
        """
        sock = take_socket(fd)
        if sock is None:
            return False
        if unpack_held(message.body)[0] in self.busy:
            self.later.append((message, sock))
            return True
        return self.take_sock(message, sock, kept)

    def take_later(self, ident: str) -> None:
        """That pool is not busy any more: adopted, or gone."""
        mine = [item for item in self.later if unpack_held(item[0].body)[0] == ident]
        self.later = [item for item in self.later if item not in mine]
        for message, sock in mine:
            key = ident, message.number, message.serial
            if not self.take_sock(message, sock, key in self.held):
                self.drop(*key)

    def take_sock(self, message: Message, sock: socket.socket, kept: bool) -> bool:
        """As ``take_back``, now."""
        ident, body = unpack_held(message.body)
        desk = self.desks.get(ident)
        if desk is not None and self.guarded(desk, partial(self.hand_over, desk, message, sock, body, kept)):
            return True
        shut(sock, socket.SHUT_RDWR)
        sock.close()
        return False

    def hand_over(self, desk: Desk, message: Message, sock: socket.socket, body: bytes, kept: bool) -> bool:
        """To its desk, unless that has it already. False: it is not what the table says, and still ours."""
        k = message.number
        if k >= desk.table.slots or desk.words[desk.table.generation + k] != message.serial or not desk.table.is_session(k, sock.fileno()):
            return False
        if desk.current(k) is None and k not in desk.closing:
            duplicate = Duplicate(message.serial, sock, body, bool(message.flags & RESIDENT))
            duplicate.kept = kept
            desk.adopt(k, duplicate)
        else:
            sock.close()
        return True

    def put(self, desk: Desk, k: int, duplicate: Duplicate) -> None:
        self.lacking.append((desk, k, duplicate))
        self.put_lacking()

    def drop(self, ident: str, k: int, generation: int) -> None:
        self.held.discard((ident, k, generation))
        if self.link is not None:
            self.undropped.append(encode(Message(Kind.DROP, k, generation, body=pack_held(ident, b""))))
            self.put_lacking()

    def put_lacking(self) -> None:
        """Say to the keeper what it does not know yet; if it is behind, the rest at its next answer."""
        try:
            while self.undropped and self.link is not None:
                wires.send(self.link, self.undropped[0])
                self.undropped.pop(0)
                self.blocked_at = 0.0
            while self.lacking and self.link is not None:
                desk, k, duplicate = self.lacking[0]
                if desk.duplicates.get(k) is duplicate:
                    wires.send(self.link, encode(put_message(desk, k, duplicate), 1), duplicate.sock.fileno())
                    if not self.unanswered:
                        self.answered_at = time.monotonic()
                    self.unanswered += 1
                    self.blocked_at = 0.0
                self.lacking.pop(0)
        except BlockingIOError:
            self.blocked_at = self.blocked_at or time.monotonic()
        except OSError:
            self.lose()

    def read(self) -> None:
        """Its answers."""
        fd = -1
        try:
            while self.link is not None:
                data, fd = wires.receive(self.link)
                if not data:
                    raise ConnectionError
                message = decode(data, 1 if fd >= 0 else 0)
                if message.kind is not Kind.KEPT:
                    raise ProtocolError(f"a keeper does not say {message.kind.name} unasked")
                ident, _ = unpack_held(message.body)
                self.unanswered = max(0, self.unanswered - 1)
                self.answered_at = time.monotonic()
                desk = self.desks.get(ident)
                if desk is not None:
                    self.held.add((ident, message.number, message.serial))
                    self.guarded(desk, partial(desk.kept, message.number, message.serial))
        except BlockingIOError:
            self.put_lacking()
        except (OSError, ProtocolError):
            self.lose()
        finally:
            if fd >= 0:
                os.close(fd)

    def forget(self, desk: Desk) -> None:
        """The broker gives that pool up."""
        self.lacking = [item for item in self.lacking if item[0] is not desk]

    # The end.

    def flush(self) -> None:
        """Wait until the keeper has all that we have; if there is none, give it to another. Bounded by how long that may take."""
        until = time.monotonic() + ANSWER
        latest = until + START  # however often one does not start
        while self.lacks():
            if self.link is None and self.starting is None and time.monotonic() >= self.retry_at:
                self.take()
            if self.starting is not None:
                until = min(latest, max(until, self.started_at + START))
                if wires.wait_readable(self.pipe(), 0.02):
                    self.started()
            elif self.link is not None:
                self.put_lacking()
                if self.link is not None and wires.wait_readable(self.link.fileno(), 0.02):
                    self.read()
            else:
                time.sleep(0.02)
            if time.monotonic() >= until:
                log.error("the keeper lacks sessions")
                return

    def lacks(self) -> bool:
        everything = ((desk.ident, k, duplicate.generation) for desk in self.desks.values() for k, duplicate in desk.duplicates.items())
        return any(key not in self.held for key in everything)

    def leave(self, desk: Desk) -> None:
        """We go; the keeper looks after the pool's names."""
        if self.link is not None:
            try:
                wires.send(self.link, encode(Message(Kind.LEAVE, body=pack_held(desk.ident, b""))))
            except OSError:
                pass  # it died in this moment

    def close(self) -> None:
        for _, sock in self.later:
            sock.close()
        self.end_start()
        if self.link is not None:
            self.link.close()
            return
        try:
            wires.connect(self.path).close()
        except ConnectionRefusedError:
            os.unlink(self.path)  # of one that was killed
        except (OSError, BrokerUnavailable):
            pass


def put_message(desk: Desk, k: int, duplicate: Duplicate) -> Message:
    return Message(Kind.PUT, k, duplicate.generation, RESIDENT if duplicate.resident else 0, pack_held(desk.ident, duplicate.body))
