"""What a pool can be told, checked once, at construction. Names and meanings are psycopg_pool's where it has them."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from mppool.errors import OptionError

__all__ = ["MAX_SLOTS", "Options", "Target", "default_name", "parse_target"]

MAX_SLOTS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,62}")
_FOREVER = 10 * 365 * 86400.0


@dataclass(frozen=True)
class Target:
    """Where the server is: ``kind`` is "tcp" (host, port) or "unix" (host is the path)."""

    kind: str
    host: str
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_target(target: object) -> Target:
    """ "tcp://host:port", "unix:///path" or (host, port). OptionError says what is wrong with anything else."""
    if isinstance(target, Target):
        return target
    if isinstance(target, (tuple, list)) and len(target) == 2:
        host, port = target
        if isinstance(host, str) and host and isinstance(port, int) and not isinstance(port, bool):
            return _tcp(target, host, port)
    if isinstance(target, str):
        kind, found, rest = target.partition("://")
        if found and kind == "unix" and rest.startswith("/") and "\0" not in rest and len(os.fsencode(rest)) <= 107:
            return Target("unix", rest)
        if found and kind == "tcp":
            match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w-]+)\]|([^:/?#\[\]\s]+)):(\d{1,5})/?", rest)
            if match:
                return _tcp(target, match[1] or match[2], int(match[3]))
    raise OptionError(f'target={target!r}: expected "tcp://host:port", "unix:///path" or (host, port)')


def _tcp(given: object, host: str, port: int) -> Target:
    if not 0 < port < 65536:
        raise OptionError(f"target={given!r}: the port must be 1 to 65535")
    return Target("tcp", host, port)


def default_name(target: Target) -> str:
    """The pool's name when none is given: workers that name the same target share a pool. What no name may contain is hashed."""
    plain = f"{target.host}:{target.port}" if target.kind == "tcp" else ""
    if _NAME.fullmatch(plain):
        return plain
    digest = hashlib.blake2b(str(target).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", target.host)[-40:].strip("-.")
    return f"{target.kind}-{readable}-{digest}" if readable else f"{target.kind}-{digest}"


@dataclass(frozen=True)
class Options:
    """All options of a pool, with their defaults. Times are in seconds.

    ``max_size``, ``min_size``, ``max_waiting``, ``max_idle``, ``max_lifetime``, ``max_dialing``, ``max_lease``, ``close_timeout`` and
    ``reconnect_timeout`` are the pool's, for all workers together: whoever creates the pool declares them, later workers meet them.
    """

    max_size: int = 4
    min_size: int = 0
    timeout: float = 30.0  # of a checkout
    max_waiting: int = 0  # 0: no limit
    max_idle: float = 600.0  # sessions above min_size that nobody used for so long are closed
    max_lifetime: float = 3600.0  # less up to 10 % at random, so that they do not all end at once
    reconnect_timeout: float = 300.0  # how long the server may be down before checkouts fail at once
    max_dialing: int = 2  # dials at a time, of all workers: a restarted server is not stormed
    max_lease: float = 0.0  # 0: no limit; else the broker shuts a session down that was lent for longer
    close_timeout: float = 0.5  # how long to wait for the server's end of a connection before its permit goes back
    connect_timeout: float = 10.0
    turn: float = 0.004  # while others wait: how long who waited, too, may take its session again and again. 0: once
    configure: Callable[[Any], object] | None = None  # called once with each new session
    check: Callable[[Any], object] | None = None  # called before lending; raises if the session is broken
    reset: Callable[[Any], object] | None = None  # called at return; raises if the session is spoilt
    debug: bool = False  # lend a duplicate that return closes: use after return fails at once

    def __post_init__(self) -> None:
        self._whole("max_size", 1, MAX_SLOTS)
        self._whole("min_size", 0, self.max_size)
        self._whole("max_waiting", 0, 1 << 30)
        self._whole("max_dialing", 1, MAX_SLOTS)
        for name in ("timeout", "max_idle", "max_lifetime", "reconnect_timeout", "max_lease", "close_timeout", "connect_timeout", "turn"):
            self._seconds(name)
        for name in ("configure", "check", "reset"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"{name}={value!r}: expected a function of one session, or None")

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise OptionError(f"{name}={value!r}: expected a whole number from {low} to {high}")

    def _seconds(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
            raise OptionError(f"{name}={value!r}: expected seconds, 0 or more")
        object.__setattr__(self, name, min(float(value), _FOREVER))

    @classmethod
    def names(cls) -> frozenset[str]:
        return frozenset(field.name for field in fields(cls))


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"name={name!r}: expected 1 to 63 letters, digits and . _ : @ + - (beginning with a letter or digit)")
    return name


def check_timeout(timeout: float | None, default: float) -> float:
    if timeout is None:
        return default
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or math.isnan(timeout) or timeout < 0:
        raise OptionError(f"timeout={timeout!r}: expected seconds, 0 or more")
    return min(float(timeout), _FOREVER)
