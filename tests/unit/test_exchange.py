"""exchange.py: who waits and in which order; what is evicted and why."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mppool.exchange import Facts, Queue, plan_evictions
from mppool.states import CloseReason, State

SECOND = 1_000_000_000
NOW = 10_000 * SECOND


def served(queue: Queue[str]) -> list[str]:
    order = []
    while queue:
        assert queue.head() == queue.head()
        order.append(queue.serve())
    return order


def test_first_come_first_served() -> None:
    """Waiters are served in the order they joined."""
    queue: Queue[str] = Queue(0)
    assert all(queue.join(waiter, front=False) for waiter in "abc")
    assert len(queue) == 3
    assert served(queue) == ["a", "b", "c"]


def test_front_is_before_everybody() -> None:
    """Whose turn came to nothing is the first again."""
    queue: Queue[str] = Queue(0)
    for waiter in "abc":
        queue.join(waiter, front=False)
    first = queue.serve()
    assert queue.join(first, front=True)
    assert served(queue) == ["a", "b", "c"]


def test_the_limit_refuses_the_next_and_only_the_next() -> None:
    """With ``limit`` waiters the next is refused and not queued; a place that becomes free is given again."""
    queue: Queue[str] = Queue(2)
    assert queue.join("a", front=False)
    assert queue.join("b", front=False)
    assert not queue.join("c", front=False)
    assert len(queue) == 2
    queue.serve()
    assert queue.join("c", front=False)
    assert served(queue) == ["b", "c"]


def test_coming_back_is_never_refused() -> None:
    """The limit does not count against a waiter that was counted before."""
    queue: Queue[str] = Queue(1)
    queue.join("a", front=False)
    assert queue.join("b", front=True)
    assert served(queue) == ["b", "a"]


def test_a_limit_of_zero_is_none() -> None:
    """``max_waiting=0`` lets everybody wait."""
    queue: Queue[int] = Queue(0)
    assert all(queue.join(waiter, front=False) for waiter in range(5000))


def test_strike_takes_out_exactly_one() -> None:
    """A struck waiter is not served, and the others keep their order."""
    queue: Queue[str] = Queue(0)
    for waiter in "abc":
        queue.join(waiter, front=False)
    assert queue.strike("b")
    assert served(queue) == ["a", "c"]


def test_strike_says_when_there_was_nothing_to_strike() -> None:
    """False for one who never waited, was served, or was struck before."""
    queue: Queue[str] = Queue(0)
    assert not queue.strike("a")
    queue.join("a", front=False)
    queue.serve()
    assert not queue.strike("a")
    queue.join("a", front=False)
    assert queue.strike("a")
    assert not queue.strike("a")


def test_waiters_are_told_apart_by_identity_of_the_link() -> None:
    """Two different waiters are never mistaken for one another."""

    class Link:
        pass

    first, second = Link(), Link()
    queue: Queue[Link] = Queue(0)
    queue.join(first, front=False)
    assert not queue.strike(second)
    assert queue.strike(first)


@dataclass
class Session:
    state: State = State.IDLE
    unused: float = 0.0  # seconds
    expires_in: float = 3600.0


def plan(*sessions: Session, max_size: int = 10, min_size: int = 0, max_idle: float = 60.0) -> list[tuple[int, CloseReason]]:
    return plan_evictions(
        Facts(
            now=NOW,
            states=[session.state for session in sessions],
            unused_since=[NOW - int(session.unused * SECOND) for session in sessions],
            expires=[NOW + int(session.expires_in * SECOND) for session in sessions],
            size=sum(session.state is not State.FREE for session in sessions),
            max_size=max_size,
            min_size=min_size,
            max_idle=int(max_idle * SECOND),
        )
    )


def test_a_quiet_pool_evicts_nothing() -> None:
    """Sessions that are young, in use lately and within the cap stay."""
    assert plan(Session(), Session(unused=59.9), Session(State.IN_USE)) == []
    assert plan() == []


def test_a_session_past_its_time_goes() -> None:
    """An idle session whose ``max_lifetime`` is over is closed as too_old, also below ``min_size``."""
    assert plan(Session(), Session(expires_in=-0.1), min_size=2) == [(1, CloseReason.too_old)]


def test_a_session_without_a_time_never_gets_too_old() -> None:
    """``expires`` 0 means that nobody has said yet: left alone."""
    facts = Facts(NOW, [State.IDLE], [NOW], [0], size=1, max_size=1, min_size=0, max_idle=SECOND)
    assert plan_evictions(facts) == []


@pytest.mark.parametrize("state", [State.FREE, State.DIALING, State.IN_USE, State.CLOSING])
def test_only_idle_sessions_are_evicted(state: State) -> None:
    """Whatever is not idle belongs to somebody, however old, unused or many."""
    assert plan(Session(state, unused=9999, expires_in=-1), max_size=1) == []


def test_the_longest_unused_go_first_down_to_min_size() -> None:
    """Of the sessions unused for longer than ``max_idle``, the longest unused go, and ``min_size`` stay."""
    sessions = Session(unused=100), Session(unused=300), Session(unused=200), Session(unused=1)
    assert plan(*sessions) == [(1, CloseReason.idle_too_long), (2, CloseReason.idle_too_long), (0, CloseReason.idle_too_long)]
    assert plan(*sessions, min_size=2) == [(1, CloseReason.idle_too_long), (2, CloseReason.idle_too_long)]
    assert plan(*sessions, min_size=4) == []


def test_sessions_in_use_count_towards_min_size() -> None:
    """``min_size`` is about all sessions: with enough in use, every idle one may go."""
    assert plan(Session(State.IN_USE), Session(State.IN_USE), Session(unused=100), min_size=2) == [(2, CloseReason.idle_too_long)]


def test_above_the_cap_idle_sessions_are_drained_at_once() -> None:
    """After a shrink the surplus goes first as drained, however fresh, the longest unused of them first."""
    sessions = Session(unused=1), Session(unused=3), Session(unused=2), Session(State.IN_USE)
    assert plan(*sessions, max_size=2) == [(1, CloseReason.drained), (2, CloseReason.drained)]
    assert plan(*sessions, max_size=1) == [(1, CloseReason.drained), (2, CloseReason.drained), (0, CloseReason.drained)]


def test_what_is_too_old_counts_towards_the_shrink() -> None:
    """A session that goes anyway is not followed by one more than the cap asks for."""
    assert plan(Session(expires_in=-1), Session(), Session(), max_size=2) == [(0, CloseReason.too_old)]


def test_what_is_closing_counts_towards_the_shrink() -> None:
    """A session that is on its way out already pays the shrink's debt: no other is closed for it."""
    assert plan(Session(State.CLOSING), Session(), Session(State.IN_USE), max_size=2) == []


def test_what_is_closing_does_not_count_towards_min_size() -> None:
    """A session that is on its way out is none of the ``min_size`` that stay."""
    assert plan(Session(State.CLOSING), Session(unused=100), min_size=1) == []


def test_all_three_reasons_in_one_plan() -> None:
    """Too old, then drained down to the cap, then idle too long down to ``min_size``: each session once."""
    sessions = Session(unused=400), Session(unused=5, expires_in=-1), Session(unused=300), Session(unused=200), Session(unused=1)
    assert plan(*sessions, max_size=3, min_size=1) == [
        (1, CloseReason.too_old),
        (0, CloseReason.drained),
        (2, CloseReason.idle_too_long),
        (3, CloseReason.idle_too_long),
    ]
