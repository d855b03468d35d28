"""The command line in general."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

import mppool
from tests.cli.shared import ENVIRONMENT, mppool_


@pytest.mark.parametrize("command", [[], ["broker"], ["run"], ["status"], ["resize"], ["gc"]], ids=" ".join)
def test_help_says_usage_and_exit_codes(command: list[str]) -> None:
    """``--help`` of every command shows its usage and, where they matter, the exit codes."""
    done = mppool_(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(" ".join(["Usage: mppool", *command, "["]))
    if command != ["gc"]:
        assert re.search(r"^ *Exit codes:\n +0 +done$", done.stdout, re.MULTILINE)


def test_version() -> None:
    """``--version`` says the package's."""
    done = mppool_("--version")
    assert (done.returncode, done.stdout) == (0, f"mppool, version {mppool.__version__}\n")


def test_the_installed_command_is_the_same() -> None:
    """``mppool`` on the path and ``python -m mppool`` are one program."""
    command = shutil.which("mppool", path=os.path.dirname(sys.executable))
    if command is None:
        pytest.skip("the mppool command is not installed beside this interpreter")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=30, env=ENVIRONMENT, check=True)
    assert done.stdout == mppool_("--help").stdout


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["--frobnicate"], ["broker", "--frobnicate"], ["run"], ["run", "--"], ["resize"], ["resize", "x"]], ids=" ".join
)
def test_a_command_line_without_sense_exits_2(arguments: list[str]) -> None:
    """Unknown commands and options, and missing arguments, say so and exit with 2."""
    done = mppool_(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr
