"""What the checks work with: the driver, what its author says about it, and the means to look at descriptors and connections."""

from __future__ import annotations

import contextlib
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
from mppool.testing.must import must_be
from mppool.testing.peer import SilentPeer
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

    def seen(self, session: Any) -> Any:
        """The state it is in, as ``look`` says."""
        return self.run(self.look, session) if self.look is not None else None

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

    @contextlib.contextmanager
    def silent(self) -> Iterator[tuple[SilentPeer, Any]]:
        """A session attached to a server that never says a word, and that server, which hears what it hears."""
        with self.dialed() as session:
            self.must_move(session)
            carried = self.driver.detach(session)
        with SilentPeer() as peer:
            yield peer, self.attach(peer.ours.fileno(), carried)

    def must_move(self, session: Any) -> None:
        residence = self.driver.residence(session)
        if residence is not Residence.moves:
            raise DoesNotApply(f"its sessions are resident ({Residence(residence).name})")

    # As the pool does.

    def settle(self, session: Any) -> None:
        """Before it lends what another process used."""
        self.resume(session)
        if self.driver.minds_transfer:
            self.run(self.driver.transferred, session)

    def end_use(self, session: Any) -> None:
        """At a return; and reading stops."""
        if self.driver.tidies_always or not self.clean(session):
            self.run(self.driver.tidy, session)
        must_be(bool(self.run(self.driver.is_clean, session)), "is_clean(session) is false after a round trip and tidy()")

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
