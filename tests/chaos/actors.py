"""The processes of a chaotic host that use the pool: workers, which thread and fork, and a bystander that takes no harm.

Each takes orders from the host as Python literals on a SEQPACKET socket, and tells on a datagram socket what failed.
None outlives the host: they have its death as a signal, their fork children an alarm and a pipe that ends.
"""

from __future__ import annotations

import ast
import faulthandler
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import mppool
from mppool.drivers.dialer import FOREVER
from mppool.drivers.raw import RawDriver
from mppool.options import parse_target
from tests.chaos.board import CAP, FULL, HIGHEST_CAP, OLDER_CAP, PACE, SHRUNK_AT, SILENT, SLOW, Board, Teller
from tests.chaos.relay import SHRINKS

__all__ = ["Setting", "bystander", "worker"]

PATIENCE = 30.0  # seconds for a reply, and for a session where there is a broker; without one nobody has a right to any
CHILD_PATIENCE = 2.0  # a fork child may itself keep what its dead parent held: the row lives as long as it has a connection that was being dialed
DISCARDS, DISCARDS_ALONE = 0.02, 0.25  # of all leases; without a broker a session would stay with its dialer otherwise, and the others starve
WHOLE = 20.0  # seconds within which the whole cap can be had, once all is quiet


@dataclass
class Setting:
    """What an actor has of the host."""

    board: Board
    tell: Teller
    orders: socket.socket
    lifeline: int  # readable when the host is gone
    target: tuple[str, int]
    broker: str
    cap: int
    seed: str
    log: int  # descriptor for what is printed
    with_broker: bool

    def pool(self) -> mppool.Pool:
        timeout = PATIENCE if self.with_broker else 1.0
        return mppool.Pool(driver=Login(self.target), name="chaos", max_size=self.cap, broker=self.broker, timeout=timeout)


class Login(RawDriver):
    """A dial that takes some milliseconds, as a login does: time for deaths, forks and trouble in the middle of it."""

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(parse_target(target))

    def dial(self) -> socket.socket:
        sock = super().dial()
        try:
            sock.settimeout(PATIENCE / 2)
            sock.sendall(b"login\n")
            welcome = b""
            while not welcome.endswith(b"\n"):
                data = sock.recv(100)
                if not data:
                    raise ConnectionError("the connection has ended before the login")
                welcome += data
            sock.settimeout(FOREVER)
        except OSError as error:
            sock.close()
            raise mppool.DialFailed(f"{self.dialer.target}: {error}") from error
        except BaseException:
            sock.close()
            raise
        return sock


class Telling(logging.Handler):
    """An error that the pool logs is told: it would be a bug report."""

    def __init__(self, tell: Teller, who: str) -> None:
        super().__init__(logging.ERROR)
        self.told, self.name_of_process = tell, who

    def emit(self, record: logging.LogRecord) -> None:
        self.told(self.name_of_process, "finding", text=f"logged {record.levelname}: {record.getMessage()}")


def prepare(setting: Setting, who: str) -> None:
    os.dup2(setting.log, 1)
    os.dup2(setting.log, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.getLogger("mppool").addHandler(Telling(setting.tell, who))


class Worker:
    """One place's process. The first thread takes orders between its requests, the others only ask."""

    def __init__(self, setting: Setting, who: str, place: int, threads: int) -> None:
        self.setting = setting
        self.who = who
        self.place = place
        self.threads = threads
        self.pool = setting.pool()
        self.ending = False

    def run(self) -> None:
        others = [threading.Thread(target=self.ask_on, args=(n,), daemon=True) for n in range(1, self.threads)]
        for thread in others:
            thread.start()
        self.ask_on(0)
        for thread in others:
            thread.join()
        self.pool.close()

    def ask_on(self, thread: int) -> None:
        who = f"{self.who}.{thread}"
        dice = random.Random(f"{self.setting.seed} {who}")
        board, busy = self.setting.board, self.setting.board.busy(self.place, thread)
        n = 0
        while not self.ending:
            if thread == 0:
                self.obey()
            pace = board[PACE]
            if pace == SILENT:
                time.sleep(0.004)
                continue
            n += 1
            board[busy] = 1
            if board[PACE] != SILENT:  # said before asked: whoever sees no thread busy can rely on it
                self.ask(f"{who}.{n}", dice)
            board[busy] = 0
            time.sleep(0.02 if pace == SLOW else dice.choice((0.0, 0.0005, 0.003)))

    def ask(self, lease: str, dice: random.Random, timeout: float | None = None) -> None:
        """One lease of some turns. Tells if it failed, or got what was not its own. Who gives a ``timeout`` has no right to any."""
        began = time.monotonic()
        port = 0
        pool = self.pool
        try:
            with pool.connection(timeout) as sock:
                port = sock.getsockname()[1]
                sock.settimeout(PATIENCE)
                converse(sock, lease, dice.choice((1, 1, 1, 2, 3)), dice.choice((0, 0, 1, 3)))
                if dice.random() < (DISCARDS if self.setting.with_broker else DISCARDS_ALONE):
                    raise Unwanted
        except Unwanted:
            pass
        except mppool.PoolClosed:
            if pool is self.pool and not self.ending:
                raise
        except (mppool.Error, OSError) as error:
            if timeout is not None and isinstance(error, mppool.PoolTimeout):
                return
            cause = f" <- {error.__cause__}" if error.__cause__ else ""
            self.setting.tell(self.who, "failed", error=type(error).__name__, text=f"{error}{cause}", began=began, port=port, lease=lease)
        except Crossed as crossed:
            self.setting.tell(self.who, "crossed", text=str(crossed))

    # Orders.

    def obey(self) -> None:
        while select.select([self.setting.orders], [], [], 0)[0]:
            data = self.setting.orders.recv(4096)
            if not data:
                os._exit(0)
            order = ast.literal_eval(data.decode())
            if order["do"] == "end":
                self.ending = True
            elif order["do"] == "reopen":
                older, self.pool = self.pool, self.setting.pool()
                older.close()
            elif order["do"] == "fork":
                self.fork(order["use"], order["seconds"], order["orderly"])

    def fork(self, use: bool, seconds: float, orderly: bool) -> None:
        """A child that uses the pool, or ignores it, for so long; then ends, with or without a word. Other threads may be anywhere."""
        pid = os.fork()
        if pid:
            self.setting.tell(self.who, "forked", pid=pid)
            return
        code = 1
        try:
            signal.alarm(60)
            self.setting.orders.close()
            who = f"{self.who}f{os.getpid()}"
            dice = random.Random(f"{self.setting.seed} {who}")
            until = time.monotonic() + seconds
            n = 0
            while time.monotonic() < until and self.setting.board[PACE] == FULL:
                n += 1
                if use:
                    self.ask(f"{who}.{n}", dice, CHILD_PATIENCE)
                if select.select([self.setting.lifeline], [], [], 0.0 if use else 0.01)[0]:
                    os._exit(0)
            if orderly:
                self.pool.close()
            code = 0
        except BaseException as error:
            self.setting.tell(self.who, "finding", text=f"a fork child failed: {type(error).__name__}: {error}")
        finally:
            os._exit(code)


class Crossed(Exception):
    pass


class Unwanted(Exception):
    """Ends a lease so that its session is discarded."""


def converse(sock: socket.socket, lease: str, turns: int, milliseconds: int) -> None:
    """Some turns of request and reply. Raises Crossed if a reply is not ours, ConnectionError if the connection ends."""
    numbers = set()
    for turn in range(1, turns + 1):
        sock.sendall(f"{lease} {turn} {turns} {milliseconds}\n".encode())
        reply = b""
        while not reply.endswith(b"\n"):
            data = sock.recv(4096)
            if not data:
                raise ConnectionError("the connection has ended")
            reply += data
        number, _, echoed = reply.decode().strip().partition(" ")
        numbers.add(number)
        if echoed != f"{lease} {turn}" or len(numbers) > 1:
            raise Crossed(f"asked {lease} {turn}, got {reply!r}, connections {sorted(numbers)}")


def worker(setting: Setting, who: str, place: int, threads: int) -> None:
    """Ask until told to end, then leave orderly. Never returns."""
    code = 1
    try:
        prepare(setting, who)
        Worker(setting, who, place, threads).run()
        code = 0
    except BaseException as error:
        setting.tell(who, "finding", text=f"a worker failed: {type(error).__name__}: {error}")
        logging.getLogger().exception("a worker failed")
    finally:
        os._exit(code)


def bystander(setting: Setting, place: int) -> None:
    """A process that nobody harms: asks now and then, resizes, and leases the whole cap when told to. Never returns."""
    code = 1
    try:
        prepare(setting, "bystander")
        one = Worker(setting, "bystander", place, 1)
        one.pool.open()
        asking = threading.Thread(target=ask_now_and_then, args=(one,), daemon=True)
        asking.start()
        while True:
            data = setting.orders.recv(4096)
            order: dict[str, Any] = ast.literal_eval(data.decode()) if data else {"do": "end"}
            if order["do"] == "end":
                break
            answer = resize(setting, one.pool, order["to"]) if order["do"] == "resize" else whole(setting, one.pool)
            setting.orders.send(repr(answer).encode())
        one.ending = True
        asking.join()
        one.pool.close()
        code = 0
    except BaseException as error:
        setting.tell("bystander", "finding", text=f"the bystander failed: {type(error).__name__}: {error}")
        logging.getLogger().exception("the bystander failed")
    finally:
        os._exit(code)


def ask_now_and_then(one: Worker) -> None:
    """Without a broker it would wait most of the time, so it does not ask at all."""
    board, busy = one.setting.board, one.setting.board.busy(one.place, 0)
    dice = random.Random(one.setting.seed)
    n = 0
    while not one.ending:
        n += 1
        board[busy] = 1
        if board[PACE] != SILENT and one.setting.with_broker:
            one.ask(f"bystander.{n}", dice)
        board[busy] = 0
        time.sleep(0.03)


def resize(setting: Setting, pool: mppool.Pool, to: int) -> dict[str, Any]:
    """The board has the larger cap before it is in force, and the smaller one after: the relay is never stricter than the pool was told."""
    board = setting.board
    before = board[CAP]
    board[CAP] = max(before, to)
    board[HIGHEST_CAP] = max(board[HIGHEST_CAP], to)
    try:
        pool.resize(to)
    except mppool.Error as error:
        board[CAP] = before
        return {"error": str(error)}
    if to < before:
        recent = time.monotonic() - board[SHRUNK_AT] / 1e9 < SHRINKS
        board[OLDER_CAP] = max(before, board[OLDER_CAP] if recent else 0)
        board[SHRUNK_AT] = time.monotonic_ns()
    board[CAP] = to
    return {"resized": to}


def whole(setting: Setting, pool: mppool.Pool) -> dict[str, Any]:
    """Lease the whole cap at once: how many could be had, and how long it took.

    The first try may find sessions above a cap that was made smaller while they were idle; giving them back ends them.
    """
    answer = lease_all(setting, pool)
    return lease_all(setting, pool) if answer["leased"] > answer["cap"] else answer


def lease_all(setting: Setting, pool: mppool.Pool) -> dict[str, Any]:
    cap = setting.board[CAP]
    began = time.monotonic()
    sessions: list[socket.socket] = []
    error = ""
    try:
        while len(sessions) < cap:
            sessions.append(pool.getconn(timeout=max(0.1, began + WHOLE - time.monotonic())))
            converse(sessions[-1], f"whole-{len(sessions)}-{began}", 1, 0)
    except (mppool.Error, OSError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    except Crossed as crossed:
        error = f"Crossed: {crossed}"
        setting.tell("bystander", "crossed", text=str(crossed))
    seconds = time.monotonic() - began
    if not error:
        try:
            sessions.append(pool.getconn(timeout=0.2))  # in need, it looks for what the dead still hold
            error = "one more than the whole cap was lent"
        except mppool.PoolTimeout:
            pass
    leased = len(sessions)
    for session in sessions:
        pool.putconn(session)
    return {"leased": leased, "cap": cap, "seconds": seconds, "error": error}
