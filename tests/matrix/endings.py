"""Rows about daemons, and ways to end."""

from __future__ import annotations

import os
import sys

from tests.helpers.processes import eventually, fork
from tests.helpers.server import ask
from tests.matrix.forks import busy
from tests.matrix.scene import Scene, row
from tests.matrix.work import from_environment, use


def in_new_interpreters(scene: Scene, function: str, *arguments: str) -> None:
    """Call a function of this file in a new interpreter, with a real exit and its atexit functions, beside one that uses the pool."""
    code = f"from tests.matrix.endings import {function}; {function}({', '.join(map(repr, arguments))})"
    with fork(lambda child: busy(scene.pool(), scene.tally, "beside", 40)) as (child,):
        exit_code = scene.python(code)
        child.result()
    assert exit_code == 0, f"{function}{arguments}: exit code {exit_code}"


@row("daemon", workers=2, cap=2, alone=True)
def daemon(scene: Scene) -> None:
    """Double fork and setsid under a lease; those in between exit in order, and the daemon uses the pool."""
    in_new_interpreters(scene, "daemonize")
    eventually(lambda: scene.tally.lines("note") == ["the daemon is done"], 20, what="the daemon's end")


def daemonize() -> None:
    pool, tally = from_environment()
    use(pool, tally, "before", 3)
    with pool.connection() as sock:
        ask(sock, "lease")
        if os.fork():
            sys.exit(0)
        os.setsid()
        if os.fork():
            sys.exit(0)
    use(pool, tally, "daemon", 20)
    pool.close()
    tally.add("note", "the daemon is done")


@row("fork in a lease, child leaves by sys.exit", workers=3, cap=2, alone=True)
def by_exit(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "sys.exit")


@row("fork in a lease, child leaves by os._exit", workers=3, cap=2, alone=True)
def by_os_exit(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "os._exit")


@row("fork in a lease, child leaves by an exception", workers=3, cap=2, alone=True)
def by_exception(scene: Scene) -> None:
    in_new_interpreters(scene, "leave", "exception")


def leave(how: str) -> None:
    """In the middle of a reply a child is forked and leaves the block; the parent reads its reply, and goes on."""
    pool, tally = from_environment()
    for used in (False, True):
        with pool.connection() as sock:
            number = ask(sock, "first")
            sock.sendall(b"middle 20\n")
            pid = os.fork()
            if pid == 0:
                if used:
                    use(pool, tally, "child", 3)
                if how == "sys.exit":
                    sys.exit(0)
                elif how == "os._exit":
                    os._exit(0)
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (its traceback is wanted, but not seen)
                raise RuntimeError("the child fails")
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == (1 if how == "exception" else 0), code
            assert sock.recv(100) == b"%d middle\n" % number
            assert ask(sock, "last") == number
        use(pool, tally, "after", 3)
    pool.close()
