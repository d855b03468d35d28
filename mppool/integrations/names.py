"""Names of pools, for integrations that are not told one."""

from __future__ import annotations

import hashlib
import re

__all__ = ["digest", "readable"]


def digest(*identity: object) -> str:
    """Of whatever makes sessions interchangeable. It may be seen by others, so a password may be in it, but must not be alone in it."""
    return hashlib.blake2b(repr(identity).encode(errors="surrogateescape"), digest_size=6).hexdigest()


def readable(where: str, digest: str) -> str:
    """A name that says where it leads, and is another one for every other digest."""
    said = re.sub(r"[^A-Za-z0-9._@-]+", "-", where)[-40:].strip("-.@_")
    return f"{said or 'pool'}-{digest}"
