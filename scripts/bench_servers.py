"""Real servers for the benchmarks, each in a directory of its own: started, waited for, ended. None outlives the benchmark."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Skipped", "broker", "dies_with_parent", "mariadb", "memcached", "nginx", "pgbouncer", "postgres", "private_directory", "redis", "silent_server"]

_libc = ctypes.CDLL(None)


class Skipped(Exception):
    """This cannot be measured here; the message says why."""


def dies_with_parent(number: int) -> Callable[[], None]:
    """What a child does first: have the kernel signal it when its parent ends, however that ends."""
    parent = os.getpid()

    def set_up() -> None:
        _libc.prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return set_up


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mppool-bench-") as directory:
        yield directory


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """The port of a server that never says a word: the kernel completes its connections, nobody accepts them."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def broker(path: str) -> Iterator[int]:
    """``mppool broker`` on this socket. If the benchmark is killed, it outlives the workers for a moment, and tidies up after them."""
    command = [sys.executable, "-m", "mppool", "broker", "--socket", path, "--idle-exit", "5"]
    with _running(command, signal.SIGTERM, lambda: _connects(socket.AF_UNIX, path), preexec_fn=None) as pid:
        yield pid


@contextlib.contextmanager
def redis(directory: str) -> Iterator[int]:
    """The port of a Redis that writes nothing to disk. Raises Skipped."""
    if shutil.which("redis-server") is None:
        raise Skipped("redis-server is not installed")
    port = _free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", directory]
    with _running(command, signal.SIGTERM, lambda: _connects(socket.AF_INET, ("127.0.0.1", port))):
        yield port


@contextlib.contextmanager
def memcached() -> Iterator[int]:
    """The port of a memcached. Raises Skipped."""
    if shutil.which("memcached") is None:
        raise Skipped("memcached is not installed")
    port = _free_port()
    command = ["memcached", "-l", "127.0.0.1", "-p", str(port), *(["-u", "nobody"] if os.geteuid() == 0 else [])]
    with _running(command, signal.SIGTERM, lambda: _connects(socket.AF_INET, ("127.0.0.1", port))):
        yield port


@contextlib.contextmanager
def nginx(directory: str) -> Iterator[int]:
    """The port of an nginx with one worker that answers every request with two bytes and keeps connections alive. Raises Skipped."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise Skipped("nginx is not installed")
    port = _free_port()
    temporary = "".join(f"{kind}_temp_path {directory}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    server = f"server {{ listen 127.0.0.1:{port} backlog=511; location / {{ return 200 ok; }} }}"
    with open(f"{directory}/nginx.conf", "w", encoding="ascii") as file:
        file.write(f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log; events {{ }}\n")
        file.write(f"http {{ access_log off; keepalive_requests 1000000000; keepalive_time 1d; keepalive_timeout 1d; {temporary}{server} }}\n")
    command = [program, "-p", directory, "-c", f"{directory}/nginx.conf"]
    with _running(command, signal.SIGTERM, lambda: _connects(socket.AF_INET, ("127.0.0.1", port))):
        yield port


@contextlib.contextmanager
def mariadb(directory: str) -> Iterator[int]:
    """The port of a MariaDB with a new data directory, whose root needs no password. Raises Skipped."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian keeps it
    if shutil.which("mariadbd") is None:
        raise Skipped("mariadbd is not installed")
    port, user = _free_port(), pwd.getpwuid(os.geteuid()).pw_name
    own = ["--no-defaults", f"--datadir={directory}/data", f"--tmpdir={directory}", f"--user={user}"]
    install = ["mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"]
    made = subprocess.run(install, capture_output=True, text=True, check=False)
    if made.returncode:
        raise Skipped(f"mariadb-install-db failed: {made.stderr.strip().splitlines()[-1:]}")
    command = ["mariadbd", *own, "--bind-address=127.0.0.1", f"--port={port}"]
    command += [f"--socket={directory}/s.sock", f"--pid-file={directory}/pid", "--innodb-buffer-pool-size=8M", "--skip-name-resolve"]
    with _running(command, signal.SIGTERM, lambda: os.path.exists(f"{directory}/pid") and _connects(socket.AF_INET, ("127.0.0.1", port))):
        yield port


@contextlib.contextmanager
def postgres(directory: str, password: str = "") -> Iterator[str]:
    """The conninfo of a PostgreSQL with a new data directory; with a ``password`` logins are by SCRAM. Raises Skipped."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) + [path for path in [shutil.which("initdb")] if path]
    if not found:
        raise Skipped("PostgreSQL's server is not installed")
    programs, data, port = os.path.dirname(found[0]), f"{directory}/data", _free_port()
    user = unprivileged(directory)
    initdb = [f"{programs}/initdb", "-D", data, "-U", "bench", "-E", "UTF8", "--locale=C", "--no-sync"]
    if password:
        with open(f"{directory}/secret", "w", encoding="ascii") as file:
            file.write(password)
        os.chmod(f"{directory}/secret", 0o644)
    initdb += ["-A", "scram-sha-256", f"--pwfile={directory}/secret"] if password else ["-A", "trust"]
    made = subprocess.run(initdb, cwd="/", capture_output=True, text=True, check=False, **user)
    if made.returncode:
        raise Skipped(f"initdb failed: {made.stderr.strip().splitlines()[-1:]}")
    command = [f"{programs}/postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", directory, "-F"]
    # SIGQUIT: its own children end with it, at once.
    with _running(command, signal.SIGQUIT, lambda: os.path.exists(f"{data}/postmaster.pid") and _pg_is_ready(data), cwd="/", **user):
        yield f"host=127.0.0.1 port={port} user=bench dbname=postgres sslmode=disable" + (f" password={password}" if password else "")


@contextlib.contextmanager
def pgbouncer(directory: str, conninfo: str, size: int) -> Iterator[tuple[str, int]]:
    """The conninfo of a PgBouncer in front of that PostgreSQL, pooling transactions over ``size`` connections, and its pid. Raises Skipped."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise Skipped("pgbouncer is not installed")
    port = _free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "pool_mode": "transaction",
        "default_pool_size": size,
        "max_client_conn": 500,
        "auth_type": "trust",
        "auth_file": f"{directory}/users",
        "ignore_startup_parameters": "extra_float_digits",
        "logfile": f"{directory}/pgbouncer.log",
    }
    with open(f"{directory}/users", "w", encoding="ascii") as file:
        file.write('"bench" ""\n')
    with open(f"{directory}/pgbouncer.ini", "w", encoding="ascii") as file:
        file.write(f"[databases]\nbench = {conninfo.replace(' sslmode=disable', '')}\n[pgbouncer]\n")
        file.writelines(f"{name} = {value}\n" for name, value in settings.items())
    user = unprivileged(directory)
    with _running([program, f"{directory}/pgbouncer.ini"], signal.SIGTERM, lambda: _connects(socket.AF_INET, ("127.0.0.1", port)), cwd="/", **user) as pid:
        yield f"host=127.0.0.1 port={port} user=bench dbname=bench sslmode=disable", pid


def unprivileged(directory: str) -> dict[str, Any]:
    """Options of Popen for servers that refuse to run as root, who may write to ``directory`` then."""
    if os.geteuid() != 0:
        return {}
    account = next((entry for entry in pwd.getpwall() if entry.pw_name == "postgres"), None) or pwd.getpwnam("nobody")
    os.chown(directory, account.pw_uid, account.pw_gid)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _pg_is_ready(data: str) -> bool:
    with open(f"{data}/postmaster.pid", encoding="ascii") as file:
        lines = file.read().splitlines()
    return len(lines) >= 8 and lines[7].strip() == "ready"


@contextlib.contextmanager
def _running(command: list[str], ending: signal.Signals, ready: Callable[[], bool], **options: Any) -> Iterator[int]:
    """A server, from when it is ready until it has ended by the signal ``ending``."""
    process = subprocess.Popen(command, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "preexec_fn": dies_with_parent(ending), **options})
    try:
        until = time.monotonic() + 20
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                raise Skipped(f"{os.path.basename(command[0])} did not start (exit code {process.poll()})")
            time.sleep(0.01)
        yield process.pid
    finally:
        if process.poll() is None:
            process.send_signal(ending)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _connects(family: int, address: Any) -> bool:
    kind = socket.SOCK_SEQPACKET if family == socket.AF_UNIX else socket.SOCK_STREAM
    with socket.socket(family, kind) as sock:
        try:
            sock.connect(address)
        except OSError:
            return False
    return True
