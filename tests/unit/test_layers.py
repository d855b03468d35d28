"""The code is in layers: a file imports only from what stands above it here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mppool

# From the words at the bottom to the edge. Within a line, too, a module imports only from those to its left. A package stands for all of its modules.
LAYERS = [
    ["errors", "states", "options"],
    ["kernel"],
    ["table", "claims", "permits", "reclaim", "snapshot"],
    ["wire", "exchange", "story"],
    ["drivers"],
    ["launch", "attached", "line", "worker", "stray", "conversation", "returning", "dialing", "alone", "checkout"],
    ["shell", "pool", "aio"],
    ["keeper", "desk", "bond", "fdstore", "succession", "broker"],
    ["inspect", "supervisor"],
    ["integrations", "testing", "cli"],
]
ORDER = [name for layer in LAYERS for name in layer]
WORKERS_SIDE = {"attached", "line", "worker", "stray", "conversation", "returning", "dialing", "alone", "checkout", "launch", "shell", "pool", "aio"}
BROKERS_SIDE = {"keeper", "desk", "bond", "fdstore", "succession", "broker"}
EDGE = {"integrations", "testing", "cli"}

ROOT = Path(mppool.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, "" is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def top(name: str) -> str:
    return name.partition(".")[0]


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it; what only the type checker reads does not count."""
    found = set()
    todo: list[ast.AST] = [ast.parse(MODULES[name].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("mppool").lstrip(".") for alias in node.names if top(alias.name) == "mppool"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively: write mppool.{node.module}"
            if node.module is not None and top(node.module) == "mppool":
                base = node.module.removeprefix("mppool").lstrip(".")
                for alias in node.names:
                    longer = f"{base}.{alias.name}".lstrip(".")
                    found.add(longer if longer in MODULES else base)
    return found


def place(name: str) -> int:
    assert top(name) in ORDER, f"mppool.{name} has no place in LAYERS: say where it belongs"
    return ORDER.index(top(name))


NAMED = [name for name in MODULES if name not in ("", "__main__")]


@pytest.mark.parametrize("name", NAMED)
def test_a_module_imports_only_from_above(name: str) -> None:
    """No import goes up or sideways; the modules of one package may import each other."""
    for imported in imports_of(name):
        assert imported, f"mppool.{name} imports the package's face, mppool itself"
        assert top(imported) == top(name) or place(imported) < place(name), f"mppool.{name} imports mppool.{imported}"


def test_no_two_modules_import_each_other() -> None:
    """Within a package, too, there is no circle."""
    open_ones: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in open_ones, f"a circle: {' > '.join([*open_ones, name])}"
        if name not in done:
            open_ones.append(name)
            for imported in imports_of(name):
                visit(imported)
            open_ones.pop()
            done.add(name)

    for name in MODULES:
        visit(name)


def test_the_lowest_know_nothing_of_the_others() -> None:
    """errors and states import nothing of ours, options only errors: every layer can use them."""
    assert imports_of("errors") == imports_of("states") == set()
    assert imports_of("options") == {"errors"}


@pytest.mark.parametrize("name", [name for name in NAMED if top(name) == "kernel"])
def test_the_kernel_layer_knows_errors_only(name: str) -> None:
    """A file on a facility of the kernel imports errors and other such files."""
    assert all(top(imported) in ("errors", "kernel") for imported in imports_of(name))


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_the_edge(name: str) -> None:
    """Only ``__main__`` imports the command line, and nobody the integrations or the kit for drivers, but themselves."""
    allowed = {top(name), "cli"} if name == "__main__" else {top(name)}
    assert {top(imported) for imported in imports_of(name)} & EDGE <= allowed


@pytest.mark.parametrize("name", NAMED)
def test_worker_and_broker_meet_only_in_what_they_share(name: str) -> None:
    """The worker's files import none of the broker's, and the other way round: they speak through wire and table."""
    imported = {top(other) for other in imports_of(name)}
    assert top(name) not in WORKERS_SIDE or not imported & BROKERS_SIDE
    assert top(name) not in BROKERS_SIDE or not imported & WORKERS_SIDE


def test_only_claims_touches_tokens() -> None:
    """The tokens' semaphores are taken and given in claims.py alone."""
    for name, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        if name != "claims":
            assert "open_token(" not in source.replace("def open_token(", ""), f"mppool.{name} opens tokens"
            assert ".token." not in source, f"mppool.{name} touches a token"


def fresh(statement: str) -> set[str]:
    """What a fresh interpreter has imported after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30).stdout.split())


@pytest.mark.parametrize("heavy", ["click", "rich", "psutil", "asyncio", "subprocess", "multiprocessing", "ssl"])
def test_a_worker_imports_only_what_it_needs(heavy: str) -> None:
    """``import mppool`` is part of every worker's start: nothing of the command line, no process tools, no event loop."""
    assert heavy not in fresh("import mppool")


def test_the_keeper_stays_tiny() -> None:
    """The keeper only holds descriptors: it loads no broker, no command line, and starts no processes."""
    loaded = fresh("import mppool.keeper")
    assert not loaded & {"click", "rich", "psutil", "asyncio", "subprocess", "mppool.broker", "mppool.desk", "mppool.cli"}
