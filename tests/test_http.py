"""HTTP/1.1 through urllib3, requests and httpx, against a real nginx, whose own count of connections is the judge."""

from __future__ import annotations

import asyncio
import pickle
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import requests
import urllib3
from urllib3.exceptions import EmptyPoolError, MaxRetryError, NewConnectionError

from mppool import shell
from mppool.integrations.httpx import AsyncHTTPTransport, HTTPTransport
from mppool.integrations.requests import HTTPAdapter
from mppool.integrations.urllib3 import PoolManager
from tests.helpers.daemons import free_port
from tests.helpers.nginx import Nginx, needs_nginx, nginx
from tests.helpers.processes import BrokerProcess, Child, fork
from tests.helpers.storm import Ask, Peak, Storm

pytestmark = needs_nginx

Get = Callable[[str], str]
loops: list[asyncio.AbstractEventLoop] = []  # of this test


@pytest.fixture(scope="module")
def web() -> Iterator[Nginx]:
    with nginx() as server:
        yield server


@pytest.fixture(autouse=True)
def let_go(socket_path: str) -> Iterator[None]:
    """Clients are not closed, as they are not in most programs: the process's end does it."""
    yield
    shell._leave_all()
    while loops:
        loops.pop().close()


def by_urllib3(path: str, cap: int) -> Get:
    manager = PoolManager(maxsize=cap, shared={"broker": path, "timeout": 20.0})
    return lambda url: manager.request("GET", url).data.decode()


def by_requests(path: str, cap: int) -> Get:
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=cap, shared={"broker": path}))

    def get(url: str) -> str:
        response = session.get(url, timeout=20)
        response.raise_for_status()
        return response.text

    return get


def by_httpx(path: str, cap: int) -> Get:
    client = httpx.Client(transport=HTTPTransport(max_connections=cap, broker=path), timeout=20)
    return lambda url: client.get(url).raise_for_status().text


def by_async_httpx(path: str, cap: int) -> Get:
    loop = asyncio.new_event_loop()
    loops.append(loop)
    client = httpx.AsyncClient(transport=AsyncHTTPTransport(max_connections=cap, broker=path), timeout=20)

    def get(url: str) -> str:
        return loop.run_until_complete(client.get(url)).raise_for_status().text

    return get


CLIENTS = [by_urllib3, by_requests, by_httpx, by_async_httpx]


def asks(client: Callable[[str, int], Get], url: str, path: str, cap: int) -> Callable[[], Ask]:
    def begin() -> Ask:
        get = client(path, cap)

        def one(nonce: str) -> None:
            _, echoed = get(f"{url}/echo?nonce={nonce}").split()
            assert echoed == nonce, f"a crossed reply: asked {nonce!r}, got {echoed!r}"

        return one

    return begin


@pytest.mark.parametrize("client", CLIENTS)
def test_workers_share_a_small_cap_and_survive_kills(
    web: Nginx, socket_path: str, broker: BrokerProcess, request: pytest.FixtureRequest, client: Callable[[str, int], Get]
) -> None:
    """Twelve workers, some SIGKILLed all the time, on a cap of 4: nginx never counts more (one more while a FIN travels), and no reply crosses."""
    with Storm(asks(client, web.url, socket_path, 4)) as storm, Peak(web.connections) as peak:
        storm.run(float(request.config.getoption("--storm-seconds")) / 2)
    print(f"\n{storm.requests} requests, {storm.kills} kills, peak {peak.most} in {peak.samples} samples")
    assert storm.failures == []
    assert peak.most <= 5
    assert storm.requests > 100


@pytest.mark.parametrize("client", CLIENTS)
def test_one_connection_serves_all_processes(web: Nginx, socket_path: str, broker: BrokerProcess, client: Callable[[str, int], Get]) -> None:
    """What one process dialed others use: three processes in turn, one connection in nginx's numbering."""

    def work(child: Child) -> list[str]:
        get = client(socket_path, 1)
        return [get(f"{web.url}/echo?nonce={n}").split()[0] for n in range(3)]

    with fork(work) as (first,):
        seen = first.result()
        with fork(work) as (second,):
            seen += second.result()
    assert len(set(seen)) == 1


@pytest.mark.parametrize("client", CLIENTS)
def test_connections_that_the_server_ends_are_no_error(web: Nginx, socket_path: str, client: Callable[[str, int], Get]) -> None:
    """A server that closes after seven requests, or says so in its answer, costs a connection each time and nothing else."""
    get = client(socket_path, 2)
    numbers = [get(f"{web.short}/echo?nonce={n}").split() for n in range(40)]
    assert [int(nonce) for _, nonce in numbers] == list(range(40))
    assert len({connection for connection, _ in numbers}) == 6
    closing = [get(f"{web.url}/close?nonce={n}").split()[0] for n in range(4)]
    assert len(set(closing)) == 4


def test_half_read_responses_are_not_lent_on(web: Nginx, socket_path: str) -> None:
    """A response that was given up before its end costs its connection, in all clients; one that was read streaming does not."""
    manager = PoolManager(maxsize=1, shared={"broker": socket_path})
    half = manager.request("GET", f"{web.url}/big/file", preload_content=False)
    half.read(1000)
    half.close()
    half.release_conn()
    first = manager.request("GET", f"{web.url}/echo?nonce=a").data.split()[0]
    whole = manager.request("GET", f"{web.url}/big/file", preload_content=False)
    assert sum(map(len, whole.stream(65536))) == 3_200_000
    assert manager.request("GET", f"{web.url}/echo?nonce=b").data.split()[0] == first
    manager.clear()

    with httpx.Client(transport=HTTPTransport(max_connections=1, broker=socket_path)) as client:
        with client.stream("GET", f"{web.url}/big/file") as response:
            next(response.iter_raw(1000))
        second = client.get(f"{web.url}/echo?nonce=c").text.split()[0]
        with client.stream("GET", f"{web.url}/big/file") as response:
            assert sum(map(len, response.iter_raw())) == 3_200_000
        assert client.get(f"{web.url}/echo?nonce=d").text.split()[0] == second != first.decode()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_cancelled_request_poisons_nothing(web: Nginx, socket_path: str, scheme: str) -> None:
    """Requests of httpx's asynchronous client that are cancelled in mid-handshake or mid-response: every later answer is its own."""
    url = web.url if scheme == "http" else web.secure

    async def main() -> int:
        cancelled = 0
        async with httpx.AsyncClient(transport=AsyncHTTPTransport(max_connections=2, broker=socket_path, verify=False), timeout=20) as client:
            for n in range(75):
                task = asyncio.ensure_future(client.get(f"{url}/slow/file"))
                for _ in range(n % 25):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    cancelled += 1
                assert (await client.get(f"{url}/echo?nonce={n}")).text.split()[1] == str(n)
        return cancelled

    assert asyncio.run(main()) > 30
    assert web.connections() <= 2


def test_the_cap_is_strict_and_says_so(web: Nginx, socket_path: str) -> None:
    """Beyond the cap urllib3's EmptyPoolError, httpx's PoolTimeout and requests' ConnectionError are raised after their timeouts."""
    manager = PoolManager(maxsize=1, block=True, shared={"broker": socket_path})
    pool = manager.connection_from_url(web.url)
    held = pool.request("GET", "/echo?nonce=x", preload_content=False)
    with pytest.raises(EmptyPoolError, match="max_size=1, in_use=1"):
        pool.urlopen("GET", "/echo", pool_timeout=0.05)  # type: ignore[arg-type]
    held.read()
    manager.clear()
    with (
        httpx.Client(transport=HTTPTransport(max_connections=1, broker=socket_path), timeout=httpx.Timeout(5, pool=0.05)) as client,
        client.stream("GET", f"{web.url}/big/file"),
        pytest.raises(httpx.PoolTimeout),
    ):
        client.get(f"{web.url}/echo")
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=1, shared={"broker": socket_path, "name": "one"}))
    with session.get(f"{web.url}/big/file", stream=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mppool.integrations.urllib3.WAIT", 0.05)
        with pytest.raises(requests.exceptions.ConnectionError, match="in_use=1"):
            session.get(f"{web.url}/echo")
    session.close()


def test_a_server_that_is_down_is_the_clients_own_error(socket_path: str) -> None:
    """At once: urllib3's NewConnectionError in MaxRetryError, requests' ConnectionError, httpx's ConnectError."""
    url = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(MaxRetryError) as caught:
        PoolManager(shared={"broker": socket_path}).request("GET", url, retries=1)
    assert isinstance(caught.value.reason, NewConnectionError)
    session = requests.Session()
    session.mount("http://", HTTPAdapter(shared={"broker": socket_path, "name": "down"}))
    with pytest.raises(requests.exceptions.ConnectionError):
        session.get(url)
    with pytest.raises(httpx.ConnectError):
        httpx.Client(transport=HTTPTransport(broker=socket_path)).get(url)


def test_redirects_retries_and_heads_are_urllib3s(web: Nginx, socket_path: str) -> None:
    """Redirects are followed, statuses retried, HEAD has no body, on the same connection."""
    manager = PoolManager(maxsize=1, shared={"broker": socket_path})
    first = manager.request("GET", f"{web.url}/echo?nonce=1").data.split()[0]
    assert manager.request("GET", f"{web.url}/moved").data.split() == [first, b"moved"]
    assert manager.request("HEAD", f"{web.url}/big/file").headers["Content-Length"] == "3200000"
    with pytest.raises(MaxRetryError, match="503"):
        manager.request("GET", f"{web.url}/sorry", retries=urllib3.Retry(2, status_forcelist=[503], backoff_factor=0))
    assert manager.request("GET", f"{web.url}/echo?nonce=2").data.split()[0] == first
    manager.clear()


def test_https_is_resident_and_counts_in_the_cap(web: Nginx, socket_path: str, broker: BrokerProcess) -> None:
    """A TLS connection is reused by its process, never shared, and ended for another process that is in need."""

    def work(child: Child) -> list[str]:
        session = requests.Session()
        session.trust_env = False  # else the environment's certificates win
        session.verify = web.certificate
        session.mount("https://", HTTPAdapter(pool_maxsize=1, shared={"broker": socket_path}))
        seen = []
        while child.hear() != "end":
            seen.append(session.get(f"{web.secure}/echo?nonce=1", timeout=20).text.split()[0])
            child.tell("done")
        return seen

    with fork(work, work) as (one, other):
        for child in (one, one, other, one):
            child.tell("go")
            assert child.hear() == "done"
        found = []
        for child in (one, other):
            child.tell("end")
            found.append(child.result())
    assert found[0][0] == found[0][1] != found[0][2]
    assert len({*found[0], *found[1]}) == 3


def secure_by_httpx(path: str, cap: int, verify: Any, timeout: float = 20.0) -> Get:
    client = httpx.Client(transport=HTTPTransport(max_connections=cap, broker=path, verify=verify, connect_timeout=timeout), timeout=20)
    return lambda url: client.get(url).raise_for_status().text


def secure_by_async_httpx(path: str, cap: int, verify: Any, timeout: float = 20.0) -> Get:
    loop = asyncio.new_event_loop()
    loops.append(loop)
    client = httpx.AsyncClient(transport=AsyncHTTPTransport(max_connections=cap, broker=path, verify=verify, connect_timeout=timeout), timeout=20)
    return lambda url: loop.run_until_complete(client.get(url)).raise_for_status().text


SECURE = [secure_by_httpx, secure_by_async_httpx]


@pytest.mark.parametrize("client", SECURE)
def test_httpx_over_tls_is_resident(web: Nginx, socket_path: str, broker: BrokerProcess, client: Callable[..., Get]) -> None:
    """Reused by its process; ended for another one that is in need, whatever SSLContext that one has; large replies come whole; an end is an end."""
    get = client(socket_path, 1, ssl.create_default_context(cafile=web.certificate))
    mine = {get(f"{web.secure}/echo?nonce={n}").split()[0] for n in range(5)}
    assert len(mine) == 1
    assert len(get(f"{web.secure}/big/file")) == 3_200_000

    def work(child: Child) -> str:
        context = ssl.create_default_context(cafile=web.certificate)
        return client(socket_path, 1, context)(f"{web.secure}/echo?nonce=1").split()[0]

    with fork(work) as (child,):
        other = child.result()
    assert other not in mine
    ends = [get(f"{web.secure}/close?nonce=1").split()[0] for _ in range(3)]
    assert len({*mine, other, *ends, get(f"{web.secure}/echo?nonce=1").split()[0]}) == 6


@pytest.mark.parametrize("client", SECURE)
def test_workers_share_a_small_cap_of_tls_connections(
    web: Nginx, socket_path: str, broker: BrokerProcess, request: pytest.FixtureRequest, client: Callable[..., Get]
) -> None:
    """Twelve workers, some SIGKILLed, on a cap of 4 connections that cannot move: nginx never counts more, no request fails."""
    trusting = partial(client, verify=False)
    with Storm(asks(trusting, web.secure, socket_path, 4)) as storm, Peak(web.connections) as peak:
        storm.run(float(request.config.getoption("--storm-seconds")) / 2)
    print(f"\n{storm.requests} requests, {storm.kills} kills, peak {peak.most} in {peak.samples} samples")
    assert storm.failures == []
    assert peak.most <= 5
    assert storm.requests > 0


@pytest.mark.parametrize("client", SECURE)
def test_who_does_not_trust_a_server_is_no_trouble_to_who_does(web: Nginx, socket_path: str, client: Callable[..., Get]) -> None:
    """In one process. A handshake that fails is httpx's ConnectError, and costs no permit; one that takes too long ConnectTimeout."""
    trusting, distrustful = client(socket_path, 1, False), client(socket_path, 1, True)
    for _ in range(3):
        assert trusting(f"{web.secure}/echo?nonce=1").split()[1] == "1"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            distrustful(f"{web.secure}/echo?nonce=1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(httpx.ConnectTimeout):
        client(socket_path, 1, False, 0.05)(f"https://127.0.0.1:{silent.getsockname()[1]}/")


def test_a_requests_own_connect_timeout_holds(socket_path: str) -> None:
    """httpx's ``timeout``, where it is shorter than the transport's ``connect_timeout``."""
    timeout = httpx.Timeout(600, connect=0.05)

    def blocking(url: str) -> str:
        with (
            httpx.Client(transport=HTTPTransport(broker=socket_path, connect_timeout=600), timeout=timeout) as client,
            pytest.raises(httpx.TransportError) as raised,
        ):
            client.get(url)
        return type(raised.value).__name__

    async def waiting(url: str) -> str:
        transport = AsyncHTTPTransport(broker=socket_path, connect_timeout=600)
        async with httpx.AsyncClient(transport=transport, timeout=timeout) as client:
            with pytest.raises(httpx.TransportError) as raised:
                await client.get(url)
        return type(raised.value).__name__

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        with fork(lambda _: blocking(url), lambda _: asyncio.run(waiting(url))) as children:
            assert [child.result() for child in children] == ["ConnectTimeout"] * 2


def begun_by_httpx(url: str, path: str) -> Any:
    client = httpx.Client(transport=HTTPTransport(broker=path), timeout=20)
    return client.send(client.build_request("GET", url), stream=True)


def begun_by_requests(url: str, path: str) -> Any:
    session = requests.Session()
    session.mount("http://", HTTPAdapter(shared={"broker": path}))
    return session.get(url, stream=True, timeout=20)


@pytest.mark.parametrize("begin", [begun_by_httpx, begun_by_requests])
def test_a_child_forked_in_the_middle_of_a_response_leaves_it_to_its_parent(web: Nginx, socket_path: str, begin: Callable[[str, str], Any]) -> None:
    """It may close its copy, as the end of a ``with`` block does."""
    response = begin(f"{web.url}/echo?nonce=1", socket_path)

    def child(_: Child) -> str:
        response.close()
        return "closed"

    with fork(child) as (forked,):
        assert forked.result() == "closed"
    text = response.read() if isinstance(response, httpx.Response) else response.content
    assert text.split()[1] == b"1"
    response.close()


def test_an_adapter_can_be_pickled(web: Nginx, socket_path: str) -> None:
    """As requests' own: the copy has its own manager, and the same options."""
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=2, shared={"broker": socket_path}))
    copy: Any = pickle.loads(pickle.dumps(session))
    assert copy.get(f"{web.url}/echo?nonce=1").text.split()[1] == "1"
    pool = copy.get_adapter("http://").poolmanager.connection_from_url(web.url).shared_pool
    assert (pool.broker, pool.options.max_size) == (socket_path, 2)
    copy.close()
    session.close()
