"""Eight gunicorn workers, four connections to the service behind them: a small web application with requests.

With a service that speaks HTTP/1.1, say `python -m http.server 8080 --protocol HTTP/1.1` (Python 3.11) in a directory with a file notes.txt,
one command starts the broker, gunicorn and its workers:

    export UPSTREAM=http://127.0.0.1:8080
    mppool run -- gunicorn -c examples/requests_app/workers.py --chdir examples/requests_app front:app

and then, in another terminal:

    $ curl http://127.0.0.1:8000/notes.txt
    (what is in it)
    $ curl http://127.0.0.1:8000/                             # which worker answers, and the pool as it is
    {"pid": 4242, "max_size": 4, "size": 1, "in_use": 0}
    $ mppool status

The environment: ``UPSTREAM``, ``UPSTREAM_CONNECTIONS`` (4, of all workers together). workers.py has the rest.

All that is special here is ``HTTPAdapter``. The session is made in gunicorn's master, before the fork: that is fine, each worker opens its own
part of the pool at its first request. A request that finds all connections in use waits; the service never sees a fifth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import requests
from urllib3 import Retry

from mppool.integrations.requests import HTTPAdapter

UPSTREAM = os.environ.get("UPSTREAM", "http://127.0.0.1:8080")

# A service may close an idle connection just as a request sets out on it; what has no effect is asked once more then.
again = Retry(total=1, read=1, connect=1, backoff_factor=0)
adapter = HTTPAdapter(pool_maxsize=int(os.environ.get("UPSTREAM_CONNECTIONS", "4")), max_retries=again)
session = requests.Session()
session.mount("http://", adapter)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: / says who answers; any other path is asked of the service behind."""
    path = environ["PATH_INFO"] + ("?" + environ["QUERY_STRING"] if environ.get("QUERY_STRING") else "")
    status, kind, body = ("200 OK", "application/json", about()) if path == "/" else fetched(path)
    start_response(status, [("Content-Type", kind)])
    return [body]


def fetched(path: str) -> tuple[str, str, bytes]:
    try:
        reply = session.get(UPSTREAM + path, timeout=10)
    except requests.RequestException as error:  # no connection free in time among them
        return "502 Bad Gateway", "text/plain", str(error).encode()
    return f"{reply.status_code} {reply.reason}", reply.headers.get("Content-Type", "text/plain"), reply.content


def about() -> bytes:
    stats = adapter.poolmanager.connection_from_url(UPSTREAM).shared_pool.get_stats()
    return json.dumps({"pid": os.getpid(), **{name: stats[name] for name in ("max_size", "size", "in_use")}}).encode()
