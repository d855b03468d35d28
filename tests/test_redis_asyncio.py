"""redis.asyncio against a real Redis: the same as in test_redis.py, in event loops, and commands that are cancelled half-way."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from redis._parsers import _AsyncRESP2Parser, _AsyncRESP3Parser
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import mppool
from mppool.drivers.redis import AsyncRedisDriver
from mppool.integrations.redis import BlockingConnectionPool as SyncPool
from mppool.integrations.redis.asyncio import BlockingConnectionPool, ConnectionPool
from mppool.kernel import link
from mppool.states import Residence
from tests.helpers.daemons import needs
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.redis import PASSWORD, Server, redis_server_with_tls
from tests.helpers.storm import Ask, Peak, Storm
from tests.test_aio import on_asyncio, on_uvloop, run  # noqa: F401 (a fixture)

pytestmark = needs("redis-server")

Run = Callable[[Any], Any]


class Maker:
    """Pools of one connection, unless the test says otherwise."""

    def __init__(self, server: Server, broker: BrokerProcess) -> None:
        self.server = server
        self.broker = broker

    def __call__(self, **options: Any) -> Any:
        return BlockingConnectionPool.from_url(self.server.url, **{"max_connections": 1, "timeout": 10, "broker": self.broker.path, **options})

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Any]:
        pool = self(**options)
        try:
            yield redis.asyncio.Redis(connection_pool=pool)
        finally:
            await pool.aclose()


@pytest.fixture
def make(redis_: Server, broker: BrokerProcess) -> Maker:
    return Maker(redis_, broker)


PARSERS = {"hiredis": {}, "resp2": {"protocol": 2, "parser_class": _AsyncRESP2Parser}, "resp3": {"protocol": 3, "parser_class": _AsyncRESP3Parser}}


@pytest.mark.parametrize("options", PARSERS.values(), ids=PARSERS)
def test_the_ordinary_api_works_beside_a_plain_process(run: Run, redis_: Server, make: Maker, options: dict[str, Any]) -> None:  # noqa: F811
    """Commands, pipelines, transactions, scripts, blocking commands, in turn with redis.Redis in another process: one connection for both."""
    sync = SyncPool.from_url(redis_.url, max_connections=1, broker=make.broker.path, client_name="mine", protocol=options.get("protocol"))

    def work(child: Child) -> None:
        client = redis.Redis(connection_pool=sync)
        while child.hear():
            child.tell(client.incr("turns"))
        sync.close()

    async def main(child: Child) -> None:
        async with make.client(decode_responses=True, client_name="mine", **{"protocol": None, **options}) as client:
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                child.tell(True)
                assert child.hear() == turns

            assert await client.set("a", "é")
            turn()
            assert await client.get("a") == "é"
            turn()
            assert await client.pipeline(transaction=False).set("b", 1).incr("b").execute() == [True, 2]
            turn()
            async with client.pipeline() as pipe:
                await pipe.watch("b")
                pipe.multi()
                pipe.incr("b")
                assert await pipe.execute() == [3]
            turn()
            double = client.register_script("return redis.call('incrby', KEYS[1], ARGV[1])")
            assert await double(keys=["b"], args=[4]) == 7
            turn()
            await client.rpush("list", "x")
            assert list(await client.blpop("list", timeout=1)) == ["list", "x"]
            turn()
            assert sorted([key async for key in client.scan_iter("*")]) == ["a", "b", "turns"]
            with pytest.raises(redis.ResponseError):
                await client.incr("a")
            turn()
            info = await client.client_info()
            assert (info["name"], info["resp"]) == ("mine", str(options.get("protocol", 3)))
            child.tell(False)

    made = redis_.made()
    with fork(work) as (child,):
        run(main(child))
        child.result()
    assert redis_.made() == made + 1


def test_what_is_in_no_state_for_others_is_not_lent_on(run: Run, redis_: Server, make: Maker) -> None:  # noqa: F811
    """Unread replies, a database, a transaction, subscriptions, another connection: closed or reset, and the next user gets his own."""

    async def say(connection: Any, *commands: tuple[Any, ...]) -> None:
        for command in commands:
            await connection.send_command(*command)
            await connection.read_response()

    async def reconnected(connection: Any) -> None:
        await connection.disconnect()
        await connection.connect()

    async def two_for_one(connection: Any) -> None:
        await connection.send_packed_command(connection.pack_commands([("GET", "a")] * 2))
        await connection.read_response()

    spoils: list[Callable[[Any], Any]] = [
        lambda connection: connection.send_command("GET", "a"),
        two_for_one,
        lambda connection: say(connection, ("SELECT", 5)),
        lambda connection: say(connection, ("MULTI",), ("GET", "a")),
        lambda connection: say(connection, ("CLIENT SETNAME", "x")),
        lambda connection: connection.send_command("SUBSCRIBE", "c"),
        lambda connection: connection.disconnect(),
        reconnected,
    ]

    async def main() -> None:
        async with make.client() as client:
            pool = client.connection_pool
            for n, spoil in enumerate(spoils):
                connection = await pool.get_connection()
                await spoil(connection)
                await pool.release(connection)
                assert await client.echo(f"n{n}") == f"n{n}".encode()
                info = await client.client_info()
                assert (info["db"], info["multi"], info["name"], info["sub"]) == (0, -1, "", 0)
                assert redis_.count() == 1
            with pytest.raises(KeyError):
                await pool.release(connection)

    run(main())


def test_pubsub_limits_and_errors(run: Run, redis_: Server, make: Maker) -> None:  # noqa: F811
    """Pub/sub has its connection for itself; full pools raise or wait; the server's errors are redis-py's own; a retried command reconnects."""

    async def main() -> None:
        async with make.client(max_connections=2, timeout=0.2, retry=Retry(NoBackoff(), 3), retry_on_error=[redis.ConnectionError]) as client:
            pool = client.connection_pool
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe("c")
                await client.publish("c", "x")
                async with asyncio.timeout(5) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
                    assert (await pubsub.get_message(timeout=5) or await pubsub.get_message(timeout=5))["data"] == b"x"
                assert pool.mppool.get_stats()["in_use"] == 1
                connection = await pool.get_connection()
                with pytest.raises(redis.ConnectionError, match="No connection available"):
                    await pool.get_connection()
                await pool.release(connection)
            assert pool.mppool.get_stats()["in_use"] == 0
            with Peak(redis_.count) as peak:
                for _ in range(10):
                    connection = await pool.get_connection()
                    redis_.judge.client_kill_filter(_type="normal", skipme=True)
                    await connection.disconnect()
                    await connection.connect()
                    await pool.release(connection)
                    assert await client.ping()
            assert peak.most <= 2
            await pool.disconnect()
            assert await client.ping()
            async with client.client() as single:
                assert await single.client_id() == await single.client_id()
        full = ConnectionPool.from_url(redis_.url, max_connections=1, name="full", broker=make.broker.path)
        connection = await full.get_connection()
        assert not full.can_get_connection()
        with pytest.raises(redis.exceptions.MaxConnectionsError):
            await full.get_connection()
        await full.disconnect()
        await full.release(connection)
        await full.aclose()
        for kind, options in ((redis.AuthenticationError, {"password": "wrong"}), (redis.ResponseError, {"db": 99}), (redis.ConnectionError, {"port": 1})):
            given: dict[str, Any] = {"port": redis_.port, "password": PASSWORD, "broker": make.broker.path, **options}
            wrong = ConnectionPool(**given)
            with pytest.raises(kind):
                await wrong.get_connection()
            await wrong.aclose()

    run(main())


# Cancelled commands. In redis-py 4.5 a task that was cancelled between sending a command and reading its reply left the
# reply for the next user of the connection, who got somebody else's data.


class Leaky(redis.asyncio.Connection):
    """As redis-py was: it does not disconnect when a command is interrupted."""

    async def disconnect(self, nowait: bool = False, *args: Any, **kwargs: Any) -> None:
        if not nowait:
            await super().disconnect(nowait, *args, **kwargs)


async def cancelled_all_the_time(client: Any, tasks: int, seed: int = 0) -> Counter[str]:
    """So many tasks, each cancelled after some turns of the loop or not; what became of them. A reply to another is "crossed"."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()

    async def one(nonce: str) -> None:
        kind = chance.randrange(4)
        try:
            if kind == 0:
                replies = await client.pipeline(transaction=False).echo(nonce).echo(nonce).execute()
            elif kind == 1:
                replies = (await client.pipeline().set(nonce, nonce, ex=9).get(nonce).execute())[1:]
            else:
                replies = [await client.echo(nonce)]
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
            raise
        except Exception as error:
            outcomes[type(error).__name__] += 1
            return
        outcomes["answered" if all(reply == nonce.encode() for reply in replies) else "crossed"] += 1

    async def canceller(task: asyncio.Task[None], turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()

    for first in range(0, tasks, 6):
        running = [asyncio.ensure_future(one(f"n{n}")) for n in range(first, first + 6)]
        cancellers = [canceller(task, chance.randrange(22)) for task in running if chance.random() < 0.8]
        await asyncio.gather(*running, *cancellers, return_exceptions=True)
    return outcomes


async def none_in_use(pool: Any) -> None:
    """Soon: what is granted to a task that was cancelled meanwhile goes back when the loop comes by."""
    until = time.monotonic() + 20
    while pool.get_stats()["in_use"]:
        assert time.monotonic() < until, pool.get_stats()
        await asyncio.sleep(0.01)


def test_a_cancelled_command_never_poisons_a_session(run: Run, redis_: Server, make: Maker) -> None:  # noqa: F811
    """Thousands of commands and pipelines, most cancelled at some await: nobody gets somebody else's reply, and nothing is lost of the cap."""

    async def main() -> None:
        with Peak(redis_.count) as peak:
            async with make.client(max_connections=3, timeout=20) as client:
                outcomes = await cancelled_all_the_time(client, 2400)
                stats = client.connection_pool.mppool.get_stats()
                print(f"\n{dict(outcomes)}, dials {stats['dials']}")
                assert outcomes["crossed"] == 0
                assert set(outcomes) == {"cancelled", "answered"}
                assert outcomes["cancelled"] > 200
                assert outcomes["answered"] > 200
                await none_in_use(client.connection_pool.mppool)
                lent = [await client.connection_pool.get_connection() for _ in range(3)]
                for connection in lent:
                    await client.connection_pool.release(connection)
        assert peak.most <= 3

    run(main())


@needs("openssl")
@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
def test_a_cancelled_login_ends_before_its_permit_goes_back(run: Run, tmp_path: Path, broker: BrokerProcess, kind: str) -> None:  # noqa: F811
    """Many logins, cancelled at whatever turn of the loop: while their permits are used again the server never counts more than the cap."""
    chance = random.Random(kind)
    rounds = 400 if kind != "tls" else 60  # redis-py reads all certificates of the system for each

    async def main(server: Server, url: str) -> int:
        pool = BlockingConnectionPool.from_url(url, max_connections=2, timeout=10, broker=broker.path).mppool
        lent = 0
        for _ in range(rounds):
            tasks = [asyncio.ensure_future(pool.getconn()) for _ in range(4)]
            for _ in range(chance.randrange(16)):
                await asyncio.sleep(0 if kind != "tls" else 0.001)
            for task in tasks[:2]:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await pool.putconn(await task, discard=True)
                    lent += 1
        await none_in_use(pool)
        await pool.close()
        return lent

    def judge(child: Child) -> tuple[int, int]:
        """Looks without a pause, in a process of its own."""
        with Peak(Server(child.hear(), tmp_path).count, every=0.0) as peak:
            child.tell()
            child.hear()
        return peak.most, peak.samples

    with fork(judge) as (child,), redis_server_with_tls(tmp_path) as (server, tls):
        url = {"tcp": server.url, "unix": f"unix://:{PASSWORD}@{server.socket}", "tls": tls}[kind]
        made = server.made()
        server.judge.close()  # is none of those that the other one counts
        child.tell(server.port)
        child.hear()
        lent = run(main(server, url))
        child.tell()
        most, samples = child.result()
        cancelled = server.made() - made - lent
        print(f"\n{lent} lent, {cancelled} cancelled with the server knowing, peak {most} of {samples} looks")
        assert most <= 2
        assert cancelled > rounds / 4 or kind == "tls"  # there it depends on the moment


def test_not_even_with_a_redis_py_that_leaks(redis_: Server, make: Maker) -> None:
    """With connections that do not disconnect when they are interrupted: redis-py's own pool hands replies to others, this one closes what owes some."""

    async def main() -> None:
        own = redis.asyncio.BlockingConnectionPool.from_url(redis_.url, max_connections=3, connection_class=Leaky)
        crossed = 0
        for seed in range(20):
            crossed += (await cancelled_all_the_time(redis.asyncio.Redis(connection_pool=own), 300, seed))["crossed"]
            if crossed:
                break
        assert crossed  # else what follows would prove nothing
        for connection in own._available_connections:
            await redis.asyncio.Connection.disconnect(connection)
        async with make.client(max_connections=3, connection_class=Leaky) as client:
            outcomes = await cancelled_all_the_time(client, 1200)
            assert outcomes["crossed"] == 0
            assert outcomes["cancelled"] > 100
            for n in range(30):  # and a reply that comes when somebody else has asked already, which no look at the socket can foresee
                blocked = asyncio.ensure_future(client.blpop("nothing", timeout=0.03))
                await asyncio.sleep(0.005)
                blocked.cancel()
                await asyncio.wait((blocked,))
                assert await client.echo(f"n{n}") == f"n{n}".encode()

    on_asyncio(main())


def test_a_subscriber_reconnects_and_its_connection_ends_with_it(run: Run, redis_: Server, make: Maker) -> None:  # noqa: F811
    """As with redis-py's own pool: subscriptions outlive a lost connection, and what subscribed is not lent to anybody. The cap holds all along."""

    async def main() -> None:
        async with make.client(max_connections=2, retry=Retry(NoBackoff(), 3), socket_timeout=None) as client:
            await client.ping()
            with Peak(redis_.count) as peak:
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe("c")
                    await pubsub.psubscribe("p*")
                    for n in range(3):
                        for channel in ("c", "pattern"):
                            hearing = asyncio.ensure_future(anext(pubsub.listen()))
                            while not await client.publish(channel, f"{channel}{n}"):
                                assert not hearing.done()  # it reconnects
                            assert (await hearing)["data"] == f"{channel}{n}".encode()
                        redis_.judge.client_kill_filter(_type="pubsub")
                    subscribed = pubsub.connection
                assert not subscribed.is_connected
                assert client.connection_pool.mppool.get_stats()["in_use"] == 0
                assert [await client.echo(f"n{n}") for n in range(5)] == [f"n{n}".encode() for n in range(5)]
            assert peak.most <= 2
            assert redis_.judge.pubsub_channels() == []


def test_a_cancelled_login_ends_at_once(run: Run) -> None:  # noqa: F811
    """When the permit goes back the server has been told of the end: the next connection comes after it. No turn of the loop is waited for."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            driver = AsyncRedisDriver(host="127.0.0.1", port=listener.getsockname()[1], socket_timeout=None)
            ended: list[bool] = []

            async def dial() -> None:
                try:
                    await driver.dial()
                finally:
                    ended.append(link.has_ended(theirs))

            dialing = asyncio.ensure_future(dial())
            theirs, _ = await asyncio.to_thread(listener.accept)
            with theirs:
                assert await asyncio.to_thread(theirs.recv, 4096)  # it says who it is, and waits for the answer
                dialing.cancel()
                await asyncio.wait((dialing,))
                assert dialing.cancelled()
                assert ended == [True]

    run(main())


def test_commands_that_block_hold_one_connection_each(run: Run, redis_: Server, make: Maker) -> None:  # noqa: F811
    """Others work beside them; who waits for a connection gets it when one has its answer; one that is cancelled loses no element to nobody."""

    async def main() -> None:
        async with make.client(max_connections=3, socket_timeout=None) as client:
            blocked = [asyncio.ensure_future(client.blpop(f"list{n}", timeout=0)) for n in range(2)]
            while client.connection_pool.mppool.get_stats()["in_use"] < 2:
                await asyncio.sleep(0.001)
            waiting = [asyncio.ensure_future(client.blmove("from", "to", timeout=0)) for _ in range(4)]
            blocked[0].cancel()
            await asyncio.wait((blocked[0],))
            redis_.judge.rpush("from", *"abcd")
            assert sorted(await asyncio.gather(*waiting)) == [b"a", b"b", b"c", b"d"]
            redis_.judge.rpush("list0", "kept")
            redis_.judge.rpush("list1", "x")
            assert list(await blocked[1]) == [b"list1", b"x"]
            assert await client.lpop("list0") == b"kept"

    run(main())


@needs("openssl")
@pytest.mark.parametrize("protocol", [2, 3])
def test_over_tls_sessions_stay_but_count(run: Run, tmp_path: Path, broker: BrokerProcess, protocol: int) -> None:  # noqa: F811
    """rediss://: the cap is the host's, who waits gets another's idle place, cancelled commands cross no reply, and an end is seen before the next lease."""
    with redis_server_with_tls(tmp_path) as (server, url):

        def pool(kind: Any) -> Any:
            return kind.from_url(f"{url}&protocol={protocol}", max_connections=1, timeout=10, socket_timeout=None, broker=broker.path)

        async def main(child: Child) -> None:
            client: Any = redis.asyncio.Redis(connection_pool=pool(BlockingConnectionPool))
            for n in range(5):
                assert [await client.echo(f"p{n}{m}") for m in range(3)] == [f"p{n}{m}".encode() for m in range(3)]
                child.tell(n)
                assert child.hear() == n
            blocked = asyncio.ensure_future(client.blpop("nothing", timeout=0))
            while not server.judge.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.001)
            blocked.cancel()
            await asyncio.wait((blocked,))
            number = await client.client_id()
            server.judge.client_kill_filter(_id=number)
            eventually(lambda: not server.count())
            assert await client.client_id() != number
            assert client.connection_pool._driver.residence(None) is Residence.tls
            await client.connection_pool.aclose()

        def other(child: Child) -> None:
            client = redis.Redis(connection_pool=pool(SyncPool))
            for n in range(5):
                assert child.hear() == n
                assert client.echo(f"c{n}") == f"c{n}".encode()
                child.tell(n)

        with Peak(server.count) as peak, fork(other) as (child,):
            run(main(child))
            child.result()
        assert peak.most == 1


@pytest.mark.storm
def test_twelve_workers_with_loops_stay_within_the_cap(redis_: Server, make: Maker, request: pytest.FixtureRequest) -> None:
    """Twelve workers with event loops, killed and replaced, with cancelled commands among theirs: never more connections than the cap, no reply crosses."""
    cap = 4

    def begin() -> Ask:
        loop = asyncio.new_event_loop()
        client = redis.asyncio.Redis(connection_pool=make(max_connections=cap, timeout=20))

        async def ask(nonce: str) -> None:
            async def one(n: int) -> None:
                assert await client.echo(f"{nonce}-{n}") == f"{nonce}-{n}".encode()

            tasks = [asyncio.ensure_future(one(n)) for n in range(3)]
            if hash(nonce) % 5 == 0:
                await asyncio.sleep(random.choice((0, 0, 0.001)))
                tasks[0].cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
                    raise outcome

        return lambda nonce: loop.run_until_complete(ask(nonce))

    storm = Storm(begin, 12)
    made = redis_.made()
    try:
        with Peak(redis_.count) as peak:
            storm.run(float(request.config.getoption("--storm-seconds")) * 0.75, kill_every=0.25)
            storm.end()
        print(f"\nkills {storm.kills}, peak {peak.most} of {peak.samples} looks, connections {redis_.made() - made}, asked {storm.requests} times 3")
        assert storm.failures == []
        assert peak.most <= cap
        assert storm.requests > 0
    finally:
        storm.end()


def test_the_driver_alone(run: Run, redis_: Server, broker: BrokerProcess) -> None:  # noqa: F811
    """mppool.AsyncPool with AsyncRedisDriver: ping as a check, reset, DialFailed with redis-py's error as its cause."""
    driver = AsyncRedisDriver(port=redis_.port, password=PASSWORD)

    async def main() -> None:
        pool = mppool.AsyncPool(driver=driver, name="alone", max_size=1, broker=broker.path, check=driver.ping)
        async with pool, pool.connection() as connection:
            await connection.send_command("SELECT", 3)
            await connection.read_response()
            await driver.reset(connection)
            assert connection.leaves == 0
        wrong = mppool.AsyncPool(driver=AsyncRedisDriver(port=redis_.port, password="wrong"), name="wrong", broker=broker.path)
        with pytest.raises(mppool.DialFailed) as caught:
            await wrong.getconn()
        assert isinstance(caught.value.__cause__, redis.AuthenticationError)
        await wrong.close()

    run(main())
