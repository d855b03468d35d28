"""Conversations: hypothesis chooses the moves, and shrinks what went wrong to the few that matter."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.fuzz import OPEN
from tests.fuzz.conversation import MOVES, Conversation
from tests.fuzz.frames import Zoo
from tests.fuzz.rig import Rig, rig


class Machine(RuleBasedStateMachine):
    rig: ClassVar[Rig]
    zoo: ClassVar[Zoo]

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.conversation = Conversation(self.rig, self.zoo, seed)

    @rule(move=st.sampled_from(MOVES))
    def move(self, move: str) -> None:
        self.conversation.move(move)

    def teardown(self) -> None:
        if hasattr(self, "conversation"):
            self.conversation.finish()


def test_any_order_of_moves(socket_path: str) -> None:
    """Rows live and die, links greet, share, fetch, wait and cancel in any order: each gets its own answers only, and nothing is lost."""
    with rig(socket_path) as it:
        Machine.rig, Machine.zoo = it, Zoo()
        run_state_machine_as_test(Machine, settings=settings(OPEN, max_examples=15, stateful_step_count=50))
        Machine.zoo.close()
        print(f"{it.requests} requests of bystanders, the slowest {it.slowest:.3f} s")
        it.end_bystanders()
        assert it.leaked() == 0
