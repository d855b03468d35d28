"""Django for real: the engine's behaviours one by one, the example project under gunicorn, its own tests by Django's runner."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django")
pytest.importorskip("psycopg")

import mppool
from tests.helpers.postgres import Database, needs_postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.site import Load, site
from tests.helpers.storm import Peak

pytestmark = needs_postgres

EXAMPLE = Path(__file__).parent.parent / "examples" / "django_app"


class Project:
    """The example project in processes of its own, over a database of a test's own."""

    def __init__(self, database: Database, path: str) -> None:
        self.database = database
        self.path = path
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(database.port),
            "PGDATABASE": database.name,
            "PGUSER": database.user,
            "PGPASSWORD": database.password,
            "MPPOOL_BROKER": path,
            "DJANGO_SETTINGS_MODULE": "project.settings",
        }

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-Wa", "manage.py", *arguments]
        return subprocess.run(command, env={**os.environ, **self.environment}, cwd=EXAMPLE, capture_output=True, text=True, timeout=60, check=False)

    def work(self, work: Callable[[Any], Any], options: dict[str, Any] | None = None, **settings: Any) -> Callable[[Child], Any]:
        """A child's work: ``work(connection)`` with the project's settings, but for these."""

        def run(child: Child) -> Any:
            os.environ.update(self.environment)
            sys.path.insert(0, str(EXAMPLE))
            module = importlib.import_module("project.settings")
            database: dict[str, Any] = module.DATABASES["default"]
            database.update(settings)
            database["OPTIONS"].update(options or {})
            import django
            from django.db import connection

            django.setup()
            result = work(connection)
            connection.close()
            for pool in connection._pools.values():
                pool.close()  # as at the interpreter's exit, which a forked child of ours does not come to
            return result

        return run

    def run(self, work: Callable[[Any], Any], options: dict[str, Any] | None = None, **settings: Any) -> Any:
        with fork(self.work(work, options, **settings)) as [child]:
            return child.result()


@pytest.fixture
def project(database: Database, broker: BrokerProcess) -> Project:
    """As ``migrate`` leaves it, which takes seconds."""
    database.ask("create table notes_note (id bigserial primary key, author varchar(50), text text, written timestamptz)")
    database.ask(f"grant all on notes_note, notes_note_id_seq to {database.user}")
    return Project(database, broker.path)


def ask(connection: Any, sql: str, *parameters: Any) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters or None)
        return cursor.fetchone()[0] if cursor.description else None


PID = "select pg_backend_pid()"


def test_a_closed_connection_is_anybodys(project: Project) -> None:
    """``close()`` at the end of a request gives the session back: one backend serves request after request, in process after process."""

    def requests(connection: Any) -> set[int]:
        pids = set()
        for _ in range(3):
            pids.add(ask(connection, PID))
            connection.close()
            assert connection.connection is None
        return list(pids)  # type: ignore[return-value]

    before = project.database.logins()
    assert len({*project.run(requests), *project.run(requests)}) == 1
    assert project.database.logins() - before <= 1


def test_nothing_travels_with_a_session(project: Project) -> None:
    """Settings, temporary tables, advisory locks, prepared statements, role, read only: a session is as after its login."""
    questions = [
        "select coalesce(current_setting('app.mine', true), '')",
        "select to_regclass('pg_temp.mine')::text",
        "select count(*) from pg_locks where locktype = 'advisory'",
        "select count(*) from pg_prepared_statements",
        "select current_setting('statement_timeout')",
        "select current_setting('TimeZone')",
        "select current_setting('default_transaction_read_only')",
    ]

    def look(connection: Any) -> list[Any]:
        return [ask(connection, PID), *(ask(connection, question) for question in questions)]

    def leave(connection: Any) -> list[Any]:
        ask(connection, "set app.mine = 'left'")
        ask(connection, "create temporary table mine (x int)")
        ask(connection, "select pg_advisory_lock(7)")
        ask(connection, "prepare mine as select 1")
        ask(connection, "set statement_timeout = 77")
        ask(connection, "set TimeZone = 'Asia/Tokyo'")
        ask(connection, "set session characteristics as transaction read only")
        connection.connection.read_only = True
        return look(connection)

    before, left, after = (project.run(work) for work in (look, leave, look))
    assert before[0] == left[0] == after[0]
    assert left[1:] == ["left", "mine", 1, 1, "77ms", "Asia/Tokyo", "on"]
    assert before == after == [before[0], "", None, 0, 0, "0", "UTC", "off"]


def test_a_request_costs_no_query_of_its_own(project: Project) -> None:
    """The time zone is set by the login: a session that comes from another process costs its reset, one that was here last nothing."""

    def use(connection: Any) -> None:
        ask(connection, PID)

    def take(connection: Any) -> list[str]:
        connection.ensure_connection()
        first = str(project.database.backends()[0]["query"])
        ask(connection, PID)
        for _ in range(3):
            connection.close()
            connection.ensure_connection()
        return [first, str(project.database.backends()[0]["query"])]

    project.run(use)
    assert project.run(take) == ["DISCARD ALL", PID]


def test_connection_created_is_sent_for_each_request(project: Project) -> None:
    """As with ``CONN_MAX_AGE = 0``, although nobody logs in; also with a pool of Django's own, ``connection.pool`` is none."""

    def work(connection: Any) -> list[Any]:
        from django.db.backends.signals import connection_created

        told: list[bool] = []
        connection_created.connect(lambda connection, **_: told.append(connection.is_usable()), weak=False)
        for _ in range(3):
            ask(connection, PID)
            connection.close()
        return [told, connection.pool]

    assert project.run(work) == [[True] * 3, None]
    assert project.database.logins() == 1


def test_a_database_is_let_go_of_before_it_is_dropped(project: Project) -> None:
    """``close_pool()``, which Django calls then: idle sessions end, also those that other processes have left."""
    project.run(lambda connection: ask(connection, PID))
    assert project.database.count() == 1
    project.run(lambda connection: connection.close_pool())
    eventually(lambda: project.database.count() == 0)


def test_all_aliases_of_a_database_let_go_of_it(project: Project) -> None:
    """Two aliases of one database have two pools if their OPTIONS differ; the tests runner drops the database by one of them."""

    def work(connection: Any) -> None:
        other = connection.copy()
        other.settings_dict["OPTIONS"]["application_name"] = "other"
        for each in (connection, other):
            ask(each, PID)
            each.close()
        assert project.database.count() == 2
        connection.close_pool()

    project.run(work)
    eventually(lambda: project.database.count() == 0)


def test_transactions(project: Project) -> None:
    """Commit, rollback, savepoints, on_commit, and an atomic block that ends with a closed connection."""

    def work(connection: Any) -> list[Any]:
        from django.db import ProgrammingError, transaction
        from notes.models import Note

        said = []
        with transaction.atomic():
            Note.objects.create(author="ann", text="kept")
            transaction.on_commit(lambda: said.append("committed"))
        with contextlib.suppress(ZeroDivisionError), transaction.atomic():
            Note.objects.create(author="ann", text="dropped")
            raise ZeroDivisionError
        with contextlib.suppress(ProgrammingError), transaction.atomic():
            Note.objects.create(author="ann", text="dropped, too")
            connection.close()
            said.append(str(Note.objects.count()))
        connection.close()
        return [*said, Note.objects.count()]

    assert project.run(work) in (["committed", 1], ["committed", "1", 1])  # before 5.1 Django connects anew within the block
    assert all(backend["state"] == "idle" for backend in project.database.backends())


def test_the_cap_is_for_all_processes_and_threads(project: Project) -> None:
    """``max_size`` and ``timeout``: whoever comes too late gets django.db.OperationalError with the numbers."""

    def work(connection: Any) -> str:
        from django.db import OperationalError

        refused: list[str] = []

        def other() -> None:
            try:
                ask(connection, PID)
            except OperationalError as error:
                refused.append(str(error))

        ask(connection, PID)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        connection.close()
        return ask(connection, PID) and refused[0]

    assert "max_size=1, in_use=1" in project.run(work, {"name": "small", "max_size": 1, "timeout": 0.2})


def test_what_is_forgotten_comes_back(project: Project) -> None:
    """A thread that ends without ``close()``, also in a transaction, costs no session, nor does a connection that is dropped."""

    def work(connection: Any) -> int:
        from django.db import connections, transaction

        pids: list[int] = []

        def use() -> None:
            transaction.set_autocommit(len(pids) % 2 == 0)
            pids.append(ask(connections["default"], PID))

        for _ in range(4):
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        dropped = connection.copy()
        pids.append(ask(dropped, PID))
        del dropped
        gc.collect()
        assert len(pids) == 5
        return len({*pids, ask(connection, PID)})

    assert project.run(work, {"name": "forgotten", "max_size": 1, "timeout": 5.0}) == 1


def test_a_session_that_died_is_replaced(project: Project) -> None:
    """While it is idle, at once; while it is lent, after the error, as Django always does; with CONN_HEALTH_CHECKS it is pinged first."""

    def work(connection: Any) -> list[int]:
        from django.db import OperationalError, close_old_connections

        first = ask(connection, PID)
        connection.close()
        project.database.ask("select pg_terminate_backend(%s)", first)
        eventually(lambda: project.database.count() == 0)
        second = ask(connection, PID)
        project.database.ask("select pg_terminate_backend(%s)", second)
        eventually(lambda: project.database.count() == 0)
        with pytest.raises(OperationalError):
            ask(connection, PID)
        close_old_connections()
        return [first, second, ask(connection, PID)]

    for settings in ({}, {"CONN_MAX_AGE": 60}, {"CONN_HEALTH_CHECKS": True}):
        assert len(set(project.run(work, {"max_size": 1}, **settings))) == 3


def test_persistent_connections_keep_their_session(project: Project) -> None:
    """``CONN_MAX_AGE``: kept over the end of requests, given back when it is too old, and counted all the time."""

    def work(connection: Any) -> list[Any]:
        from django.db import close_old_connections

        ask(connection, PID)
        close_old_connections()
        kept = connection.connection is not None
        time.sleep(0.31)
        close_old_connections()
        return [kept, connection.connection is None]

    assert project.run(work, CONN_MAX_AGE=0.3) == [True, True]


def test_a_fork_leaves_the_parents_connection_alone(project: Project) -> None:
    """A child of a process with an open connection takes a session of its own; the parent goes on with its."""

    def work(connection: Any) -> list[int]:
        from django.db import connections

        mine = ask(connection, PID)

        def child_work(_: Child) -> int:
            connections.close_all()
            return int(ask(connection, PID))

        with fork(child_work) as [child]:
            theirs = child.result()
        return [mine, theirs, ask(connection, PID)]

    mine, theirs, still = project.run(work)
    assert mine == still != theirs


def test_isolation_level_and_role(project: Project) -> None:
    """``isolation_level`` and ``assume_role`` of Django's OPTIONS hold for each request."""
    project.database.ask("create role reader")
    project.database.ask(f"grant reader to {project.database.user}")

    def work(connection: Any) -> list[Any]:
        import psycopg
        from django.db import transaction

        seen = []
        for _ in range(2):
            with transaction.atomic():
                seen.append([ask(connection, "show transaction_isolation"), ask(connection, "select current_user::text")])
            connection.close()
        assert connection.isolation_level == psycopg.IsolationLevel.SERIALIZABLE
        return seen

    assert project.run(work, {"isolation_level": 4, "assume_role": "reader"}) == [["serializable", "reader"]] * 2
    plain = project.run(lambda connection: [ask(connection, "show transaction_isolation"), ask(connection, "select current_user::text")])
    assert plain == ["read committed", project.database.user]
    project.database.ask("drop role reader")


def test_cursors_on_the_server(project: Project) -> None:
    """``QuerySet.iterator()``, inside and outside of a transaction, also one that is not read to its end."""

    def work(connection: Any) -> list[int]:
        from django.db import transaction
        from notes.models import Note

        Note.objects.bulk_create(Note(author="ann", text=str(n)) for n in range(50))
        whole = len(list(Note.objects.all().iterator(chunk_size=7)))
        with transaction.atomic():
            part = next(iter(Note.objects.order_by("id").iterator(chunk_size=7))).text
        connection.close()
        return [whole, int(part), Note.objects.count()]

    assert project.run(work) == [50, 0, 50]


def test_an_iterator_ends_with_its_connection(project: Project) -> None:
    """Read on after ``connection.close()`` it is an error, as without a pool: the session may be in another request's hands."""

    def work(connection: Any) -> str:
        from django.db import OperationalError
        from notes.models import Note

        Note.objects.bulk_create(Note(author="ann", text=str(n)) for n in range(100))
        rows = Note.objects.iterator(chunk_size=10)
        next(rows)
        connection.close()
        try:
            list(rows)
        except OperationalError as error:
            return str(error) + str(Note.objects.count())
        return "read on"

    assert project.run(work) == "the connection is closed100"


def test_time_zones_are_read_as_django_wants(project: Project) -> None:
    """Aware datetimes, in the setting's zone; a changed setting (as in tests) changes what is read."""

    def work(connection: Any) -> list[str]:
        from django.test.utils import override_settings
        from django.utils import timezone
        from notes.models import Note

        Note.objects.create(author="ann", text="now")
        assert timezone.is_aware(Note.objects.get().written)
        with override_settings(TIME_ZONE="Asia/Tokyo", USE_TZ=False):
            tokyo = ask(connection, "show TimeZone")
            assert timezone.is_naive(Note.objects.get().written)
            connection.close()
        return [tokyo, ask(connection, "show TimeZone")]

    assert project.run(work) == ["Asia/Tokyo", "UTC"]


def test_djangos_own_pool_options_are_understood(project: Project) -> None:
    """``OPTIONS["pool"]`` as Django documents it: a project that used it changes the ENGINE only."""

    def work(connection: Any) -> list[Any]:
        ask(connection, PID)
        stats = connection._lender.get_stats()
        connection.close()
        return [stats["max_size"], stats["min_size"], stats["name"]]

    assert project.run(work, OPTIONS={"pool": {"min_size": 1, "max_size": 3, "timeout": 10, "name": "mine"}}) == [3, 1, "mine"]


def test_one_name_for_two_databases_is_an_error(project: Project) -> None:
    """Not a connection to the first one's."""

    def work(connection: Any) -> str:
        from django.db import connections

        connections.settings["other"] = {**connection.settings_dict, "NAME": "postgres"}
        ask(connection, PID)
        with pytest.raises(mppool.ConfigMismatch):
            ask(connections["other"], "select current_database()")
        return "refused"

    assert project.run(work, {"name": "both"}) == "refused"


def test_what_cannot_be_connected_to_is_said_at_once(project: Project) -> None:
    """A wrong password, a database that is not there, a server that is down: django.db.OperationalError, without waiting for ``timeout``."""

    def work(connection: Any) -> str:
        from django.db import OperationalError

        began = time.monotonic()
        with pytest.raises(OperationalError) as raised:
            ask(connection, PID)
        assert time.monotonic() - began < 20
        return str(raised.value)

    patient = {"timeout": 60, "name": "patient"}
    assert "password" in project.run(work, patient, PASSWORD="wrong")
    assert "nowhere" in project.run(work, {**patient, "name": "nowhere"}, NAME="nowhere")
    assert "refused" in project.run(work, {**patient, "name": "refused"}, PORT="1").lower()


def test_unknown_options_are_psycopgs(project: Project) -> None:
    """What is neither ours nor psycopg's is an error, as with Django's own engine; what is psycopg's is passed on."""
    assert project.run(lambda connection: ask(connection, "show application_name"), {"application_name": "mine"}) == "mine"

    def work(connection: Any) -> str:
        with pytest.raises(Exception, match="max_sise"):  # django.db.ProgrammingError
            ask(connection, PID)
        return "refused"

    assert project.run(work, {"max_sise": 3}) == "refused"


@pytest.mark.parametrize("name", [None, "notes"], ids=["unnamed", "named"])
@pytest.mark.parametrize("arguments", [(), ("--parallel", "2")], ids=["one-process", "parallel"])
def test_the_projects_own_tests_run(project: Project, arguments: tuple[str, ...], name: str | None, tmp_path: Path) -> None:
    """``manage.py test``: test databases are made, copied and dropped; the pool lets go of them in time. A name in OPTIONS is not for them."""
    (tmp_path / "tried.py").write_text(f"from project.settings import *\nDATABASES['default']['OPTIONS']['name'] = {name!r}\n")
    project.environment.update(PYTHONPATH=str(tmp_path), DJANGO_SETTINGS_MODULE="tried")
    project.database.ask(f"alter role {project.database.user} createdb")
    done = project.manage("test", "notes", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Ran 5 tests" in done.stderr
    assert "OK" in done.stderr
    assert project.database.ask("select count(*) from pg_database where datname like 'test%%'") == [(0,)]


@pytest.mark.storm
@pytest.mark.parametrize("age", ["0", "60"], ids=["per-request", "persistent"])
def test_the_example_under_gunicorn(database: Database, socket_path: str, tmp_path: Path, request: pytest.FixtureRequest, age: str) -> None:
    """Several workers, killed all the time, over few sessions: never one too many, nothing of others seen, nothing half-written, everybody served."""
    cap, workers = (3, 6) if age == "0" else (6, 4)
    seconds = float(request.config.getoption("--storm-seconds")) / (2 if age == "0" else 4)
    project = Project(database, socket_path)
    assert project.manage("migrate", "-v0").returncode == 0

    def asked(get: Callable[[str], tuple[int, str]], client: int, n: int) -> None:
        author = f"client-{client}"
        status, text = get(f"/add/{author}/note-{n}")
        assert status == 200, text[:300]
        for path, expected in ((f"/notes/{author}", None), ("/setting", "none, UTC"), (f"/fail/{author}", None), ("/stream", None), ("/awaited", None)):
            status, text = get(path)
            assert status == (500 if path.startswith("/fail") else 200), (path, text[:300])
            assert age != "0" or expected is None or text == expected, (path, text)
            assert "never written" not in text

    environment = {**project.environment, "DATABASE_CONNECTIONS": str(cap), "CONN_MAX_AGE": age, "CONN_HEALTH_CHECKS": "" if age == "0" else "1"}
    logins = database.logins()
    with site(EXAMPLE, "project/gunicorn.py", "project.wsgi", socket_path, tmp_path, workers, **environment) as it:
        with Load(it, asked) as load, Peak(database.count) as peak:
            kills = it.kill_workers(seconds)
        assert eventually(lambda: it.get("/whoami")[0] == 200)
    assert load.wrong == []
    assert sum(load.rounds) > 5
    assert peak.most <= cap
    logins = database.logins() - logins
    print(f"\n{sum(load.rounds) * 6} requests, {kills} kills, {load.broken} without a reply, {logins} logins, at most {peak.most} backends")
    assert logins <= cap + 2 * kills + (workers if age != "0" else 0)
