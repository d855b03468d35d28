"""Scenarios with a broker: rows and links that outlive their processes, and a broker that follows on a dead one."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from mppool.wire import GIVEN_UP
from tests.model.explore import WAIT, Explorer, State, Violation
from tests.model.steps import Atomic, Lock, Step, access
from tests.model.world import World

__all__ = ["Order", "Restart", "Rows"]


class Socket(Atomic):
    """A duplicate of the one session."""

    def dup(self) -> Socket:
        return self

    def fileno(self) -> int:
        return 0

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        pass


class Keeping(Atomic):
    """The broker around a desk; its keeper has at once what it is given."""

    def put(self, desk: Any, k: int, duplicate: Any) -> None:
        desk.kept(k, duplicate.generation)

    def drop(self, desk: Any, k: int, generation: int) -> None:
        pass

    def cut(self, link: Any) -> None:
        desk, link.desk = link.desk, None
        access("cut", link.name)
        if desk is not None:
            desk.link_ended(link)


class Brokered(World):
    """Process 0 is the broker. Links are named after the process at their other end."""

    interest = ("uses", "state", "lane", "generation", "permit", "pid", "incarnation", "last_incarnation", "shared_flag", "spread", "waiters", "home")
    links: tuple[int, ...] = ()

    def __init__(self, code: SimpleNamespace) -> None:
        super().__init__(code)
        code.desk.time = code.conversation.time = SimpleNamespace(monotonic=lambda: 0.0, monotonic_ns=lambda: 0)
        code.permits.threading = SimpleNamespace(RLock=nullcontext, get_ident=lambda: 0)
        code.desk.wires = SimpleNamespace(has_ended=lambda sock: True)
        code.desk.os = SimpleNamespace(close=lambda fd: None)
        code.desk.take_socket = lambda fd: Socket()
        self.patient |= {code.table.BROKER}
        world = self

        class Link(code.desk.WorkerLink):  # type: ignore[misc, name-defined]
            def __init__(self, name: int) -> None:
                super().__init__(None)
                self.name = name

            def send(self, message: Any, fd: int = -1) -> bool:
                access("answer", self.name, message.kind.name)
                return True

        class Desk(code.desk.Desk):  # type: ignore[misc, name-defined]
            pass

        self.Link, self.Desk = Link, Desk
        self.operations.update(serve=self.serve, read=self.read, poll=self.poll, tick=self.tick, judge=self.judge)
        for link in self.links:
            self.place(("to broker", link), ())  # type: ignore[arg-type]
            self.place(("from broker", link), ())  # type: ignore[arg-type]
            self.place(("open", link), 1)
        self.place("spoilt", 0)
        del world

    # The broker.

    def desk(self, local: Any, duplicate: bool) -> None:
        local.desk = self.Desk(self.table, Lock(), self.row(0), Keeping())
        local.links = {name: self.Link(name) for name in self.links}
        if duplicate:
            local.desk.adopt(0, self.code.desk.Duplicate(0, Socket(), b"", False))

    def serve(self, local: Any, ticks: int) -> Any:
        """What may happen next to a broker: a message (or the end) of a link, the passing of time, the second look at a case."""
        readable = tuple(name for name, link in local.links.items() if link is not None)
        chosen = access("select", readable, (*(["tick"] if ticks else []), *(["judge"] if local.desk.cases else [])))
        if chosen == "tick":
            return "tick", ticks - 1
        return ("judge", ticks) if chosen == "judge" else ("read", chosen, ticks)

    def selectable(self, memory: tuple[Any, ...], me: int, step: Step) -> list[Any]:
        return [*(name for name in step.place if memory[self.places["to broker", name]]), *step.value]

    def read(self, local: Any, name: int, ticks: int) -> Any:
        self.take_in(local, name, access("receive", name))
        return "serve", ticks

    def poll(self, local: Any, name: int) -> Any:
        while local.links[name] is not None:
            received = access("receive", name)
            if received is None:
                break
            self.take_in(local, name, received)

    def take_in(self, local: Any, name: int, received: tuple[Any, ...]) -> None:
        """As Broker.read does."""
        link, message = local.links[name], self.code.conversation.Message
        kinds = self.code.conversation.Kind
        if received[0] == "END":
            local.links[name] = None
            Keeping().cut(link)
        elif received[0] == "HELLO":
            if not local.desk.hello(link, *received[1:]):
                local.links[name] = None
                access("cut", name)
            else:
                local.desk.look_for_dead()
        else:
            try:
                local.desk.received(link, message(kinds[received[0]], *received[1:]), 0 if received[0] == "SHARE" else -1)
            except self.code.errors.ProtocolError:
                local.links[name] = None
                Keeping().cut(link)
        for other, its in local.links.items():
            if its is not None and its.desk is None and its in local.desk.links:
                local.links[other] = None

    def tick(self, local: Any, ticks: int) -> Any:
        local.desk.look_for_dead()
        if local.desk.lost_sessions():
            local.desk.bury_and_free()
        local.desk.serve()
        return "serve", ticks

    def judge(self, local: Any, ticks: int) -> Any:
        if local.desk.cases:
            local.desk.judge()
        return "serve", ticks

    # What links and holders do.

    def stepped(self, memory: list[Any], me: int, step: Step) -> Any:
        kind, name, value = step
        if kind == "send":
            if memory[self.places["open", name]]:
                memory[self.places["to broker", name]] += (value,)
        elif kind == "receive":
            waiting = memory[self.places["to broker", name]]
            if not waiting:
                return None
            memory[self.places["to broker", name]] = waiting[1:]
            return waiting[0]
        elif kind == "answer":
            if memory[self.places["open", name]]:
                memory[self.places["from broker", name]] += (value,)
        elif kind == "answered":
            answers = memory[self.places["from broker", name]]
            if not answers:
                return "END" if not memory[self.places["open", name]] else WAIT
            memory[self.places["from broker", name]] = answers[1:]
            return answers[0]
        elif kind == "cut":
            memory[self.places["open", name]] = 0
        elif kind == "hold":
            if memory[self.places["holders 0"]] & ~(1 << me):
                raise Violation("two holders")
            if memory[self.places["spoilt"]]:
                raise Violation("what a dead process was using is lent again")
            memory[self.places["holders 0"]] |= 1 << me
        elif kind == "drop":
            memory[self.places["holders 0"]] &= ~(1 << me)
        return None

    def died(self, memory: list[Any], me: int) -> None:
        memory[self.places["spoilt"]] |= memory[self.places["holders 0"]] >> me & 1
        memory[self.places["holders 0"]] &= ~(1 << me)
        if me in self.links:
            memory[self.places["to broker", me]] += (("END",),)

    def check(self, before: tuple[int, ...], after: list[int], me: int, step: Step) -> None:
        if step.kind == "write" and step.place == "generation 0":
            after[self.places["spoilt"]] = 0  # another session
            if after[self.places["holders 0"]] & ~(1 << me):
                raise Violation("a live holder's session was closed")

    def wound_up(self, state: State, explorer: Explorer) -> State:
        """The broker does all that it can still do."""
        local = explorer.known[state.processes[0]].local
        for operation in 3 * [*(("poll", name) for name in self.links), ("tick", 0), ("judge", 0)]:
            state, done = explorer.go_on(state, 0, local, operation)
            local = done.local
        return state


class Rows(Brokered):
    """1 says hello, waits, and may die at any moment; 2 takes a row, which may have been 1's, and uses the slot.

    With ``gives_up`` 1 goes away as soon as it has asked, says so, and looks at its lane only when it was struck.
    """

    rows = 2
    links = (1,)

    def __init__(self, code: SimpleNamespace, *, deaths: int = 1, ticks: int = 2, gives_up: bool = False) -> None:
        super().__init__(code)
        self.deaths = deaths
        self.gives_up = gives_up
        self.mortal = (1, 2)
        self.operations.update(begin=self.begin, ask=self.ask, wait=self.wait, arrive=self.arrive, claim=self.claim, release=self.release)
        self.operations.update(give_up=self.give_up, struck=self.struck)
        self.initial[self.places[f"byte {code.table.FIRST_ROW}"]] = 1
        self.initial[self.places[f"byte {code.table.BROKER}"]] = 1
        self.start(SimpleNamespace(desk=None, links={}), ("begin", ticks))
        self.start(self.worker(1), ("ask",))
        self.start(self.worker(1), ("arrive",))

    def begin(self, local: Any, ticks: int) -> Any:
        self.desk(local, duplicate=True)
        return "serve", ticks

    def ask(self, worker: Any) -> Any:
        access("send", 1, ("HELLO", worker.row.index, worker.row.incarnation))
        access("send", 1, ("WAIT", 0, worker.row.incarnation))
        return ("give_up",) if self.gives_up else ("wait",)

    def give_up(self, worker: Any) -> Any:
        access("send", 1, ("CANCEL", 0, 0, GIVEN_UP))
        return ("struck",)

    def struck(self, worker: Any) -> Any:
        """As settle_abandoned does. At rest nothing may be left in a lane whose owner does not come by."""
        answer = access("answered", 1)
        if answer not in ("STRUCK", "END"):
            return ("struck",)
        if self.code.conversation.granted(worker, worker.all_lanes[0]).lane is None:
            return None
        if answer == "STRUCK":
            raise Violation("struck, and yet something is granted")
        access("hold", 0)
        return ("release",)

    def wait(self, worker: Any) -> Any:
        answer = access("answered", 1)
        if answer == "WELCOME":
            return ("wait",)
        if self.code.conversation.granted(worker, worker.all_lanes[0]).lane is None:
            return None
        access("hold", 0)
        return ("release",)

    def arrive(self, worker: Any) -> Any:
        return ("claim",) if self.takes_row(worker) else None

    def claim(self, worker: Any) -> Any:
        if not self.code.claims.claim(worker.words, worker.all_lanes[0], worker.slot(0)):
            return None
        access("hold", 0)
        return ("release",)

    def release(self, worker: Any) -> Any:
        access("drop", 0)
        self.code.claims.release(worker.words, worker.all_lanes[0], worker.slot(0))

    def at_rest(self, state: State, explorer: Explorer) -> None:
        state = self.wound_up(state, explorer)
        token, permit, cap = (self.get(state.memory, name) for name in ("token 0", "permit 0", "cap"))
        if not self.get(state.memory, "holders 0") and (token, permit + cap) != (1, 1):
            raise Violation(f"lost: token {token}, permit {permit}, units {cap}")


class Driver(Atomic):
    def farewell(self, session: Any) -> bytes:
        return b""

    def detach(self, session: Any) -> bytes:
        return b""


class Line(Atomic):
    """A worker's end of its link."""

    epoch = 1

    def __init__(self, name: int) -> None:
        self.name = name

    def send(self, message: Any, fd: int = -1) -> None:
        access("send", self.name, (message.kind.name, *message[1:]))


class Restart(Brokered):
    """Broker and keeper died at once; a new broker begins. 1 has an idle session that the old broker had shared; 2 waits for one."""

    rows = 3
    links = (1, 2)

    def __init__(self, code: SimpleNamespace, *, deaths: int = 1, ticks: int = 2) -> None:
        super().__init__(code)
        self.deaths = deaths
        self.mortal = (1, 2)
        self.operations.update(begin=self.begin, greet=self.greet, show=self.show, wait=self.wait, release=self.release)
        self.initial[self.places[f"byte {code.table.BROKER}"]] = 1
        self.start(SimpleNamespace(desk=None, links={}), ("begin", ticks))
        owner = self.worker(1)
        owner.entries[0] = entry = code.attached.Entry(owner.slot(0), 0, 0, None, -1)
        entry.sock = Socket()
        self.start(owner, ("greet", 1))
        self.start(self.worker(2), ("greet", 2))

    def value_of(self, field: str, at: int) -> int:
        if field in ("shared_flag", "spread"):
            return 1
        return 1 << 32 | super().value_of("incarnation", 1) if field == "home" else super().value_of(field, at)

    def worker(self, index: int) -> Any:
        worker = super().worker(index)
        worker.driver, worker.shown_epoch, worker.owes = Driver(), 0, False
        return worker

    def begin(self, local: Any, ticks: int) -> Any:
        self.desk(local, duplicate=False)
        return "serve", ticks

    def greet(self, worker: Any, name: int) -> Any:
        access("send", name, ("HELLO", worker.row.index, worker.row.incarnation))
        return ("show", name) if access("answered", name) == "WELCOME" else None

    def show(self, worker: Any, name: int) -> Any:
        self.code.conversation.show(worker, Line(name))
        if name == 1:
            return None
        access("send", name, ("WAIT", 0, worker.row.incarnation))
        return ("wait", name)

    def wait(self, worker: Any, name: int) -> Any:
        if access("answered", name) == "DIAL" or self.code.conversation.granted(worker, worker.all_lanes[0]).lane is None:
            return None
        access("hold", 0)
        return ("release",)

    def release(self, worker: Any) -> Any:
        access("drop", 0)
        self.code.claims.release(worker.words, worker.all_lanes[0], worker.slot(0))

    def at_rest(self, state: State, explorer: Explorer) -> None:
        state = self.wound_up(state, explorer)
        waiter = explorer.known[state.processes[2]]
        if waiter.operation is not None and waiter.operation[0] == "wait" and not self.get(state.memory, ("from broker", 2)):
            raise Violation("a waiter is forgotten")
        token, permit, cap = (self.get(state.memory, name) for name in ("token 0", "permit 0", "cap"))
        granted = self.get(state.memory, "lane 2")
        if not self.get(state.memory, "holders 0") and not granted and (token, permit + cap) != (1, 1):
            raise Violation(f"lost: token {token}, permit {permit}, units {cap}")


class Order(Brokered):
    """1 and then 2 wait for a session that either can be given; 3 gives it back at some moment."""

    rows = 4
    links = (1, 2)

    def __init__(self, code: SimpleNamespace, *, ticks: int = 1) -> None:
        super().__init__(code)
        self.operations.update(begin=self.begin, release=self.release)
        holder = self.worker(3)
        self.initial[self.places["token 0"]] = 0
        self.initial[self.places["lane 3"]] = holder.slot(0).held
        self.initial[self.places[f"byte {code.table.BROKER}"]] = 1
        self.start(SimpleNamespace(desk=None, links={}), ("begin", ticks))
        self.start(holder, ("release",))

    def begin(self, local: Any, ticks: int) -> Any:
        self.desk(local, duplicate=True)
        for name in self.links:
            incarnation = self.value_of("incarnation", name)
            self.take_in(local, name, ("HELLO", name, incarnation))
            self.take_in(local, name, ("WAIT", 0, incarnation))
        return "serve", ticks

    def release(self, worker: Any) -> Any:
        self.code.claims.release(worker.words, worker.all_lanes[0], worker.slot(0))

    def check(self, before: tuple[int, ...], after: list[int], me: int, step: Step) -> None:
        if step.kind == "answer" and step.value == "GRANT" and "GRANT" not in after[self.places["from broker", 1]]:  # type: ignore[operator]
            raise Violation("the second in line is served before the first")

    def at_rest(self, state: State, explorer: Explorer) -> None:
        state = self.wound_up(state, explorer)
        if "GRANT" not in self.get(state.memory, ("from broker", 1)):  # type: ignore[operator]
            raise Violation("a waiter is forgotten")
