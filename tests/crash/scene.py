"""The place of a crash: a server that is the judge, perhaps a broker, and a worker that survives and looks what is left."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import tempfile
import warnings
from typing import Any

import mppool
from mppool.claims import named
from mppool.inspect import Inspected, find_pool
from mppool.kernel import memory
from mppool.kernel.runtime import pool_id, scope_of
from mppool.snapshot import waiting
from mppool.states import State
from mppool.table import H_WAITERS, R_PID, W_BEAT
from tests.crash.peers import CAP, DEADLINE, Peer, descriptors
from tests.crash.tracing import KINDS, Trigger
from tests.helpers.processes import Child, answers, eventually
from tests.helpers.server import judge

__all__ = ["COMING", "Broker", "Lost", "Scene"]

COMING = 40.0  # seconds that a broker may take to come on a machine that has much else to do


class Lost(Exception):
    """Something did not come back."""


class Scene:
    """Everything is in a directory of its own, and gone after ``end``."""

    def __init__(self, has_broker: bool, traced: bool = False) -> None:
        """``traced``: the broker can be struck."""
        self.has_broker = has_broker
        self.traced = traced
        self._stack = contextlib.ExitStack()
        atexit.register(self.abandon)
        self.directory = tempfile.mkdtemp(prefix="mppool-crash-")
        self.path = f"{self.directory}/b.sock"
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._stack.callback(remove_names, f"mppool-{scope_of(self.path)}")
        self.judge = self._stack.enter_context(judge())
        self.broker: Broker | None = None  # the one that is there now
        self._stack.callback(self.end_broker)
        if has_broker:
            self.broker = Broker(self.path, Trigger() if traced else None)
        self.survivor = self.peer()
        self._stack.callback(self.survivor.end)
        self.survivor.do("hold", CAP)
        self.survivor.do("give_back", not has_broker)
        self.table = self._table()
        self._stack.callback(self.table.lock.close)
        self.tokens = [self.table.table.open_token(k) for k in range(self.table.table.slots)]

    def _table(self) -> Inspected:
        found = find_pool(self.path, "crash")
        assert found is not None
        return found

    def make_pool(self, **options: Any) -> mppool.Pool:
        return mppool.Pool(self.judge.address, broker=self.path, **{"name": "crash", "max_size": CAP, "close_timeout": 0.2, **options})

    def again(self) -> Scene:
        """Another one like this."""
        self.abandon()
        return Scene(self.has_broker, self.traced)

    def peer(self, operation: Any = None) -> Peer:
        return Peer(self.make_pool, operation)

    # Who holds what.

    def clear(self) -> None:
        """No session at all."""
        self.survivor.do("hold", CAP)
        self.survivor.do("give_back", True)

    def renew(self) -> None:
        """Idle sessions, that the survivor dialed just now and all may fetch."""
        self.renew_held()
        self.survivor.do("give_back")

    def renew_held(self) -> None:
        """The same, not given back yet."""
        self.clear()
        self.survivor.do("hold", CAP)
        eventually(self.all_shared)

    def all_shared(self) -> bool:
        table = self.table.table
        return all(table.words[table.shared_flag + k] for state in (State.IDLE, State.IN_USE) for k in table.find_all(state))

    def waiting(self) -> int:
        table = self.table.table
        return table.halves[H_WAITERS] if self.has_broker else waiting(table)

    def held(self) -> int:
        """Permits."""
        table = self.table.table
        return sum(table.array(table.permit))

    def has_row(self, peer: Peer) -> bool:
        table = self.table.table
        return peer.pid in [table.words[table.row_at(row) + R_PID] for row in table.taken_rows()]

    def ended(self) -> bool:
        """The broker."""
        return self.broker is not None and self.broker.has_ended()

    def let_broker_pass(self) -> None:
        """Until it has executed another line since, or has ended."""
        words = self.table.table.words
        beat = words[W_BEAT]
        eventually(lambda: self.ended() or words[W_BEAT] != beat, what="the broker goes on")

    # What is left.

    def check(self, *others: Peer) -> None:
        """The whole cap can be leased at once, by each of those that live on, at last by the survivor; the server sees no connection more."""
        peers = [*others, self.survivor]
        for peer in peers:
            peer.do("give_back", not self.has_broker)
        for peer in peers:
            peer.do("hold", CAP)
            self.check_server()
            peer.do("give_back", not self.has_broker)
        self.judge.forget_peak()
        eventually(lambda: not self.lost_tokens(), DEADLINE, "slots that nobody holds and nobody can take")

    def lost_tokens(self) -> list[int]:
        """At rest: with a broker each token is back; without one some may wait for somebody in need, and the lanes of the dead name them."""
        table = self.table.table
        words = [] if self.has_broker else [word for row in table.taken_rows() for word in table.lanes_of(row)]
        taken = [k for k, token in enumerate(self.tokens) if not token.value]
        return [k for k in taken if k not in map(named, words)]

    def come_by(self, other: Peer) -> None:
        """After a broker's death: each worker uses the pool while the other waits, and so shows the next broker what only it has."""
        for waits, uses in ((other, self.survivor), (self.survivor, other)):
            waits.do("give_back")
            uses.do("give_back")
            waits.send("hold", CAP)
            while not waits.has_spoken():
                uses.do("use")
            waits.answer()

    def wait_for(self, peer: Peer) -> None:
        """Until it waits for a session, or has what it wants."""
        eventually(lambda: self.waiting() or peer.has_spoken())

    def check_server(self) -> None:
        """The whole cap is held."""
        peak = self.judge.counts()["peak"]
        if peak > CAP + 1:  # one FIN may still travel
            raise Lost(f"the server saw {peak} connections")
        eventually(lambda: self.judge.counts()["live"] == CAP, DEADLINE, "the server has connections that nobody holds")

    def check_no_names(self, name: str) -> None:
        ident = pool_id(self.path, name)
        eventually(lambda: not memory.names(ident) + memory.names(f"sem.{ident}"), DEADLINE, f"names of {name} left over")

    def rest(self) -> None:
        """The survivor alone, with as many sessions as there may be; a broker has duplicates of them."""
        if self.has_broker:
            self.renew()

    def descriptors(self) -> dict[str, int]:
        """At rest: how many of each process are open beside the links between the two."""
        found = {"survivor": len(self.survivor.do("stray_descriptors"))}
        if self.broker is not None:
            found["broker"] = len(descriptors(self.broker.pid)) - self.survivor.do("links")
        return found

    # The end.

    def end(self) -> None:
        """Orderly: nothing may be left. Raises Lost."""
        try:
            self.survivor.do("close")
            self.survivor.end()
            if self.broker is not None:
                self.broker.stop()
            prefix = f"mppool-{scope_of(self.path)}"
            eventually(lambda: not memory.names(prefix) + memory.names(f"sem.{prefix}"), what="names left over")
            eventually(lambda: not os.listdir(self.directory), what="files left over in the runtime directory")
        finally:
            self.abandon()

    def end_broker(self) -> None:
        if self.broker is not None:
            self.broker.kill()

    def abandon(self) -> None:
        """Whatever state it is in."""
        atexit.unregister(self.abandon)
        self._stack.close()


def remove_names(prefix: str) -> None:
    for name in memory.names(prefix) + memory.names(f"sem.{prefix}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{memory.SHM}/{name}")


class Broker:
    """A broker in a forked process; with a trigger it can be struck."""

    def __init__(self, path: str, trigger: Trigger | None, wait: bool = True) -> None:
        self.path = path
        self.trigger = trigger
        self._stack = tempfile.TemporaryFile()  # noqa: SIM115 (as long as we are)
        self._child = Child(lambda child: serve(child, path, trigger, self._stack.fileno()))
        self.pid = self._child.pid
        if wait:
            self.wait_for_answer()

    def wait_for_answer(self) -> None:
        """Long enough for a machine that has much else to do; else what it is at is part of the report."""
        try:
            eventually(self.answers, COMING)
        except AssertionError:
            self._child.kill(signal.SIGUSR2)
            with contextlib.suppress(AssertionError):
                eventually(lambda: os.fstat(self._stack.fileno()).st_size, 2)
            self._stack.seek(0)
            raise Lost(f"the broker does not come: {' '.join(self._stack.read().decode().split())}") from None

    def answers(self) -> bool:
        if self.has_ended():
            raise Lost(f"the broker ended: {self.last_words()}")
        return answers(self.path)

    def last_words(self) -> str:
        try:
            return str(self._child.hear())
        except EOFError:
            return "killed"
        except AssertionError as error:
            return " ".join(str(error).split())

    def has_ended(self) -> bool:
        return self._child.status is not None or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def tell_to_end(self) -> None:
        self._child.kill(signal.SIGTERM)

    def stop(self) -> None:
        self.tell_to_end()
        eventually(self.has_ended)
        self._child.wait()

    def kill(self) -> None:
        self._child.end()
        self._stack.close()


def serve(child: Child, path: str, trigger: Trigger | None, stack: int) -> None:
    from mppool.broker import serve

    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in (child._in, child._out, stack):
            with contextlib.suppress(OSError):
                os.close(fd)  # the director's
    faulthandler.register(signal.SIGUSR2, file=stack)
    logging.disable()
    warnings.simplefilter("ignore")
    if trigger is not None:
        trigger.install(KINDS["kill"])
    serve(path, None, lambda: None)
