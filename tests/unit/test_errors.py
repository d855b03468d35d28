"""errors.py: the tree is as drawn, and every error survives a trip to another process."""

from __future__ import annotations

import pickle
import re

import pytest

from mppool import errors

NAMES = sorted(errors.__all__)
LEAVES = [name for name in NAMES if name != "Error"]


def drawn() -> dict[str, str]:
    """From the module's own drawing: each error below Error, and what else it is said to be."""
    return {name: also or "" for name, also in re.findall(r"[├└]── (\w+)(?: +\(also (\w+)\))?", errors.__doc__ or "")}


def test_every_error_is_drawn_and_nothing_else() -> None:
    """The drawing at the top of errors.py names exactly the errors there are."""
    assert sorted(drawn()) == LEAVES
    defined = [name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert sorted(defined) == NAMES


@pytest.mark.parametrize("name", LEAVES)
def test_an_error_is_what_the_drawing_says(name: str) -> None:
    """Each error derives from Error, and from the built-in error it is drawn with, and from no other."""
    kind = getattr(errors, name)
    bases = {base.__name__ for base in kind.__bases__}
    assert bases == {"Error"} | ({drawn()[name]} - {""})


@pytest.mark.parametrize("name", NAMES)
def test_an_error_survives_pickling(name: str) -> None:
    """Type, message and attributes are the same after a trip through pickle, as multiprocessing makes it."""
    error = getattr(errors, name)("max_size=0: no")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(error, protocol))
        assert type(twin) is type(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("permanent", [True, False])
def test_a_failed_dial_keeps_whether_waiting_helps(permanent: bool) -> None:
    """DialFailed carries ``permanent`` through pickle, too."""
    twin = pickle.loads(pickle.dumps(errors.DialFailed("refused", permanent=permanent)))
    assert (str(twin), twin.permanent) == ("refused", permanent)


@pytest.mark.parametrize("name", NAMES)
def test_every_error_says_what_it_means(name: str) -> None:
    """Each error has a docstring of its own."""
    kind = getattr(errors, name)
    assert kind.__doc__
    assert all(kind.__doc__ != base.__doc__ for base in kind.__bases__)
