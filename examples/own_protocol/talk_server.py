"""A server for the protocol in talk_client.py, which knows one user: ``app``, password ``secret``.  $ python talk_server.py 7007"""

from __future__ import annotations

import itertools
import socketserver
import sys
import time
from typing import ClassVar

LOGIN_TAKES = 0.002  # seconds: as long as password hashing takes elsewhere


class Session(socketserver.StreamRequestHandler):
    numbers = itertools.count(1)
    live: ClassVar[set[int]] = set()

    def handle(self) -> None:
        number = next(self.numbers)
        values: dict[str, str] = {}
        self.live.add(number)
        try:
            for line in self.rfile:
                command, _, rest = line.decode().rstrip("\n").partition(" ")
                if command == "QUIT":
                    return
                self.wfile.write(f"{self.answer(number, values, command, rest)}\n".encode())
        except ConnectionError:
            pass  # it went without a word
        finally:
            self.live.discard(number)

    def answer(self, number: int, values: dict[str, str], command: str, rest: str) -> str:
        if command == "LOGIN":
            time.sleep(LOGIN_TAKES)
            if rest != "app secret":
                return "-ERR wrong user or password"
            values["user"] = "app"
            return f"+OK session {number}"
        if "user" not in values:
            return "-ERR log in first"
        if command == "SET":
            name, _, value = rest.partition(" ")
            values[name] = value
            return "+OK"
        if command == "GET":
            return f"+OK {values.get(rest, '')}"
        if command == "SESSION":
            return f"+OK {number}"
        if command == "LIVE":
            return f"+OK {len(self.live)}"
        if command == "ECHO":
            return f"+OK {rest}"
        if command == "WAIT":
            time.sleep(float(rest))
            return "+OK"
        if command == "RESET":
            for name in set(values) - {"user"}:
                del values[name]
            return "+OK"
        return "-ERR what?"


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Session) as server:
        print("listening on", *server.server_address, flush=True)
        server.serve_forever()
