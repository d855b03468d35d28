"""Does what was drawn, and looks when all is quiet: the round, the reckoning after it, and the end of all."""

from __future__ import annotations

import ast
import contextlib
import heapq
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mppool.errors import Error
from mppool.kernel import memory
from mppool.kernel.runtime import scope_of
from mppool.permits import Permits
from tests.chaos import actors, relay, upstream
from tests.chaos.actions import BASE, Action, Round
from tests.chaos.board import (
    CAP,
    FULL,
    HIGHEST_CAP,
    MOOD,
    PACE,
    PLACES,
    RELAY_ACCEPTED,
    RELAY_LIVE,
    SILENT,
    SLOW,
    THREADS,
    UPSTREAM_LIVE,
    UPSTREAM_PEAK,
    UPSTREAM_REQUESTS,
    Board,
    Teller,
    become,
)
from tests.chaos.report import Report, inspected, sockets
from tests.helpers.processes import answers, die_with_parent, eventually

__all__ = ["Host"]

BYSTANDER = PLACES - 1
MANY_THREADS = (1, 1, 2, 1, THREADS, 1, 2, 1)  # by place
COMING = 40.0  # seconds that a process may take to come or to go on a machine that has much else to do
SETTLING = 20.0  # seconds within which table, server and relay agree, once nobody asks any more
UNEXPLAINED = 20.0  # seconds of a wait that timed out without any trouble around
BACKOFF = 6.0  # seconds the breaker may pause after the server could not be reached
TRAVEL = 1.0  # seconds that the end of a killed worker's connection may take on a busy machine


class Actor:
    def __init__(self, who: str, pid: int, orders: socket.socket) -> None:
        self.who = who
        self.pid = pid
        self.orders = orders

    def order(self, do: str, **more: Any) -> None:
        with contextlib.suppress(OSError):
            self.orders.send(repr({"do": do, **more}).encode())


class Host:
    def __init__(self, seed: str, report: Report, *, with_broker: bool, cap: int = 4) -> None:
        self.seed = seed
        self.report = report
        self.with_broker = with_broker
        self.cap = cap
        self.home = Path(tempfile.mkdtemp(prefix="mppool-chaos-"))
        (self.home / "run").mkdir(mode=0o700)
        self.path = str(self.home / "run" / "b.sock")
        self.log = os.open(self.home / "processes.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.board = Board()
        self.board[CAP] = self.board[HIGHEST_CAP] = cap
        self.events, telling = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        telling.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.tell = Teller(telling)
        self.lifeline, self.line_end = os.pipe()
        self.actors: dict[int, Actor] = {}  # by place
        self.born = 0
        self.names: dict[int, str] = {}  # pid -> who, of all that live and are ours
        self.expected: set[int] = set()  # pids whose end we have asked for
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.planned = 0
        self.broker: subprocess.Popen[bytes] | None = None
        self.upstream: int = 0
        self.upstream_port = free_port()
        self.relay: Actor | None = None
        self.relay_port = free_port()
        self.quiet = ""  # how long it took
        # What explains failures.
        self.trouble: list[tuple[float, float]] = []  # times in which waiting takes long
        self.refused: list[tuple[float, float]] = []
        self.ends: dict[int, list[tuple[float, str]]] = {}  # by the client's port: when and by whom a connection was ended
        self.kills: list[float] = []  # of workers
        self.failures: list[dict[str, Any]] = []
        self.overs: list[dict[str, Any]] = []

    # Beginning.

    def start(self) -> None:
        set_child_subreaper()
        self.start_upstream()
        listener = socket.create_server(("127.0.0.1", self.relay_port), backlog=512)
        self.relay = self.fork("relay", lambda orders: relay.run(listener, orders, ("127.0.0.1", self.upstream_port), self.board, self.tell))
        listener.close()
        self.start_broker()
        self.actors[BYSTANDER] = self.fork("bystander", lambda orders: actors.bystander(self.setting(orders), BYSTANDER))

    def start_upstream(self) -> None:
        if not self.upstream:
            listener = socket.create_server(("127.0.0.1", self.upstream_port), backlog=512)
            self.upstream = self.fork("upstream", lambda _: upstream.run(listener, self.board, self.tell)).pid
            listener.close()

    def start_broker(self) -> None:
        if self.with_broker and self.broker is None:
            command = [sys.executable, "-m", "mppool", "broker", "--verbose", "--socket", self.path]
            with open(self.home / "broker.log", "ab") as log:
                self.broker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
            self.names[self.broker.pid] = "broker"
            self.report.note(f"start broker {self.broker.pid}")

    def start_worker(self, place: int) -> None:
        if place not in self.actors:
            self.born += 1
            who = f"w{self.born}"
            self.actors[place] = self.fork(who, lambda orders: actors.worker(self.setting(orders), who, place, MANY_THREADS[place % BASE]))

    def setting(self, orders: socket.socket) -> actors.Setting:
        target = ("127.0.0.1", self.relay_port)
        return actors.Setting(self.board, self.tell, orders, self.lifeline, target, self.path, self.cap, self.seed, self.log, self.with_broker)

    def fork(self, who: str, work: Callable[[socket.socket], None]) -> Actor:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                others = [*self.actors.values(), *([self.relay] if self.relay is not None else [])]
                become(ours, self.events, self.line_end, *(actor.orders for actor in others))
                work(theirs)
            finally:
                os._exit(4)
        theirs.close()
        self.names[pid] = who
        self.report.note(f"start {who} {pid}")
        return Actor(who, pid, ours)

    # A round.

    def run(self, one: Round) -> None:
        """Trouble, then quiet, then the reckoning."""
        self.board[HIGHEST_CAP] = self.board[CAP]
        self.board[UPSTREAM_PEAK] = self.board[UPSTREAM_LIVE]
        for place in range(BASE):
            self.start_worker(place)
        self.board[MOOD] = one.closes
        self.board[PACE] = FULL
        self.report.note(f"round {one.number}: {one.mood}")
        due = time.monotonic()
        for action in one.actions:
            due = max(due + action.wait, time.monotonic() - 0.2)  # a machine that is behind does not catch up at once
            self.live_until(due)
            self.do(action)
            if self.report.findings:
                break
        self.calm()
        self.reckon()
        self.report.figures["rounds"] += 1

    def live_until(self, moment: float) -> None:
        while True:
            now = time.monotonic()
            if self.later and self.later[0][0] <= now:
                heapq.heappop(self.later)[2]()
                continue
            self.reap()
            self.listen()
            left = min(moment, self.later[0][0] if self.later else moment) - now
            if moment <= now:
                return
            self.wait(min(left, 0.05))

    def wait(self, seconds: float) -> None:
        self.events.settimeout(max(seconds, 0.0005))
        try:
            self.take(self.events.recv(65536))
        except TimeoutError:
            pass

    def plan(self, seconds: float, action: Callable[[], None]) -> None:
        self.planned += 1
        heapq.heappush(self.later, (time.monotonic() + seconds, self.planned, action))

    # Actions.

    def do(self, action: Action) -> None:
        kind, seconds = action.kind, action.seconds
        self.report.note(f"{kind} place={action.place} seconds={seconds} number={action.number} share={action.share:.3f}")
        done = self.report.done
        actor = self.actors.get(action.place)
        now = time.monotonic()
        if kind == "kill worker":
            self.kill_worker(action.place)
            self.plan(seconds, lambda: self.start_worker(action.place))
        elif kind == "kill broker":
            self.kill_broker(seconds)
        elif kind == "kill keeper":
            self.kill_keeper(self.keeper())
        elif kind == "kill both":
            keeper = self.keeper()
            if action.share < 0.5:
                self.kill_broker(seconds)
                self.kill_keeper(keeper)
            else:
                self.kill_keeper(keeper)
                self.kill_broker(seconds)
        elif kind == "kill server":
            self.kill_upstream(seconds)
        elif kind.startswith("stop"):
            what = kind.partition(" ")[2]
            pids = {"broker": self.broker.pid if self.broker else 0, "server": self.upstream, "worker": actor.pid if actor else 0}
            pid = self.keeper() if what == "keeper" else pids[what]
            if pid:
                self.signal(pid, signal.SIGSTOP)
                self.plan(seconds, lambda: self.go_on(pid))
                done[f"stopped {what}s"] += 1
                self.trouble.append((now, now + seconds + (BACKOFF if what == "server" else 1.0)))
        elif kind in ("close", "reset"):
            done[f"{kind}s"] += self.tell_relay(kind, count=action.number, share=action.share)
        elif kind == "cut":
            self.tell_relay("cut", count=action.number)
        elif kind == "refuse":
            done["refusals"] += 1
            self.tell_relay("refuse")
            self.plan(seconds, lambda: self.order_relay("accept"))
            self.refused.append((now, now + seconds + 0.5))
            self.trouble.append((now, now + seconds + BACKOFF))
        elif kind == "delay":
            done["delays"] += 1
            self.tell_relay("delay", seconds=action.number * 0.005)
            self.plan(seconds, lambda: self.order_relay("delay", seconds=0.0))
        elif kind == "resize":
            self.actors[BYSTANDER].order("resize", to=action.number)
        elif kind == "fork" and actor is not None:
            actor.order("fork", use=action.share < 0.6, seconds=seconds, orderly=action.share < 0.3)
        elif kind == "reopen" and actor is not None:
            done["reopens"] += 1
            actor.order("reopen")
        elif kind == "burst":
            done["bursts"] += 1
            for place in range(BASE, BASE + action.number):
                self.start_worker(place)
                if action.share < 0.5:
                    self.plan(seconds, lambda place=place: self.kill_worker(place))  # type: ignore[misc]
                else:
                    self.plan(seconds, lambda place=place: self.end_worker(place))  # type: ignore[misc]

    def signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def go_on(self, pid: int) -> None:
        if pid in self.names or pid == self.keeper():
            self.signal(pid, signal.SIGCONT)

    def kill(self, pid: int) -> None:
        self.expected.add(pid)
        self.signal(pid, signal.SIGKILL)

    def kill_worker(self, place: int) -> None:
        actor = self.actors.pop(place, None)
        if actor is not None:
            self.report.done["killed workers"] += 1
            self.kills.append(time.monotonic())
            self.kill(actor.pid)
            os.waitid(os.P_PID, actor.pid, os.WEXITED | os.WNOWAIT)
            self.board.forget(place)
            actor.orders.close()

    def end_worker(self, place: int) -> None:
        actor = self.actors.get(place)
        if actor is not None:
            self.expected.add(actor.pid)
            actor.order("end")

    def kill_broker(self, seconds: float) -> None:
        if self.broker is not None:
            self.report.done["killed brokers"] += 1
            self.kill(self.broker.pid)
            self.broker.wait()
            self.names.pop(self.broker.pid)
            self.broker = None
            now = time.monotonic()
            self.trouble.append((now, now + seconds + 1.5))
            self.plan(seconds, self.start_broker)

    def kill_keeper(self, pid: int) -> None:
        if pid:
            self.report.done["killed keepers"] += 1
            self.kill(pid)

    def keeper(self) -> int:
        """The pid of this host's keeper, 0 if there is none."""
        wanted = f"{self.path}.keeper".encode()
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        return int(pid)
        return 0

    def kill_upstream(self, seconds: float) -> None:
        if self.upstream:
            self.report.done["killed servers"] += 1
            self.kill(self.upstream)
            os.waitid(os.P_PID, self.upstream, os.WEXITED | os.WNOWAIT)
            self.upstream = 0
            self.board[UPSTREAM_LIVE] = 0
            now = time.monotonic()
            self.trouble.append((now, now + seconds + BACKOFF))
            self.plan(seconds, self.start_upstream)

    def order_relay(self, do: str, **more: Any) -> None:
        self.tell_relay(do, **more)

    def tell_relay(self, do: str, **more: Any) -> int:
        assert self.relay is not None
        self.relay.order(do, **more)
        self.relay.orders.settimeout(10)
        answer: int = ast.literal_eval(self.relay.orders.recv(4096).decode())
        return answer

    # What is told.

    def listen(self) -> None:
        self.events.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.take(self.events.recv(65536))
        for place, actor in self.actors.items():
            if place == BYSTANDER:
                actor.orders.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    self.bystander_said(ast.literal_eval(actor.orders.recv(4096).decode() or "{}"))

    def bystander_said(self, answer: dict[str, Any]) -> None:
        self.report.note(f"bystander: {answer}")
        if "resized" in answer:
            self.report.done["resizes"] += 1

    def take(self, data: bytes) -> None:
        event = ast.literal_eval(data.decode())
        what, at = event["what"], event["at"]
        self.report.note(" ".join(f"{key}={value}" for key, value in event.items() if key != "at"), at)
        if what == "ended":
            self.ends.setdefault(event["port"], []).append((at, event["cause"]))
            self.report.done["cuts"] += event["cause"] == "cut"
        elif what == "failed":
            self.failures.append(event)
        elif what in ("over", "under"):
            self.overs.append(event)
        elif what == "forked":
            self.report.done["forks"] += 1
        elif what == "moody":
            self.report.done["server closes"] += 1
        elif what == "crossed":
            self.report.figures["crossed"] += 1
            self.report.find(f"a crossed reply: {event['who']}: {event['text']}")
        elif what == "finding":
            self.report.figures["two_holders"] += event["text"].startswith("two holders")
            self.report.find(f"{event['who']}: {event['text']}")

    def reap(self) -> None:
        """The ended: those of ours, and those that their dead parents left to us."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            if self.broker is not None and pid == self.broker.pid:
                self.broker.wait()
                self.broker = None
            else:
                os.waitpid(pid, 0)
            who = self.names.pop(pid, None)
            self.report.note(f"ended {who or 'orphan'} {pid} status {ended.si_status}")
            if who is not None and pid not in self.expected:
                self.report.find(f"{who} (pid {pid}) ended by itself, status {ended.si_status}")
            self.expected.discard(pid)
            for place, actor in list(self.actors.items()):
                if actor.pid == pid:
                    del self.actors[place]
                    self.board.forget(place)
                    actor.orders.close()

    # Quiet.

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> bool:
        """Live on until it is true; a finding if it is not within so long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.report.find(f"not within {seconds:g} s: {what}")
                return False
            self.live_until(time.monotonic() + 0.01)
        return True

    def calm(self) -> None:
        """Everything that is stopped, refused or down comes back; those who came for a while go."""
        for place in [place for place in self.actors if BASE <= place < BYSTANDER]:
            self.end_worker(place)
        while self.later:
            heapq.heappop(self.later)[2]()
        self.board[MOOD] = 0
        self.tell_relay("calm")
        for place in [place for place in self.actors if BASE <= place < BYSTANDER]:
            self.end_worker(place)
        for pid in list(self.names):
            self.signal(pid, signal.SIGCONT)
        self.board[PACE] = SLOW if self.with_broker else SILENT
        self.report.note("calm")

    def reckon(self) -> None:
        """All is quiet: what is lost, what was crossed, what failed without a reason?"""
        report, board = self.report, self.board
        began = time.monotonic()
        if self.with_broker:
            self.until(lambda: answers(self.path), COMING, "a broker that answers")
        else:
            self.until(lambda: not board.is_busy() and not self.strangers(), COMING, "no request and no fork child left")
            for place in [place for place in self.actors if place != BYSTANDER]:
                (self.kill_worker if place % 2 else self.end_worker)(place)
        self.until(lambda: not any(BASE <= place < BYSTANDER for place in self.actors), COMING, "those who came for a while are gone")
        self.until(lambda: self.with_broker or len(self.actors) == 1, COMING, "the workers have ended")
        there = time.monotonic() - began
        self.until(lambda: not self.strangers(), COMING, "no fork child left")
        self.lease_whole_cap()
        board[PACE] = SILENT
        if not self.until(lambda: not board.is_busy() and not self.strangers(), COMING, "no request and no fork child left"):
            for actor in self.actors.values():
                self.signal(actor.pid, signal.SIGUSR1)
        asked = time.monotonic() - began
        deadline = time.monotonic() + SETTLING
        while (wrong := self.what_is_wrong()) and time.monotonic() < deadline:
            self.live_until(time.monotonic() + 0.01)
        settled = time.monotonic() - began
        report.took("quiet_ms", settled)
        self.quiet = f"all there {there:.2f} s, no request {asked:.2f} s, all agree {settled:.2f} s after it"
        for text in wrong:
            report.find(f"when all was quiet: {text}")
        self.listen()
        self.judge()
        report.figures["requests"] = board[UPSTREAM_REQUESTS]
        report.figures["dials"] = board[RELAY_ACCEPTED]

    def lease_whole_cap(self) -> None:
        self.listen()
        one = self.actors.get(BYSTANDER)
        if one is None:
            return  # it ended by itself: found already
        one.order("whole")
        deadline = time.monotonic() + actors.WHOLE + actors.PATIENCE + 5
        answer: dict[str, Any] = {}
        while time.monotonic() < deadline and "leased" not in answer and BYSTANDER in self.actors:
            one.orders.settimeout(0.05)
            with contextlib.suppress(OSError):
                answer = ast.literal_eval(one.orders.recv(4096).decode() or "{}")
                self.bystander_said(answer)
            self.reap()
        missing = answer.get("cap", 1) - answer.get("leased", 0)
        if missing or answer.get("error"):
            self.report.figures["lost"] += max(0, missing)
            self.report.find(f"the whole cap could not be leased, exactly: {answer or 'no answer'}")
        else:
            self.report.took("whole_ms", answer["seconds"])

    def strangers(self) -> list[int]:
        """Living children of our actors, and orphans: fork children, but not the keeper."""
        found = []
        ours = {*self.names, os.getpid()}
        keeper = self.keeper()
        for pid in os.listdir("/proc"):
            if pid.isdigit() and int(pid) not in ours:
                with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
                    if int(parent) in ours and state != "Z" and int(pid) != keeper:
                        found.append(int(pid))
        return found

    def what_is_wrong(self) -> list[str]:
        """Compare the table with what the servers say, when nobody asks for anything."""
        board = self.board
        with inspected(self.path) as pool:
            if pool is None:
                return ["there is no pool"]
            table, now = pool.table, pool.snapshot()
            wrong = []
            if not now["size"] == board[RELAY_LIVE] == board[UPSTREAM_LIVE]:
                wrong.append(f"the table has {now['size']} sessions, the relay {board[RELAY_LIVE]}, the server {board[UPSTREAM_LIVE]}")
            wrong += [f"{now[state]} {state}" for state in ("in_use", "dialing", "closing", "waiting") if now[state]]
            if now["max_size"] != board[CAP]:
                wrong.append(f"max_size is {now['max_size']}, and should be {board[CAP]}")
            units = Permits(table, pool.lock).cap.value
            if units + now["size"] != now["max_size"]:
                wrong.append(f"permits do not add up: {units} units and {now['size']} held, max_size {now['max_size']}")
            tokens = [k for k in range(table.slots) if table.open_token(k).value != 1]
            if tokens:
                wrong.append(f"tokens of slots {tokens} are not there")
            named = {row: words for row in table.taken_rows() if (words := [word for word in table.lanes_of(row) if word])}
            if named:
                wrong.append(f"lanes of rows name slots: {named}")
            dead = [worker["pid"] for worker in now["workers"] if not worker["alive"]]
            if dead:
                wrong.append(f"rows of the dead are not free: pids {dead}")
            if self.with_broker:
                wrong += self.wrong_duplicates(now["size"])
            self.report.figures["repairs"] = now["repairs"]
            return wrong

    def wrong_duplicates(self, size: int) -> list[str]:
        wrong = []
        keeper = self.keeper()
        for name, pid in (("broker", self.broker.pid if self.broker else 0), ("keeper", keeper)):
            held = sockets(pid) if pid else []
            if len(held) != size or any("ESTABLISHED" not in one for one in held):
                wrong.append(f"the {name} ({pid}) has {len(held)} sockets for {size} sessions: {held}")
        for actor in self.actors.values():
            held = sockets(actor.pid)
            if len(held) > 4 * 16:
                wrong.append(f"{actor.who} has {len(held)} sockets for {size} sessions")
        return wrong

    # What is explained, and what is not.

    def judge(self) -> None:
        for failure in self.failures:
            if self.is_explained(failure):
                self.report.figures["explained"] += 1
            else:
                self.report.figures["unexplained"] += 1
                seconds = failure["at"] - failure["began"]
                ends = [(round(at - self.report.began, 4), cause) for at, cause in self.ends.get(failure["port"], [])]
                began = failure["began"] - self.report.began
                self.report.find(f"unexplained: {failure['who']} at {began:.4f} for {seconds:.4f} s: {failure['error']}: {failure['text']}; relay: {ends}")
        self.judge_peaks()
        board = self.board
        if board[UPSTREAM_PEAK] > board[HIGHEST_CAP] + bool(self.kills):
            self.report.find(f"the server had {board[UPSTREAM_PEAK]} connections, with a cap of at most {board[HIGHEST_CAP]}")
        self.failures.clear()
        self.ends.clear()
        self.kills.clear()
        self.refused.clear()
        self.trouble = [(begin, end) for begin, end in self.trouble if end > time.monotonic() - 2 * actors.PATIENCE]

    def is_explained(self, failure: dict[str, Any]) -> bool:
        began, at, error = failure["began"], failure["at"], failure["error"]
        if error in ("PoolTimeout", "TimeoutError"):
            return (not self.with_broker and error == "PoolTimeout") or uncovered(began, at, self.trouble) < UNEXPLAINED
        if error == "DialFailed":
            return any(begin < at and began < end for begin, end in self.trouble)
        if error in ("ConnectionError", "ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError"):
            ends = self.ends.get(failure["port"], [])
            if any(cause != "client" and began - TRAVEL <= end <= at + 0.5 for end, cause in ends):
                return True
            return not ends and any(begin - TRAVEL < at and began < end for begin, end in self.refused)
        return False

    def judge_peaks(self) -> None:
        """More at the relay than the cap: one, for the instant in which the end of a killed worker's connection travels."""
        report = self.report
        over: dict[str, Any] | None = None
        for event in [*self.overs, {"what": "under", "at": time.monotonic()}]:
            if event["what"] == "over":
                excess = event["live"] - event["cap"]
                killed = any(0 <= event["at"] - moment < TRAVEL for moment in self.kills)
                if excess > 1 or not killed:
                    report.figures["peak_over_cap"] = max(report.figures["peak_over_cap"], excess)
                    report.find(
                        f"at {event['at'] - report.began:.4f}: {event['live']} connections at the relay with a cap of {event['cap']} (port {event['port']})"
                    )
                over = over or event
            elif over is not None:
                report.figures["fin_travels"] += 1
                report.took("fin_ms", event["at"] - over["at"])
                if event["at"] - over["at"] > TRAVEL:
                    report.find(f"more connections than the cap for {event['at'] - over['at']:.3f} s, from {over['at'] - report.began:.4f}")
                over = None
        self.overs.clear()

    # The end.

    def end(self) -> None:
        """Everybody goes, half of them without a word; nothing may be left."""
        report = self.report
        for place in [place for place in self.actors if place != BYSTANDER]:
            (self.kill_worker if place % 2 else self.end_worker)(place)
        if self.until(lambda: not [place for place in self.actors if place != BYSTANDER], COMING, "the workers have ended"):
            self.end_worker(BYSTANDER)
            self.until(lambda: not self.actors, COMING, "the bystander has ended")
        if self.broker is not None:
            self.expected.add(self.broker.pid)
            self.broker.terminate()
            self.until(lambda: self.broker is None, COMING, "the broker has ended")
        prefix = f"mppool-{scope_of(self.path)}"

        def left() -> list[str]:
            keeper = [f"keeper {self.keeper()}"] if self.keeper() else []
            others = [f"process {pid}" for pid in self.strangers()]
            return keeper + others + memory.names(prefix) + memory.names(f"sem.{prefix}") + os.listdir(self.home / "run")

        if not self.until(lambda: not left(), COMING, "nothing is left"):
            report.figures["left_over"] += len(left())
            report.find(f"left over: {left()}")

    def explain(self) -> None:
        self.report.print_cause(self.path, self.home, {**self.names, self.keeper(): "keeper"})

    def destroy(self) -> None:
        """Whatever happened: no process, name or file of ours stays."""
        for pid in [*self.names, self.keeper(), *self.strangers()]:
            if pid:
                self.kill(pid)
        for pid in list(self.names):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.keeper() and not self.strangers(), 5)
        prefix = f"mppool-{scope_of(self.path)}"
        for name in memory.names(prefix) + memory.names(f"sem.{prefix}"):
            with contextlib.suppress(OSError):
                os.unlink(f"{memory.SHM}/{name}")
        shutil.rmtree(self.home, ignore_errors=True)


def uncovered(began: float, ended: float, windows: list[tuple[float, float]]) -> float:
    """Seconds of this time that are in none of the windows."""
    total, at = 0.0, began
    for begin, end in sorted(windows):
        if end > at:
            total += max(0.0, min(begin, ended) - at)
            at = max(at, end)
        if at >= ended:
            break
    return total + max(0.0, ended - at)


def free_port() -> int:
    """A port that nobody uses, and that no outgoing connection is given by the kernel."""
    for _ in range(1000):
        port = random.SystemRandom().randint(20000, 32000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port
    raise Error("no free port")


def set_child_subreaper() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become ours to reap
