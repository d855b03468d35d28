"""The place of a crash: a server that is the judge, perhaps a broker, and a worker that survives and looks what is left."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import warnings
from typing import Any

import mppool
from mppool.inspect import Inspected, find_pool
from mppool.kernel import memory
from mppool.kernel.runtime import pool_id, scope_of
from mppool.snapshot import waiting
from mppool.states import State
from mppool.table import H_WAITERS
from tests.crash.peers import CAP, DEADLINE, Peer
from tests.crash.tracing import KINDS, Trigger
from tests.helpers.processes import Child, answers, eventually
from tests.helpers.server import judge

__all__ = ["Lost", "Scene"]


class Lost(Exception):
    """Something did not come back."""


class Scene:
    """Everything is in a directory of its own, and gone after ``end``."""

    def __init__(self, has_broker: bool) -> None:
        self.has_broker = has_broker
        self._stack = contextlib.ExitStack()
        self.judge = self._stack.enter_context(judge())
        self.directory = tempfile.mkdtemp(prefix="mppool-crash-")
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.path = f"{self.directory}/b.sock"
        self.broker = Broker(self.path) if has_broker else None
        self.survivor = self.peer()
        self.survivor.do("hold", CAP)
        self.survivor.do("give_back", not has_broker)
        self.table = self._table()

    def _table(self) -> Inspected:
        found = find_pool(self.path, "crash")
        assert found is not None
        return found

    def make_pool(self, **options: Any) -> mppool.Pool:
        return mppool.Pool(self.judge.address, broker=self.path, **{"name": "crash", "max_size": CAP, "close_timeout": 0.2, **options})

    def peer(self, operation: Any = None) -> Peer:
        return Peer(self.make_pool, operation)

    # Who holds what.

    def clear(self) -> None:
        """No session at all."""
        self.survivor.do("hold", CAP)
        self.survivor.do("give_back", True)

    def renew(self) -> None:
        """Idle sessions, that the survivor dialed just now and all may fetch."""
        self.clear()
        self.survivor.do("hold", CAP)
        self.survivor.do("give_back")
        eventually(self.all_shared)

    def all_shared(self) -> bool:
        table = self.table.table
        return all(table.words[table.shared_flag + k] for k in table.find_all(State.IDLE))

    def waiting(self) -> int:
        table = self.table.table
        return table.halves[H_WAITERS] if self.has_broker else waiting(table)

    # What is left.

    def check(self, victim: Peer | None) -> None:
        """The whole cap can be leased at once, by the victim if it lives on, then by the survivor; the server sees no connection more."""
        self.survivor.do("give_back", not self.has_broker)
        for peer in (victim, self.survivor):
            if peer is not None:
                peer.do("hold", CAP)
                self.check_server()
                peer.do("give_back", not self.has_broker)
        self.judge.forget_peak()

    def check_server(self) -> None:
        """The whole cap is held."""
        peak = self.judge.counts()["peak"]
        if peak > CAP + 1:  # one FIN may still travel
            raise Lost(f"the server saw {peak} connections")
        eventually(lambda: self.judge.counts()["live"] == CAP, DEADLINE, "the server has connections that nobody holds")

    def check_no_names(self, name: str) -> None:
        ident = pool_id(self.path, name)
        eventually(lambda: not memory.names(ident) + memory.names(f"sem.{ident}"), DEADLINE, f"names of {name} left over")

    def descriptors(self) -> dict[str, int]:
        found = {"survivor": self.survivor.do("stray_descriptors")}
        if self.broker is not None:
            found["broker"] = len(os.listdir(f"/proc/{self.broker.pid}/fd"))
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

    def abandon(self) -> None:
        """Whatever state it is in."""
        self.survivor.end()
        if self.broker is not None:
            self.broker.kill()
        self.table.lock.close()
        prefix = f"mppool-{scope_of(self.path)}"
        self._stack.close()
        for name in memory.names(prefix) + memory.names(f"sem.{prefix}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{memory.SHM}/{name}")


class Broker:
    """A broker in a forked process, which can be struck."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.trigger = Trigger()
        self._child = Child(lambda _child: serve(path, self.trigger))
        self.pid = self._child.pid
        eventually(lambda: self.has_ended() or answers(path))

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def stop(self) -> None:
        self._child.kill(signal.SIGTERM)
        eventually(self.has_ended)
        self._child.wait()

    def kill(self) -> None:
        self._child.end()


def serve(path: str, trigger: Trigger) -> None:
    from mppool.broker import serve

    logging.disable()
    warnings.simplefilter("ignore")
    trigger.install(KINDS["kill"])
    serve(path, None, lambda: None)
