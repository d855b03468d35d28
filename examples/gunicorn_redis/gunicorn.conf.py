"""gunicorn's settings for app.py. The environment: ``BIND`` (127.0.0.1:8000), ``WEB_CONCURRENCY`` (8 workers)."""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WEB_CONCURRENCY", "8"))
worker_class = "sync"
preload_app = True  # app.py is imported once, before the fork, and its pool with it
max_requests = int(os.environ.get("MAX_REQUESTS", "0"))  # workers may come and go: their sessions stay in the pool
max_requests_jitter = max_requests // 2
graceful_timeout = 10
