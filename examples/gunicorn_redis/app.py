"""Eight gunicorn workers, four connections to Redis: a small web application over one shared pool.

From the repository, with a Redis on 127.0.0.1:6379, one command starts the broker, gunicorn and its workers:

    mppool run -- gunicorn -c examples/gunicorn_redis/gunicorn.conf.py --chdir examples/gunicorn_redis app:app

and then, in another terminal:

    $ curl http://127.0.0.1:8000/incr/visits
    1
    $ curl http://127.0.0.1:8000/whoami
    {"client_id": 7, "pid": 4242}
    $ redis-cli info clients | grep connected_clients        # never more than 4, and redis-cli's own
    $ mppool status

The environment: ``REDIS`` is the server (tcp://127.0.0.1:6379), ``REDIS_CONNECTIONS`` the cap (4). gunicorn.conf.py has the rest.

What to look at. The pool is made when the module is imported; with gunicorn's ``--preload`` that is in the master, before it
forks. That is fine: making a pool does no I/O, and each worker opens its own part at its first request. ``whoami`` shows
the same few client ids under all the workers' pids: the connections move, the workers stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from resp import RedisError, Reply, command

import mppool

pool = mppool.Pool(os.environ.get("REDIS", "tcp://127.0.0.1:6379"), max_size=int(os.environ.get("REDIS_CONNECTIONS", "4")), name="redis")


def redis(*words: str | int) -> Reply:
    """One command on whichever session is free. Waits for one at most 10 seconds, and for the reply 5 more.

    Whatever ``command`` raises closes the session, for its bytes can be trusted no more. An error that Redis replied is
    raised only here, after the block: the session is fine and goes to the next in line.
    """
    with pool.connection(timeout=10) as sock:
        sock.settimeout(5)
        reply = command(sock, *words)
    if isinstance(reply, RedisError):
        raise reply
    return reply


def incr(key: str) -> str:
    return str(redis("INCR", key))


def set_(key: str, value: str) -> str:
    redis("SET", key, value, "EX", 600)
    return value


def get(key: str) -> str | None:
    value = redis("GET", key)
    return value.decode() if isinstance(value, bytes) else None


def pop(key: str, seconds: str) -> str | None:
    """Wait for an item of a list. This one keeps its session for so long: with all of them busy, other workers queue."""
    item = redis("BLPOP", key, str(float(seconds)))
    return item[1].decode() if isinstance(item, list) and isinstance(item[1], bytes) else None


def whoami() -> str:
    return json.dumps({"client_id": redis("CLIENT", "ID"), "pid": os.getpid()})


ROUTES: dict[str, Callable[..., str | None]] = {"incr": incr, "set": set_, "get": get, "pop": pop, "whoami": whoami}


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: /incr/KEY, /set/KEY/VALUE, /get/KEY, /pop/KEY/SECONDS, /whoami."""
    status, body = answer(environ["PATH_INFO"])
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode() + b"\n"]


def answer(path: str) -> tuple[str, str]:
    name, *arguments = path.strip("/").split("/")
    route = ROUTES.get(name)
    if route is None or len(arguments) != route.__code__.co_argcount:
        return "404 Not Found", app.__doc__ or ""
    try:
        body = route(*arguments)
    except (mppool.PoolTimeout, mppool.TooManyWaiting) as error:
        return "503 Service Unavailable", str(error)  # the message has the numbers: max_size, in use, waiting, longest held
    except RedisError as error:
        return "400 Bad Request", str(error)
    return ("404 Not Found", "nothing there") if body is None else ("200 OK", body)
