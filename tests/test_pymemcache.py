"""pymemcache against a real memcached: the cap holds over all workers, no answer is somebody else's, and pymemcache's ways are kept."""

from __future__ import annotations

import contextlib
import signal
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymemcache
import pytest
from pymemcache.exceptions import MemcacheClientError, MemcacheError, MemcacheIllegalInputError, MemcacheServerError, MemcacheUnexpectedCloseError
from pymemcache.serde import PickleSerde

import mppool
from mppool.drivers.pymemcache import PymemcacheDriver
from mppool.integrations.pymemcache import HashClient, ObjectPool, PooledClient, TooManyObjects
from mppool.states import Residence
from mppool.testing import check_driver
from tests.helpers.certificates import self_signed
from tests.helpers.daemons import daemon, free_port, needs
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.storm import Ask, Peak, Storm

pytestmark = needs("memcached")


class Memcached:
    def __init__(self, port: int) -> None:
        self.port = port
        self.server = f"127.0.0.1:{port}"
        self.judge = pymemcache.Client(self.server, timeout=5)
        self.one_at_a_time = threading.Lock()  # the judge is asked from threads, too

    def stats(self) -> Any:
        with self.one_at_a_time:
            return self.judge.stats()

    def connections(self) -> int:
        """As the server counts them, without ours and its own listening one."""
        return int(self.stats()[b"curr_connections"]) - self.own

    def made(self) -> int:
        return int(self.stats()[b"total_connections"])

    def look(self) -> None:
        self.own = int(self.stats()[b"curr_connections"])


@pytest.fixture(scope="module")
def memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    port = free_port()
    with daemon(command(port), port, tmp_path_factory.mktemp("memcached") / "log"):
        server = Memcached(port)
        eventually(lambda: server.stats()[b"curr_connections"] <= 3)  # the one that looked if it listens is gone
        server.look()
        yield server
        server.judge.close()


def command(port: int) -> list[str]:
    return ["memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", str(port), "-t", "2"]


@contextlib.contextmanager
def client_of(server: str, broker: BrokerProcess, kind: type[Any] = PooledClient, **options: Any) -> Iterator[Any]:
    client = kind(server, **{"pool_broker": broker.path, "max_pool_size": 2, **options})
    try:
        yield client
    finally:
        client.client_pool.pool.close()


def answering(client: PooledClient) -> Callable[[Child], None]:
    """A child that calls the methods that it is told, with arguments, and tells what came out."""

    def work(child: Child) -> None:
        while True:
            order = child.hear()
            if order is None:
                client.pool.close()
                return
            name, *arguments = order
            child.tell(str(getattr(client, name)(*arguments)))

    return work


# One pool.


def test_all_commands_work_and_share_one_connection(memcached: Memcached, broker: BrokerProcess) -> None:
    """Every command of pymemcache's, from two processes in turn, on one connection."""
    made = memcached.made()
    with client_of(memcached.server, broker, max_pool_size=1, default_noreply=False) as client, fork(answering(client)) as (child,):
        assert client.set("a", "1")
        child.tell(["get", "a"])
        assert child.hear() == "b'1'"
        assert client.add("a", "2") is False
        assert client.replace("a", "3")
        assert client.append("a", "4")
        assert client.prepend("a", "2")
        assert client.get("a") == b"234"
        assert client.incr("a", 1) == 235
        child.tell(["decr", "a", 5])
        assert child.hear() == "230"
        value, cas = client.gets("a")
        assert client.cas("a", "9", cas)
        assert client.cas("a", "8", cas) is False
        assert client.set_many({"b": "1", "c": "2"}) == []
        assert client.get_many(["b", "c", "d"]) == {"b": b"1", "c": b"2"}
        assert set(client.gets_many(["b"])) == {"b"}
        assert client.touch("b", 100)
        assert client.delete("b")
        assert client.delete_many(["c"])
        client["k"] = "v"
        assert client["k"] == b"v"
        del client["k"]
        with pytest.raises(KeyError):
            client["k"]
        assert client.version()
        assert client.stats()[b"version"]
        assert client.raw_command("mn", "MN\r\n") == b""
        assert client.flush_all()
        assert client.get("a") is None
        assert value == b"230"
        child.tell(None)
        child.result()
    assert memcached.made() - made == 1


def test_the_driver_keeps_its_promises(memcached: Memcached) -> None:
    """The pool's own checks."""

    def ask(client: Any, nonce: str) -> Any:
        client.set("nonce", nonce, noreply=False)
        return client.get("nonce")

    def an_answer_that_is_not_read(client: Any) -> None:
        client.sock.sendall(b"get nonce\r\n")

    def half_an_answer(client: Any) -> None:
        client.raw_command("get nonce")

    def a_short_timeout(client: Any) -> None:
        client.sock.settimeout(1e-9)

    report = check_driver(
        PymemcacheDriver(memcached.server),
        ask=ask,
        dirty=[an_answer_that_is_not_read, half_an_answer, a_short_timeout],
        unreachable=PymemcacheDriver("127.0.0.1:1"),
    )
    assert set(report.skipped) == {"attach_fails_cleanly", "reset"}


def test_the_cap_is_all_workers_and_waits_a_moment(memcached: Memcached, broker: BrokerProcess) -> None:
    """When all connections are in use, a command waits ``pool_timeout``, then raises what pymemcache's pool raises; one that comes back in time is used."""
    with client_of(memcached.server, broker, max_pool_size=1, pool_timeout=0.2) as client:
        with client.client_pool.get_and_release() as held:
            assert held.version()
            with pytest.raises(RuntimeError, match="max_size=1") as failure:
                client.get("a")
            assert isinstance(failure.value, TooManyObjects)
            assert not isinstance(failure.value, OSError)  # which HashClient takes for a server that is down
        client.get("a")
        with client_of(memcached.server, broker, max_pool_size=1, pool_timeout=0.05, ignore_exc=True) as lenient, client.client_pool.get_and_release():
            assert lenient.get("a", "miss") == "miss"
            assert lenient.get_many(["a"]) == {}
            assert lenient.gets("a") == (None, None)
            with pytest.raises(TooManyObjects):
                lenient.set("a", "1")


def test_the_arguments_of_pymemcaches_are_taken(memcached: Memcached, broker: BrokerProcess) -> None:
    """All of PooledClient's, also by position; what cannot be is refused by name."""
    with client_of(memcached.server, broker, serde=PickleSerde(), key_prefix="app:", lock_generator=threading.RLock, pool_idle_timeout=7, timeout=3) as client:
        client.set("object", {"a": [1]}, noreply=False)
        assert client.get("object") == {"a": [1]}
        assert memcached.judge.get("app:object")
        assert client.pool.options.max_idle == 7
    assert PooledClient(memcached.server).pool.options.max_size == 16
    assert PooledClient("/tmp/some.sock").pool.name.startswith("memcached@unix-")
    for wrong in ({"max_pool_size": "many"}, {"pool_sise": 3}, {"socket_module": contextlib}, {"socket_keepalive": 3}):
        with pytest.raises((ValueError, TypeError)):
            PooledClient(memcached.server, **wrong)


def test_close_begins_anew(memcached: Memcached, broker: BrokerProcess) -> None:
    """As in pymemcache, a client that was closed connects again at the next command; quit() ends one connection."""
    with client_of(memcached.server, broker) as client:
        client.set("a", "1", noreply=False)
        client.close()
        assert client.get("a") == b"1"
        client.quit()
        assert client.get("a") == b"1"


def test_the_pool_can_be_used_as_pymemcaches(memcached: Memcached, broker: BrokerProcess) -> None:
    """get, release, destroy; releasing twice is silent unless asked."""
    with client_of(memcached.server, broker) as client:
        pool: ObjectPool = client.client_pool
        one = pool.get()
        pool.release(one)
        pool.release(one)
        with pytest.raises(ValueError, match="not lent"):
            pool.release(one, silent=False)
        pool.destroy(pool.get())
        eventually(lambda: memcached.connections() == 0)
        assert pool.max_size == 2


# Answers.


def test_what_may_be_half_an_answer_is_not_lent_on(memcached: Memcached, broker: BrokerProcess) -> None:
    """After a raw command the server is asked for something else first: a rest of its answer closes the connection."""
    with client_of(memcached.server, broker, max_pool_size=1, default_noreply=False) as client:
        client.set("a", "1")
        for _ in range(50):
            assert client.raw_command("get a").startswith(b"VALUE a 0 1")  # and the rest is not read
            assert client.incr("a", 0) == 1
            assert client.raw_command("get a\r\nget a", "END\r\n")
            assert client.get("a") == b"1"


class Slow(socketserver.StreamRequestHandler):
    """A memcached whose answer to ``get slow`` comes in two halves."""

    def handle(self) -> None:
        for line in self.rfile:
            if line == b"version\r\n":
                self.wfile.write(b"VERSION 1\r\n")
            elif line == b"get slow\r\n":
                self.wfile.write(b"VALUE slow 0 1\r\n")
                time.sleep(0.05)
                self.wfile.write(b"x\r\nEND\r\n")
            else:
                self.wfile.write(b"VALUE a 0 1\r\n1\r\nEND\r\n")


def test_the_second_half_of_an_answer_may_be_late(broker: BrokerProcess) -> None:
    """Nothing is to be read yet when the connection is given back, and the rest comes while the next command waits for its own answer."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with client_of(f"127.0.0.1:{server.server_address[1]}", broker, max_pool_size=1) as client:
                for _ in range(3):
                    assert client.raw_command("get slow") == b"VALUE slow 0 1"
                    assert client.get("a") == b"1"
        finally:
            server.shutdown()
            thread.join()


class Interrupted(BaseException):
    pass


def test_an_interrupted_client_that_is_given_back_is_closed(memcached: Memcached, broker: BrokerProcess) -> None:
    """A pool's user who gives his client back whatever happened to it gives nobody a late answer: the driver knows that one is owed."""

    class Interrupting(PickleSerde):  # type: ignore[misc]
        def deserialize(self, key: Any, value: Any, flags: Any) -> Any:
            raise Interrupted

    pool = mppool.Pool(driver=PymemcacheDriver(memcached.server), name="given-back", max_size=1, broker=broker.path)
    with contextlib.closing(pool):
        client = pool.getconn()
        client.set("a", "1", noreply=False)
        client.set("b", "2", noreply=False)
        serde, client.serde = client.serde, Interrupting()
        try:
            with pytest.raises(Interrupted):
                client.get_many(["a", "b"])
        finally:
            client.serde = serde
            pool.putconn(client)
        assert pool.get_stats()["closed"] == {"reset_failed": 1}


def test_an_interrupted_command_gives_nobody_its_answer(memcached: Memcached, broker: BrokerProcess) -> None:
    """pymemcache keeps a connection whose command was ended by a KeyboardInterrupt, answer and all; here it is closed."""
    with fork(lambda _: interrupted_commands(memcached, broker)) as (child,):  # where no other thread runs: beside one, strays are not settled
        child.result()


def interrupted_commands(memcached: Memcached, broker: BrokerProcess) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, interrupt)
    with client_of(memcached.server, broker, max_pool_size=1, default_noreply=False) as client:
        client.set_many({f"k{n}": f"v{n}" for n in range(100)})
        for round_ in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + round_ * 0.0001)
                for n in range(100000):
                    assert client.get(f"k{n % 100}") == f"v{n % 100}".encode()
            except Interrupted:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for n in range(10):
                assert client.get(f"k{n}") == f"v{n}".encode()


def test_a_lease_lost_to_an_interruption_is_found(memcached: Memcached, broker: BrokerProcess) -> None:
    """An exception can fall between the two halves of ``ready = leases.pop(...)``. Whoever waits next finds the stray, also from within a client's code."""

    def work(_: Child) -> None:
        with client_of(memcached.server, broker, max_pool_size=1, pool_timeout=10) as client:
            client.set("a", "text")
            pool = client.client_pool.pool
            del pool._worker.leases[id(pool.getconn())]
            assert client.get("a") == b"text"
            assert pool.get_stats()["closed"] == {"discarded": 1}

    with fork(work) as (child,):
        child.result()


def test_after_an_error_the_connection_is_closed_as_pymemcache_does(memcached: Memcached, broker: BrokerProcess) -> None:
    """Errors of the server and of the serializer close it; illegal input, which is found before anything is sent, does not."""
    with client_of(memcached.server, broker, max_pool_size=1, default_noreply=False) as client:
        client.set("a", "text")
        made = memcached.made()
        for illegal in ("with space", "x" * 300, "nul\0"):
            with pytest.raises(MemcacheIllegalInputError):
                client.get(illegal)
        with pytest.raises(MemcacheIllegalInputError):
            client.set("a", "1", expire="soon")
        assert client.get("a") == b"text"
        assert memcached.made() == made
        with pytest.raises(MemcacheClientError):
            client.incr("a", 1)
        with pytest.raises(MemcacheServerError):
            client.set("big", b"x" * 3_000_000)
        assert client.get("a") == b"text"
        assert memcached.made() - made == 2


def test_errors_of_unanswered_writes_reach_nobody(memcached: Memcached, broker: BrokerProcess) -> None:
    """Writes with noreply that memcached refuses: it is silent, and the next commands get their own answers."""
    with client_of(memcached.server, broker, max_pool_size=1) as client:
        client.set("a", "text", noreply=False)
        for n in range(20):
            client.set("big", b"x" * 1_200_000)
            client.incr("a", 1, noreply=True)
            client.cas("a", "1", "123456789", noreply=True)
            client.set(f"n{n}", str(n))
            assert client.get(f"n{n}") == str(n).encode()
            assert client.get("a") == b"text"


def test_a_lent_client_does_not_connect_by_itself(memcached: Memcached, broker: BrokerProcess) -> None:
    """After an error closed its connection, a client that is still lent raises, instead of making one outside the cap."""
    driver = PymemcacheDriver(memcached.server)
    pool = mppool.Pool(driver=driver, name="raw-clients", max_size=1, broker=broker.path)
    with contextlib.closing(pool):
        client = pool.getconn()
        client.close()
        with pytest.raises(MemcacheUnexpectedCloseError):
            client.get("a")
        pool.putconn(client)
        with pool.connection() as client:
            assert client.version()


def test_tls_stays_with_its_process(broker: BrokerProcess, tmp_path: Path) -> None:
    """With a TLS context connections are resident: each process makes its own, within the cap of all."""
    port = free_port()
    key, certificate = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    secured = [*command(port), "-u", "root", "-Z", "-o", f"ssl_key={key},ssl_chain_cert={certificate}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(daemon(secured, port, tmp_path / "log"))
        client = stack.enter_context(client_of(f"127.0.0.1:{port}", broker, tls_context=context, max_pool_size=1, default_noreply=False))
        with fork(answering(client)) as (child,):
            for n in range(3):
                client.set("a", n)
                child.tell(["get", "a"])
                assert child.hear() == f"b'{n}'"
            driver = client.pool._driver
            assert driver.key().endswith(" tls")
            with client.client_pool.get_and_release() as held:
                assert driver.residence(held) is Residence.tls
                assert int(held.stats()[b"curr_connections"]) - int(held.stats()[b"threads"]) <= 3
            assert client.pool.get_stats()["dials"] >= 4
            child.tell(None)
            child.result()


# The server goes.


def test_a_server_that_is_down_fails_at_once_and_comes_back(broker: BrokerProcess, tmp_path: Path) -> None:
    """A ConnectionError without waiting, a miss with ``ignore_exc``; after a restart the cache is there again."""
    port = free_port()
    with client_of(f"127.0.0.1:{port}", broker, pool_timeout=30) as client, client_of(f"127.0.0.1:{port}", broker, pool_timeout=30, ignore_exc=True) as lenient:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                client.get("a")
            assert lenient.get("a") is None
            assert time.monotonic() - began < 20
        for _ in range(2):
            with daemon(command(port), port, tmp_path / "log"):
                eventually(lambda: works(client))
                client.set("a", "1", noreply=False)
                assert client.get("a") == b"1"
            eventually(lambda: not works(client))


def works(client: PooledClient) -> bool:
    try:
        return bool(client.version())
    except (OSError, MemcacheError):
        return False


def test_hash_clients_have_a_cap_for_each_server(memcached: Memcached, broker: BrokerProcess, tmp_path: Path) -> None:
    """HashClient spreads keys over servers, each with its pool; a server that goes is left out, and tried again later."""
    port = free_port()
    servers = [memcached.server, f"127.0.0.1:{port}"]
    options: dict[str, Any] = {"pool_broker": broker.path, "max_pool_size": 1, "retry_attempts": 1, "retry_timeout": 0.05, "dead_timeout": 0.2}
    with daemon(command(port), port, tmp_path / "log"):
        cluster = HashClient(servers, default_noreply=False, ignore_exc=True, **options)
        try:
            assert cluster.set_many({f"k{n}": str(n) for n in range(50)}) == []
            assert cluster.get_many([f"k{n}" for n in range(50)]) == {f"k{n}": str(n).encode() for n in range(50)}
            assert {client.pool.options.max_size for client in cluster.clients.values()} == {1}
            assert len({client.pool.name for client in cluster.clients.values()}) == 2
            eventually(lambda: memcached.connections() == 1)
        finally:
            for client in cluster.clients.values():
                client.pool.close()


def test_a_server_of_a_cluster_that_goes_is_tried_again(memcached: Memcached, broker: BrokerProcess, tmp_path: Path) -> None:
    """pymemcache's own way with dead servers works on these clients: out of rotation, and back, with nothing left behind."""
    port = free_port()
    options: dict[str, Any] = {"pool_broker": broker.path, "max_pool_size": 1, "retry_attempts": 0, "dead_timeout": 0.1}
    cluster = HashClient([memcached.server, f"127.0.0.1:{port}"], default_noreply=False, ignore_exc=True, **options)
    try:
        for n in range(30):
            cluster.set(f"k{n}", str(n))
        assert list(cluster._dead_clients) == [("127.0.0.1", port)]
        assert all(cluster.set(f"k{n}", str(n)) for n in range(30))
        with daemon(command(port), port, tmp_path / "log"):
            eventually(lambda: all(cluster.set(f"k{n}", str(n)) for n in range(30)) and not cluster._dead_clients)
            assert all(cluster.set(f"k{n}", str(n)) for n in range(30))
            assert all(cluster.get(f"k{n}") == str(n).encode() for n in range(30))
    finally:
        for client in cluster.clients.values():
            client.pool.close()


# Storms.


@pytest.mark.storm
def test_a_storm_of_workers(memcached: Memcached, broker: BrokerProcess, request: pytest.FixtureRequest) -> None:
    """12 workers on a cap of 3, killed all the time: the server never has more connections, no answer is crossed, they are made for kills only."""
    cap, seconds = 3, float(request.config.getoption("--storm-seconds"))
    with client_of(memcached.server, broker, max_pool_size=cap, pool_timeout=20, default_noreply=False) as client:

        def begin() -> Ask:
            def one(nonce: str) -> None:
                key = nonce.partition("-")[0]
                assert client.set(key, nonce)
                assert client.get(key) == nonce.encode()
                client.set(f"{key}-quiet", nonce, noreply=True)
                assert client.get_many([key, "none"]) == {key: nonce.encode()}

            return one

        eventually(lambda: memcached.connections() == 0)
        made = memcached.made()
        with Storm(begin, 12) as storm, Peak(memcached.connections) as peak:
            storm.run(seconds / 2, kill_every=0.1)
            made = memcached.made() - made
            storm.end()
        print(f"\nkills {storm.kills}, peak {peak.most} of {cap} in {peak.samples} looks, made {made}, requests {storm.requests}")
        print(f"closed {client.pool.get_stats()['closed']}, {client.pool.get_stats()['repairs']} repairs, {client.pool.get_stats()['dials']} dials")
        assert storm.failures == []
        assert storm.requests > 100
        assert peak.most <= cap + 1  # while the end of a killed worker's connection travels
        assert made <= cap + storm.kills
