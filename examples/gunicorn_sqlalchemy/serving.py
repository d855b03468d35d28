"""gunicorn's settings. The environment: ``BIND`` (127.0.0.1:8000), ``WEB_CONCURRENCY`` (8 workers), ``MAX_REQUESTS`` (0: workers stay)."""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WEB_CONCURRENCY", "8"))
worker_class = "sync"
preload_app = True
max_requests = int(os.environ.get("MAX_REQUESTS", "0"))
graceful_timeout = 10
