"""The command line. Commands only gather and print; what they show is rendered by pure functions in render.py."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from typing import Any, NoReturn

import click

from mppool.cli.render import render_gc, render_status
from mppool.errors import BrokerUnavailable, Error, OptionError
from mppool.inspect import collect_garbage, find_pool, open_pools
from mppool.kernel.runtime import check_directory, socket_path
from mppool.kernel.systemd import Service
from mppool.launch import ALREADY_RUNNING

__all__ = ["main"]

EXIT_CODES = """\b
Exit codes:
  0    done
  1    it failed; the message says why
  2    the command line makes no sense
  3    a broker serves this socket already
  4    no such pool
  N    of `run`: the command's own, 128 + N if signal N ended it
"""

NO_SUCH_POOL = 4

socket_option = click.option(
    "--socket", "socket", metavar="PATH", help="The broker's socket. Default: $MPPOOL_BROKER, else broker.sock in the user's runtime directory."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="mppool")
def cli() -> None:
    """One pool of connections for all worker processes of a host."""


@cli.command(epilog=EXIT_CODES)
@socket_option
@click.option("--replace", is_flag=True, help="Take the place of a broker that runs, without losing a session. It ends with exit code 0.")
@click.option("--background", is_flag=True, help="Return as soon as the broker listens; it goes on in the background.")
@click.option("--idle-exit", type=click.FloatRange(min=0), metavar="SECONDS", help="End after so long without any worker.")
@click.option("--verbose", "-v", is_flag=True, help="Log what happens.")
def broker(socket: str | None, replace: bool, background: bool, idle_exit: float | None, verbose: bool) -> None:
    """Serve all pools of this user until SIGTERM. Under systemd: a listener it passes is used, its watchdog fed, its store of descriptors, too."""
    from mppool import broker as brokers

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    service = Service()
    listener = None if background else service.take_listener()
    path = socket_path(socket) if listener is None else same_path(socket, listener.getsockname())
    if idle_exit is not None and math.isnan(idle_exit):
        raise click.BadParameter(f"{idle_exit} is no time; expected seconds, 0 or more", param_hint="--idle-exit")
    if background:
        go_to_background(path, idle_exit, replace)
    try:
        brokers.serve(path, idle_exit, replace=replace, service=service, listener=listener)
    except brokers.AlreadyRunning as error:
        fail(str(error), ALREADY_RUNNING)


def same_path(socket: str | None, passed: str) -> str:
    """The path of the listener that systemd passes. Raises Error if another one is asked for."""
    if socket or os.environ.get("MPPOOL_BROKER"):
        asked = socket_path(socket)
        if os.path.realpath(asked) != os.path.realpath(passed):
            raise Error(f"broker={asked!r}: systemd passes a listener at {passed!r}; ListenSequentialPacket= and --socket must name the same path")
    return socket_path(passed)


def go_to_background(path: str, idle_exit: float | None, replace: bool) -> NoReturn:
    """Fork; the parent waits until the child listens, or says why it does not, and exits."""
    from mppool import broker as brokers

    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            code, _, message = pipe.read().partition(" ")
        if message:
            click.echo(f"mppool: {message}", err=True)
        os._exit(int(code or 1))
    os.setsid()
    os.close(reader)
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)

        def ready() -> None:
            os.write(writer, b"0 ")
            os.close(writer)

        brokers.serve(path, idle_exit, ready, replace=replace)
    except brokers.AlreadyRunning as error:
        os.write(writer, f"{ALREADY_RUNNING} {error}".encode())
    except Exception as error:
        os.write(writer, f"1 {error}".encode())
    os._exit(0)


@cli.command(context_settings={"ignore_unknown_options": True}, epilog=EXIT_CODES)
@socket_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(socket: str | None, command: tuple[str, ...]) -> None:
    """Run COMMAND with a broker beside it: mppool run -- gunicorn app:app"""
    from mppool.supervisor import Supervisor

    logging.basicConfig(level=logging.WARNING, format="mppool run: %(message)s")
    path = socket_path(socket)
    check_directory(path, create=True)
    try:
        sys.exit(Supervisor(path, list(command)).run())
    except (FileNotFoundError, NotADirectoryError) as error:
        fail(f"COMMAND {command[0]!r}: {error.strerror}", 127)
    except PermissionError as error:
        found = os.sep in command[0] or shutil.which(command[0], mode=os.F_OK) is not None  # else a directory of $PATH is closed to us
        fail(f"COMMAND {command[0]!r}: {error.strerror}", 126 if found else 127)


@cli.command(epilog=EXIT_CODES)
@socket_option
@json_option
@click.argument("name", required=False)
def status(socket: str | None, as_json: bool, name: str | None) -> None:
    """Show all pools of this socket, or the one called NAME. Reads shared memory: works without a broker."""
    found, faults = open_pools(socket_path(socket))
    pools = [pool.snapshot() for pool in found]
    for fault in faults:
        click.echo(f"mppool: {fault}", err=True)
    if name is not None:
        pools = [pool for pool in pools if pool["name"] == name]
        if not pools:
            fail(f"NAME={name!r}: no such pool", NO_SUCH_POOL)
    show({"pools": pools}, as_json, render_status)


@cli.command(epilog=EXIT_CODES)
@socket_option
@click.argument("name")
@click.argument("max_size", type=int)
def resize(socket: str | None, name: str, max_size: int) -> None:
    """Change the cap of the pool called NAME, for all workers, at once."""
    path = socket_path(socket)
    pool = find_pool(path, name)
    if pool is None:
        fail(f"NAME={name!r}: no such pool at {path}", NO_SUCH_POOL)
    before = pool.resize(max_size)
    click.echo(f"{name}: max_size {before} -> {max_size}")


@cli.command(epilog=EXIT_CODES)
@json_option
def gc(as_json: bool) -> None:
    """Remove what pools left in shared memory that no process uses any more; say what is still in use."""
    show(collect_garbage(), as_json, render_gc)


def show(data: dict[str, Any], as_json: bool, render: Any) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    from rich.console import Console

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # into a pipe or a file: nothing is cut
    console.print(*render(data), sep="\n")


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"mppool: {message}", err=True)
    sys.exit(code)


def main() -> None:
    try:
        cli(prog_name="mppool")
    except OptionError as error:
        fail(str(error), 2)
    except (BrokerUnavailable, Error) as error:
        fail(str(error), 1)
