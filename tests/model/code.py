"""The product's own source, as it is or with one change in it: each set of modules is loaded afresh."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

__all__ = ["Mutation", "load"]

MODULES = (
    "alone",
    "attached",
    "claims",
    "conversation",
    "desk",
    "dialing",
    "errors",
    "exchange",
    "permits",
    "reclaim",
    "returning",
    "states",
    "stray",
    "table",
    "worker",
)


class Mutation(NamedTuple):
    """A defect: ``old`` stands exactly once in the module's source, and is replaced. More than one place: several triples."""

    name: str
    edits: tuple[tuple[str, str, str], ...]  # module, old, new


class _Loader(importlib.abc.MetaPathFinder):
    def __init__(self, mutation: Mutation | None) -> None:
        self.edits = mutation.edits if mutation is not None else ()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("mppool."):
            return None
        edits = [(old, new) for module, old, new in self.edits if name == f"mppool.{module}"]
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if edits and spec is not None and spec.origin is not None:
            spec.loader = _Mutant(name, spec.origin, edits)
        return spec


class _Mutant(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, edits: list[tuple[str, str]]) -> None:
        super().__init__(name, path)
        self.edits = edits

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        source = self.get_data(self.path).decode()
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.path}: {source.count(old)} places read {old!r}"
            source = source.replace(old, new)
        return compile(source, self.path, "exec")


def load(mutation: Mutation | None = None) -> SimpleNamespace:
    """The modules that the model runs, by their names. What others have imported stays as it is."""
    before = {name: module for name, module in sys.modules.items() if name == "mppool" or name.startswith("mppool.")}
    finder = _Loader(mutation)
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"mppool.{name}") for name in MODULES})
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name == "mppool" or name.startswith("mppool.")]:
            del sys.modules[name]
        sys.modules.update(before)
