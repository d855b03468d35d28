"""gunicorn's settings. The environment: ``BIND`` (127.0.0.1:8000), ``WEB_CONCURRENCY`` (8 workers)."""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WEB_CONCURRENCY", "8"))
worker_class = "sync"
preload_app = True  # front.py is imported once, before the fork, and its session with it
graceful_timeout = 10
