"""What systemd hands to a service, and what it wants to hear from it. Nothing but datagrams and environment variables.

The service manager may pass descriptors (a listener; what the service stored before its last end), a socket for messages,
and a watchdog's period. Everything here does nothing where there is none of that. See systemd.exec(5), sd_notify(3), sd_listen_fds(3).
"""

from __future__ import annotations

import array
import os
import select
import socket

from mppool.errors import Error

__all__ = ["VARIABLES", "Service", "without_service"]

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
FIRST = 3  # SD_LISTEN_FDS_START
PATIENCE = 2.0  # seconds for a message that must arrive


def without_service() -> dict[str, str]:
    """The environment for a child that must not speak as this service."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}


class Service:
    """This process as systemd's service. Owns the descriptors that were passed, until they are taken."""

    def __init__(self) -> None:
        """Take what the environment says, and out of it: no child shall believe that it is meant."""
        said = {name: os.environ.pop(name, "") for name in VARIABLES}
        mine = str(os.getpid())
        count = _number(said["LISTEN_FDS"]) if said["LISTEN_PID"] == mine else 0
        names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else []
        self.descriptors: list[tuple[str, int]] = []
        for n in range(count):
            try:
                os.set_inheritable(FIRST + n, False)
            except OSError as error:
                raise Error(f"LISTEN_FDS={count}: descriptor {FIRST + n} is not open ({error.strerror})") from error
            self.descriptors.append((names[n] if n < len(names) else "unknown", FIRST + n))
        address = said["NOTIFY_SOCKET"]
        self.address = "\0" + address[1:] if address.startswith("@") else address if address.startswith("/") else ""
        period = _number(said["WATCHDOG_USEC"]) if said["WATCHDOG_PID"] in ("", mine) else 0
        self.beat_every = period / 2e6  # seconds; 0: nobody watches
        self.listens = False  # did it pass the listener?

    def __bool__(self) -> bool:
        return bool(self.address or self.listens)

    def take_listener(self) -> socket.socket | None:
        """The listener among what was passed; None if there is none. Raises Error if it is not what the broker needs."""
        found = []
        for name, fd in self.descriptors:
            try:
                sock = socket.socket(fileno=os.dup(fd))
            except OSError:
                continue  # no socket: something stored
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append((name, fd, sock))
            else:
                sock.close()
        if not found:
            return None
        name, fd, sock = found[0]
        for item in found:
            self.descriptors.remove(item[:2])
            os.close(item[1])
        if len(found) > 1 or sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET or not isinstance(sock.getsockname(), str):
            for _, _, extra in found:
                extra.close()
            raise Error(f"systemd passes {len(found)} listeners, {name!r} first; expected one, of ListenSequentialPacket=/a/path")
        sock.setblocking(False)
        self.listens = True
        return sock

    # Messages.

    def notify(self, *lines: str, fd: int = -1, patience: float = PATIENCE) -> bool:
        """Send one message, with a descriptor if given. False: nobody listens, or he is too busy; that is no reason to end."""
        if not self.address:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(patience)
                sock.connect(self.address)
                sock.sendmsg(["\n".join(lines).encode()], rights, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def store(self, name: str, fd: int) -> bool:
        """Let systemd keep a duplicate over our end."""
        return self.notify("FDSTORE=1", f"FDNAME={name}", fd=fd)

    def unstore(self, name: str) -> bool:
        return self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def barrier(self) -> bool:
        """Wait until every message so far was read: systemd closes what came with this one in its turn."""
        ours, theirs = os.pipe()
        try:
            sent = self.notify("BARRIER=1", fd=theirs)
        finally:
            os.close(theirs)
        try:
            poller = select.poll()
            poller.register(ours, 0)  # the end is told in any case
            return sent and bool(poller.poll(PATIENCE * 1000))
        finally:
            os.close(ours)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
