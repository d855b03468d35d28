"""The Celery application of the rows in ``queues``. ``python -m tests.matrix.tasks 100 5`` sends so many tasks, each holding its lease so long.

The environment: ``MATRIX_REDIS``; ``MATRIX_EARLY`` uses the pool while this module is imported, which is in the parent; ``Scene.environment`` has the rest.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down

from tests.matrix.work import from_environment, use

__all__ = ["app"]

pool, tally = from_environment()
app = Celery("matrix", broker=os.environ["MATRIX_REDIS"])
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True)

if os.environ.get("MATRIX_EARLY"):
    use(pool, tally, "early", 3)


def ask(who: str, milliseconds: float) -> None:
    use(pool, tally, who, 1, milliseconds)
    tally.add("task", str(os.getpid()))


def in_the_parent(**_: Any) -> None:
    """The parent uses the pool, too, after its children were forked and before it ends."""
    use(pool, tally, "parent", 3)
    tally.add("parent")


task = app.task(name="matrix.ask")(ask)
worker_ready.connect(in_the_parent)
worker_shutting_down.connect(in_the_parent)

if __name__ == "__main__":
    for n in range(int(sys.argv[1])):
        task.delay(f"task{n}", float(sys.argv[2]))
