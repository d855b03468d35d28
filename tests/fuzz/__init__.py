"""What happens to the others when somebody of the same user sends garbage, or scribbles over the shared table?

    python -m tests.fuzz [--frames N] [--seed S] [--minutes M]      the long run, with figures
    pytest tests/fuzz                                               the same in short, with hypothesis

``rig`` has the innocent: a broker, servers, and bystanders whose every request is counted. ``frames`` makes what is sent,
``links`` says what may come back, ``bulk`` sends at full speed, ``conversation`` speaks in any order, ``hostile`` is a broker
that lies, ``damage`` and ``tables`` scribble.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

__all__ = ["OPEN"]

# New examples each time, nothing kept on disk; what fails is printed so that it can be repeated.
OPEN = settings(deadline=None, database=None, print_blob=True, derandomize=False, suppress_health_check=list(HealthCheck))
