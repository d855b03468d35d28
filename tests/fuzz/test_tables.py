"""Scribbled tables, chosen and shrunk by hypothesis."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import OPEN
from tests.fuzz.damage import Damage, damages
from tests.fuzz.tables import MOMENTS, bench


def test_a_damaged_table_is_refused_or_repaired(socket_path: str) -> None:
    """Whatever is written into a pool's table, whenever: no socket is shared, no process crashes or hangs, errors are mppool's own."""
    with bench(socket_path) as it:

        @settings(OPEN, max_examples=10)
        @given(some=damages(), moment=st.sampled_from(MOMENTS), with_broker=st.booleans())
        def play(some: list[Damage], moment: str, with_broker: bool) -> None:
            it.round(some, moment, with_broker)

        play()
        print(f"{it.rounds} tables, {it.over_cap} of them over the cap, {dict(it.outcomes)}; {it.innocent.requests} requests of the innocent pool")
