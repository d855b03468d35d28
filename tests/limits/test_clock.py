"""The clock is stepped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mppool
from tests.helpers.processes import broker_process, die_with_parent, eventually
from tests.helpers.server import Judge, ask, judge
from tests.limits.shared import SOON

SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long long *step;
__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_STEP");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) { step = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0); close(fd); }
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = syscall(SYS_clock_gettime, id, t);
    if (!failed && step && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += *step;
    return failed;
}
int gettimeofday(struct timeval *t, void *zone) {
    int failed = syscall(SYS_gettimeofday, t, zone);
    if (!failed && step) t->tv_sec += *step;
    return failed;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that shifts the wall clock of a process by as many seconds as a file says."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("clock")
    (directory / "step.c").write_text(SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(directory / "step.so"), str(directory / "step.c")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot compile: {done.stderr[:200]}")
    return str(directory / "step.so")


class Clock:
    """The wall clock of this process, its broker and its children, stepped by so many seconds at a time."""

    def __init__(self, file: str, step: int) -> None:
        self.file = file
        self.seconds = step
        self.sum = 0

    def step(self) -> None:
        before = time.time()
        self.sum += self.seconds
        with open(self.file, "r+b") as file:
            file.write(struct.pack("q", self.sum))
        assert abs(time.time() - before - self.seconds) < 60, "the shim does nothing"


def timed(clock: Clock | None, work: Callable[[], object]) -> float:
    """How long something took by the clock that nobody can step; the wall clock is stepped meanwhile."""
    thread = threading.Timer(0.3, clock.step) if clock is not None else None
    began = time.monotonic()
    if thread is not None:
        thread.start()
    with contextlib.suppress(mppool.Error):
        work()
    if thread is not None:
        thread.join()
    return time.monotonic() - began


def clock_story(port: int, path: str, file: str, step: int) -> None:
    """Runs in a process with the shim. Prints what took how long."""
    clock = Clock(file, step)
    address = ("127.0.0.1", port)
    found: dict[str, Any] = {}

    def wait(pool: mppool.Pool) -> None:
        with pool.connection(timeout=1.5):
            raise AssertionError("lent")

    with mppool.Pool(address, name="alone", max_size=1, broker=f"{path}-nobody") as pool, pool.connection():
        found["wait without a broker"] = timed(clock, lambda: wait(pool))
    with broker_process(path), mppool.Pool(address, name="web", max_size=1, max_idle=600, max_lifetime=600, max_lease=600, broker=path) as pool:
        with pool.connection() as sock:
            first = ask(sock, "first")
            found["wait in the queue"] = timed(clock, lambda: wait(pool))
            assert ask(sock, "still") == first  # max_lease has not struck
        back = threading.Timer(0.8, pool.putconn, [pool.getconn()])

        def take() -> None:
            back.start()
            pool.putconn(pool.getconn(timeout=60))

        found["a session comes back"] = timed(clock, take)
        clock.step()
        time.sleep(0.5)  # five ticks of the broker, and none of them may evict
        with pool.connection() as sock:
            assert ask(sock, "later") == first  # neither max_idle nor max_lifetime
        found["closed"] = pool.get_stats()["closed"]
        with mppool.Pool(address, name="short", max_size=1, max_idle=1, broker=path) as short:
            with short.connection() as sock:
                ask(sock, "short")
            found["max_idle of 1 s"] = timed(clock, lambda: eventually(lambda: short.get_stats()["closed"].get("idle_too_long"), timeout=30))
        with judge() as gone:
            address = gone.address
        with mppool.Pool(address, name="down", max_size=1, broker=path) as down:
            found["a server that is down"] = timed(clock, lambda: down.getconn(timeout=1.5))
            with judge(address[1]):
                found["a server that is back"] = timed(clock, lambda: down.putconn(down.getconn(timeout=60)))
    print(json.dumps(found))


def test_the_clock_is_stepped(server: Judge, socket_path: str, shim: str, tmp_path: Path) -> None:
    """Steps of an hour, forth or back, in the middle of each: waits, idle times, lifetimes and the pauses of the breaker are as long as they should be."""
    told = []
    for way, step in ("forth", 3600), ("back", -3600):
        file = tmp_path / way
        file.write_bytes(bytes(4096))
        call = f"from tests.limits.test_clock import clock_story; clock_story({server.port}, {socket_path + way!r}, {str(file)!r}, {step})"
        environment = {**os.environ, "LD_PRELOAD": shim, "CLOCK_STEP": str(file)}
        told.append(subprocess.Popen([sys.executable, "-c", call], env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent))
    for process in told:
        found = json.loads(process.communicate(timeout=50)[0] or '"it failed; see stderr"')
        assert process.returncode == 0, found
        assert found.pop("closed") == {}
        shortest = {"wait without a broker": 1.4, "wait in the queue": 1.4, "max_idle of 1 s": 0.9, "a server that is down": 1.4}
        assert found.keys() == {*shortest, "a session comes back", "a server that is back"}
        for what, seconds in found.items():
            assert shortest.get(what, 0.0) <= seconds < SOON, (what, seconds)
