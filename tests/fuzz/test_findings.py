"""What fuzzing found, each in the few steps that matter. Kept so that it does not come back."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

import mppool
from mppool import claims
from mppool.claims import HELD, Lane
from mppool.kernel import memory
from mppool.kernel.runtime import pool_id, scope_of
from mppool.states import State
from mppool.table import (
    R_CLAIMED,
    R_LANES,
    R_PID,
    W_CLOSE_TIMEOUT,
    W_INCARNATION,
    W_MAGIC,
    W_MAX_DIALING,
    W_MAX_LIFETIME,
    W_MAX_SIZE,
    W_MIN_SIZE,
    W_SLOTS,
)
from mppool.wire import GIVEN_UP, Kind, Message, encode
from tests.fuzz.frames import Frame
from tests.fuzz.links import RawLink
from tests.fuzz.rig import Ground, Seat
from tests.helpers.processes import BrokerProcess, Child, broker_process, eventually, fork
from tests.helpers.server import Judge, ask

ONES = (1 << 64) - 1


@pytest.fixture
def torn_path(socket_path: str) -> Iterator[str]:
    """Where a pool is damaged for good: what `mppool gc` would remove is removed."""
    yield socket_path
    prefix = f"mppool-{scope_of(socket_path)}-"
    for name in memory.names(prefix) + memory.names(f"sem.{prefix}"):
        os.unlink(f"{memory.SHM}/{name}")


def holder(pool: mppool.Pool, discard: bool = False) -> Callable[[Child], str]:
    """A child that lends a session, and gives it back when told; then, told again, it lends another."""

    def work(child: Child) -> str:
        sock = pool.getconn(timeout=5)
        ask(sock, "mine")
        child.tell("holds")
        child.hear()
        try:
            pool.putconn(sock, discard=discard)
            said = "fine"
        except mppool.Error as error:
            said = str(error)
        child.tell(said)
        child.hear()
        return said

    return work


def test_a_stranger_cannot_share_junk(server: Judge, socket_path: str) -> None:
    """Before a session's own process has shared it, another worker's SHARE for it, with any descriptor, is not believed."""
    pool = mppool.Pool(server.address, name="p", broker=socket_path)
    pool.putconn(pool.getconn())  # there is no broker yet: it is not shared
    with broker_process(socket_path):
        ground = Ground(socket_path, "p", server.port)
        eventually(lambda: ground.lock.is_held(2))
        seat, (one, other) = Seat(ground), socket.socketpair()
        generation = ground.generations()[0]
        raw = RawLink(socket_path, ground)
        raw.hello(seat)
        for sock in (one, socket.create_connection(server.address)):
            raw.ask(Kind.SHARE, Frame(encode(Message(Kind.SHARE, 0, generation), 1), (sock.fileno(),)))
            sock.close()
        time.sleep(0.05)  # the keeper's answer makes a session known to others
        raw.ask(Kind.FETCH, Frame(encode(Message(Kind.FETCH, 0, generation))))
        answer = raw.await_answer(Kind.SESSION, Kind.GONE)
        assert answer is not None
        assert answer[0].kind is Kind.GONE
        assert ground.table.words[ground.table.shared_flag] == 0
        raw.close()
        seat.die()
        other.close()
        ground.close()
        pool.close()


def test_two_waits_with_one_lane_lose_no_session(server: Judge, broker: BrokerProcess) -> None:
    """A worker that waits twice with the same lane gets one session at most; the other stays free for others."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    sessions = [pool.getconn(), pool.getconn()]
    for session in sessions:
        pool.putconn(session)
    ground = Ground(broker.path, "p", server.port)
    eventually(lambda: ground.table.array(ground.table.shared_flag)[:2] == [1, 1])
    seat = Seat(ground)
    links = [RawLink(broker.path, ground) for _ in range(2)]
    for raw in links:
        raw.hello(seat)
        assert raw.await_answer(Kind.WELCOME)
        raw.ask(Kind.WAIT, Frame(encode(Message(Kind.WAIT, 0, seat.row.incarnation))))
    assert links[0].await_answer(Kind.GRANT)
    links[1].ask(Kind.CANCEL, Frame(encode(Message(Kind.CANCEL))))
    links[1].await_answer(Kind.STRUCK)
    assert ground.lost() == []
    seat.sweep()
    again = [pool.getconn(timeout=5) for _ in range(2)]
    for session in again:
        pool.putconn(session)
    for raw in links:
        raw.close()
    seat.die()
    ground.close()
    pool.close()


def test_giving_up_an_earlier_wait_takes_nothing_from_a_later_one(server: Judge, broker: BrokerProcess) -> None:
    """A line whose wait was over long ago gives up: what its lane was granted since, to a wait on another line, stays granted."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=broker.path)
    pool.putconn(pool.getconn())
    ground = Ground(broker.path, "p", server.port)
    eventually(lambda: ground.table.array(ground.table.shared_flag)[:1] == [1])
    seat = Seat(ground)
    earlier, later = (RawLink(broker.path, ground) for _ in range(2))
    for raw in (earlier, later):
        raw.hello(seat)
        assert raw.await_answer(Kind.WELCOME)
        raw.ask(Kind.WAIT, Frame(encode(Message(Kind.WAIT, 0, seat.row.incarnation))))
        assert raw.await_answer(Kind.GRANT)
        if raw is earlier:
            seat.sweep()
    earlier.ask(Kind.CANCEL, Frame(encode(Message(Kind.CANCEL, flags=GIVEN_UP))))
    assert earlier.await_answer(Kind.STRUCK)
    assert seat.accept(0) == 0
    seat.release(0)
    for raw in (earlier, later):
        raw.close()
    seat.die()
    ground.close()
    pool.close()


def test_who_lost_the_proof_of_holding_gives_no_token(server: Judge, broker: BrokerProcess) -> None:
    """A lane is overwritten and a dead row says that it held the session: it is closed, and its late holder gives no second token."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    with fork(holder(pool)) as (child,):
        child.hear()
        ground = Ground(broker.path, "p", server.port)
        table, words = ground.table, ground.table.words
        row = next(row for row in table.taken_rows() if any(table.lanes_of(row)))
        generation, lie = words[table.generation], table.row_at(300)
        words[table.lanes_at(row) + [bool(word) for word in table.lanes_of(row)].index(True)] = 0
        words[lie + R_LANES] = HELD
        words[lie + R_PID] = 4_000_000
        eventually(lambda: words[table.generation] != generation and ground.slot(0).token.value, what="the broker closes it")
        child.tell()
        child.hear()
        assert ground.slot(0).token.value == 1
        seats = [Seat(ground), Seat(ground)]
        held = [seat for seat in seats if claims.claim(words, Lane(seat.row, 0), ground.slot(0))]
        assert len(held) == 1
        claims.release(words, Lane(held[0].row, 0), ground.slot(0))
        for seat in seats:
            seat.die()
        ground.close()
        child.tell()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (W_MAGIC, 0),
        (W_MAGIC, ONES),
        (W_SLOTS, 0),
        (W_SLOTS, ONES),
        (W_MAX_SIZE, 0),
        (W_MAX_SIZE, 1 << 40),
        (W_MIN_SIZE, 1 << 40),
        (W_MAX_DIALING, 0),
        (W_MAX_DIALING, ONES),
        (W_CLOSE_TIMEOUT, ONES),
        (W_MAX_LIFETIME, ONES),
        (W_INCARNATION, ONES),
    ],
    ids=hex,
)
def test_a_damaged_header_is_refused(server: Judge, torn_path: str, at: int, value: int) -> None:
    """Whoever attaches says that the table is damaged and what to do; it never makes a second one, and who is attached already goes on or refuses."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=torn_path)
    with fork(holder(pool)) as (child,):
        child.hear()
        ground = Ground(torn_path, "p", server.port)
        ground.table.words[at] = value
        with pytest.raises(mppool.Error, match="mppool gc"):
            pool.getconn(timeout=1)
        assert server.counts()["peak"] == 1
        child.tell()
        child.hear(15)
        child.tell()
        child.result(15)
        ground.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 12345])
def test_a_shrunk_file_is_refused(server: Judge, torn_path: str, size: int) -> None:
    """Of any size, also one that is no multiple of a word, while somebody is attached: an error that says what to do, no second table."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=torn_path)
    with fork(holder(pool)) as (child,):
        child.hear()
        child.kill(19)  # SIGSTOP: it must not touch what is gone
        with open(f"{memory.SHM}/{pool_id(torn_path, 'p')}.table", "r+b") as file:
            file.truncate(size)
        with pytest.raises(mppool.Error, match="mppool gc"):
            pool.getconn(timeout=1)


@pytest.mark.parametrize("with_broker", [True, False])
def test_an_absurd_cap_is_no_endless_loop(server: Judge, torn_path: str, with_broker: bool) -> None:
    """With a max_size of 2**40 written over the real one, giving a session back returns, and the broker obeys SIGTERM."""
    broker = BrokerProcess(torn_path) if with_broker else None
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=torn_path)
    try:
        with fork(holder(pool, discard=True)) as (child,):
            child.hear()
            ground = Ground(torn_path, "p", server.port)
            ground.table.words[W_MAX_SIZE] = 1 << 40
            child.tell()
            child.hear(15)
            child.tell()
            child.result(15)
            ground.close()
    finally:
        if broker is not None:
            broker.stop()


@pytest.mark.parametrize("field", ["generation", "uses", "counter"])
def test_a_full_counter_is_an_error_of_ours(server: Judge, torn_path: str, field: str) -> None:
    """A word of ones where something is to be counted: calls raise mppool's own errors, the broker lives, its other pools go on."""
    pool, other = (mppool.Pool(server.address, max_size=2, name=name, broker=torn_path) for name in ("p", "other"))
    with broker_process(torn_path) as broker:
        with fork(holder(pool, discard=True)) as (child,):
            child.hear()
            ground = Ground(torn_path, "p", server.port)
            table = ground.table
            rows = [table.row_at(row) + R_CLAIMED for row in table.taken_rows()]
            for at in {"generation": [table.generation], "uses": [table.uses], "counter": rows}[field]:
                table.words[at] = ONES
            child.tell()
            child.hear(15)
            child.tell()
            child.result(15)
            ground.close()
        time.sleep(0.3)  # some ticks of the broker
        with other.connection(timeout=5) as sock:
            ask(sock, "x")
        assert broker.process.poll() is None
        other.close()


def test_a_full_counter_at_a_checkout_is_an_error_of_ours(server: Judge, torn_path: str) -> None:
    """A checkout that finds a counter full, or a return after which one is, raises nothing but mppool's own errors."""
    pool = mppool.Pool(server.address, max_size=1, name="p", broker=torn_path)

    def work(child: Child) -> None:
        table = Ground(torn_path, "p", server.port).table
        for at, old in ((table.uses, 5), (table.generation, 0)):
            pool.putconn(pool.getconn())
            table.words[at] = ONES
            with pytest.raises(mppool.Error):
                pool.putconn(pool.getconn(timeout=0.1), discard=True)
            table.words[at] = old

    pool.open()
    with fork(work) as (child,):
        child.result()
    pool.close()


def test_a_damaged_pool_can_be_closed(server: Judge, torn_path: str) -> None:
    """After a return that found a counter full, close raises nothing but mppool's own errors, and the row is free."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=torn_path)

    def work(child: Child) -> bool:
        sock = pool.getconn()
        ground = Ground(torn_path, "p", server.port)
        ground.table.words[ground.table.generation] = ONES
        with contextlib.suppress(mppool.Error):
            pool.putconn(sock, discard=True)
        with contextlib.suppress(mppool.Error):
            pool.close()
        return any(ground.lock.is_held(16 + row) for row in range(ground.table.rows))

    with fork(work) as (child,):
        assert child.result() is False


def test_a_state_that_lies_does_not_make_room(server: Judge, broker: BrokerProcess) -> None:
    """A slot that says FREE while its permit is taken is not dialed into: the server sees no more connections than the cap."""
    pool = mppool.Pool(server.address, max_size=2, name="p", broker=broker.path)
    for session in [pool.getconn(), pool.getconn()]:
        pool.putconn(session)
    ground = Ground(broker.path, "p", server.port)
    ground.table.mem[ground.table.states_byte] = State.FREE
    for n in range(6):
        try:
            sessions = [pool.getconn(timeout=1), pool.getconn(timeout=1)]
        except mppool.Error:
            break
        for session in sessions:
            ask(session, f"n{n}")
            pool.putconn(session, discard=n % 2 == 0)
    assert server.counts()["peak"] <= 2
    ground.close()
    pool.close()
