"""``PsycopgDriver``, which blocks."""

from __future__ import annotations

from typing import Any

import psycopg

from mppool.drivers.base import DriverBase
from mppool.drivers.psycopg.connections import CANCELING, cancel, end
from mppool.drivers.psycopg.sessions import Sessions, command

__all__ = ["PsycopgDriver"]


class PsycopgDriver(Sessions, DriverBase):
    """Lends ``psycopg.Connection`` objects (of a subclass of ``connection_class``). Arguments as of ``psycopg_pool.ConnectionPool``; see ``Sessions``."""

    plain = psycopg.Connection

    def dial(self) -> Any:
        """Raises DialFailed, with psycopg's error as its cause."""
        conninfo, kwargs = self.arguments()
        try:
            conn = self.cls.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise self.failed(error) from error
        try:
            self.note(conn)
            self.set_up(conn)
        except BaseException:
            end(conn)
            raise
        return conn

    def tidy(self, session: Any) -> None:
        if self.check_tidy(session):
            session._do(session._rollback_gen())
        if self.must_reset(session):
            self.reset(session)

    def transferred(self, session: Any) -> None:
        if self.begins_anew(session):
            self.reset(session)
        else:
            self.forget(session)
            if self.must_deallocate(session):
                session._do(command(session.pgconn, b"DEALLOCATE ALL"))
        session._adopted = False

    def set_up(self, session: Any) -> None:
        """Call the user's ``configure``. Raises what it raises, ProgrammingError if it leaves a transaction open."""
        if self.configure is not None:
            self.configure(session)
            self.was_set_up(session)

    def reset(self, session: Any) -> None:
        session._do(command(session.pgconn, b"DISCARD ALL"))
        self.was_discarded(session)
        self.set_up(session)

    def ping(self, session: Any) -> None:
        session._do(command(session.pgconn, b""))

    def close(self, session: Any) -> None:
        if self.must_cancel(session):
            try:
                cancel(session._mppool, CANCELING)
            except psycopg.Error:
                pass  # it finds out by itself, later
        end(session)
