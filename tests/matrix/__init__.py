"""The fork and server matrix: every way a process comes to use a pool that another process made, with real processes.

``python -m tests.matrix`` runs all rows and prints a table; ``tests/matrix/test_matrix.py`` runs each of them as a test.
``guard`` puts a row into a process tree of its own, ``scene`` has the server that judges and the checks at a row's end,
``work`` is what workers do. The rows are in ``forks``, ``meanwhile`` (another thread is inside a checkout), ``orphans``, ``programs`` and ``endings``,
``greens`` (gevent), ``webs`` (gunicorn, uWSGI) and ``queues`` (Celery).
"""
