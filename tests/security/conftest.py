from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.users import ALICE, Home, home_of


@pytest.fixture
def home() -> Iterator[Home]:
    with home_of(ALICE) as it:
        yield it
