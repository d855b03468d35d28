"""The upstream, which judges: it counts its connections, and tags each reply with the connection's number and the caller's nonce."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

from prefork.processes import answer_orders


async def upstream(listener: socket.socket, control: socket.socket, think: float) -> None:
    """A request is a line, the caller's nonce; the reply is ``number nonce`` with the number of the connection."""
    counts: dict[str, Any] = {"live": 0, "peak": 0, "dials": 0, "requests": 0}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counts["dials"] += 1
        counts["live"] += 1
        counts["peak"] = max(counts["peak"], counts["live"])
        number = counts["dials"]
        try:
            while nonce := await reader.readline():
                counts["requests"] += 1
                await asyncio.sleep(think * random.uniform(0.5, 1.5))
                writer.write(b"%d %s" % (number, nonce))
        except ConnectionError:
            pass
        finally:
            counts["live"] -= 1  # before the other side can know: it may dial the next one then
            writer.close()

    def peak_since_last_asked() -> dict[str, Any]:
        answer = dict(counts)
        counts["peak"] = counts["live"]
        return answer

    answer_orders(control, peak_since_last_asked)
    async with await asyncio.start_server(connection, sock=listener) as server:
        await server.serve_forever()
