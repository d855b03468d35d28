"""What commands leave in the server's session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["MARKS", "SPOILT", "mark"]

# What a command leaves in the server's session until some other command: a transaction, watched keys, what RESET undoes,
# and what nothing does (RESET keeps NO-EVICT in Redis 7.0).
MULTI, WATCH, OTHER, SPOILT = 1, 2, 4, 8
LEAVES = {
    "MULTI": MULTI,
    "WATCH": WATCH,
    **dict.fromkeys(("SELECT", "AUTH", "HELLO", "RESET", "CLIENT", "READONLY", "READWRITE", "ASKING"), OTHER),
    **dict.fromkeys(("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"), OTHER),
    **dict.fromkeys(("MONITOR", "SYNC", "PSYNC", "REPLCONF", "QUIT"), SPOILT),
    **dict.fromkeys(("ID", "INFO", "LIST", "GETNAME", "KILL", "UNBLOCK", "PAUSE", "UNPAUSE", "GETREDIR", "TRACKINGINFO", "HELP"), 0),  # CLIENT ...
    **dict.fromkeys(("NO-EVICT", "NO-TOUCH", "REPLY"), SPOILT),  # likewise
}
ENDS = {"EXEC": MULTI | WATCH, "DISCARD": MULTI | WATCH, "UNWATCH": WATCH}

MARKS: dict[Any, tuple[int, int]] = {}  # by a command's name as redis-py gives it: what it leaves, and all but what it ends


def mark(command: Sequence[Any]) -> tuple[int, int]:
    """What a command leaves behind, and what it does not end. Its name may be of two words."""
    name = command[0]
    words = text_of(name).split() or [""]
    if words == ["CLIENT"]:
        return LEAVES.get(text_of(command[1]), OTHER) if len(command) > 1 else OTHER, -1
    found = LEAVES.get(words[1], OTHER) if words[0] == "CLIENT" else LEAVES.get(words[0], 0), ~ENDS.get(words[0], 0)
    if len(MARKS) < 4096 and isinstance(name, (str, bytes)):
        MARKS[name] = found
    return found


def text_of(word: Any) -> str:
    return (bytes(word).decode("latin-1") if isinstance(word, (bytes, bytearray, memoryview)) else str(word)).upper()
