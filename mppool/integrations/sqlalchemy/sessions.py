"""A session as SQLAlchemy has it: the DBAPI connection, the pool record that goes with it, and how both are made, moved and closed.

Each process has a DBAPI connection of its own for each session, and a record for it. SQLAlchemy makes the record's connection,
fires "connect" and everything else as it always does; only that the connection it is given was not always logged in just now.
A session that another process used meanwhile comes back as a new DBAPI connection with a new record: adopted is new, without the
handshake. (Under ``on_transfer="trust"`` nothing was reset, and it comes back as it was.)
"""

from __future__ import annotations

import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool.base import _ConnectionRecord

from mppool.drivers.base import DriverBase
from mppool.drivers.closeable import CloseableDriver
from mppool.errors import DialFailed, Error
from mppool.integrations.sqlalchemy.clients import Client, digest_of, name_for
from mppool.states import Residence

if TYPE_CHECKING:
    from mppool.integrations.sqlalchemy.shared import SharedPool
    from mppool.shell import Shell

__all__ = ["Record", "Session", "SessionDriver"]

LOGIN = struct.Struct("!d")  # in front of the client's baggage: when the session logged in, by the wall clock, as SQLAlchemy counts


class Record(_ConnectionRecord):
    """SQLAlchemy's record of a DBAPI connection, which knows its session. Without one, it takes one when it next connects."""

    __slots__ = ("owner", "session")

    def __init__(self, owner: SharedPool, session: Session) -> None:
        self.owner = owner
        self.session: Session | None = session
        super().__init__(owner, connect=False)

    def get_connection(self) -> Any:
        connection = super().get_connection()
        session = self.session
        if session is not None and not session.settled:
            session.settled = True
            session.pool._driver.settle(session)
        return connection

    @property
    def fresh(self) -> bool:
        """Logged in just now? What is adopted is not, and ``pool_pre_ping`` pings it."""
        return self.session is not None and self.session.fresh

    @fresh.setter
    def fresh(self, value: bool) -> None:
        if not value and self.session is not None:
            self.session.fresh = False


class Session:
    """What the pool lends: a DBAPI connection and its record. ``client`` is the driver that made the connection."""

    __slots__ = ("__weakref__", "client", "connection", "fresh", "login", "loose", "pid", "plain", "pool", "record", "settled", "terminate", "tidied")

    def __init__(self, client: DriverBase, connection: Any, login: float, pool: Any) -> None:
        self.client = client
        self.connection = connection
        self.login = login
        self.pool = pool  # that lends it, and takes it back
        self.record: Record | None = None
        self.fresh = False
        self.terminate = False  # close without a word: SQLAlchemy has found it broken
        self.loose: weakref.ref[Any] | None = None  # after Connection.detach(): the user alone keeps the connection alive
        self.pid = os.getpid()
        self.plain = True  # what has no descriptor is tidied at each return, for there it is given up if others wait: see CloseableDriver
        self.tidied = False
        self.settled = False

    def at_hand(self) -> Any:
        """The DBAPI connection; None if it was detached and is gone."""
        return self.connection if self.loose is None else self.loose()


class Lender:
    """For psycopg's connection, and cursors that were left open: what is not lent any more is closed, as far as they know."""

    close_returns = False

    def __init__(self, session: Session) -> None:
        self.session = weakref.ref(session)

    def lends(self, _: object) -> bool:
        session = self.session()
        return session is not None and bool(session.pool._lends(session))


class SessionDriver(DriverBase):
    """Sessions of one engine. With a ``client`` they move, unless that says otherwise; without one all are resident.

    DBAPI connections are made by the engine's own creator, so that "do_connect" listeners and ``connect_args`` mean what they always
    do; where that comes down to ``dialect.connect(...)``, the client makes the connection instead of the DBAPI.
    """

    def __init__(self, owner: SharedPool, known: dict[int, Session], client: Client | None, on_transfer: str) -> None:
        self.owner = owner  # the newest SharedPool of the engine
        self.pool: Shell = None  # type: ignore[assignment]  # the one that lends what we dial; set as soon as it is made
        self.known = known  # by id of the DBAPI connection
        self.make = client
        self.on_transfer = on_transfer
        self.minds_transfer = client is not None
        self.resident = CloseableDriver(lambda: None)
        self.client: tuple[Mapping[str, Any], DriverBase] | None = None
        self.digest = ""

    # What is interchangeable.

    def learn(self, name: str | None) -> str | None:
        """Find out what the engine's creator would connect with; nothing is connected. Returns ``name``, or if there is none, one that says where it leads.

        Raises what a listener raises.
        """
        dialect = self.owner._dialect
        take_place_of_connect(dialect)
        try:
            with asking(Dial(None)):
                connection = self.owner.create(None)  # type: ignore[arg-type]
        except Asked as asked:
            self.use(asked.arguments, asked.options)
            self.digest = digest_of(dialect, asked.arguments, asked.options)
            return name or name_for(asked.arguments, asked.options, self.digest)
        self.owner.end(connection, terminate=False)  # a listener has connected by itself
        self.make, self.minds_transfer = None, False
        return name

    def use(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> DriverBase | None:
        """The client's driver for these arguments, which a listener may change each time (a token). None if there is no client."""
        if self.make is None:
            return None
        if self.client is None or self.client[0] != options:
            driver = self.make(arguments, options, self.on_transfer)
            if self.client is not None and driver.key() != self.client[1].key():
                raise DialFailed(f"a do_connect listener changed server, login or options: {driver.key()}, and the pool has {self.client[1].key()}")
            self.client, self.tidies_always = (dict(options), driver), driver.tidies_always
        return self.client[1]

    def key(self) -> str:
        return f"{self.client[1].key()}+sqlalchemy" if self.client is not None else f"dbapi/1/{self.digest}"

    def connect(self, client: DriverBase, dbapi_connect: Callable[..., Any]) -> Any:
        """In the place of ``dialect.connect``."""
        return client.dial()

    # The seam.

    def dial(self) -> Any:
        """Raises DialFailed, always permanent: SQLAlchemy's users expect to hear at once that the database cannot be reached."""
        session, dial = self.beginning()
        with said_at_once(), asking(dial):
            connection = self.owner.create(session.record)  # type: ignore[arg-type]
        return self.made(session, dial, connection)

    def beginning(self) -> tuple[Session, Dial]:
        session = Session(self.resident, None, time.time(), self.pool)
        session.record = Record(self.owner, session)
        session.fresh = True
        return session, Dial(self)

    def made(self, session: Session, dial: Dial, connection: Any) -> Session:
        if dial.client is not None and dial.connection is connection:
            session.client = dial.client
        session.connection = connection
        session.plain = self.fileno(session) >= 0
        self.known[id(connection)] = session
        return session

    def fileno(self, session: Session) -> int:
        return session.client.fileno(session.connection)

    def residence(self, session: Session) -> Residence:
        return session.client.residence(session.connection)

    def detach(self, session: Session) -> bytes:
        return LOGIN.pack(session.login) + session.client.detach(session.connection)

    def farewell(self, session: Session) -> bytes:
        return session.client.farewell(session.connection)

    def expect(self) -> None:
        if self.client is not None:
            self.client[1].expect()

    def attach(self, fd: int, baggage: bytes) -> Any:
        [login] = LOGIN.unpack_from(baggage)
        client = self.adopter()
        return self.adopted(client, client.attach(fd, baggage[LOGIN.size :]), login)

    def adopter(self) -> DriverBase:
        if self.client is None:
            raise Error("no client adopts such sessions here")
        return self.client[1]

    def adopted(self, client: DriverBase, connection: Any, login: float) -> Session:
        session = Session(client, connection, login, self.pool)
        session.record = Record(self.owner, session)
        self.known[id(connection)] = session
        return session

    def inside(self, connection: Any) -> Any:
        """The client's connection, in the DBAPI's."""
        return connection

    def settle(self, session: Session) -> None:
        """What "connect" listeners have set is how the engine wants its connections, and nothing to be put right at their return."""
        inside = self.inside(session.connection)
        settle = getattr(session.client, "settle", None)
        if settle is not None:
            settle(inside)
        if getattr(inside, "_pool", session) is None:
            inside._pool = Lender(session)

    def is_clean(self, session: Session) -> bool:
        if session.loose is not None:
            return False
        if session.plain:
            return session.client.is_clean(session.connection)
        tidied, session.tidied = session.tidied, False
        return tidied

    def tidy(self, session: Session) -> Any:
        """Whatever the client finds that SQLAlchemy has not put right, it may have to reset; then "connect" is for firing again."""
        session.client.tidy(session.connection)
        session.tidied = True
        if session.client is not self.resident and session.record is not None:
            self.renew(session, session.record)

    def transferred(self, session: Session) -> Any:
        """Reset by policy; and unless what the other process left is trusted, this one begins anew, with a new DBAPI connection."""
        record = session.record
        if self.on_transfer != "trust" and record is not None and record.dbapi_connection is not None:
            self.renew(session, record)
        session.client.transferred(session.connection)

    def renew(self, session: Session, record: Record) -> Any:
        """Another DBAPI connection over the same connection to the server, and another record. (A resident one stays the object it is.)"""
        client, older = session.client, session.connection
        renewed = getattr(client, "renewed", None)  # clients may know a quicker way than to adopt
        moves = client.residence(older) is Residence.moves
        newer = client.attach(client.fileno(older), client.detach(older)) if renewed is None and moves else older
        self.gone(session)
        if renewed is not None:
            newer = renewed(older)
        elif moves:
            client.abort(older)
        session.connection, session.record, session.settled = newer, Record(self.owner, session), False
        self.known[id(newer)] = session

    def reset(self, session: Session) -> Any:
        session.client.reset(session.connection)

    def ping(self, session: Session) -> Any:
        session.client.ping(session.connection)

    def close(self, session: Session) -> Any:
        connection = session.at_hand()
        self.gone(session)
        if connection is None:
            return
        if session.client is self.resident:
            self.owner.end(connection, terminate=session.terminate)
        else:
            session.client.close(connection)

    def abort(self, session: Session) -> None:
        connection = session.at_hand()
        self.gone(session)
        if connection is not None:
            session.client.abort(connection)

    def forked(self) -> bool:
        """Known are the connections that a client was dialing; a DBAPI's own are not."""
        return self.client is not None and self.client[1].forked()

    def gone(self, session: Session) -> None:
        """This process has the DBAPI connection no more. If it was not SQLAlchemy that closed it, the "close" event is fired here."""
        connection = session.at_hand()
        if connection is None:
            return
        if self.known.get(id(connection)) is session:
            del self.known[id(connection)]
        record = session.record
        if record is not None and record.dbapi_connection is connection and session.pid == os.getpid():
            try:
                self.owner.dispatch.close(connection, record)
            except Exception:
                self.owner.logger.error("Exception in a close event of connection %r", connection, exc_info=True)
        if record is not None:
            record.dbapi_connection = None
            record.session = None


@contextmanager
def said_at_once() -> Iterator[None]:
    """Whatever keeps us from connecting, as an error that ends the checkout."""
    try:
        yield
    except DialFailed as error:
        raise DialFailed(str(error), permanent=True) from error.__cause__
    except Exception as error:
        raise DialFailed(f"{type(error).__name__}: {error}", permanent=True) from error


class Asked(BaseException):
    """Thrown through the creator: these are the arguments it would connect with."""

    def __init__(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        super().__init__("not connected: only asked")
        self.arguments = arguments
        self.options = options


class Dial:
    """What this thread wants of ``dialect.connect`` just now: a connection of the driver's client, or without a driver the arguments."""

    def __init__(self, driver: SessionDriver | None) -> None:
        self.driver = driver
        self.client: DriverBase | None = None
        self.connection: Any = None


_dial: ContextVar[Dial | None] = ContextVar("mppool_dial", default=None)  # of this thread, or of this task


@contextmanager
def asking(dial: Dial) -> Iterator[None]:
    token = _dial.set(dial)
    try:
        yield
    finally:
        _dial.reset(token)


def take_place_of_connect(dialect: Any) -> None:
    """From now on this engine's ``dialect.connect`` is ours where we dial, and what it was to everybody else."""
    if "connect" in vars(dialect):
        return
    dbapi_connect = dialect.connect

    def connect(*arguments: Any, **options: Any) -> Any:
        dial = _dial.get()
        if dial is None:
            return dbapi_connect(*arguments, **options)
        if dial.driver is None:
            raise Asked(arguments, options)
        dial.client = dial.driver.use(arguments, options)
        if dial.client is None:
            return dbapi_connect(*arguments, **options)
        dial.connection = dial.driver.connect(dial.client, dbapi_connect)
        return dial.connection

    dialect.connect = connect
