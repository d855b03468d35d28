from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users can reach, as the runtime directory's parent is."""
    path = Path(tempfile.mkdtemp(prefix="mppool-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
