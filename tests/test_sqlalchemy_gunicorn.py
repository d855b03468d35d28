"""examples/gunicorn_sqlalchemy, started as its docstring says, and loaded while its workers are killed."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import eventually
from tests.helpers.site import Load, site
from tests.helpers.storm import Peak

EXAMPLE = Path(__file__).parent.parent / "examples" / "gunicorn_sqlalchemy"

pytestmark = [needs_postgres, pytest.mark.storm, pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed")]


def test_the_example_keeps_its_books(database: Database, socket_path: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Six workers on three sessions, killed all the time: never a fourth backend, money neither made nor lost, no setting of another worker seen."""
    cap, seconds = 3, float(request.config.getoption("--storm-seconds")) / 2
    url = f"postgresql+psycopg://{database.user}:{database.password}@127.0.0.1:{database.port}/{database.name}"

    def ask(get: Callable[[str], tuple[int, str]], client: int, n: int) -> None:
        for path, expected in ((f"/pay/a{random.randrange(4)}/b{client}/{n % 7}", None), ("/total", "0"), ("/setting", "none"), ("/nowhere", None)):
            status, text = get(path)
            assert status == (404 if path == "/nowhere" else 200), (path, text[:300])
            assert expected is None or text == expected, (path, text)

    with site(EXAMPLE, "serving.py", "bank:app", socket_path, tmp_path, 6, DATABASE_URL=url, DATABASE_CONNECTIONS=str(cap)) as it:
        with Load(it, ask) as load, Peak(database.count) as peak:
            kills = it.kill_workers(seconds)
        assert eventually(lambda: it.get("/total") == (200, "0"))
    assert load.wrong == []
    assert sum(load.rounds) > 10
    assert peak.most <= cap
    print(f"\n{sum(load.rounds) * 4} requests, {kills} kills, {load.broken} without a reply, {database.logins()} logins, at most {peak.most} backends")
    assert database.logins() <= cap + 2 * kills
