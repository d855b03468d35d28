"""The clients, who check that every reply carries their own nonce."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from prefork.processes import answer_orders


async def clients(address: tuple[str, int], control: socket.socket, number: int) -> None:
    """``number`` clients, each one request after the other until told to stop."""
    counts: dict[str, Any] = {"answered": 0, "crossed": 0, "broken": 0, "failed": 0, "first_error": "", "running": number}
    stopping = asyncio.Event()
    answer_orders(control, lambda: dict(counts), stopping.set)

    async def request(nonce: str) -> None:
        reply = b""
        try:
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(f"{nonce}\n".encode())
                reply = await asyncio.wait_for(reader.readline(), 20)
            finally:
                writer.close()
        except ConnectionError:
            pass  # counted as broken, like an end without a reply
        except (OSError, asyncio.TimeoutError) as error:
            reply = f"error {error!r}".encode()
        _, _, echoed = reply.decode().strip().partition(" ")
        if not reply:
            counts["broken"] += 1  # its worker was killed, or should not have died
        elif reply.startswith(b"error"):
            counts["failed"] += 1
            counts["first_error"] = counts["first_error"] or echoed
        else:
            counts["answered" if echoed == nonce else "crossed"] += 1

    async def client(who: int) -> None:
        served = 0
        while not stopping.is_set():
            served += 1
            await request(f"{who}.{served}")
        counts["running"] -= 1

    await asyncio.gather(*(client(who) for who in range(number)))
    await asyncio.Event().wait()  # the last counts are asked for; then we are killed
