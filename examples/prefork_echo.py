"""A prefork server whose workers share one pool, under load, while its workers and the broker are killed.

    python examples/prefork_echo.py [--workers 8] [--cap 3] [--clients 16] [--seconds 12] [--kills 4]

This file is the server: ``front`` and ``worker`` are all that it takes. Around it, in ``prefork/``: upstream.py judges, clients.py
checks every reply, demo.py kills, measures and shows, processes.py sees to it that nothing outlives the demo. The exit code
is 0 only if the upstream never saw more than ``--cap`` connections and no reply was crossed and nothing lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress

from prefork.clients import clients
from prefork.demo import Demo
from prefork.echo import ask, read_line
from prefork.processes import Broker, Helper, clean_up_after, start, wait_until
from prefork.upstream import upstream
from rich.live import Live

import mppool


def front(listener: socket.socket, pool: mppool.Pool, workers: int, deaths: socket.socket) -> None:
    """The parent: keeps so many workers alive until SIGTERM, and tells which ones died. It never uses the pool itself."""
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # from here on they wait for sigwait, so that none is lost
    pids = {start(worker, listener, pool) for _ in range(workers)}
    while signal.sigwait(signals) == signal.SIGCHLD:
        for pid in ended(pids):
            deaths.send(b"%d" % pid)
            pids.add(start(worker, listener, pool))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)  # somebody may have stopped it
    wait_until(lambda: not ended(pids) and not pids)  # who has not ended by then is killed with us


def ended(pids: set[int]) -> set[int]:
    """Those that have ended; they are no longer among ``pids``."""
    gone = {pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]}
    pids -= gone
    return gone


def worker(listener: socket.socket, pool: mppool.Pool) -> None:
    """One client at a time: read its line, ask the upstream over a session of the pool, answer."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            client, _ = listener.accept()
            with client, suppress(ConnectionError):  # a client may go away
                nonce = read_line(client)
                try:
                    with pool.connection(timeout=10) as session:  # an exception in this block discards the session
                        reply = ask(session, nonce)
                except (mppool.Error, OSError) as error:
                    reply = f"error {type(error).__name__}: {error}"
                client.sendall(f"{reply}\n".encode())
    finally:
        pool.close()  # a forked child that ends in os._exit runs no exit handlers


def main() -> int:
    parser = argparse.ArgumentParser(description="A prefork server with one pool, under load, while its workers and the broker are killed.")
    parser.add_argument("--workers", type=int, default=8, help="processes of the server (default: 8)")
    parser.add_argument("--cap", type=int, default=3, help="connections to the upstream, of all workers together (default: 3)")
    parser.add_argument("--clients", type=int, default=16, help="clients at a time (default: 16)")
    parser.add_argument("--seconds", type=float, default=12, help="how long the load lasts (default: 12)")
    parser.add_argument("--kills", type=int, default=4, help="workers killed (default: 4)")
    parser.add_argument("--think", type=float, default=2, help="milliseconds the upstream takes for a reply (default: 2)")
    options = parser.parse_args()

    directory = tempfile.mkdtemp(prefix="mppool-demo-")
    waiting, ours = os.pipe()
    cleaner = os.fork()
    if cleaner == 0:
        os.close(ours)
        try:
            clean_up_after(directory, waiting)
        finally:
            os._exit(0)
    os.close(waiting)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return 0 if play(options, directory) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        os.close(ours)
        os.waitpid(cleaner, 0)


def play(options: argparse.Namespace, directory: str) -> bool:
    """Start everything, run the demo, end everything in order. True if all is well."""
    path = f"{directory}/broker.sock"
    at_upstream, at_front = (socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(2))
    pool = mppool.Pool(at_upstream.getsockname(), max_size=options.cap, name="echo", broker=path)  # no I/O yet
    with ExitStack() as stack:
        broker = Broker(path)
        stack.callback(broker.end)
        broker.start()
        judge = Helper(lambda control: upstream(at_upstream, control, options.think / 1000))
        stack.callback(judge.end)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = start(front, at_front, pool, options.workers, theirs)
        stack.callback(os.waitpid, server, 0)
        stack.callback(os.kill, server, signal.SIGTERM)
        load = Helper(lambda control: clients(at_front.getsockname(), control, options.clients))
        stack.callback(load.end)
        stack.callback(pool.close)
        demo = Demo(options, pool, judge, load, ours, broker)
        if demo.console.is_terminal:
            with Live(console=demo.console, auto_refresh=False) as demo.live:
                demo.run()
            demo.live = None
        else:
            demo.run()
        well = demo.finish()
    status = subprocess.run([sys.executable, "-m", "mppool", "status", "--json", "--socket", path], stdout=subprocess.PIPE, check=True)
    nothing_left = not json.loads(status.stdout)["pools"] and wait_until(lambda: os.listdir(directory) == [])
    if nothing_left:
        os.rmdir(directory)
    demo.console.print(f"left behind: {'nothing' if nothing_left else status.stdout.decode() + str(os.listdir(directory))}")
    demo.console.print("all is well" if well and nothing_left else "NOT WELL")
    return well and nothing_left


if __name__ == "__main__":
    sys.exit(main())
