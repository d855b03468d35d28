"""Four uvicorn workers, four connections to Redis: a plain ASGI application on redis.asyncio, and on raw sockets.

From the repository, with a Redis on 127.0.0.1:6379, one command starts the broker, uvicorn and its workers:

    mppool run -- uvicorn --app-dir examples/asgi_redis --workers 4 asgi_app:app

and then, in another terminal:

    $ curl http://127.0.0.1:8000/redis/hello                 # through redis.asyncio
    hello
    $ curl http://127.0.0.1:8000/raw/hello                   # through an mppool.AsyncPool of sockets
    hello
    $ redis-cli info clients | grep connected_clients        # never more than 4 of each, and redis-cli's own

The environment: ``REDIS_URL`` is the server (redis://127.0.0.1:6379), ``REDIS_CONNECTIONS`` the cap of each pool (4).

What to look at. Both requests wait a little in Redis (``?ms=20``). When a browser goes away meanwhile, its request is cancelled,
wherever it is: waiting for a connection, for a reply, between the two. The connection it had is closed, because a reply is
still to come on it; nobody else ever sees that reply.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis.asyncio

import mppool
from mppool.integrations.redis.asyncio import BlockingConnectionPool

URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
CAP = int(os.environ.get("REDIS_CONNECTIONS", "4"))

client = redis.asyncio.Redis(connection_pool=BlockingConnectionPool.from_url(URL, max_connections=CAP, timeout=10, name="asgi-redis"))


async def log_in(sock: Any) -> None:
    """With each new raw connection."""
    password = urlsplit(URL).password
    if password:
        await say(sock, ("AUTH", password))
        await read(sock, b"+OK\r\n")


raw = mppool.AsyncPool(("127.0.0.1", urlsplit(URL).port or 6379), max_size=CAP, name="asgi-raw", configure=log_in)


async def say(sock: Any, *commands: tuple[str, ...]) -> None:
    parts = []
    for words in commands:
        parts.append(f"*{len(words)}\r\n")
        parts.extend(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    await asyncio.get_running_loop().sock_sendall(sock, "".join(parts).encode())


async def read(sock: Any, expected: bytes) -> None:
    """Exactly this. RuntimeError if it is anything else: somebody else's reply, say."""
    got = b""
    while len(got) < len(expected):
        data = await asyncio.get_running_loop().sock_recv(sock, 65536)
        if not data:
            raise ConnectionError("Redis has closed the connection")
        got += data
    if got != expected:
        raise RuntimeError(f"not the reply to what was asked: {got!r}, and not {expected!r}")


async def by_redis(word: str, seconds: float) -> str:
    """A command that takes so long, and one that says the word: each on whichever connection is free."""
    if seconds:
        await client.blpop("nothing", timeout=seconds)
    said = await client.echo(word)
    return said.decode() if isinstance(said, bytes) else said


async def by_socket(word: str, seconds: float) -> str:
    async with raw.connection(timeout=10) as sock:
        if seconds:
            await say(sock, ("BLPOP", "nothing", str(seconds)))
            await read(sock, b"*-1\r\n")
        await say(sock, ("ECHO", word))
        await read(sock, f"${len(word.encode())}\r\n{word}\r\n".encode())
    return word


ROUTES: dict[str, Callable[[str, float], Awaitable[str]]] = {"redis": by_redis, "raw": by_socket}


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """ASGI: /redis/WORD and /raw/WORD, with ?ms=MILLISECONDS."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    _, _, rest = scope["path"].partition("/")
    route, _, word = rest.partition("/")
    if scope["type"] != "http" or route not in ROUTES:
        await reply(send, 404, str(app.__doc__))
        return
    seconds = float(parse_qs(scope["query_string"].decode()).get("ms", ["0"])[0]) / 1000
    work = asyncio.ensure_future(ROUTES[route](word, seconds))
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
    try:
        status, text = 200, await work
    except asyncio.CancelledError:
        return  # nobody is there to be told
    except (mppool.PoolTimeout, redis.ConnectionError) as error:
        status, text = 503, str(error)
    await reply(send, status, text)


async def until_gone(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Callable[[dict[str, Any]], Awaitable[None]], status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": text.encode() + b"\n"})


async def live(receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """The worker's life: its parts of both pools end with it, and the sessions go on in the others."""
    while True:
        kind = (await receive())["type"]
        if kind == "lifespan.shutdown":
            await client.aclose(close_connection_pool=True)
            await raw.close()
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
