"""HTTP/1.1: what does adopting a connection cost beside a new one, and a request over our pool beside one over the client's own? In one run.

    scripts/bench http [--rounds N] [--number N] [--json]

*login*: a new TCP connection, the client's object, and its end; over loopback, where it is as cheap as can be. *adopt*: a live connection
that another process used becomes ours (once a process and connection). *checkout* takes the one idle connection and gives it back; httpx's
own pool has no call that does only that. *with command* is a GET of two bytes from nginx.

Every round measures everything, in an order of its own: compare the ratios, not the microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import repeat
from time import perf_counter_ns
from typing import Any

from bench_checkout import Measure, pair
from bench_clients import Clients, Measures, calls, run
from bench_servers import broker, nginx, private_directory


def beginning(stack: ExitStack) -> tuple[str, dict[str, Any]]:
    """An nginx and a broker: the URL of the one, the options of a pool at the other."""
    directory = stack.enter_context(private_directory())
    port = stack.enter_context(nginx(directory))
    stack.enter_context(broker(f"{directory}/broker.sock"))
    return f"http://127.0.0.1:{port}/", {"broker": f"{directory}/broker.sock"}


def adopting(stack: ExitStack, driver: Any) -> Callable[[], None]:
    """A live session under a new object of this driver's, each time."""
    session = driver.dial()
    stack.callback(driver.close, session)
    fd = driver.fileno(session)
    return lambda: driver.abort(driver.attach(fd, b""))


@contextlib.contextmanager
def urllib3() -> Iterator[Measures]:
    from urllib3 import PoolManager

    from mppool.integrations.urllib3 import PoolManager as Ours

    with ExitStack() as stack:
        url, options = beginning(stack)
        ours, theirs = Ours(maxsize=4, shared=options), PoolManager(maxsize=4)
        stack.callback(ours.clear)
        stack.callback(theirs.clear)
        yield as_urllib3(stack, url, ours, theirs, lambda: ours.request("GET", url), lambda: theirs.request("GET", url))


@contextlib.contextmanager
def requests() -> Iterator[Measures]:
    from requests import Session

    from mppool.integrations.requests import HTTPAdapter

    with ExitStack() as stack:
        url, options = beginning(stack)
        adapter = HTTPAdapter(pool_maxsize=4, shared=options)
        ours, theirs = stack.enter_context(Session()), stack.enter_context(Session())
        ours.mount("http://", adapter)
        own: Any = theirs.get_adapter(url)
        yield as_urllib3(stack, url, adapter.poolmanager, own.poolmanager, lambda: ours.get(url), lambda: theirs.get(url))


def as_urllib3(stack: ExitStack, url: str, ours: Any, theirs: Any, get: Callable[[], Any], get_theirs: Callable[[], Any]) -> Measures:
    get()
    get_theirs()
    pool, own = ours.connection_from_url(url), theirs.connection_from_url(url)

    def login() -> None:
        conn = own.ConnectionCls(host=pool.host, port=pool.port)
        conn.connect()
        conn.close()

    return {
        "login": calls(login),
        "adopt": calls(adopting(stack, pool.shared_pool._driver)),
        "checkout": pair(pool._get_conn, pool._put_conn),
        "theirs": pair(own._get_conn, own._put_conn),
        "with command": calls(get),
        "theirs with command": calls(get_theirs),
    }


@contextlib.contextmanager
def httpx() -> Iterator[Measures]:
    from httpx import Client

    from mppool.integrations.httpx import HTTPTransport

    with ExitStack() as stack:
        url, options = beginning(stack)
        transport = HTTPTransport(max_connections=4, **options)
        ours, theirs = stack.enter_context(Client(transport=transport)), stack.enter_context(Client())
        ours.get(url)
        (pool,) = transport.pools().values()
        driver = pool._driver
        yield {
            "login": calls(lambda: driver.close(driver.dial())),
            "adopt": calls(adopting(stack, driver)),
            "checkout": pair(pool.getconn, pool.putconn),
            "with command": calls(lambda: ours.get(url)),
            "theirs with command": calls(lambda: theirs.get(url)),
        }


@contextlib.contextmanager
def async_httpx() -> Iterator[Measures]:
    from httpx import AsyncClient

    from mppool.integrations.httpx import AsyncHTTPTransport

    with ExitStack() as stack:
        url, options = beginning(stack)
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        transport = AsyncHTTPTransport(max_connections=4, **options)
        ours, theirs = AsyncClient(transport=transport), AsyncClient()
        stack.callback(lambda: loop.run_until_complete(ours.aclose()))
        stack.callback(lambda: loop.run_until_complete(theirs.aclose()))
        loop.run_until_complete(ours.get(url))
        (pool,) = transport.pools().values()
        driver = pool._driver
        session = loop.run_until_complete(driver.dial())
        stack.callback(driver.close, session)
        fd = driver.fileno(session)

        async def connect() -> None:
            driver.close(await driver.dial())

        async def checkout() -> None:
            await pool.putconn(await pool.getconn())

        yield {
            "login": awaited(loop, connect),
            "adopt": calls(lambda: driver.abort(driver.attach(fd, b""))),
            "checkout": awaited(loop, checkout),
            "with command": awaited(loop, lambda: ours.get(url)),
            "theirs with command": awaited(loop, lambda: theirs.get(url)),
        }


def awaited(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> Measure:
    async def repeatedly(number: int) -> int:
        began = perf_counter_ns()
        for _ in repeat(None, number):
            await function()
        return perf_counter_ns() - began

    return lambda number: loop.run_until_complete(repeatedly(number))


CLIENTS: Clients = {"urllib3": urllib3, "requests": requests, "httpx": httpx, "httpx, async": async_httpx}

if __name__ == "__main__":
    run("http", CLIENTS, __doc__)
