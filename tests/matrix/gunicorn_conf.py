"""gunicorn's settings for the rows; with --preload its master uses the pool too, while workers come and go."""

import os
from typing import Any

bind = os.environ["BIND"]
workers = int(os.environ["WEB_CONCURRENCY"])
max_requests = int(os.environ["MAX_REQUESTS"])
max_requests_jitter = max_requests // 2
graceful_timeout = 5
control_socket_disable = True


def child_exit(server: Any, worker: Any) -> None:
    """In the master, after a worker's end: the parent goes on."""
    if os.environ.get("MATRIX_EARLY"):
        from tests.matrix.webapp import pool, tally
        from tests.matrix.work import use

        use(pool, tally, "master", 2)
