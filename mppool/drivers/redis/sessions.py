"""What both drivers are told, and say of a session."""

from __future__ import annotations

from typing import Any

from mppool.drivers.redis.login import Login
from mppool.errors import DialFailed
from mppool.states import Residence

__all__ = ["Sessions"]


class Sessions:
    name = "redis"

    plain: type[Any]
    """redis-py's own class, for who asks for no other."""

    def __init__(self, connection_class: Any = None, on_transfer: str = "reset", **connection_kwargs: Any) -> None:
        self.login = Login(connection_class or self.plain, connection_kwargs, on_transfer)
        self.minds_transfer = on_transfer == "reset"

    def key(self) -> str:
        return f"redis/1/{self.login.target}/{self.login.db}/{self.login.digest()}"

    def residence(self, session: Any) -> Residence:
        return Residence.tls if self.login.is_tls else Residence.moves

    def failed(self, error: Exception) -> DialFailed:
        """Redis-py has tried as often as its ``retry`` says: the caller is told at once, as by redis-py."""
        return DialFailed(f"target={str(self.login.target)!r}: {type(error).__name__}: {error}", permanent=True)
