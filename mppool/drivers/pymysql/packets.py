"""What is said to a server, and what a client is shown of one, as whole packets with their headers. No I/O."""

from __future__ import annotations

import struct

from pymysql.constants import CLIENT

from mppool.drivers.pymysql.connection import Session

__all__ = ["COM_QUIT", "COM_RESET_CONNECTION", "OK", "command", "greeting", "packet", "settings"]

COM_RESET_CONNECTION = b"\x01\0\0\0\x1f"
COM_QUIT = b"\x01\0\0\0\x01"
OK = b"\0\0\0\x02\0\0\0"  # no rows, autocommit; PyMySQL looks at the first byte of the two that it is shown
PLAIN = ~(CLIENT.SSL | CLIENT.PLUGIN_AUTH | CLIENT.CONNECT_ATTRS | CLIENT.PLUGIN_AUTH_LENENC_CLIENT_DATA)  # what a canned greeting offers


def settings(model: Session) -> bytes:
    """What a login sets and a reset drops, in one statement."""
    collation = f" COLLATE {model.collation}" if model.collation else ""
    statement = f"SET NAMES {model.charset}{collation}"
    if model.sql_mode is not None:
        quoted = str(model.sql_mode).replace("'", "''")
        statement += f", sql_mode='{quoted}'"
    if model.autocommit_mode is not None:
        statement += f", autocommit={int(bool(model.autocommit_mode))}"
    return statement.encode(model.encoding)


def packet(number: int, payload: bytes) -> bytes:
    return struct.pack("<I", len(payload))[:3] + bytes([number]) + payload


def command(which: int, body: bytes) -> bytes:
    return packet(0, bytes([which]) + body)


def greeting(session: Session) -> bytes:
    """The packet with which the server began this session, as far as its meaning goes; the challenge in it is never answered."""
    capabilities = session.server_capabilities & PLAIN
    return packet(
        0,
        bytes([session.protocol_version])
        + session.server_version.encode("latin1")
        + struct.pack("<xI8sx", session.server_thread_id[0], b"challeng")
        + struct.pack("<HBHHB10x12sx", capabilities & 0xFFFF, session.server_language, session.at_rest, capabilities >> 16, 21, b"e, a canned.."[:12]),
    )
