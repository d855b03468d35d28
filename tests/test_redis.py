"""redis-py against a real Redis: its clients on a pool of the host, what they leave behind, and the cap as the server counts it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis._parsers import _RESP2Parser, _RESP3Parser
from redis.backoff import NoBackoff
from redis.retry import Retry

import mppool
from mppool.drivers.redis import RedisDriver
from mppool.integrations.redis import BlockingConnectionPool, ConnectionPool
from mppool.states import Residence
from mppool.testing import check_driver
from mppool.testing.must import open_descriptors
from tests.helpers.daemons import needs
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.redis import PASSWORD, Server, redis_server_with_tls
from tests.helpers.storm import Ask, Peak, Storm

pytestmark = needs("redis-server")


Make = Callable[..., Any]


@pytest.fixture
def make(redis_: Server, broker: BrokerProcess) -> Iterator[Make]:
    """Makes pools: a BlockingConnectionPool of one connection, unless the test says otherwise. They are closed afterwards."""
    pools = []

    def one(kind: Any = BlockingConnectionPool, **options: Any) -> Any:
        pools.append(kind.from_url(options.pop("url", redis_.url), **{"max_connections": 1, "timeout": 5, "broker": broker.path, **options}))
        return pools[-1]

    yield one
    for pool in pools:
        pool.close()


@pytest.fixture
def plain(make: Make) -> Make:
    """The same with ConnectionPool, which does not block."""

    def one(**options: Any) -> Any:
        return make(NonBlocking, **options)

    return one


class NonBlocking(ConnectionPool):
    def __init__(self, timeout: Any = None, **options: Any) -> None:
        super().__init__(**options)


def answering(client: Any) -> Callable[[Child], None]:
    """A child that executes the commands that it is told, and tells what came out."""

    def work(child: Child) -> None:
        while (command := child.hear()) is not None:
            child.tell(repr(client.execute_command(*command)))

    return work


# The ordinary API, on one connection for two processes.

PARSERS = {
    "hiredis": {},
    "resp2": {"protocol": 2, "parser_class": _RESP2Parser},
    "resp3": {"protocol": 3, "parser_class": _RESP3Parser},
    "hiredis2": {"protocol": 2},
}


@pytest.mark.parametrize("options", PARSERS.values(), ids=PARSERS)
def test_the_ordinary_api_works_from_two_processes_in_turn(redis_: Server, make: Make, options: dict[str, Any]) -> None:
    """Commands, pipelines, transactions, scripts, blocking commands and scans, each after another process used the connection."""
    pool = make(decode_responses=True, client_name="mine", **options)
    client: Any = redis.Redis(connection_pool=pool)
    made = redis_.made()
    with fork(answering(client)) as (child,):
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            child.tell(["INCR", "turns"])
            assert child.hear() == str(turns)

        assert client.set("a", "é")
        turn()
        assert client.get("a") == "é"
        turn()
        assert client.hset("h", mapping={"x": 1, "y": 2}) == 2
        turn()
        assert client.hgetall("h") == {"x": "1", "y": "2"}
        turn()
        assert client.pipeline(transaction=False).set("b", 1).incr("b").execute() == [True, 2]
        turn()
        assert client.pipeline().incr("b").get("b").execute() == [3, "3"]
        turn()
        assert client.transaction(lambda pipe: [pipe.multi(), pipe.incr("b")], "b") == [4]
        turn()
        double = client.register_script("return redis.call('incrby', KEYS[1], ARGV[1])")
        assert double(keys=["b"], args=[4]) == 8
        turn()
        assert client.blpop("nothing", timeout=0.01) is None
        client.rpush("list", "x")
        assert client.blpop("list", timeout=1) == ["list", "x"] or client.llen("list") == 0
        turn()
        assert sorted(client.scan_iter("*")) == ["a", "b", "h", "turns"]
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            client.incr("h")
        turn()
        assert client.lock("l", timeout=5).acquire()
        turn()
        info = client.client_info()
        assert (info["name"], info["db"], info["resp"]) == ("mine", 0, str(options.get("protocol", 3)))
        child.tell(None)
    assert redis_.made() == made + 1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_url_says_where_and_who(redis_: Server, make: Make, kind: str) -> None:
    """Host or path, password, database, client name and mppool's options in the query; sessions move over Unix sockets, too."""
    where = redis_.url if kind == "tcp" else f"unix://:{PASSWORD}@{redis_.socket}"
    pool = make(url=f"{where}?db=3&client_name=me&max_idle=60&on_transfer=trust")
    client: Any = redis.Redis(connection_pool=pool)
    assert pool.mppool.options.max_idle == 60
    assert not pool._driver.minds_transfer
    with fork(answering(client)) as (child,):
        number = client.client_id()
        child.tell(["CLIENT ID"])
        assert child.hear() == str(number)
        child.tell(None)
    assert client.client_info()["db"] == 3
    assert client.client_getname() in (b"me", "me")


# What a user leaves behind.

# What is said on the connection, and what of CLIENT INFO would show it.
LEFT: dict[str, list[tuple[Any, ...]]] = {
    "select": [("SELECT", 5)],
    "lower": [("select 5",)],
    "name": [("CLIENT SETNAME", "x")],
    "multi": [("MULTI",), ("SET", "a", 1)],
    "watch": [("WATCH", "a")],
    "tracking": [("CLIENT", "TRACKING", "ON")],
    "bcast": [("CLIENT TRACKING", "ON", "BCAST")],
    "no-evict": [("CLIENT NO-EVICT", "ON")],
    "protocol": [("HELLO", 2)],
    "user": [("AUTH", "guest", "guest")],
    "reset": [("RESET",)],
}
SHOWN = ("name", "db", "flags", "multi", "sub", "psub", "resp", "user", "redir")


def state_of(client: Any) -> str:
    info = client.client_info()
    return repr([info[name] for name in SHOWN])


@pytest.mark.parametrize("on_transfer", ["reset", "hidden", "trust"])
def test_what_a_user_leaves_does_not_travel(redis_: Server, make: Make, on_transfer: str) -> None:
    """A database, a name, a transaction, another login: the next process finds the session as after a login. With "trust": what went through redis-py."""
    redis_.judge.acl_setuser("guest", enabled=True, passwords=["+guest"], keys=["*"], commands=["+@all"])
    pool = make(on_transfer="trust" if on_transfer == "trust" else "reset", client_name="mine", db=2)
    client: Any = redis.Redis(connection_pool=pool)
    fresh = state_of(client)

    def work(child: Child) -> None:
        while child.hear():
            child.tell([state_of(client), client.client_id()])

    with fork(work) as (child,):
        for what, commands in LEFT.items():
            if on_transfer == "hidden" and what == "no-evict":
                continue  # Redis 7.0 keeps it through RESET
            connection = pool.get_connection()
            for command in commands:
                if on_transfer == "hidden":  # said past redis-py
                    connection._sock.sendall(b"".join(connection._command_packer.pack(*command)))
                    connection._parser.read_response()
                else:
                    connection.send_command(*command)
                    connection.read_response()
            first = redis_.clients()[0]["id"]
            pool.release(connection)
            child.tell(True)
            state, number = child.hear()
            assert state == fresh, what
            assert (str(number) == first) is (what != "no-evict"), what  # it was made clean; closed where no RESET does
        child.tell(False)
        child.result()
    assert state_of(client) == fresh


def test_the_reset_is_one_round_trip(redis_: Server, make: Make) -> None:
    """What a session costs that comes from another process: RESET, login, name and database in one write."""
    pool = make(client_name="mine", db=2)
    client: Any = redis.Redis(connection_pool=pool)
    client.ping()
    writes: list[Any] = []

    def work(child: Child) -> list[int]:
        child.hear()
        connection = pool.get_connection()
        pool.release(connection)
        child.tell()
        child.hear()
        send = type(connection).send_packed_command

        def counted(self: Any, command: Any, **options: Any) -> None:
            writes.append(command)
            send(self, command, **options)

        type(connection).send_packed_command = counted
        pool.release(pool.get_connection())
        return [len(written) for written in writes]

    with fork(work) as (child,):
        child.tell()
        child.hear()
        client.ping()
        child.tell()
        assert child.result() == [1]


def read_ahead(connection: Any) -> None:
    connection._sock.sendall(b"PING\r\nPING\r\n")
    time.sleep(0.05)
    connection._parser.read_response()


DIRTY: dict[str, Callable[[Any], object]] = {
    "no reply read": lambda connection: connection.send_command("GET", "a"),
    "one reply too few": lambda connection: (connection.send_packed_command(connection.pack_commands([("GET", "a")] * 2)), connection.read_response()),
    "subscribed": lambda connection: (connection.send_command("SUBSCRIBE", "c"), connection.read_response(push_request=True)),
    "disconnected": lambda connection: connection.disconnect(),
    "reconnected": lambda connection: (connection.disconnect(), connection.connect()),
    "to reconnect": lambda connection: connection.mark_for_reconnect(),
    "read ahead": read_ahead,
}


@pytest.mark.parametrize("options", [PARSERS["hiredis"], PARSERS["resp3"]], ids=["hiredis", "python"])
def test_what_is_in_no_state_for_others_is_not_lent_on(redis_: Server, make: Make, options: dict[str, Any]) -> None:
    """Replies that nobody has read, another connection than before: it is closed or reset, and the next user gets his own reply."""
    pool = make(**options)
    client: Any = redis.Redis(connection_pool=pool)
    client.set("a", "old")
    for what, spoil in DIRTY.items():
        connection = pool.get_connection()
        spoil(connection)
        pool.release(connection)
        assert client.echo(what) == what.encode()
        assert redis_.count() == 1


@pytest.mark.parametrize("protocol", [2, 3])
def test_pubsub_has_its_connection_for_itself(redis_: Server, make: Make, protocol: int) -> None:
    """While subscribed it is in use, and the others have what is left; closed, its place is free again, and nobody hears its messages."""
    pool = make(max_connections=2, protocol=protocol)
    client: Any = redis.Redis(connection_pool=pool)
    with client.pubsub(ignore_subscribe_messages=True) as pubsub, fork(answering(client)) as (child,):
        pubsub.subscribe("c")
        pubsub.psubscribe("p*")
        child.tell(["PUBLISH", "c", "one"])
        assert child.hear() == "1"
        assert eventually(lambda: pubsub.get_message(timeout=0.1))["data"] == b"one"
        assert pool.mppool.get_stats()["in_use"] == 1
        child.tell(["PUBLISH", "p1", "two"])
        child.hear()
        assert eventually(lambda: pubsub.get_message(timeout=0.1))["data"] == b"two"
        child.tell(None)
    assert pool.mppool.get_stats()["in_use"] == 0
    assert client.publish("c", "three") == 0
    a, b = pool.get_connection(), pool.get_connection()
    pool.release(a)
    pool.release(b)
    assert redis_.count() <= 2


def test_pubsub_of_many_workers_stays_within_the_cap(redis_: Server, make: Make) -> None:
    """Six workers subscribe, hear and close all the time, on three connections: the server never has more."""
    pool = make(max_connections=3, timeout=30)

    def work(child: Child) -> None:
        client: Any = redis.Redis(connection_pool=pool)
        for n in range(15):
            with client.pubsub() as pubsub:
                pubsub.subscribe(f"{os.getpid()}-{n}")
                assert pubsub.get_message(timeout=5)["channel"] == f"{os.getpid()}-{n}".encode()

    with Peak(redis_.count, every=0.001) as peak, fork(*[work] * 6) as children:
        for child in children:
            child.result()
    assert peak.most <= 3


def test_a_pubsub_thread_and_monitor(redis_: Server, make: Make) -> None:
    """run_in_thread, and MONITOR: both give their place back."""
    pool = make(max_connections=2)
    client: Any = redis.Redis(connection_pool=pool)
    heard = threading.Event()
    pubsub = client.pubsub()
    pubsub.subscribe(c=lambda message: heard.set())
    thread = pubsub.run_in_thread(sleep_time=0.01)
    client.publish("c", "x")
    assert heard.wait(5)
    thread.stop()
    thread.join(5)
    with client.monitor() as monitor:
        client.get("watched")
        assert any("watched" in monitor.next_command()["command"] for _ in range(2))
    assert pool.mppool.get_stats()["in_use"] == 0
    assert client.ping()


# Limits and errors, as redis-py has them.


def test_a_full_pool_raises_at_once(redis_: Server, plain: Make) -> None:
    """ConnectionPool: MaxConnectionsError, when other processes have them all, too."""
    pool = plain(max_connections=2)

    def work(child: Child) -> None:
        lent = [pool.get_connection() for _ in range(2)]
        child.tell()
        child.hear()
        for connection in lent:
            pool.release(connection)
        child.tell()
        child.hear()

    with fork(work) as (child,):
        child.hear()
        began = time.monotonic()
        with pytest.raises(redis.exceptions.MaxConnectionsError, match="Too many connections"):
            redis.Redis(connection_pool=pool).ping()
        assert time.monotonic() - began < 2
        child.tell()
        child.hear()
        assert redis.Redis(connection_pool=pool).ping()
        child.tell()
        child.result()


def test_a_pool_that_does_not_block_is_not_full_while_others_dial(redis_: Server, plain: Make) -> None:
    """Many processes begin at once, fewer may dial at a time: all of them get one of enough connections."""
    pool = plain(max_connections=12, max_dialing=1)

    def work(child: Child) -> None:
        child.hear()
        connection = pool.get_connection()
        child.tell()
        child.hear()
        pool.release(connection)

    with fork(*[work] * 12) as children:
        for child in children:
            child.tell()
        for child in children:
            child.hear()
        assert redis_.count() == 12
        for child in children:
            child.tell()
        for child in children:
            child.result()


def test_a_blocking_pool_waits_and_then_says_so(make: Make) -> None:
    """BlockingConnectionPool: ConnectionError after ``timeout``; before that, whoever waits is served when one comes back."""
    pool = make(timeout=0.2)
    connection = pool.get_connection()
    with pytest.raises(redis.ConnectionError, match="No connection available"):
        pool.get_connection()
    pool.release(connection)
    patient = make(timeout=None, name="patient")
    connection = patient.get_connection()
    threading.Timer(0.1, patient.release, (connection,)).start()
    patient.release(patient.get_connection())


def test_the_servers_errors_come_through(redis_: Server, make: Make) -> None:
    """A wrong password, an unknown user, a database there is not, a port where nobody listens: redis-py's own exceptions, at once."""
    for kind, options in (
        (redis.AuthenticationError, {"url": redis_.url.replace(PASSWORD, "wrong")}),
        (redis.AuthenticationError, {"url": redis_.url.replace(":s3", "who:s3")}),
        (redis.ResponseError, {"db": 99}),
        (redis.ConnectionError, {"url": "redis://127.0.0.1:1/0"}),
    ):
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(kind):
                redis.Redis(connection_pool=make(**options)).ping()
        assert time.monotonic() - began < 4


def test_commands_survive_the_servers_end_of_a_connection(redis_: Server, make: Make) -> None:
    """An idle connection that the server closes is replaced; one that ends in mid-command is retried as its Retry says, under the same permit."""
    pool = make(retry=Retry(NoBackoff(), 3), retry_on_error=[redis.ConnectionError])
    client: Any = redis.Redis(connection_pool=pool)
    client.ping()
    redis_.judge.client_kill_filter(_type="normal", skipme=True)
    assert client.ping()
    with Peak(redis_.count) as peak:
        connection = pool.get_connection()
        for _ in range(20):
            redis_.judge.client_kill_filter(_type="normal", skipme=True)
            assert connection.retry.call_with_retry(
                lambda: (connection.send_command("PING"), connection.read_response())[1], lambda error: connection.disconnect()
            ) in (b"PONG", "PONG")
            connection.disconnect()
        pool.release(connection)
    assert client.ping()
    assert peak.most == 1


def test_health_checks_and_single_connections(redis_: Server, make: Make) -> None:
    """health_check_interval pings before a command; a single_connection_client keeps its connection until it is closed."""
    pool = make(health_check_interval=1, max_connections=2)
    client: Any = redis.Redis(connection_pool=pool)
    client.ping()
    connection = pool.get_connection()
    connection.next_health_check = 0.001
    before = redis_.judge.info("commandstats")["cmdstat_ping"]["calls"]
    connection.send_command("GET", "a")
    connection.read_response()
    pool.release(connection)
    assert redis_.judge.info("commandstats")["cmdstat_ping"]["calls"] == before + 1
    with redis.Redis(connection_pool=pool, single_connection_client=True) as single:
        assert single.client_id() == single.client_id()
        single.select(4)
        single.set("x", 1)
        assert pool.mppool.get_stats()["in_use"] == 1
    assert pool.mppool.get_stats()["in_use"] == 0
    assert client.get("x") is None
    assert redis_.judge.select(4)
    assert redis_.judge.get("x") == "1"
    redis_.judge.select(0)


def test_a_closed_pool_begins_anew(redis_: Server, make: Make) -> None:
    """disconnect(), close(), reset() and Redis.from_pool's close: this process lets go, and the next command connects again; what was lent comes back."""
    pool = make(max_connections=2)
    client: Any = redis.Redis.from_pool(pool)
    for end in (pool.disconnect, pool.close, pool.reset, client.close):
        assert client.ping()
        lent = pool.get_connection()
        end()
        assert client.ping()
        pool.release(lent)
        pool.release(lent)  # once more does nothing
        assert pool.mppool.get_stats()["in_use"] == 0
    with pool:
        assert client.ping()


def test_the_rest_of_a_pools_interface(redis_: Server, make: Make) -> None:
    """Encoders, protocol, ownership, retries, counts, repr without passwords; what needs connections of one's own is refused."""
    pool = make(max_connections=2, protocol=2, encoding="latin-1", decode_responses=True)
    connection = pool.get_connection()
    assert pool.owns_connection(connection)
    assert pool.get_protocol() == 2
    assert pool.get_encoder().encode("é") == b"\xe9"
    retry = Retry(NoBackoff(), 7)
    pool.set_retry(retry)
    assert connection.retry is retry
    pool.release(connection)
    assert redis.Redis(connection_pool=pool).get_retry() is not None
    assert PASSWORD not in repr(pool)
    assert PASSWORD not in pool.mppool._driver.key()
    assert isinstance(pool, redis.ConnectionPool)
    with pytest.raises(redis.RedisError, match="caching"):
        make(protocol=3, cache_config=redis.cache.CacheConfig())
    with pytest.raises(ValueError, match="max_connections"):
        make(max_connections=-1)


def test_other_logins_have_other_pools(redis_: Server, make: Make) -> None:
    """Another database, password, user, name or protocol: not the same sessions. Decoding and timeouts are everybody's own."""
    base = make()
    others: list[dict[str, Any]] = [{"db": 1}, {"client_name": "x"}, {"protocol": 2}, {"username": "default"}, {"url": redis_.url.replace(PASSWORD, "other")}]
    assert len({base.mppool.name, *(make(**options).mppool.name for options in others)}) == len(others) + 1
    assert make(decode_responses=True, socket_timeout=1).mppool.name == base.mppool.name


def test_a_fork_leaves_the_parents_connections_alone(redis_: Server, make: Make) -> None:
    """A child uses the pool; a connection that was lent before the fork is no use to it, whatever it does, and the parent goes on with it."""
    pool = make(max_connections=2)
    client: Any = redis.Redis(connection_pool=pool)
    connection = pool.get_connection()

    def work(child: Child) -> int:
        assert not pool.owns_connection(connection)
        with pytest.raises(redis.ConnectionError, match="forked"):
            connection.send_command("PING")
        pool.release(connection)
        connection.disconnect()
        return int(client.client_id())

    connection.send_command("ECHO", "parent")
    with fork(work) as (child,):
        child.result()
    assert connection.read_response() in (b"parent", "parent")
    pool.release(connection)
    assert redis_.count() <= 2


def test_no_timeout_is_no_blocking_socket(redis_: Server, make: Make) -> None:
    """socket_timeout=None: the connection stays non-blocking in the kernel, which other processes share."""
    pool = make(socket_timeout=None)
    connection = pool.get_connection()
    assert not os.get_blocking(connection._sock.fileno())
    pool.release(connection)


@needs("openssl")
def test_tls_sessions_stay_but_count(tmp_path: Path, broker: BrokerProcess) -> None:
    """rediss://: sessions stay with their process; the cap is the host's all the same, and who waits gets another's idle place."""
    with redis_server_with_tls(tmp_path) as (server, url):
        pool = BlockingConnectionPool.from_url(url, max_connections=1, timeout=10, broker=broker.path)
        client: Any = redis.Redis(connection_pool=pool)
        with fork(answering(client)) as (child,):
            with Peak(server.count) as peak:
                for n in range(5):
                    assert client.echo(f"p{n}") == f"p{n}".encode()
                    child.tell(["ECHO", f"c{n}"])
                    assert child.hear() == f"b'c{n}'"
                child.tell(None)
            assert peak.most == 1
        assert pool._driver.residence(None) is Residence.tls
        pool.close()


def test_the_driver_alone(redis_: Server, broker: BrokerProcess) -> None:
    """mppool.Pool with RedisDriver: ping, reset, and DialFailed with redis-py's error as its cause."""
    driver = RedisDriver(port=redis_.port, password=PASSWORD)
    with mppool.Pool(driver=driver, name="alone", max_size=1, broker=broker.path, check=driver.ping) as pool, pool.connection() as connection:
        connection.send_command("SELECT", 3)
        connection.read_response()
        driver.reset(connection)
        assert connection.leaves == 0
    wrong = mppool.Pool(driver=RedisDriver(port=redis_.port, password="wrong"), name="wrong", broker=broker.path)
    with pytest.raises(mppool.DialFailed) as caught:
        wrong.getconn()
    assert isinstance(caught.value.__cause__, redis.AuthenticationError)
    wrong.close()
    with pytest.raises(ValueError, match="on_transfer"):
        RedisDriver(on_transfer="hope")


def test_the_driver_keeps_its_promises(redis_: Server) -> None:
    """What mppool.testing asks of any driver, with a database, a transaction and a missing reply as the dirt."""

    def say(session: Any, *command: Any) -> Any:
        session.send_command(*command)
        return session.read_response()

    check_driver(
        RedisDriver(port=redis_.port, password=PASSWORD, decode_responses=True),
        identity=lambda session: str(say(session, "CLIENT ID")),
        ask=lambda session, nonce: say(session, "ECHO", nonce),
        look=lambda session: repr([word for word in say(session, "CLIENT INFO").split() if word.partition("=")[0] in SHOWN]),
        dirty=[lambda session: say(session, "SELECT", 3), lambda session: say(session, "MULTI"), lambda session: session.send_command("GET", "a")],
        secrets=[PASSWORD],
    )


# The must-show: many workers on a small cap.


def asks(make_pool: Callable[[], Any]) -> Callable[[], Ask]:
    def begin() -> Ask:
        client: Any = redis.Redis(connection_pool=make_pool())
        script = client.register_script("return ARGV[1]")

        def one(nonce: str) -> None:
            kind = hash(nonce) % 6
            if kind == 0:
                assert client.pipeline(transaction=False).echo(nonce).set(nonce, 1, ex=5).execute()[0] == nonce.encode()
            elif kind == 1:
                with client.pipeline() as pipe:
                    pipe.watch(nonce)
                    pipe.multi()
                    pipe.set(nonce, nonce, ex=5)
                    pipe.get(nonce)
                    assert pipe.execute()[1] == nonce.encode()
            elif kind == 2:
                assert script(args=[nonce]) == nonce.encode()
            elif kind == 3:
                client.rpush(nonce, nonce)
                assert list(client.blpop(nonce, timeout=1)) == [nonce.encode()] * 2
            else:
                assert client.echo(nonce) == nonce.encode()

        return one

    return begin


@pytest.mark.storm
def test_twelve_workers_never_exceed_a_small_cap(redis_: Server, make: Make, request: pytest.FixtureRequest) -> None:
    """Twelve workers, killed and replaced, with redis-py's ordinary API on top: the server's own list is never longer than the cap, no reply crosses."""
    cap = 4
    seconds = float(request.config.getoption("--storm-seconds"))
    pool = make(max_connections=cap, timeout=20)
    storm = Storm(asks(lambda: pool), 12)
    made = redis_.made()
    try:
        with Peak(redis_.count) as peak:
            storm.run(seconds, kill_every=0.25)
            storm.end()
        stats = pool.mppool.get_stats()
        print(
            f"\nkills {storm.kills}, peak {peak.most} of {peak.samples} looks, connections {redis_.made() - made}, requests {storm.requests}, {stats['closed']}"
        )
        assert storm.failures == []
        assert peak.most <= cap
        assert redis_.made() - made <= cap + storm.kills + storm.workers  # a connection whose holder is killed ends with him; at the end all are
        assert storm.requests > 0
    finally:
        storm.end()


@pytest.mark.storm
def test_workers_share_a_few_connections_for_good(redis_: Server, make: Make) -> None:
    """Twelve workers, some killed while they hold nothing: connections made over the run are about the cap, whatever they do."""
    cap = 4
    pool = make(max_connections=cap, timeout=20)

    def work(child: Child) -> int:
        client: Any = redis.Redis(connection_pool=pool)
        for n in range(150):
            nonce = f"{os.getpid()}-{n}".encode()
            assert client.echo(nonce) == nonce
        return 150

    made = redis_.made()
    with Peak(redis_.count) as peak:
        for _ in range(2):
            with fork(*[work] * 12) as children:
                assert [child.result() for child in children] == [150] * 12
    print(f"\npeak {peak.most}, connections {redis_.made() - made} for 3600 requests of 24 processes")
    assert peak.most <= cap
    assert redis_.made() - made <= cap + 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_a_login_that_is_interrupted_leaves_no_connection_open(redis_: Server, interruption: type[BaseException]) -> None:
    """Also while the exception, and with it redis-py's object, is still at hand: its permit goes back at once."""

    def login(connection: Any) -> None:
        raise interruption

    before = open_descriptors()
    with pytest.raises(interruption) as raised:
        RedisDriver(port=redis_.port, redis_connect_func=login).dial()
    assert open_descriptors() == before
    assert raised.tb is not None
