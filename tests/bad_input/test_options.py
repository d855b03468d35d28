"""Options that make no sense are refused, at once and by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

import mppool
from mppool.options import MAX_SLOTS
from mppool.table import slots_for


@pytest.mark.parametrize(
    "target",
    ["localhost:80", "tcp://localhost", "http://localhost:80", "tcp://localhost:99999", "unix://x", ("localhost", "80"), ("localhost", 0), 80, b"x"],
    ids=repr,
)
def test_targets_that_cannot_be_parsed(target: object) -> None:
    """A target that makes no sense is refused by the constructor, with the value. (All forms: unit/test_options.py.)"""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool(target)
    assert str(caught.value).startswith(f"target={target!r}: ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_size": 0}, "max_size=0: expected a whole number from 1 to 1024"),
        ({"max_size": -3}, "max_size=-3: expected a whole number from 1 to 1024"),
        ({"max_size": MAX_SLOTS + 1}, "max_size=1025: expected a whole number from 1 to 1024"),
        ({"max_size": 2.5}, "max_size=2.5: expected a whole number from 1 to 1024"),
        ({"max_size": "4"}, "max_size='4': expected a whole number from 1 to 1024"),
        ({"max_size": None}, "max_size=None: expected a whole number from 1 to 1024"),
        ({"max_size": 2, "min_size": 3}, "min_size=3: expected a whole number from 0 to 2"),
        ({"max_waiting": -1}, "max_waiting=-1: expected a whole number from 0 to 1073741824"),
        ({"timeout": -1}, "timeout=-1: expected seconds, 0 or more"),
        ({"timeout": math.nan}, "timeout=nan: expected seconds, 0 or more"),
        ({"timeout": "soon"}, "timeout='soon': expected seconds, 0 or more"),
        ({"max_idle": -0.5}, "max_idle=-0.5: expected seconds, 0 or more"),
        ({"max_lifetime": math.nan}, "max_lifetime=nan: expected seconds, 0 or more"),
        ({"check": "SELECT 1"}, "check='SELECT 1': expected a function of one session, or None"),
        ({"name": ""}, "name='': expected 1 to 63 letters, digits and . _ : @ + - (beginning with a letter or digit)"),
        ({"name": "../../etc/passwd"}, "name='../../etc/passwd': expected 1 to 63 letters"),
        ({"name": "a\0b"}, r"name='a\x00b': expected 1 to 63 letters"),
        ({"name": "naïve"}, "name='naïve': expected 1 to 63 letters"),
        ({"name": "x" * 64}, f"name='{'x' * 64}': expected 1 to 63 letters"),
        ({"name": 7}, "name=7: expected 1 to 63 letters"),
        ({"max_sise": 4}, "max_sise=4: there is no such option; there are check, close_timeout, "),
        ({"maxconn": 4, "host": "db"}, "host='db': there is no such option; there are "),
        ({"dial": print}, "target='tcp://localhost:80', dial=<built-in function print>, driver=None: expected a target, or dial=, or driver="),
        ({"broker": "/tmp/" + "x" * 100}, f"broker='/tmp/{'x' * 100}': a socket path may have at most 96 bytes"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    """Each is refused by the constructor, before any I/O, with option, value and what was expected."""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool("tcp://localhost:80", **options)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "target=None, dial=None, driver=None: expected a target, or dial=, or driver="),
        ({"dial": 5, "name": "x"}, "dial=5: expected a function without arguments"),
        ({"dial": print}, "name=None: a pool without a target needs a name; workers that give the same share it"),
    ],
    ids=str,
)
def test_pools_of_nothing(options: dict[str, Any], said: str) -> None:
    """Without a target there must be a function to dial, and a name."""
    with pytest.raises(mppool.OptionError) as caught:
        mppool.Pool(**options)
    assert str(caught.value) == said


@pytest.mark.parametrize("broker", [5, b"/tmp/b.sock", "/tmp/a\0b"], ids=repr)
def test_a_broker_that_is_no_path(broker: Any) -> None:
    """``broker=`` is checked at construction as every option is."""
    with pytest.raises(mppool.OptionError, match="broker="):
        mppool.Pool("tcp://localhost:80", broker=broker)


@pytest.mark.parametrize("host", ["höst", "my host", "_x", "a\nb", "-x"])
def test_an_odd_host_is_not_blamed_on_the_name(host: str) -> None:
    """A host that no default name can be made of is accepted, or refused as what the user gave: the target."""
    try:
        mppool.Pool((host, 80))
    except mppool.OptionError as error:
        if not str(error).startswith("target="):
            raise


def test_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPPOOL_BROKER counts where ``broker=`` is not given, with the same bounds."""
    monkeypatch.setenv("MPPOOL_BROKER", "/tmp/" + "x" * 100)
    with pytest.raises(mppool.OptionError, match=r"broker='/tmp/x+': a socket path may have at most 96 bytes"):
        mppool.Pool("tcp://localhost:80")


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True], ids=repr)
def test_timeouts_of_a_checkout(socket_path: str, timeout: Any) -> None:
    """A checkout's own timeout is checked as the option is; nothing is dialed."""
    with mppool.Pool(("127.0.0.1", 1), broker=socket_path) as pool:
        for checkout in (pool.getconn, lambda timeout: pool.connection(timeout).__enter__()):
            with pytest.raises(mppool.OptionError) as caught:
                checkout(timeout)
            assert str(caught.value) == f"timeout={timeout!r}: expected seconds, 0 or more"
        assert pool.get_stats()["dial_failures"] == 0


@pytest.mark.parametrize("timeout", [-1, math.nan, "1"], ids=repr)
def test_timeouts_of_open(socket_path: str, timeout: Any) -> None:
    """``open(wait=True)`` checks its timeout like every other."""
    with mppool.Pool(("127.0.0.1", 1), broker=socket_path) as pool, pytest.raises(mppool.OptionError, match="timeout="):
        pool.open(wait=True, timeout=timeout)


def test_open_says_when_it_had_to_give_up(socket_path: str) -> None:
    """``open(wait=True)`` raises PoolTimeout when ``min_size`` sessions are not to be had in time."""
    with mppool.Pool(("127.0.0.1", 1), min_size=1, broker=socket_path) as pool, pytest.raises(mppool.PoolTimeout, match="min_size=1"):
        pool.open(wait=True, timeout=0.05)


@pytest.mark.parametrize("max_size", [0, -1, slots_for(4) + 1, 2.0, "8", True, None], ids=repr)
def test_caps_of_a_resize(socket_path: str, max_size: Any) -> None:
    """A new cap below 1, above the table's room, or no number, is refused with value and bounds; the old one stays."""
    with mppool.Pool(("127.0.0.1", 1), max_size=4, broker=socket_path) as pool:
        with pytest.raises(mppool.OptionError) as caught:
            pool.resize(max_size)
        assert str(caught.value).startswith(f"max_size={max_size!r}: expected a whole number from 1 to {slots_for(4)}")
        assert pool.get_stats()["max_size"] == 4
