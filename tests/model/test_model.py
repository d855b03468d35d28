"""The model finds no fault in the code as it is, and finds each of a list of faults in code that has it."""

from __future__ import annotations

import pytest

from tests.model.code import Mutation, load
from tests.model.explore import explore
from tests.model.mutations import MUTATIONS, SCENARIOS, Setting
from tests.model.steps import Violation


@pytest.mark.parametrize("setting", SCENARIOS, ids=str)
def test_every_order_of_steps_and_deaths_is_safe(setting: Setting) -> None:
    """Never two holders, never a live holder's session closed, nothing lost at rest, no waiter forgotten; thousands of states."""
    assert explore(setting.build(load())) > 1000


@pytest.mark.parametrize(("mutation", "setting"), MUTATIONS, ids=[mutation.name for mutation, _ in MUTATIONS])
def test_a_defect_is_found(mutation: Mutation, setting: Setting) -> None:
    """The same exploration of the product's source with one defect in it comes upon a violation."""
    with pytest.raises(Violation):
        explore(setting.build(load(mutation)))
