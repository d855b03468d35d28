"""Twelve psycopg workers on four sessions of a real PostgreSQL, killed and replaced all the time: its log and pg_stat_activity are the judges."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from mppool.integrations.psycopg import ConnectionPool
from mppool.reclaim import left_at_home
from mppool.table import R_PID
from tests.helpers.postgres import Database, Login, Postgres, needs_postgres
from tests.helpers.processes import BrokerProcess, Child
from tests.helpers.storm import Ask, Peak, Storm

pytestmark = [needs_postgres, pytest.mark.storm, pytest.mark.xdist_group("postgres")]

WORKERS, CAP = 12, 4


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[Database]:
    it = Login(postgres_server)
    yield it
    it.drop()


class Judged(Storm):
    """Before a worker is killed it is stopped, and the broker, so that nothing changes hands: does it hold a session?

    ``spare``: those that do are let go on.
    """

    def __init__(self, pool: ConnectionPool, broker: BrokerProcess, spare: bool) -> None:
        super().__init__(lambda: asks(pool), WORKERS)
        self.pool = pool
        self.broker = broker
        self.spare = spare
        self.holders = 0

    def kill_one(self) -> None:
        stop(self.broker.pid)
        try:
            super().kill_one()
        finally:
            os.kill(self.broker.pid, signal.SIGCONT)

    def may_kill(self, child: Child) -> bool:
        stop(child.pid)
        holder = self.holds(child.pid)
        if holder and self.spare:
            child.kill(signal.SIGCONT)
            return False
        self.holders += holder
        return True

    def holds(self, pid: int) -> bool:
        """It has, or is about to have, a session, or dials one; or an idle one has never left it, and will die with it."""
        worker = self.pool._pool._worker
        assert worker is not None
        table = worker.table
        rows = {row for row in table.taken_rows() if table.words[table.row_at(row) + R_PID] == pid}
        return bool(left_at_home(table, rows)) or not all(map(table.names_nothing, rows))


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)


def one(conn: psycopg.Connection[Any], sql: str, *parameters: Any) -> Any:
    row = conn.execute(sql, parameters or None).fetchone()
    return row[0] if row is not None else None


def asks(pool: ConnectionPool) -> Ask:
    """Each request: no transaction and no setting of others, a setting of one's own, three statements in a transaction."""
    me = str(os.getpid())

    def ask(nonce: str) -> None:
        with pool.connection() as conn:
            status = conn.info.transaction_status
            assert status == psycopg.pq.TransactionStatus.IDLE, f"lent in {status.name}"
            seen = one(conn, "select coalesce(current_setting('app.marker', true), '')")
            assert seen in ("", me), f"a setting of process {seen}"
            assert one(conn, "select pg_current_xact_id_if_assigned()::text") is None, "others began to write in this transaction"
            conn.execute("select set_config('app.marker', %s, false)", (me,))
            conn.execute("insert into done values (%s)", (nonce,))
            assert one(conn, "select t from done where t = %s", nonce) == nonce

    return ask


@pytest.mark.parametrize("kill", ["nobody", "who-waits", "anybody"])
def test_twelve_workers_on_four_sessions(database: Database, socket_path: str, broker: BrokerProcess, request: pytest.FixtureRequest, kill: str) -> None:
    """Never more than four backends, and no login but the first four, and one for each that died with its holder; what was committed is there, once."""
    pool = ConnectionPool(database.conninfo, min_size=0, max_size=CAP, name="pg", broker=socket_path, timeout=20.0)
    with pool.connection() as conn:
        conn.execute("create table done (t text)")
        conn.execute("create index on done (t)")
    goal = int(250 * request.config.getoption("--storm-seconds"))
    storm = Judged(pool, broker, spare=kill == "who-waits")
    with Peak(database.count) as peak, storm:
        while storm.requests < goal:
            storm.run(0.5, kill_every=None if kill == "nobody" else 0.05)
        logins = database.logins()  # before the end, which kills those that are at work
        storm.end()
    rows, distinct = database.ask("select count(*)::int, count(distinct t)::int from done")[0]
    print(f"\n{kill}: {rows} transactions, {storm.kills} kills, {storm.holders} of them of holders, {logins} logins, peak {peak.most} ({peak.samples} looks)")
    pool.close()
    assert storm.failures == []
    assert peak.most <= CAP
    assert logins <= CAP + storm.holders
    assert rows == distinct
    assert rows >= goal
    assert (storm.kills > 0) is (kill != "nobody")
