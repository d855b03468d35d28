"""A raw link to the broker, and what may come back on it: an answer for each question, to whoever asked, and nothing else."""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from collections import Counter

from mppool.errors import ProtocolError
from mppool.kernel import link
from mppool.wire import Kind, Message, decode
from tests.fuzz.frames import Frame
from tests.fuzz.rig import Ground, Seat, Violation

__all__ = ["RawLink", "send"]

ANSWERS = {  # what each answer answers
    Kind.WELCOME: (Kind.HELLO,),
    Kind.SESSION: (Kind.FETCH,),
    Kind.GONE: (Kind.FETCH,),
    Kind.GRANT: (Kind.WAIT,),
    Kind.DIAL: (Kind.WAIT,),
    Kind.TOO_MANY: (Kind.WAIT,),
    Kind.STRUCK: (Kind.CANCEL,),
    Kind.LEAVE: (Kind.REPLACE,),
}


def connect(path: str) -> socket.socket:
    """A broker that takes us for its successor comes back; one whose backlog is full takes us later."""
    until = time.monotonic() + 15
    while True:
        try:
            return link.connect(path)
        except OSError:
            if time.monotonic() > until:
                raise Violation("no broker listens for 15 s") from None
            time.sleep(0.001)


def send(sock: socket.socket, frame: Frame) -> bool:
    """False: the queue is full, the other side has closed it, or the kernel does not take such a message."""
    try:
        if frame.fds:
            sock.sendmsg([frame.data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", frame.fds))], socket.MSG_NOSIGNAL)
        else:
            sock.send(frame.data, socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EMSGSIZE, errno.ETOOMANYREFS, errno.EINVAL, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
            return False
        raise
    return True


class RawLink:
    """Sends what it is told. Checks each answer; descriptors that come with them are closed, or kept for who asks."""

    def __init__(self, path: str, ground: Ground) -> None:
        self.sock = connect(path)
        self.ground = ground
        self.seat: Seat | None = None
        self.asked: Counter[Kind] = Counter()
        self.answered: Counter[Kind] = Counter()
        self.inbox: list[tuple[Message, int]] = []
        self.ended = False
        self.sent = 0

    def send(self, frame: Frame) -> bool:
        """False if it did not go out."""
        if not send(self.sock, frame):
            return False
        self.sent += 1
        return True

    def send_garbage(self, frame: Frame) -> None:
        """It may happen to be a question."""
        self.asked.update(set().union(*ANSWERS.values()))
        self.send(frame)

    def ask(self, kind: Kind, frame: Frame) -> bool:
        if self.send(frame):
            self.asked[kind] += 1
            return True
        return False

    def hello(self, seat: Seat) -> bool:
        self.seat = seat
        return self.ask(Kind.HELLO, Frame(seat.hello()))

    def read(self) -> list[tuple[Message, int]]:
        """Every answer there is by now; the descriptors are the caller's. Sets ``ended``."""
        found = []
        while not self.ended:
            fd = -1
            try:
                data, fd = link.receive(self.sock)
                if not data:
                    self.ended = True
                    break
                message = decode(data, 1 if fd >= 0 else 0)
            except BlockingIOError:
                break
            except ProtocolError as error:
                raise Violation(f"the broker itself sent nonsense: {error}") from error
            except OSError:
                self.ended = True
                break
            self.check(message, fd)
            found.append((message, fd))
            if message.kind is Kind.LEAVE:
                self.ended = True  # we were taken for its successor: it is back as soon as we hang up
        return found

    def drain(self) -> None:
        for _, fd in [*self.inbox, *self.read()]:
            if fd >= 0:
                os.close(fd)
        self.inbox.clear()

    def take(self, *kinds: Kind) -> tuple[Message, int] | None:
        """The first answer of these kinds that has come by now; others are kept for who asks for them."""
        self.inbox += self.read()
        for answer in self.inbox:
            if answer[0].kind in kinds:
                self.inbox.remove(answer)
                return answer
        return None

    def await_answer(self, *kinds: Kind, timeout: float = 10.0) -> tuple[Message, int] | None:
        """None if the link ends instead. Violation if there is neither within 10 s."""
        until = time.monotonic() + timeout
        while True:
            answer = self.take(*kinds)
            if answer is not None or self.ended:
                return answer
            if time.monotonic() > until:
                raise Violation(f"no {' or '.join(kind.name for kind in kinds)} within {timeout} s")
            link.wait_readable(self.sock.fileno(), 0.1)

    def check(self, message: Message, fd: int) -> None:
        kind = message.kind
        self.answered[kind] += 1
        if kind is Kind.REFUSED:
            return
        questions = ANSWERS.get(kind)
        if questions is None:
            raise Violation(f"the broker said {kind.name} to a worker")
        answers = sum(count for answer, count in self.answered.items() if ANSWERS.get(answer) == questions)
        if answers > sum(self.asked[question] for question in questions):
            raise Violation(f"{kind.name} to a link that did not ask ({answers} answers): {message[:4]}")
        if fd >= 0:
            self.check_session(fd)

    def check_session(self, fd: int) -> None:
        """Whatever comes is a connection to the server of our pool, or has been one."""
        sock = socket.socket(fileno=os.dup(fd))
        try:
            if sock.type & 0xF != socket.SOCK_STREAM or sock.family != socket.AF_INET or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise Violation(f"a session that is none: {sock}")
            try:
                port = sock.getpeername()[1]
            except OSError as error:
                if error.errno == errno.ENOTCONN and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07" and sock.getsockname()[0] != "0.0.0.0":
                    return  # it has ended meanwhile
                raise Violation(f"a session that is not connected: {sock}") from error
            if port != self.ground.port:
                raise Violation(f"a session of another server: {sock}")
        finally:
            sock.close()

    def close(self, *, reset: bool = False) -> None:
        """With ``reset`` what is still on its way to us is lost, as after a SIGKILL."""
        if reset:
            self.ended = True
        self.drain()
        self.sock.close()
