"""A short while of chaos, with another seed each time; scripts/chaos runs longer and repeats a seed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import die_with_parent

pytestmark = pytest.mark.storm


@pytest.mark.parametrize("options", [["--seconds", "12"], ["--seconds", "8", "--no-broker"]], ids=["broker", "no-broker"])
def test_a_host_full_of_trouble_loses_nothing(options: list[str]) -> None:
    """Whatever is killed, stopped, closed, reset, refused or resized: the servers never see too many connections, nothing crosses, nothing is lost."""
    command = [sys.executable, "-m", "tests.chaos", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, preexec_fn=die_with_parent)
    print(done.stdout)
    assert done.returncode == 0, "see what was found above; --seed repeats the actions"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests"] > 0
    assert figures["rounds"] > 0
    assert figures["kills"] > 0
