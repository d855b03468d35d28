"""Sessions over a restart of the unit, in systemd's store of descriptors.

When systemd ends a unit it ends the keeper, too. So a broker that is told to end uploads the duplicates it has, named by pool,
slot and generation; beside them an index, in memory only, of the messages that would have gone to a keeper. The next broker takes all
and has the store emptied: what is stored is one more duplicate, and would keep alive what everybody else has closed.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
from collections.abc import Iterable

from mppool.errors import ProtocolError
from mppool.kernel.systemd import Service
from mppool.wire import Kind, Message, decode, encode, unpack_held

__all__ = ["empty", "take", "upload"]

log = logging.getLogger("mppool.broker")

INDEX = "mppool-index"
_LENGTH = struct.Struct("<I")
_NAME = re.compile(r"mppool-[0-9a-f]{8}-[0-9a-f]{10}\.[0-9]+\.[0-9]+")


def name_of(message: Message) -> str:
    return f"{unpack_held(message.body)[0]}.{message.number}.{message.serial}"


def upload(service: Service, sessions: Iterable[tuple[Message, int]]) -> int:
    """Store sessions, each as its PUT and its descriptor, which stays the caller's; the index first, so that any part of the rest has a meaning."""
    held = list(sessions)
    if not held or not service.address:
        return 0
    records = [encode(message, 1) for message, _ in held]
    index = os.memfd_create(INDEX, os.MFD_CLOEXEC)
    try:
        with open(index, "wb", closefd=False) as file:
            file.write(b"".join(_LENGTH.pack(len(record)) + record for record in records))
        stored = service.store(INDEX, index)
    finally:
        os.close(index)
    count = 0
    for message, fd in held if stored else []:
        if not service.store(name_of(message), fd):
            break
        count += 1
    if not service.barrier() or count < len(held):
        log.error("systemd took %d of %d sessions", count, len(held))
    return count


def take(service: Service) -> list[tuple[Message, int]]:
    """What was stored: sessions, each as its PUT and its descriptor, which is the caller's now. What is none is ended."""
    index: dict[str, Message] = {}
    for _, fd in [item for item in service.descriptors if item[0] == INDEX]:
        try:
            index.update(read_index(fd))
        except (OSError, ProtocolError) as error:
            log.error("the index of the stored sessions cannot be read: %s", error)
    found = []
    for name, fd in service.descriptors:
        if name in index:
            found.append((index[name], fd))
            continue
        if name != INDEX and not _NAME.fullmatch(name):
            end(fd)
        else:
            os.close(fd)  # the index itself; or a session whose name is all we know: whoever has it goes on with it
    return found


def empty(service: Service) -> None:
    """After what was taken is safe elsewhere: nothing stays in the store."""
    for name in {name for name, _ in service.descriptors}:
        service.unstore(name)
    service.descriptors.clear()


def read_index(fd: int) -> dict[str, Message]:
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    found, at = {}, 0
    while at < len(data):
        if len(data) - at < _LENGTH.size:
            raise ProtocolError("it ends within a record")
        (length,) = _LENGTH.unpack_from(data, at)
        message = decode(data[at + _LENGTH.size : at + _LENGTH.size + length], 1)
        if message.kind is not Kind.PUT:
            raise ProtocolError(f"a record of kind {message.kind.name}")
        found[name_of(message)] = message
        at += _LENGTH.size + length
    return found


def end(fd: int) -> None:
    """Shut down, if it is a connection, and close."""
    try:
        with socket.socket(fileno=fd) as sock:
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
