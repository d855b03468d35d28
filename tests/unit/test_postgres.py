"""The greeting of a PostgreSQL session: recorded, checked, and what cancels its statements."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppool.drivers.postgres import cancel_request, greeting_of, is_greeting, is_hopeless, refusal_in, settings_of


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


KEY = struct.pack("!ii", 4711, -559038737)
READY = message(b"Z", b"I")
SETTINGS = message(b"S", b"TimeZone\0UTC\0") + message(b"S", b"client_encoding\0UTF8\0")
WELCOME = message(b"R", b"\0\0\0\0")
GREETING = WELCOME + SETTINGS + message(b"K", KEY) + READY


def test_a_login_is_recorded_without_its_secrets() -> None:
    """Of a SCRAM login only the end is kept, up to the first time the server is ready."""
    scram = message(b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0") + message(b"R", b"\0\0\0\x0br=nonce") + message(b"R", b"\0\0\0\x0cv=signature")
    query = message(b"T", b"\0\0") + message(b"C", b"SHOW\0") + READY
    assert greeting_of(scram + WELCOME + SETTINGS + message(b"N", b"a notice\0") + message(b"K", KEY) + READY + query) == GREETING


def test_what_cancels_is_made_of_the_recorded_key() -> None:
    """Length, the code of a cancel request, process and key; nothing without a key."""
    assert cancel_request(GREETING) == struct.pack("!ii", 16, 80877102) + KEY
    assert cancel_request(WELCOME + SETTINGS + READY) == b""


@pytest.mark.parametrize(
    "baggage",
    [
        b"",
        b"anything",
        GREETING[:-1],
        GREETING + b"x",
        GREETING + READY,
        GREETING.replace(READY, message(b"Z", b"T")),
        WELCOME,
        WELCOME + message(b"E", b"SFATAL\0\0") + READY,
        message(b"R", b"\0\0\0\x03") + READY,
        b"R\0\0\0\0" + READY,
    ],
)
def test_anything_else_is_no_greeting(baggage: bytes) -> None:
    """Cut short, with something after it, in a transaction, with an error in it: refused."""
    assert not is_greeting(baggage)
    assert is_greeting(GREETING)


@given(st.binary(max_size=200))
def test_no_bytes_are_too_odd(data: bytes) -> None:
    """Whatever a server or broker hands over, nothing is raised, and what is made of it is no greeting unless it is one."""
    assert not is_greeting(data) or greeting_of(data) == data
    cancel_request(data)
    refusal_in(data)
    settings_of(data)


def test_why_a_login_was_refused() -> None:
    """The SQLSTATE of the server's error says if waiting helps: too many clients does, a wrong password does not."""
    for sqlstate, hopeless in (("28P01", True), ("28000", True), ("3D000", True), ("53300", False), ("57P03", False)):
        heard = message(b"E", b"SFATAL\0VFATAL\0C" + sqlstate.encode() + b"\0Mno\0\0")
        assert refusal_in(heard) == sqlstate
        assert is_hopeless(sqlstate) is hopeless
    assert refusal_in(GREETING) == ""


def test_the_settings_by_which_clients_read() -> None:
    """Of those that the server greeted with."""
    assert dict(settings_of(GREETING)) == {b"TimeZone": b"UTC", b"client_encoding": b"UTF8"}
