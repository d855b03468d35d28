"""Frames of any kind, to a broker that serves others meanwhile."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mppool.kernel.link import MAX_MESSAGE
from mppool.wire import Kind, Message, encode
from tests.fuzz import OPEN
from tests.fuzz.bulk import Bulk
from tests.fuzz.frames import COUNTS, Frame, Zoo, bad_frames
from tests.fuzz.links import RawLink
from tests.fuzz.rig import Seat, descriptors, rig
from tests.helpers.processes import eventually


def test_no_frame_harms_anybody(socket_path: str) -> None:
    """Whatever is sent, before HELLO or after: the broker lives, keeps no descriptor of it, and bystanders' requests go on."""
    with rig(socket_path) as it:
        zoo, seat = Zoo(), Seat(it.ground)
        before = descriptors(it.pid)

        @settings(OPEN, max_examples=50)
        @given(frames=st.lists(bad_frames(zoo), min_size=1, max_size=12), greets=st.booleans(), reads=st.booleans())
        def send(frames: list[Frame], greets: bool, reads: bool) -> None:
            raw = RawLink(it.path, it.ground)
            if greets:
                raw.hello(seat)
            for frame in frames:
                raw.send_garbage(frame)
                if reads:
                    raw.drain()
            raw.close(reset=not reads)
            seat.sweep()
            it.check()

        send()
        eventually(lambda: descriptors(it.pid) <= before + 4, what="its descriptors are as many as before (bystanders open a link now and then)")
        seat.die()
        it.check_rest()
        zoo.close()
        it.end_bystanders()
        assert it.leaked() == 0


def test_a_flood_of_frames(socket_path: str) -> None:
    """The long run in short: many thousands of frames over many links and rows, at full speed."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    with rig(socket_path) as it:
        bulk = Bulk(it, seed)
        bulk.run(20_000)
        bulk.close()
        it.check_rest()
        print(f"{bulk.frames} frames on {bulk.opened} links; {it.requests} requests of bystanders, the slowest {it.slowest:.3f} s")
        it.end_bystanders()
        assert it.leaked() == 0


def test_every_kind_with_every_number_of_descriptors(socket_path: str) -> None:
    """Each kind of message, with 0 to 253 descriptors, announced rightly or not, empty to too long, as the first message and after HELLO."""
    with rig(socket_path) as it:
        zoo, seat = Zoo(), Seat(it.ground)
        before = descriptors(it.pid)
        for kind, count, greets in itertools.product(Kind, COUNTS, (False, True)):
            whole = encode(Message(kind, body=bytes(MAX_MESSAGE)), count & 255)[:MAX_MESSAGE]
            for data in (b"", encode(Message(kind), count & 255), encode(Message(kind), 1), whole):
                raw = RawLink(it.path, it.ground)
                if greets:
                    raw.hello(seat)
                raw.send_garbage(Frame(data, tuple(zoo.fds[:1]) * count))
                raw.drain()
                raw.close()
        it.check()
        eventually(lambda: descriptors(it.pid) <= before + 4, what="its descriptors are as many as before")
        seat.sweep()
        seat.die()
        it.check_rest()
        zoo.close()


def test_the_longest_messages(socket_path: str) -> None:
    """Up to 66 KiB a message is read whole, beyond the link is cut; what the kernel itself refuses (EMSGSIZE) never arrives."""
    with rig(socket_path) as it:
        seat = Seat(it.ground)
        for size, fits in ((MAX_MESSAGE - 1, True), (MAX_MESSAGE, True), (MAX_MESSAGE + 1, False), (3 * MAX_MESSAGE, False)):
            raw = RawLink(it.path, it.ground)
            raw.hello(seat)
            assert raw.await_answer(Kind.WELCOME)
            assert raw.ask(Kind.CANCEL, Frame((encode(Message(Kind.CANCEL)) + bytes(size))[:size]))
            answer = raw.await_answer(Kind.STRUCK, Kind.REFUSED)
            assert answer is not None
            assert answer[0].kind is (Kind.STRUCK if fits else Kind.REFUSED)
            raw.close()
        raw = RawLink(it.path, it.ground)
        raw.hello(seat)
        assert raw.await_answer(Kind.WELCOME)
        assert not raw.ask(Kind.LOOK, Frame(bytes(1 << 20))), "the kernel took a message of a megabyte"
        assert raw.ask(Kind.CANCEL, Frame(encode(Message(Kind.CANCEL))))
        assert raw.await_answer(Kind.STRUCK)
        raw.close()
        seat.die()
        it.check_rest()


def test_the_broker_holds_the_end_of_a_link(socket_path: str) -> None:
    """A worker that shares its own end of its link, or another's: the links still end, and nothing is kept."""
    with rig(socket_path) as it:
        seat = Seat(it.ground)
        before = descriptors(it.pid)
        for _ in range(20):
            one, other = RawLink(it.path, it.ground), RawLink(it.path, it.ground)
            for raw in (one, other):
                raw.hello(seat)
                assert raw.await_answer(Kind.WELCOME)
            for k, generation in enumerate(it.ground.generations()[:8]):
                for fd in (one.sock.fileno(), other.sock.fileno()):
                    one.ask(Kind.SHARE, Frame(encode(Message(Kind.SHARE, k, generation), 1), (fd,)))
            one.close()
            other.close()
        eventually(lambda: descriptors(it.pid) <= before + 4, what="its descriptors are as many as before")
        seat.die()
        it.check_rest()
