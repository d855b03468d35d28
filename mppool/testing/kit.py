"""What the checks work with: the driver, what its author says about it, and the means to look at descriptors and connections."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mppool.drivers.base import AsyncDriverBase, DriverBase
from mppool.states import Residence
from mppool.testing.report import DoesNotApply, PromiseBroken

__all__ = ["Kit"]


@dataclass
class Kit:
    driver: DriverBase
    identity: Callable[[Any], Any] | None
    ask: Callable[[Any, str], Any] | None
    look: Callable[[Any], Any] | None
    dirty: Mapping[str, Callable[[Any], Any]]
    secrets: Sequence[str]
    unreachable: DriverBase | None
    moves: int
    broker: str
    timeout: float
    name: str = "check-driver"  # of the pool: each check has its own
    loop: Any = field(default=None, repr=False)

    # Calling things, whether they are coroutine functions or not.

    @property
    def is_async(self) -> bool:
        return isinstance(self.driver, AsyncDriverBase)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        if not self.is_async:
            return function(*args)
        import asyncio

        async def call() -> Any:
            result = function(*args)
            return await result if inspect.isawaitable(result) else result

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
        return self.loop.run_until_complete(call())

    def begin(self) -> None:
        """In the process of a check: a loop has descriptors of its own, which are not the driver's."""
        self.run(int)

    def pool(self, max_size: int = 1) -> Any:
        from mppool.aio import AsyncPool
        from mppool.pool import Pool

        kind: Any = AsyncPool if self.is_async else Pool
        return kind(driver=self.driver, name=self.name, max_size=max_size, broker=self.broker, timeout=self.timeout / 2)

    def is_overridden(self, method: str) -> bool:
        return getattr(type(self.driver), method) not in (getattr(DriverBase, method), getattr(AsyncDriverBase, method))

    # Sessions.

    def who(self, session: Any) -> Any:
        """The server's own idea of this session; without a way to ask, the two ends of its connection."""
        if self.identity is not None:
            return self.run(self.identity, session)
        with self.socket_of(session) as sock:
            return sock.getsockname(), sock.getpeername()

    def use(self, session: Any, nonce: str) -> None:
        """One round trip. Raises PromiseBroken if the answer is not to this question."""
        if self.ask is not None:
            answer = self.run(self.ask, session, nonce)
            text = answer.decode(errors="replace") if isinstance(answer, (bytes, bytearray)) else str(answer)
            if nonce not in text:
                raise PromiseBroken(f"ask(session, {nonce!r}) got somebody else's answer: {text[:200]!r}")

    def clean(self, session: Any) -> bool:
        answer = bool(self.run(self.driver.is_clean, session))
        self.resume(session)
        return answer

    def resume(self, session: Any) -> None:
        if isinstance(self.driver, AsyncDriverBase):
            self.run(self.driver.resume, session)

    def dial(self) -> Any:
        return self.run(self.driver.dial)

    def attach(self, fd: int, baggage: bytes) -> Any:
        session = self.run(self.driver.attach, fd, baggage)
        self.resume(session)
        return session

    def close(self, session: Any) -> None:
        self.run(self.driver.close, session)

    def abort(self, session: Any) -> None:
        self.run(self.driver.abort, session)

    @contextlib.contextmanager
    def dialed(self) -> Iterator[Any]:
        session = self.dial()
        try:
            yield session
        finally:
            self.close(session)

    def must_move(self, session: Any) -> None:
        residence = self.driver.residence(session)
        if residence is not Residence.moves:
            raise DoesNotApply(f"its sessions are resident ({Residence(residence).name})")

    # Descriptors and connections.

    def fd_of(self, session: Any) -> int:
        """A socket's descriptor. Raises PromiseBroken if it is none."""
        fd = self.run(self.driver.fileno, session)
        if not isinstance(fd, int) or fd < 0:
            raise PromiseBroken(f"fileno(session) is {fd!r}")
        try:
            mode = os.fstat(fd).st_mode
        except OSError as error:
            raise PromiseBroken(f"fileno(session) is {fd}, which is not open: {error.strerror}") from error
        if not stat.S_ISSOCK(mode):
            raise PromiseBroken(f"fileno(session) is {fd}, which is no socket")
        return fd

    @contextlib.contextmanager
    def socket_of(self, session: Any) -> Iterator[socket.socket]:
        """A duplicate, as the pool and other processes have one."""
        sock = socket.socket(fileno=os.dup(self.fd_of(session)))
        try:
            yield sock
        finally:
            sock.close()

    def is_readable(self, session: Any) -> bool:
        """Is there something to read on a session that nobody uses, or within a moment? The pool would close it."""
        with self.socket_of(session) as sock:
            return bool(select.select([sock], [], [], 0.05)[0])

    def must_not_block(self, session: Any, when: str) -> None:
        if os.get_blocking(self.fd_of(session)):
            raise PromiseBroken(f"{when} the connection is in blocking mode, for every process that has it")


def open_descriptors() -> set[int]:
    gc.collect()
    return {int(name) for name in os.listdir("/proc/self/fd")} - {-1}


class SilentPeer:
    """A connection over TCP to somebody who listens and never says a word: ``ours`` is the client's end."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.ours = socket.create_connection(listener.getsockname())
            self.theirs, _ = listener.accept()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)

    def heard(self) -> str | None:
        """What the peer heard since: None for nothing at all."""
        if not select.select([self.theirs], [], [], 0.03)[0]:
            return None
        try:
            data = self.theirs.recv(4096)
        except OSError as error:
            return f"{error.strerror}"
        return f"{data!r}" if data else "the end of the connection: something called shutdown()"

    def __enter__(self) -> SilentPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()
