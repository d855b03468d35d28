"""Other users, for real: children that give up root's rights, brokers and commands that run as somebody else."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mppool
from mppool.kernel.memory import SHM
from tests.helpers.processes import Child, die_with_parent, ended, eventually

__all__ = ["ALICE", "BOB", "Home", "as_root", "as_user", "become", "broker_of", "home_of", "names_of", "run_as"]

# Users that nobody has given any rights, and that no other run of these tests is.
ALICE, BOB = (100_000 + 2 * (os.getpid() % 1_000_000) + which for which in (0, 1))

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as other users")

for codec in ("ascii", "idna"):
    codecs.lookup(codec)  # imported at its first use, which may be where this user cannot read the library any more


def become(uid: int) -> None:
    """Give up all rights but those of ``uid``, for good, in a process of one's own."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    die_with_parent()  # a change of user has undone it
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise AssertionError("root's rights were to be had again")


def as_user(uid: int, work: Callable[[Child], Any]) -> Callable[[Child], Any]:
    """A child's work, as that user."""

    def drop_and_work(child: Child) -> Any:
        become(uid)
        return work(child)

    return drop_and_work


class Home:
    """A directory that everybody may enter, with a runtime directory ``run`` of one user in it."""

    def __init__(self, uid: int, path: Path) -> None:
        self.uid = uid
        self.path = path
        self.run = path / "run"
        self.socket = str(self.run / "b.sock")

    def scope(self) -> str:
        """The scope of the user's pools: as runtime.scope_of says it in a process of his."""
        return hashlib.blake2b(f"{self.uid}:{os.path.realpath(self.socket)}".encode(), digest_size=4).hexdigest()

    def ident(self, name: str) -> str:
        return f"mppool-{self.scope()}-{hashlib.blake2b(name.encode(), digest_size=5).hexdigest()}"


@contextlib.contextmanager
def home_of(uid: int) -> Iterator[Home]:
    """A home for the user; afterwards no name of a pool of it may be left."""
    path = Path(tempfile.mkdtemp(prefix="mppool-home-"))
    home = Home(uid, path)
    try:
        path.chmod(0o755)
        home.run.mkdir(mode=0o700)
        os.chown(home.run, uid, uid)
        yield home
        eventually(lambda: not names_of(home), what=f"names left over: {names_of(home)}")
    finally:
        for name in names_of(home):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHM}/{name}")
        shutil.rmtree(path)


def names_of(home: Home) -> list[str]:
    """Everything in shared memory that is called as this home's pools are, whoever made it."""
    prefix = f"mppool-{home.scope()}-"
    return sorted(name for name in os.listdir(SHM) if name.startswith((prefix, f"sem.{prefix}")))


@functools.cache
def interpreter(uid: int) -> tuple[str, dict[str, str]]:
    """A Python that this user may execute, with mppool, and its environment. Skips the test where there is none."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(mppool.__file__)))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([here, *(path for path in sys.path if path.endswith("site-packages"))])}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = [python, "-c", "import mppool.broker, mppool.cli"]
        try:
            done = subprocess.run(command, user=uid, group=uid, extra_groups=[], env=environment, cwd="/", capture_output=True, timeout=30, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return python, environment
    pytest.skip(f"uid {uid} may not execute {sys.executable}, nor read what it needs")


def run_as(uid: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``mppool ARGUMENTS`` as that user."""
    python, base = interpreter(uid)
    return subprocess.run(
        [python, "-m", "mppool", *arguments],
        user=uid,
        group=uid,
        extra_groups=[],
        env={**base, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=die_with_parent,
        check=False,
    )


@contextlib.contextmanager
def broker_of(uid: int, path: str, *options: str, umask: int = -1, log: str = os.devnull, limits: Callable[[], None] | None = None) -> Iterator[int]:
    """A real broker as that user, ended by SIGTERM afterwards. Yields its pid. ``limits`` is called in it before it begins."""
    python, environment = interpreter(uid)

    def prepare() -> None:
        die_with_parent()
        if limits is not None:
            limits()

    with open(log, "ab") as file:
        process = subprocess.Popen(
            [python, "-m", "mppool", "broker", "--socket", path, *options],
            user=uid,
            group=uid,
            extra_groups=[],
            umask=umask,
            env=environment,
            cwd="/",
            stderr=file,
            preexec_fn=prepare,
        )
    try:
        eventually(lambda: process.poll() is not None or os.path.lexists(path))
        assert process.poll() is None, f"the broker ended with exit code {process.returncode}"
        yield process.pid
    finally:
        ended(process)
