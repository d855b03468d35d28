from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from tests.helpers.users import ALICE, Home, home_of


@pytest.fixture
def home() -> Iterator[Home]:
    with home_of(ALICE) as it:
        yield it


@pytest.fixture
def many_descriptors() -> None:
    """So many as processes that fork others, or open hundreds of sessions, need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"RLIMIT_NOFILE allows {hard} descriptors, this needs 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
