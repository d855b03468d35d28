"""A short while of chaos, with another seed each time (scripts/chaos runs longer and repeats a seed); and what it found, step by step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mppool
from mppool.worker import Hands
from tests.helpers.processes import Child, die_with_parent, fork
from tests.helpers.server import Judge, ask


@pytest.mark.storm
@pytest.mark.parametrize("options", [["--seconds", "12"], ["--seconds", "8", "--no-broker"]], ids=["broker", "no-broker"])
def test_a_host_full_of_trouble_loses_nothing(options: list[str]) -> None:
    """Whatever is killed, stopped, closed, reset, refused or resized: the servers never see too many connections, nothing crosses, nothing is lost."""
    command = [sys.executable, "-m", "tests.chaos", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, preexec_fn=die_with_parent)
    print(done.stdout)
    assert done.returncode == 0, "see what was found above; --seed repeats the actions"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests"] > 0
    assert figures["rounds"] > 0
    assert figures["kills"] > 0


@pytest.mark.xfail(strict=True, reason="without a broker, who is dead is decided before it is one's turn to reclaim")
def test_a_row_that_was_taken_again_is_not_taken_for_dead(server: Judge, socket_path: str) -> None:
    """A worker in need that saw a dead row, and whose turn to reclaim comes when a living process has that row, leaves that one alone."""

    def pool(size: int = 1) -> mppool.Pool:
        return mppool.Pool(server.address, max_size=size, name="again", broker=socket_path)

    def dead(child: Child) -> None:
        pool().open()
        child.tell()
        child.hear()

    def slow(child: Child) -> None:
        """In need; between its look for the dead and its turn to reclaim it is held up."""
        turns: list[Hands] = []
        real = Hands.may_reclaim

        def may_reclaim(hands: Hands) -> bool:
            turns.append(hands)
            if len(turns) == 1:
                child.tell("held up")
                child.hear()
            return real(hands)

        setattr(Hands, "may_reclaim", may_reclaim)  # noqa: B010 (which mypy allows)
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=0.5)
        child.tell("gave up")
        child.hear()

    def quick(child: Child) -> None:
        """In need, too, and not held up; it frees the dead row."""
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with pytest.raises(mppool.PoolTimeout):
            mine.getconn(timeout=0.1)
        child.tell("gave up")
        child.hear()

    def holder(child: Child) -> None:
        with pool().connection():
            child.tell("holds")
            child.hear()

    def newcomer(child: Child) -> None:
        """Takes the row that became free, and then the session."""
        mine = pool()
        mine.open()
        child.tell("there")
        child.hear()
        with mine.connection() as sock:
            child.tell("holds")
            child.hear()
            ask(sock, "still-mine")
        child.tell("returned")
        child.hear()

    with fork(dead) as [one]:
        one.hear()
        with fork(holder, slow, quick) as [two, three, four]:
            assert [two.hear(), three.hear(), four.hear()] == ["holds", "there", "there"]
            one.end()
            three.tell()
            assert three.hear() == "held up"
            four.tell()
            assert four.hear() == "gave up"
            with fork(newcomer) as [five]:
                assert five.hear() == "there"
                two.end()
                five.tell()
                assert five.hear() == "holds"
                three.tell()
                assert three.hear() == "gave up"
                five.tell()
                assert five.hear() == "returned"
                last = pool()
                workers = {worker["pid"] for worker in last.get_stats()["workers"]}
                assert workers >= {three.pid, four.pid, five.pid}
    last.close()  # the names go with the last to leave
