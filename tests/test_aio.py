"""AsyncPool: the same pool, in event loops, in real processes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

import mppool
from mppool import claims
from mppool.aio import perform, wake
from mppool.conversation import connect, settle_abandoned
from mppool.table import H_WAITERS
from mppool.worker import Hands
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.server import Judge
from tests.helpers.storm import Ask, Storm


def on_asyncio(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main)


def on_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


@pytest.fixture(params=[on_asyncio, on_uvloop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return request.param  # type: ignore[no-any-return]


async def ask(sock: socket.socket, nonce: str, milliseconds: float = 0) -> int:
    """One request on a raw session; the number of the connection."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, f"{nonce} {milliseconds}\n".encode())
    reply = b""
    while not reply.endswith(b"\n"):
        data = await loop.sock_recv(sock, 4096)
        assert data, "the server has ended the connection"
        reply += data
    return understood(reply, nonce)


async def ask_streams(streams: Any, nonce: str, milliseconds: float = 0) -> int:
    reader, writer = streams
    writer.write(f"{nonce} {milliseconds}\n".encode())
    return understood(await reader.readline(), nonce)


def understood(reply: bytes, nonce: str) -> int:
    number, _, echoed = reply.decode().strip().partition(" ")
    assert echoed == nonce, f"a crossed reply: asked {nonce!r}, got {reply!r}"
    return int(number)


@pytest.mark.parametrize("streams", [False, True], ids=["sockets", "streams"])
@pytest.mark.parametrize("with_broker", [True, False], ids=["broker", "no-broker"])
def test_many_tasks_share_the_cap(run: Any, server: Judge, socket_path: str, streams: bool, with_broker: bool) -> None:
    """Three hundred tasks on a cap of 3, more than a process has lanes for: all are served, no reply crosses, three connections are dialed."""
    asks: Callable[..., Awaitable[int]] = ask_streams if streams else ask

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=3, broker=socket_path, streams=streams) as pool:

            async def one(n: int) -> None:
                async with pool.connection(timeout=60) as conn:
                    await asks(conn, f"n{n}", random.choice((0, 1)))

            await asyncio.gather(*map(one, range(300)))

    broker = BrokerProcess(socket_path) if with_broker else None
    try:
        run(main())
    finally:
        if broker is not None:
            broker.stop()
    assert server.counts()["requests"] == 300
    assert server.counts()["peak"] == server.counts()["dials"] == 3


def test_a_session_moves_between_sync_and_async_processes(run: Any, server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """What an AsyncPool dialed a Pool of another process uses, and the other way round: one connection for all, in one process, too."""

    async def first() -> int:
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path) as pool, pool.connection() as sock:
            return await ask(sock, "a")

    def other(child: Child) -> int:
        with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool, pool.connection() as sock:
            sock.sendall(b"b\n")
            return understood(sock.recv(100), "b")

    with mppool.Pool(server.address, max_size=1, broker=socket_path) as mine:
        numbers = [run(first())]
        with fork(other) as (child,):
            numbers.append(child.result())
        with mine.connection() as sock:
            sock.sendall(b"c\n")
            numbers.append(understood(sock.recv(100), "c"))
    assert numbers == [1, 1, 1]


@pytest.mark.parametrize("streams", [False, True], ids=["sockets", "streams"])
def test_cancelled_tasks_poison_and_leak_nothing(run: Any, server: Judge, socket_path: str, broker: BrokerProcess, streams: bool) -> None:
    """Tasks cancelled at whatever await, most of them with a request under way: no later reply is theirs, and the whole cap is there at the end."""
    asks: Callable[..., Awaitable[int]] = ask_streams if streams else ask
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def main() -> int:
        async with mppool.AsyncPool(server.address, max_size=3, broker=socket_path, streams=streams, close_timeout=0.2) as pool:
            cancelled = 0

            async def one(n: int) -> None:
                async with pool.connection(timeout=30) as conn:
                    await asks(conn, f"n{n}", chance.choice((0, 0, 1, 2)))

            async def struck(n: int) -> None:
                nonlocal cancelled
                task = asyncio.ensure_future(one(n))
                for _ in range(chance.choice((0, 1, 2, 3, 4, 6, 10, 30))):
                    await asyncio.sleep(0)
                if chance.random() < 0.5:
                    await asyncio.sleep(chance.uniform(0, 0.004))
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    cancelled += 1

            async def chain(first: int) -> None:
                for n in range(first, first + 60):
                    await (struck if n % 3 else one)(n)

            await asyncio.gather(*(chain(1000 * number) for number in range(12)))
            leases = [await pool.getconn(timeout=10) for _ in range(3)]
            assert len({await asks(conn, f"whole{n}") for n, conn in enumerate(leases)}) == 3
            for conn in leases:
                await pool.putconn(conn)
            stats = pool.get_stats()
            assert (stats["in_use"], stats["waiting"], stats["size"]) == (0, 0, 3)
            return cancelled

    assert run(main()) > 100
    assert server.counts()["peak"] <= 3


def test_workers_of_both_kinds_survive_a_storm(server: Judge, socket_path: str, broker: BrokerProcess, request: pytest.FixtureRequest) -> None:
    """Asynchronous workers SIGKILLed all the time: at most one connection over the cap, while a FIN travels; no crossed reply; the cap whole after."""

    def begin() -> Ask:
        pool = mppool.AsyncPool(server.address, max_size=4, broker=socket_path)
        loop = asyncio.new_event_loop()

        async def three(nonce: str) -> None:
            async def one(n: int) -> None:
                async with pool.connection(timeout=20) as sock:
                    await ask(sock, f"{nonce}-{n}", random.choice((0, 0, 1)))

            await asyncio.gather(*map(one, range(3)))

        return lambda nonce: loop.run_until_complete(three(nonce))

    with Storm(begin, workers=6) as storm:
        storm.run(float(request.config.getoption("--storm-seconds")) / 2, kill_every=0.05)
    assert storm.failures == []
    with mppool.Pool(server.address, max_size=4, broker=socket_path) as pool:
        sessions = [pool.getconn(timeout=10) for _ in range(4)]
        for session in sessions:
            pool.putconn(session)
    counts = server.counts()
    print(f"kills {storm.kills}, peak {counts['peak']}, dials {counts['dials']}, requests {counts['requests']}")
    assert counts["peak"] <= 5
    assert storm.requests > 50


def test_bytes_that_come_late_stay_in_the_kernel(run: Any, server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """A stream given back stops reading: what arrives then is found at the next checkout, and the session is closed, not lent."""

    async def main() -> dict[str, int]:
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path, streams=True) as pool:
            async with pool.connection() as (reader, writer):
                await ask_streams((reader, writer), "first")
                writer.write(b"late 30\n")  # whose reply nobody waits for
            await asyncio.sleep(0.1)
            assert not reader._buffer
            async with pool.connection() as streams:
                assert await ask_streams(streams, "second") == 2
            closed: dict[str, int] = pool.get_stats()["closed"]
            return closed

    assert run(main()) == {"unread_data": 1}


def test_replies_to_others_are_not_read_by_a_loop_that_watches_on(run: Any, server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """A session that this process's loop has had, and may still watch, belongs to whoever has it now: each reply reaches who asked."""
    rounds = 30

    def other(child: Child) -> None:
        with mppool.Pool(server.address, max_size=1, broker=socket_path) as pool:
            for n in range(rounds):
                child.hear()
                with pool.connection() as sock:
                    sock.settimeout(10)
                    sock.sendall(f"child{n} 2\n".encode())
                    assert understood(sock.recv(100), f"child{n}") == 1
                child.tell(n)

    async def main(child: Child) -> None:
        loop = asyncio.get_running_loop()
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path, streams=True) as pool:
            for n in range(rounds):
                for _ in range(1 + n % 3):
                    async with pool.connection() as streams:
                        assert await ask_streams(streams, f"parent{n}") == 1
                heard = loop.create_future()
                loop.add_reader(child._in, wake, heard, True)
                child.tell()
                await heard  # the loop runs while the child asks
                loop.remove_reader(child._in)
                assert child.hear() == n
            assert pool.get_stats()["dials"] == 1

    with fork(other) as (child,):
        run(main(child))
        child.result()


@pytest.mark.parametrize("left", ["reader", "writer", "both"])
def test_a_socket_that_a_loop_still_watches_is_not_lent_on(run: Any, server: Judge, socket_path: str, left: str) -> None:
    """Its session is closed: a call of it may have been given up half-way, whose reply is still to come."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path) as pool:
            for n in (1, 2):
                sock = await pool.getconn()
                assert await ask(sock, "first") == n
                if left in ("reader", "both"):
                    loop.add_reader(sock, str)
                if left in ("writer", "both"):
                    loop.add_writer(sock, str)
                await pool.putconn(sock)
            async with pool.connection() as sock:
                assert await ask(sock, "next") == 3

    run(main())


def test_a_socket_that_a_transport_has_is_not_lent_on(server: Judge, socket_path: str) -> None:
    """Nor if that does not read just now: it may have read ahead."""

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path) as pool:
            sock = await pool.getconn()
            assert await ask(sock, "first") == 1
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=sock)
            transport.pause_reading()
            with pytest.raises(RuntimeError):
                await pool.putconn(sock)
            transport.abort()
            async with pool.connection() as sock:
                assert await ask(sock, "next") == 2

    asyncio.run(main())


def test_what_a_reader_has_read_ahead_is_not_lent_on(run: Any, server: Judge, socket_path: str) -> None:
    """A reply that was read into the stream's buffer, and by nobody, ends the session at its return."""

    async def main() -> int:
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path, streams=True) as pool:
            async with pool.connection() as (reader, writer):
                writer.write(b"unread\n")
                while not reader._buffer:
                    await asyncio.sleep(0.001)
            async with pool.connection() as streams:
                return await ask_streams(streams, "next")

    assert run(main()) == 2


def test_a_wait_in_vain_says_the_numbers(run: Any, server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """PoolTimeout with an operator's numbers, at the broker and in the process's own queue; TooManyWaiting beyond max_waiting."""

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=1, max_waiting=3, broker=socket_path) as pool, pool.connection():
            with pytest.raises(mppool.PoolTimeout, match="max_size=1, in_use=1"):
                await pool.getconn(timeout=0.05)
            pool._gate.room = 1
            waits = [asyncio.ensure_future(pool.getconn(timeout=0.4)) for _ in range(3)]
            while pool.get_stats()["waiting"] < 3:
                await asyncio.sleep(0.005)
            with pytest.raises(mppool.TooManyWaiting):
                await pool.getconn(timeout=1)
            found = await asyncio.gather(*waits, return_exceptions=True)
            assert [type(error) for error in found] == [mppool.PoolTimeout] * 3
            assert pool.get_stats()["waiting"] == 0
            assert pool.get_stats()["timeouts"] == 4

    run(main())


def test_one_loop_after_the_other(server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """A pool goes on in a new loop once the old one is closed, with the same connection; what was lent there is closed; two at once are refused."""
    pool = mppool.AsyncPool(server.address, max_size=1, broker=socket_path, streams=True)

    async def use() -> int:
        async with pool.connection() as streams:
            return await ask_streams(streams, "x")

    async def forget() -> None:
        await pool.getconn()

    assert [asyncio.run(use()) for _ in range(3)] == [1, 1, 1]
    asyncio.run(forget())
    assert asyncio.run(use()) == 2
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    with pytest.raises(mppool.Error, match="another event loop"):
        asyncio.run(use())
    loop.run_until_complete(pool.close())
    loop.close()
    assert server.counts()["peak"] == 1


def test_a_fork_inside_a_loop_disturbs_nobody(run: Any, server: Judge, socket_path: str, broker: BrokerProcess) -> None:
    """A child forked by a task uses the pool in a loop of its own; the parent's lease, transports and epoll go on."""
    pool = mppool.AsyncPool(server.address, max_size=2, broker=socket_path, streams=True)

    async def use() -> int:
        async with pool.connection() as streams:
            return await ask_streams(streams, "child")

    def in_child(child: Child) -> int:
        number: int = asyncio.new_event_loop().run_until_complete(use())
        return number

    async def main() -> None:
        async with pool.connection() as streams:
            assert await ask_streams(streams, "before") == 1
            child = Child(in_child)
            loop = asyncio.get_running_loop()
            heard = loop.create_future()
            loop.add_reader(child._in, wake, heard, True)
            await heard
            loop.remove_reader(child._in)
            assert child.result() == 2
            assert await ask_streams(streams, "after") == 1
        async with pool.connection() as streams:
            assert await ask_streams(streams, "again") in (1, 2)
        await pool.close()

    run(main())
    assert server.counts()["peak"] == 2


def test_hooks_may_be_coroutines(run: Any, server: Judge, socket_path: str) -> None:
    """configure, check and reset are awaited; one that raises costs its session, with its reason."""
    calls: list[str] = []

    async def configure(sock: socket.socket) -> None:
        await ask(sock, "configure")
        calls.append("configure")

    async def check(sock: socket.socket) -> None:
        await ask(sock, "check")
        calls.append("check")
        if len(calls) > 4:
            raise ValueError("no good")

    async def reset(sock: socket.socket) -> None:
        await ask(sock, "reset")
        calls.append("reset")

    async def main() -> dict[str, int]:
        options: dict[str, Any] = {"configure": configure, "check": check, "reset": reset}
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path, **options) as pool:
            for n in range(3):
                async with pool.connection() as sock:
                    await ask(sock, f"n{n}")
            closed: dict[str, int] = pool.get_stats()["closed"]
            return closed

    assert run(main()) == {"check_failed": 1}
    assert calls == ["configure", "reset", "check", "reset", "check", "configure", "reset"]


def test_a_block_whose_coroutine_is_dropped_holds_nothing(server: Judge, socket_path: str) -> None:
    """A coroutine that is closed inside its block, where nothing can be awaited any more, gives its session up at once."""

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=1, broker=socket_path) as pool:

            async def block() -> None:
                async with pool.connection():
                    await asyncio.get_running_loop().create_future()

            async with pool.connection() as sock:
                await ask(sock, "first")  # from here on an idle session is there, and the block's beginning waits for nothing
            dropped = block()
            dropped.send(None)
            assert pool.get_stats()["in_use"] == 1
            dropped.close()
            assert pool.get_stats()["in_use"] == 0
            async with pool.connection(timeout=5) as sock:
                assert await ask(sock, "next") == 2

    asyncio.run(main())


def test_cancelled_waiters_keep_nothing_from_those_who_wait_on(run: Any, server: Judge, broker: BrokerProcess) -> None:
    """Many tasks on three sessions, half of them cancelled at some turn of the loop: what the broker had just granted to those goes on to the others."""
    chance = random.Random(1)

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=3, broker=broker.path) as pool:

            async def one(n: int) -> None:
                async with pool.connection(timeout=5) as conn:
                    await ask(conn, f"n{n}")

            async def cancel(task: asyncio.Task[None], turns: int) -> None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()

            for first in range(0, 1200, 6):
                tasks = [asyncio.ensure_future(one(n)) for n in range(first, first + 6)]
                cancels = [cancel(task, chance.randrange(40)) for task in tasks if chance.random() < 0.6]
                outcomes = await asyncio.gather(*tasks, *cancels, return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}

    run(main())


def test_what_was_granted_to_a_cancelled_task_is_left_to_the_broker_until_it_has_answered(server: Judge, broker: BrokerProcess) -> None:
    """The broker takes it back; who looked at it before, say because it is slow, would take it, too."""

    async def main() -> None:
        async with mppool.AsyncPool(server.address, max_size=1, broker=broker.path) as pool:
            lent = await pool.getconn()
            worker: Any = pool._worker
            waiter = asyncio.ensure_future(pool.getconn())
            while not worker.table.halves[H_WAITERS]:
                await asyncio.sleep(0.001)
            worker.lines.append(await perform(worker, connect(worker)))  # else putconn() makes one to say it on, and the loop runs meanwhile
            await pool.putconn(lent)
            eventually(lambda: any(map(claims.is_granted, worker.table.lanes_of(worker.row.index))))
            os.kill(broker.pid, signal.SIGSTOP)
            waiter.cancel()
            await asyncio.wait((waiter,))
            [(line, lane)] = worker.abandoned
            hands = Hands(worker)
            settle_abandoned(hands)
            assert [*worker.abandoned] == [(line, lane)]
            assert claims.is_granted(worker.words[lane.at])
            os.kill(broker.pid, signal.SIGCONT)
            eventually(lambda: not worker.words[lane.at])
            eventually(lambda: [settle_abandoned(hands)] and not worker.abandoned)  # type: ignore[func-returns-value]
            hands.done()
            assert line in worker.lines
            assert lane in worker.lanes
            async with pool.connection(timeout=5) as sock:
                assert await ask(sock, "again") == 1

    asyncio.run(main())
