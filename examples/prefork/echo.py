"""The protocol: a request is a line, a reply is a line."""

from __future__ import annotations

import socket


def ask(upstream: socket.socket, nonce: str) -> str:
    upstream.sendall(f"{nonce}\n".encode())
    return read_line(upstream)


def read_line(sock: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        more = sock.recv(4096)
        if not more:
            raise ConnectionError("the other side has closed the connection")
        data += more
    return data.decode().strip()
