"""The public names: a promise, and documented."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import types

import pytest

import mppool

PUBLIC = [
    "AsyncLease",
    "AsyncPool",
    "BrokerUnavailable",
    "ConfigMismatch",
    "DialFailed",
    "Error",
    "Lease",
    "OptionError",
    "Pool",
    "PoolClosed",
    "PoolTimeout",
    "ProtocolError",
    "TooManyWaiting",
]
METHODS = ["close", "closed", "connection", "drain", "get_stats", "getconn", "open", "putconn", "resize"]


def test_the_promised_names_are_there() -> None:
    """None of the names that were ever public is missing."""
    assert set(PUBLIC) <= set(mppool.__all__)


def test_the_public_names_are_exactly_all() -> None:
    """Whatever can be reached as ``mppool.x`` without an underscore is in ``__all__``, but for submodules; and it is sorted."""
    plain = {name for name, thing in vars(mppool).items() if not name.startswith("_") and not isinstance(thing, types.ModuleType)}
    on_demand = {"AsyncLease", "AsyncPool"}  # with asyncio
    assert plain - {"TYPE_CHECKING", "Any"} | on_demand == set(mppool.__all__)
    assert {getattr(mppool, name).__name__ for name in on_demand} == on_demand
    assert list(mppool.__all__) == sorted(mppool.__all__)


@pytest.mark.parametrize("name", mppool.__all__)
def test_public_names_are_documented(name: str) -> None:
    """Each has a docstring, and so has each of its public methods."""
    thing = getattr(mppool, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing) and not issubclass(thing, BaseException):
        for method, value in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)) and method != "closed":
                assert inspect.getdoc(value), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("kind", [mppool.Pool, mppool.AsyncPool])
def test_a_pool_has_the_methods_it_should(kind: type) -> None:
    """The public methods of both pools are those promised, psycopg_pool's names among them."""
    found = [name for name, value in inspect.getmembers(kind) if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))]
    assert set(METHODS) <= set(found)


def test_the_version_is_that_of_the_package() -> None:
    """``mppool.__version__`` is what was installed."""
    assert mppool.__version__ == importlib.metadata.version("mppool")


def test_the_package_is_typed() -> None:
    """py.typed is part of what is installed: type checkers of users see our types."""
    assert (importlib.resources.files(mppool) / "py.typed").is_file()
