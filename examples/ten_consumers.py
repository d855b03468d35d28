"""Ten consumers, five connections: who waits, who is woken, and how a broken connection is replaced.

    python examples/ten_consumers.py

Five processes with two threads each use one pool at once. The small server they talk to counts its connections; between the
two rounds it closes one of them. The exit code is 0 only if it never had more than five and everybody was served.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Barrier

import mppool

CAP, PROCESSES, THREADS, HOLD = 5, 5, 2, 0.3
forking = multiprocessing.get_context("fork")


class Server(socketserver.ThreadingTCPServer):
    """Answers each line with the number of the connection it came on."""

    daemon_threads = True
    dials = peak = 0
    lock = threading.Lock()
    live: dict[int, socket.socket] = {}  # noqa: RUF012 (there is one server)


class Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with Server.lock:
            Server.dials += 1
            number = Server.dials
            Server.live[number] = self.request
            Server.peak = max(Server.peak, len(Server.live))
        for _ in self.rfile:
            self.wfile.write(b"%d\n" % number)
        with Server.lock:  # before the socket is closed: the pool dials the next one when it sees the end of this one
            del Server.live[number]


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, whoever else speaks


def consume(pool: mppool.Pool, who: int, barrier: Barrier) -> None:
    """Two rounds: have a session, use it for a while, give it back."""
    for _ in range(2):
        barrier.wait(10)
        began = time.monotonic()
        try:
            sock = pool.getconn(timeout=0)
            how = "has at once"
        except mppool.PoolTimeout:
            say(f"consumer {who} waits")
            sock = pool.getconn(timeout=10)
            how = f"is woken after {(time.monotonic() - began) * 1000:.0f} ms and has"
        sock.sendall(b"which one is this?\n")
        say(f"consumer {who} {how} connection {int(sock.recv(100))}")
        time.sleep(HOLD)
        pool.putconn(sock)
        barrier.wait(10)


def process(pool: mppool.Pool, number: int, barrier: Barrier) -> None:
    end_with_parent()
    with pool:
        threads = [threading.Thread(target=consume, args=(pool, number * THREADS + n + 1, barrier)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # 1: PR_SET_PDEATHSIG


def main() -> int:
    with tempfile.TemporaryDirectory() as directory, Server(("127.0.0.1", 0), Connection) as server:
        path = f"{directory}/broker.sock"
        command = [sys.executable, "-m", "mppool", "broker", "--socket", path]
        with subprocess.Popen(command, preexec_fn=end_with_parent) as broker:
            try:
                while not os.path.exists(path) and broker.poll() is None:
                    time.sleep(0.01)
                return 0 if two_rounds(server, path) else 1
            finally:
                broker.terminate()


def two_rounds(server: Server, path: str) -> bool:
    pool = mppool.Pool(server.server_address, max_size=CAP, max_dialing=CAP, name="five", broker=path)
    barrier = forking.Barrier(PROCESSES * THREADS + 1)
    children = [forking.Process(target=process, args=(pool, n, barrier), daemon=True) for n in range(PROCESSES)]
    for child in children:
        child.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()  # after the fork: threads do not survive one
    with pool:
        barrier.wait(10)
        barrier.wait(10)
        say(f"the server had {Server.peak} connections at most; it closes connection 2 while that is idle")
        Server.live[2].shutdown(socket.SHUT_RDWR)
        barrier.wait(10)
        barrier.wait(10)
        closed, live = pool.get_stats()["closed"], sorted(Server.live)
    for child in children:
        child.join()
    say(f"the pool has closed {closed}; the server has connections {live}, had {Server.peak} at most and {Server.dials} in all")
    return Server.peak == CAP and live == [1, 3, 4, 5, 6] and closed == {"peer_closed": 1} and all(child.exitcode == 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
