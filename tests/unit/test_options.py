"""options.py: what a pool can be told. Errors name the option and the value."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest

from mppool.errors import OptionError
from mppool.options import MAX_SLOTS, Options, Target, check_name, check_timeout, default_name, parse_target

TIMES = ["timeout", "max_idle", "max_lifetime", "reconnect_timeout", "max_lease", "close_timeout", "connect_timeout"]
TEN_YEARS = 10 * 365 * 86400.0


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("tcp://127.0.0.1:6379", Target("tcp", "127.0.0.1", 6379)),
        ("tcp://db.example.org:1", Target("tcp", "db.example.org", 1)),
        ("tcp://db:65535/", Target("tcp", "db", 65535)),
        ("tcp://[::1]:80", Target("tcp", "::1", 80)),
        ("tcp://[fe80::1%eth0]:80", Target("tcp", "fe80::1%eth0", 80)),
        (("127.0.0.1", 6379), Target("tcp", "127.0.0.1", 6379)),
        (["::1", 80], Target("tcp", "::1", 80)),
        ("unix:///run/redis.sock", Target("unix", "/run/redis.sock")),
        ("unix:///a b:c", Target("unix", "/a b:c")),
        (Target("tcp", "x", 1), Target("tcp", "x", 1)),
    ],
)
def test_targets_that_make_sense(given: object, target: Target) -> None:
    """Each way to write a target gives the same Target."""
    assert parse_target(given) == target


@pytest.mark.parametrize("target", [Target("tcp", "127.0.0.1", 6379), Target("tcp", "::1", 80), Target("tcp", "fe80::1%eth0", 80), Target("unix", "/run/x")])
def test_a_target_reads_back(target: Target) -> None:
    """What a Target prints is a target again: errors and the table show what can be typed."""
    assert parse_target(str(target)) == target


def test_a_zone_is_any_interface() -> None:
    """Interfaces are called br-0a1b, too."""
    assert parse_target("tcp://[fe80::1%br-0a1b]:80") == Target("tcp", "fe80::1%br-0a1b", 80)


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "localhost",
        "localhost:80",
        ":80",
        "tcp://",
        "tcp://localhost",
        "tcp://localhost:",
        "tcp://:80",
        "tcp://localhost:http",
        "tcp://localhost:-1",
        "tcp://localhost:+80",
        "tcp://localhost: 80",
        "tcp://local host:80",
        "tcp://localhost:80/0",
        "tcp://localhost:80?db=1",
        "tcp://localhost:80#x",
        "tcp://localhost:80 ",
        "tcp://localhost:80\n",
        "tcp://user:secret@localhost:80",
        "tcp://::1:80",
        "tcp://[::1]",
        "tcp://[::1:80",
        "tcp://[]:80",
        "tcp://localhost:123456",
        "TCP://localhost:80",
        "http://localhost:80",
        "redis://localhost:6379",
        "tcp:localhost:80",
        "unix://",
        "unix://run/x.sock",
        "unix:/run/x.sock",
        "unix:///run/\0x",
        "unix:///" + "x" * 107,
        b"tcp://localhost:80",
        80,
        3.5,
        (),
        ("localhost",),
        ("localhost", 80, 0, 0),
        ("localhost", "80"),
        ("localhost", 80.0),
        ("localhost", True),
        ("", 80),
        (None, 80),
        (b"localhost", 80),
        (80, "localhost"),
        {"host": "localhost", "port": 80},
    ],
    ids=repr,
)
def test_targets_that_make_no_sense(given: object) -> None:
    """Anything else is refused with the option, the value, and what was expected."""
    with pytest.raises(OptionError) as caught:
        parse_target(given)
    assert str(caught.value).startswith(f"target={given!r}: expected ")


@pytest.mark.parametrize(
    "given", [("localhost", 0), ("localhost", 65536), ("localhost", -1), "tcp://localhost:0", "tcp://localhost:65536", "tcp://localhost:99999"]
)
def test_ports_have_bounds(given: object) -> None:
    """A port below 1 or above 65535 is refused as such."""
    with pytest.raises(OptionError) as caught:
        parse_target(given)
    assert str(caught.value) == f"target={given!r}: the port must be 1 to 65535"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (Target("tcp", "127.0.0.1", 6379), "127.0.0.1:6379"),
        (Target("tcp", "db.example.org", 5432), "db.example.org:5432"),
        (Target("tcp", "::1", 80), "tcp-1-9c5e3540"),
        (Target("tcp", "fe80::1%eth0", 80), "tcp-fe80-1-eth0-c643be81"),
        (Target("unix", "/run/redis.sock"), "unix-run-redis.sock-968bc708"),
    ],
)
def test_default_names_are_names(target: Target, name: str) -> None:
    """A pool without a name is called after its target, and that is a legal name."""
    assert default_name(target) == check_name(name)


def test_default_names_of_different_servers_differ() -> None:
    """Two ports of one host with a long name are two pools, not a ConfigMismatch."""
    host = "orders-cache.a1b2c3.clustercfg.euc1.cache.internal.shop.example.org"
    assert default_name(Target("tcp", host, 6379)) != default_name(Target("tcp", host, 6380))


def test_default_names_of_different_paths_differ() -> None:
    """Two Unix sockets are two pools, however alike their paths."""
    assert default_name(Target("unix", "/run/a-b")) != default_name(Target("unix", "/run/a/b"))


def test_a_path_of_undecodable_bytes_is_an_option_error_too() -> None:
    """A path with surrogates is refused, or taken, like any other."""
    with contextlib.suppress(OptionError):
        parse_target("unix:///run/\udcff.sock")


@pytest.mark.parametrize("name", ["a", "7", "A" * 63, "cache", "db.example.org:5432", "a_b-c+d@e"])
def test_names_that_make_sense(name: str) -> None:
    """Letters, digits and a few signs, up to 63."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "A" * 64, "a/b", "../etc", ".hidden", "-x", "_x", " a", "a b", "a\n", "a\0b", "naïve", "池", "a%b", "a*", None, 7, b"a", ["a"]], ids=repr
)
def test_names_with_odd_characters(name: object) -> None:
    """Everything else is refused with the value and what is allowed."""
    with pytest.raises(OptionError) as caught:
        check_name(name)
    assert str(caught.value).startswith(f"name={name!r}: expected 1 to 63 letters, digits and ")


def test_the_defaults_are_in_order() -> None:
    """``Options()`` is valid, and ``names()`` names its fields."""
    options = Options()
    assert options.max_size == 4
    assert Options.names() == {field.name for field in dataclasses.fields(options)}


def test_options_cannot_be_changed() -> None:
    """What was checked once stays as it was."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().max_size = 5  # type: ignore[misc]


@pytest.mark.parametrize(("option", "low", "high"), [("max_size", 1, MAX_SLOTS), ("max_waiting", 0, 1 << 30), ("max_dialing", 1, MAX_SLOTS)])
def test_whole_numbers_have_bounds(option: str, low: int, high: int) -> None:
    """Both bounds are allowed; beyond them, and anything that is no whole number, is refused with option, value and bounds."""
    goods: list[Any] = [low, high]
    for good in goods:
        assert getattr(Options(**{option: good}), option) == good
    bads: list[Any] = [low - 1, high + 1, -1 << 70, 1 << 70, 2.0, 2.5, math.nan, "4", None, True, [4]]
    for bad in bads:
        with pytest.raises(OptionError) as caught:
            Options(**{option: bad})
        assert str(caught.value) == f"{option}={bad!r}: expected a whole number from {low} to {high}"


def test_min_size_is_at_most_max_size() -> None:
    """``min_size`` may be anything from 0 to ``max_size``."""
    assert Options(max_size=3, min_size=3).min_size == 3
    for bad in (4, -1):
        with pytest.raises(OptionError) as caught:
            Options(max_size=3, min_size=bad)
        assert str(caught.value) == f"min_size={bad}: expected a whole number from 0 to 3"


@pytest.mark.parametrize("option", TIMES)
@pytest.mark.parametrize("bad", [-1, -0.001, -math.inf, math.nan, "1", None, True, 1j, [1]], ids=repr)
def test_times_that_make_no_sense(option: str, bad: Any) -> None:
    """Negative, NaN and no number at all are refused with option and value."""
    with pytest.raises(OptionError) as caught:
        Options(**{option: bad})
    assert str(caught.value) == f"{option}={bad!r}: expected seconds, 0 or more"


@pytest.mark.parametrize("option", TIMES)
def test_times_that_make_sense(option: str) -> None:
    """Zero, whole numbers, and forever, which is ten years: far enough, and it fits into nanoseconds."""
    times: list[tuple[Any, float]] = [(0, 0.0), (7, 7.0), (0.25, 0.25), (math.inf, TEN_YEARS), (1e300, TEN_YEARS)]
    for given, kept in times:
        value = getattr(Options(**{option: given}), option)
        assert (value, type(value)) == (kept, float)


@pytest.mark.parametrize("option", ["configure", "check", "reset"])
def test_hooks_are_functions(option: str) -> None:
    """A hook is something to call, or None."""
    assert getattr(Options(**{option: print}), option) is print  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=f"^{option}='yes': expected a function of one session, or None$"):
        Options(**{option: "yes"})  # type: ignore[arg-type]


def test_timeouts_of_a_single_checkout() -> None:
    """None means the pool's; everything else is checked as the option is."""
    assert check_timeout(None, 30.0) == 30.0
    assert check_timeout(0, 30.0) == 0.0
    assert check_timeout(math.inf, 30.0) == TEN_YEARS
    for bad in (-1, math.nan, "1", True, -math.inf):
        with pytest.raises(OptionError) as caught:
            check_timeout(bad, 30.0)  # type: ignore[arg-type]
        assert str(caught.value) == f"timeout={bad!r}: expected seconds, 0 or more"
