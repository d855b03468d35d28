"""``check_driver``: try all promises, and say which are not kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mppool.drivers.base import DriverBase
from mppool.testing import processes
from mppool.testing.kit import Kit
from mppool.testing.promises import PROMISES
from mppool.testing.report import Broken, BrokenDriver, DoesNotApply, PromiseBroken, Report

__all__ = ["check_driver"]

Leave = Callable[[Any], Any]


def check_driver(
    driver: DriverBase,
    *,
    identity: Callable[[Any], Any] | None = None,
    ask: Callable[[Any, str], Any] | None = None,
    look: Callable[[Any], Any] | None = None,
    dirty: Iterable[Leave] | Mapping[str, Leave] = (),
    secrets: Sequence[str] = (),
    unreachable: DriverBase | None = None,
    moves: int = 20,
    timeout: float = 20.0,
    only: Sequence[str] = (),
) -> Report:
    """Try with real processes, against the running server, what the pool relies on. Returns what was tried.

    ``identity(session)`` asks the server which of its sessions this is (its own number for it); without it the addresses of
    the connection must do. ``ask(session, nonce)`` does one round trip whose answer contains the nonce. ``look(session)``
    says what state the session is in, as far as users can change it: it is compared with that of a new one. ``dirty``: functions,
    by name or in a list, each of which leaves something in a session (a variable, a transaction, half a reply); what they
    raise is ignored. ``secrets`` must not appear in the key. ``unreachable`` is such a driver for a place where nobody listens.
    For an AsyncDriverBase all of these may be coroutine functions. ``timeout`` in seconds, for each promise; ``only``: names of promises.

    Raises BrokenDriver, an AssertionError, that names every promise which is not kept, with what was seen and what to do. Nothing
    is left running in either case. Raises ValueError if there is no promise of a name in ``only``.
    """
    unknown = set(only) - {promise.name for promise in PROMISES}
    if unknown:
        raise ValueError(f"only={only!r}: there are no promises {', '.join(sorted(unknown))}")
    ways = dict(dirty) if isinstance(dirty, Mapping) else {getattr(leave, "__name__", f"way {n}"): leave for n, leave in enumerate(dirty, 1)}
    report = Report(f"{type(driver).__name__} ({driver.name})")
    kit = Kit(driver, identity, ask, look, ways, secrets, unreachable, moves, "", timeout)
    with contextlib.ExitStack() as afterwards:
        for name, says, advice, check, pooled in PROMISES:
            if only and name not in only:
                continue
            if pooled and not kit.broker:
                kit.broker = afterwards.enter_context(processes.broker())
            kit.name = f"check-{name}"
            try:
                note = processes.outcome(functools.partial(tried, kit, check), timeout)
            except DoesNotApply as reason:
                report.skipped[name] = str(reason)
            except PromiseBroken as seen:
                report.broken.append(Broken(name, says, str(seen), advice))
            else:
                report.kept.append(name)
                if note:
                    report.notes.append(f"{name}: {note}")
    if report.broken:
        raise BrokenDriver(report)
    return report


def tried(kit: Kit, check: Callable[[Kit], str | None]) -> str | None:
    kit.begin()
    return check(kit)
