"""The application of the rows about web servers: each request is a lease, and the reply says what the server behind replied.

Imported by a server's worker, or before its workers are forked. The environment: ``MATRIX_EARLY`` uses the pool while this
module is imported; ``Scene.environment`` has the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from tests.matrix.work import from_environment, use

pool, tally = from_environment()

if os.environ.get("MATRIX_EARLY"):
    use(pool, tally, "early", 3)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: /WHO/MILLISECONDS. The body is the worker's pid, and whether all was well."""
    _, who, milliseconds = environ["PATH_INFO"].split("/")
    fine = use(pool, tally, who, 1, float(milliseconds))
    start_response("200 OK" if fine else "500 Internal Server Error", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {who}\n".encode()]
