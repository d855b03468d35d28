"""wire.py: what is encoded is decoded, and nothing else is believed."""

from __future__ import annotations

import random

import pytest

from mppool import wire
from mppool.errors import ProtocolError
from mppool.kernel.link import MAX_MESSAGE
from mppool.options import MAX_SLOTS
from mppool.wire import MAX_BAGGAGE, Kind, Message, decode, encode, pack_held, unpack_held

HEAD = 16  # bytes: version, kind, flags, descriptors, number (4), serial (8)
MUST = {Kind.SHARE, Kind.SESSION, Kind.PUT}  # come with a descriptor
MAY = MUST | {Kind.GRANT}
LAST_PLACE = 4 * MAX_SLOTS


def descriptors_of(kind: Kind) -> list[int]:
    return [1] if kind in MUST else [0, 1] if kind in MAY else [0]


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_encoded_is_decoded(kind: Kind) -> None:
    """Every kind comes back as it was sent, with the smallest and the largest of each field."""
    for descriptors in descriptors_of(kind):
        for message in (Message(kind), Message(kind, LAST_PLACE, (1 << 64) - 1, 255, bytes(range(256)) * 256), Message(kind, 7, 8, 3, b"x")):
            assert decode(encode(message, descriptors), descriptors) == message


def test_the_head_is_sixteen_bytes() -> None:
    """Version, kind, flags, descriptors, number and serial, little-endian: the format is a promise between two versions."""
    data = encode(Message(Kind.SHARE, 0x01020304, 0x1112131415161718, 2, b"body"), 1)
    assert data == bytes([wire.WIRE_VERSION, 4, 2, 1, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]) + b"body"


def test_the_largest_baggage_fits() -> None:
    """A session's baggage of the promised size fits into one message, with the name of its pool."""
    body = pack_held("mppool-01234567-0123456789", bytes(MAX_BAGGAGE))
    assert len(encode(Message(Kind.PUT, body=body), 1)) <= MAX_MESSAGE
    assert decode(encode(Message(Kind.PUT, body=body), 1), 1).body == body


@pytest.mark.parametrize("length", [*range(HEAD), MAX_MESSAGE + 1])
def test_too_short_and_too_long_are_refused(length: int) -> None:
    """A message without a whole head, or beyond the limit, is refused and says its length."""
    data = encode(Message(Kind.LOOK, body=bytes(MAX_MESSAGE)))[:length]
    with pytest.raises(ProtocolError, match=f"a message of {length} bytes"):
        decode(data, 0)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_wire_version_is_refused(version: int) -> None:
    """The refusal says both versions."""
    data = bytes([version]) + encode(Message(Kind.HELLO))[1:]
    with pytest.raises(ProtocolError, match=f"wire version {version}, this mppool speaks {wire.WIRE_VERSION}"):
        decode(data, 0)


def test_another_version_of_ours_is_told_from_nonsense() -> None:
    """The version's upper half says that it is us: what begins so may be a broker of another version, anything else is none."""
    ours = encode(Message(Kind.REFUSED, body=b"no"))
    with pytest.raises(wire.OtherVersion):
        decode(bytes([wire.WIRE_VERSION + 1]) + ours[1:], 0)
    with pytest.raises(ProtocolError) as caught:
        decode(bytes([wire.WIRE_VERSION ^ 0x80]) + ours[1:], 0)
    assert not isinstance(caught.value, wire.OtherVersion)


@pytest.mark.parametrize("kind", [0, max(Kind) + 1, 255])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    """The refusal says which."""
    data = bytes([wire.WIRE_VERSION, kind]) + encode(Message(Kind.HELLO))[2:]
    with pytest.raises(ProtocolError, match=f"unknown kind {kind}"):
        decode(data, 0)


@pytest.mark.parametrize("kind", list(Kind))
def test_descriptors_must_be_as_announced_and_as_the_kind_has_them(kind: Kind) -> None:
    """A descriptor that was lost, came uninvited, or does not belong to the kind is refused."""
    for announced in (0, 1, 2, 255):
        for came in (0, 1):
            data = encode(Message(kind), announced)
            if announced == came and came in descriptors_of(kind):
                decode(data, came)
            else:
                with pytest.raises(ProtocolError, match=f"{kind.name} announced {announced} descriptors and came with {came}"):
                    decode(data, came)


@pytest.mark.parametrize("number", [LAST_PLACE + 1, (1 << 32) - 1])
def test_a_place_that_cannot_be_is_refused(number: int) -> None:
    """No table has so many slots, lanes or rows."""
    with pytest.raises(ProtocolError, match=f"FETCH names place {number}"):
        decode(encode(Message(Kind.FETCH, number)), 0)


def test_random_bytes_are_refused_or_are_a_message() -> None:
    """Whatever comes, decode returns a message that encodes to the same bytes, or raises ProtocolError: never anything else."""
    dice = random.Random(2024)
    understood = 0
    for _ in range(20_000):
        data = dice.randbytes(dice.randrange(0, 40))
        if dice.random() < 0.7:  # most would fail at the first byte
            data = bytes([wire.WIRE_VERSION, dice.randrange(0, 24), dice.randrange(4), dice.randrange(2), *dice.randbytes(1), dice.randrange(32), 0, 0]) + data
        descriptors = dice.randrange(2)
        try:
            message = decode(data, descriptors)
        except ProtocolError:
            continue
        understood += 1
        assert encode(message, descriptors) == data
    assert understood > 200, "the dice are loaded: hardly anything was worth decoding"


def test_a_damaged_message_is_refused_or_is_a_message() -> None:
    """The same for real messages with single bytes changed."""
    dice = random.Random(2025)
    for _ in range(20_000):
        kind = dice.choice(list(Kind))
        descriptors = dice.choice(descriptors_of(kind))
        data = bytearray(encode(Message(kind, dice.randrange(64), dice.getrandbits(64), 0, dice.randbytes(5)), descriptors))
        data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            message = decode(bytes(data), descriptors)
        except ProtocolError:
            continue
        assert encode(message, descriptors) == data


@pytest.mark.parametrize("baggage", [b"", b"x", bytes(MAX_BAGGAGE)])
def test_held_sessions_keep_their_pool_and_baggage(baggage: bytes) -> None:
    """The body of PUT and DROP comes apart as it was put together."""
    assert unpack_held(pack_held("mppool-01234567-0123456789", baggage)) == ("mppool-01234567-0123456789", baggage)


@pytest.mark.parametrize("body", [b"", b"\x01", b"\x05abcd", b"\xff" + b"x" * 254])
def test_a_held_session_without_its_pool_is_refused(body: bytes) -> None:
    """A body that ends within the name is refused."""
    with pytest.raises(ProtocolError, match="without the name of its pool"):
        unpack_held(body)


def test_the_name_of_a_held_session_may_be_any_bytes() -> None:
    """Bytes that are no text do not crash the keeper; they name no pool."""
    ident, baggage = unpack_held(b"\x02\xff\xfebag")
    assert baggage == b"bag"
    assert not ident.isascii()
