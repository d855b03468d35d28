"""Eight gunicorn workers, four connections to PostgreSQL: a small web application with SQLAlchemy.

With a database that you may write to, one command starts the broker, gunicorn and its workers:

    export DATABASE_URL=postgresql+psycopg://app:secret@127.0.0.1/app
    mppool run -- gunicorn -c examples/gunicorn_sqlalchemy/serving.py --chdir examples/gunicorn_sqlalchemy bank:app

and then, in another terminal:

    $ curl http://127.0.0.1:8000/pay/ann/bob/5
    ann -5, bob 5
    $ curl http://127.0.0.1:8000/whoami
    backend 4711, worker 4242
    $ mppool status

The environment: ``DATABASE_URL``, ``DATABASE_CONNECTIONS`` (4, of all workers together). serving.py has the rest.

All that is special here is ``poolclass=SharedPool``. The engine is made, and used, in gunicorn's master, before the fork: that is
fine, and needs no ``dispose()``. ``whoami`` shows the same few backends under all workers' pids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import create_engine, exc, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from mppool.integrations.sqlalchemy import SharedPool

engine = create_engine(
    os.environ.get("DATABASE_URL", "postgresql+psycopg://localhost/app"),
    poolclass=SharedPool,
    pool_size=int(os.environ.get("DATABASE_CONNECTIONS", "4")),
    pool_timeout=10,
)


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    owner: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)


Base.metadata.create_all(engine)  # once, in the master


def pay(payer: str, payee: str, amount: str) -> str:
    """A transaction: all of it, or nothing."""
    owners = sorted({payer, payee})
    with Session(engine) as session, session.begin():
        session.execute(insert(Account).values([{"owner": owner, "balance": 0} for owner in owners]).on_conflict_do_nothing())
        accounts = {
            account.owner: account for account in session.scalars(select(Account).where(Account.owner.in_(owners)).order_by(Account.owner).with_for_update())
        }
        accounts[payer].balance -= int(amount)
        accounts[payee].balance += int(amount)
        return ", ".join(f"{account.owner} {account.balance}" for account in (accounts[payer], accounts[payee]))


def total() -> str:
    with Session(engine) as session:
        return str(sum(session.scalars(select(Account.balance))))


def sleep(seconds: str) -> str:
    """Keeps its connection for so long: with all of them busy, other workers queue."""
    with engine.connect() as connection:
        connection.execute(text("select pg_sleep(:seconds)"), {"seconds": float(seconds)})
    return "slept"


def setting() -> str:
    """What the last user of this connection has set, if it was another worker: nothing. Then sets it."""
    with engine.begin() as connection:
        seen = connection.scalar(text("select current_setting('app.worker', true)"))
        connection.execute(text("select set_config('app.worker', :pid, false)"), {"pid": str(os.getpid())})
    return "foreign" if seen and seen != str(os.getpid()) else "none"


def whoami() -> str:
    with engine.connect() as connection:
        return f"backend {connection.scalar(text('select pg_backend_pid()'))}, worker {os.getpid()}"


ROUTES: dict[str, Callable[..., str]] = {"pay": pay, "total": total, "sleep": sleep, "setting": setting, "whoami": whoami}


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: /pay/FROM/TO/AMOUNT, /total, /sleep/SECONDS, /setting, /whoami."""
    name, *arguments = environ["PATH_INFO"].strip("/").split("/")
    route = ROUTES.get(name)
    if route is None or len(arguments) != route.__code__.co_argcount:
        status, body = "404 Not Found", app.__doc__ or ""
    else:
        try:
            status, body = "200 OK", route(*arguments)
        except exc.TimeoutError as error:
            status, body = "503 Service Unavailable", str(error)
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode() + b"\n"]
