"""psycopg, and a service that moves from one real PostgreSQL to another: no session of the old one is lent, and new ones reach the new one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from mppool.integrations.psycopg import ConnectionPool
from tests.helpers.postgres import Login, Postgres, needs_postgres, postgres
from tests.helpers.processes import BrokerProcess, Child, eventually, fork

pytestmark = [needs_postgres, pytest.mark.xdist_group("postgres")]

CAP = 2


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, Postgres]]:
    with postgres() as older, postgres() as newer:
        yield older, newer


@pytest.fixture
def logins(servers: tuple[Postgres, Postgres]) -> Iterator[tuple[Login, Login]]:
    """The same login on both, which take writes."""
    for server in servers:
        promote(server)
    older = Login(servers[0])
    newer = Login(servers[1], older.user)
    yield older, newer
    for login in (older, newer):
        if login.server.process.poll() is not None:
            login.server.start()
        promote(login.server)
        login.drop()


def demote(server: Postgres) -> None:
    write(server, "on")


def promote(server: Postgres) -> None:
    write(server, "off")


def write(server: Postgres, read_only: str) -> None:
    server.ask(f"alter system set default_transaction_read_only = {read_only}")
    server.ask("select pg_reload_conf()")
    eventually(lambda: server.ask("show default_transaction_read_only") == [(read_only,)])


def place_of(conn: psycopg.Connection[Any]) -> list[int]:
    """The server's port, and the backend."""
    row = conn.execute("select inet_server_port(), pg_backend_pid()").fetchone()
    assert row is not None
    return list(row)


def workers(pool: ConnectionPool) -> list[Callable[[Child], None]]:
    """Two, which lease when they are told to, and say where that led."""

    def work(child: Child) -> None:
        while child.hear(60):
            with pool.connection() as conn:
                place = place_of(conn)
            child.tell(place)

    return [work, work]


def places(children: list[Child]) -> set[int]:
    """All lease, twice, in turn."""
    found = set()
    for child in 2 * children:
        with contextlib.suppress(BrokenPipeError):  # what it died of is heard
            child.tell(1)
        found.add(child.hear(30)[0])
    return found


def test_the_next_host_takes_over(logins: tuple[Login, Login], socket_path: str, broker: BrokerProcess) -> None:
    """host=a,b target_session_attrs=read-write: a dies, b is promoted. Both workers go on with b, within the cap."""
    older, newer = logins
    demote(newer.server)
    conninfo = f"host=127.0.0.1,127.0.0.1 port={older.port},{newer.port} dbname=shared user={older.user} password={older.password}"
    pool = ConnectionPool(f"{conninfo} target_session_attrs=read-write", min_size=0, max_size=CAP, broker=socket_path, timeout=20)
    with fork(*workers(pool)) as children:
        assert places(children) == {older.port}
        older.server.stop()
        promote(newer.server)
        assert places(children) == {newer.port}
        assert 1 <= newer.count() <= CAP
        assert pool.get_stats()["pool_size"] == newer.count()
    pool.close()


def test_a_server_that_is_demoted_alive_is_left(logins: tuple[Login, Login], socket_path: str, broker: BrokerProcess) -> None:
    """The old one lives on, read-only, and so do its sessions: drain() in one process replaces those of all."""
    older, newer = logins
    demote(newer.server)
    conninfo = f"host=127.0.0.1,127.0.0.1 port={older.port},{newer.port} dbname=shared user={older.user} password={older.password}"
    pool = ConnectionPool(f"{conninfo} target_session_attrs=read-write", min_size=0, max_size=CAP, broker=socket_path, timeout=20)
    with fork(*workers(pool)) as children:
        assert places(children) == {older.port}
        demote(older.server)
        promote(newer.server)
        assert places(children) == {older.port}, "nothing tells a client"
        pool.drain()
        assert places(children) == {newer.port}
        eventually(lambda: older.count() == 0)
        assert 1 <= newer.count() <= CAP
    pool.close()


def test_check_finds_out_by_itself(logins: tuple[Login, Login], socket_path: str, broker: BrokerProcess) -> None:
    """The same without drain(): a ``check`` that refuses a server that takes no writes closes its sessions as they are met."""

    def check(conn: psycopg.Connection[Any]) -> None:
        row = conn.execute("show transaction_read_only").fetchone()
        conn.rollback()
        if row != ("off",):
            raise psycopg.OperationalError("read-only")

    older, newer = logins
    demote(newer.server)
    conninfo = f"host=127.0.0.1,127.0.0.1 port={older.port},{newer.port} dbname=shared user={older.user} password={older.password}"
    pool = ConnectionPool(f"{conninfo} target_session_attrs=read-write", min_size=0, max_size=CAP, broker=socket_path, timeout=20, check=check)
    with fork(*workers(pool)) as children:
        assert places(children) == {older.port}
        demote(older.server)
        promote(newer.server)
        assert places(children) == {newer.port}
        eventually(lambda: older.count() == 0)
        assert 1 <= newer.count() <= CAP
        assert pool.get_stats()["connections_lost"] >= 1
    pool.close()


def test_an_address_that_moves(logins: tuple[Login, Login], socket_path: str, broker: BrokerProcess) -> None:
    """One host and port, which lead to another server from now on, and cut what led to the old one: one statement fails, no more."""
    older, newer = logins

    with socket.create_server(("127.0.0.1", 0)) as listener, fork(lambda child: asyncio.run(relay(child, listener, older.port))) as (moving,):
        port = listener.getsockname()[1]
        pool = ConnectionPool(older.conninfo.replace(f"port={older.port}", f"port={port}"), min_size=0, max_size=CAP, broker=socket_path, timeout=20)
        with fork(*workers(pool)) as children:
            assert places(children) == {older.port}
            with pool.connection() as conn:
                assert place_of(conn)[0] == older.port
                moving.tell(newer.port)
                moving.hear()
                with pytest.raises(psycopg.OperationalError):
                    place_of(conn)
            assert places(children) == {newer.port}
            eventually(lambda: older.count() == 0)
            assert 1 <= newer.count() <= CAP
        pool.close()


async def relay(child: Child, listener: socket.socket, port: int) -> None:
    """Passes on whatever comes to ``port``; whenever the parent tells another one it cuts all connections, and leads there."""
    leads_to, joined = port, set[asyncio.StreamWriter]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", leads_to)
        joined.update((writer, back))
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with await asyncio.start_server(join, sock=listener):
        while True:
            leads_to = await asyncio.to_thread(child.hear, 100)
            for writer in joined:
                writer.transport.abort()
            child.tell("moved")
