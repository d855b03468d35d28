"""Baggage is said to nobody."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import psutil

import mppool
from mppool.drivers.raw import RawDriver
from mppool.kernel import link, memory
from mppool.kernel.runtime import pool_id
from mppool.options import parse_target
from mppool.story import Attach
from mppool.wire import Kind, Message
from tests.helpers.processes import Child, die_with_parent, eventually, fork
from tests.helpers.server import Judge, ask
from tests.security.shared import send_fds

SECRET = "s3cret-b4ggage-marker"


class Secretive(RawDriver):
    """Sessions with a password in their baggage."""

    trouble = ""

    def detach(self, session: socket.socket) -> bytes:
        return SECRET.encode() * 20

    def attach(self, fd: int, baggage: bytes) -> socket.socket:
        assert baggage == SECRET.encode() * 20
        if Secretive.trouble:
            raise mppool.Error(Secretive.trouble)
        return super().attach(fd, baggage)


def test_baggage_is_never_said(server: Judge, socket_path: str, tmp_path: Path) -> None:
    """It passes through broker and keeper, over their deaths too, and is in no log, message, status, name, argument or shared memory."""
    log, said = tmp_path / "log", tmp_path / "said"

    def work(child: Child) -> None:
        sys.stdout = sys.stderr = open(said, "a")  # noqa: SIM115 (it ends with the process)
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        pool = mppool.Pool(driver=Secretive(parse_target(server.address)), name="web", max_size=2, broker=socket_path)
        for message in iter(child.hear, "end"):
            Secretive.trouble = "cannot attach" if message == "trouble" else ""
            held = []
            try:
                held = [pool.getconn(timeout=3) for _ in range(2)]
                for n, sock in enumerate(held):
                    ask(sock, f"secret-{n}")
            except mppool.Error:
                traceback.print_exc()
            print(repr(pool), pool.get_stats(), flush=True)
            for sock in held:
                pool.putconn(sock)
            child.tell(len(held))
        pool.close()

    with open(log, "wb") as file:

        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "mppool", "broker", "-v", "--socket", socket_path], stdout=file, stderr=file, preexec_fn=die_with_parent
            )
            eventually(lambda: os.path.exists(socket_path))
            return process

        broker = start()
        try:
            with fork(work, work) as (one, two):
                for child, order in ((one, "lease"), (two, "trouble"), (two, "lease"), (one, "lease")):
                    child.tell(order)
                    child.hear()
                shown = [show(socket_path), *names_and_arguments(socket_path)]
                broker.kill()
                broker.wait()
                os.unlink(socket_path)
                broker = start()
                for child in (one, two):
                    child.tell("lease")
                    assert child.hear() == 2
                say_nonsense(socket_path)
                shown += [show(socket_path), *names_and_arguments(socket_path)]
                for child in (one, two):
                    child.tell("end")
                    child.result()
        finally:
            broker.terminate()
            broker.wait()
    for text in (*shown, log.read_bytes(), said.read_bytes()):
        assert SECRET.encode() not in text
    assert b"cannot attach" in said.read_bytes()  # it was said what went wrong


def show(path: str) -> bytes:
    found = b""
    for options in ([], ["--json"]):
        found += subprocess.run([sys.executable, "-m", "mppool", "status", "--socket", path, *options], capture_output=True, check=True).stdout
    return found


def names_and_arguments(path: str) -> list[bytes]:
    """The contents of shared memory, its names, and what processes were started with."""
    ident = pool_id(path, "web")
    files = [name for name in os.listdir(memory.SHM) if ident in name]
    assert f"{ident}.table" in files
    processes = [" ".join(process.info["cmdline"] or []).encode() for process in psutil.process_iter(["cmdline"])]
    return [Path(memory.SHM, name).read_bytes() for name in files] + [" ".join(files).encode(), *(line for line in processes if path.encode() in line)]


def say_nonsense(path: str) -> None:
    """Messages that carry baggage, where none is expected or none is allowed."""
    body = (SECRET * 20).encode()
    with socket.socket() as session:
        for message in (Message(Kind.SHARE, body=body), Message(Kind.PUT, body=body), Message(Kind.SHARE, 9999, body=body), Message(Kind.SESSION, body=body)):
            with link.connect(path) as sock:
                sock.setblocking(True)
                sock.settimeout(10)
                send_fds(sock, message, [session.fileno()])
                answer = sock.recv(65536)
                assert SECRET.encode() not in answer


def test_a_message_does_not_show_its_baggage() -> None:
    """What a traceback with locals, or a log of requests, would print of a message or a request is not the baggage."""
    assert SECRET not in repr(Message(Kind.SHARE, 1, 2, 0, SECRET.encode()))
    assert SECRET not in repr(Attach(3, SECRET.encode()))
