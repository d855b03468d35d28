"""What a driver says of itself."""

from __future__ import annotations

import os

from mppool.states import Residence
from mppool.testing.kit import Kit
from mppool.testing.must import must_be_open, open_descriptors
from mppool.testing.promises.promise import promise
from mppool.testing.report import DoesNotApply, PromiseBroken


@promise(
    "key() says which sessions are interchangeable: 'name/version ...', with no secrets in it",
    "begin it with f'{self.name}/{self.baggage_version}', then server, login and options that make a difference; of secrets at most a digest; 255 bytes",
)
def key(kit: Kit) -> None:
    said = kit.driver.key()
    if not isinstance(said, str) or not kit.driver.name:
        raise PromiseBroken(f"name is {kit.driver.name!r}, key() is {said!r}")
    prefix = f"{kit.driver.name}/{kit.driver.baggage_version}"
    if said != prefix and not said.startswith((f"{prefix} ", f"{prefix}/", f"{prefix}?", f"{prefix}:", f"{prefix};")):
        raise PromiseBroken(f"key() is {said!r}, which does not begin with {prefix!r}: pools of two versions of the baggage would share sessions")
    if said != kit.driver.key():
        raise PromiseBroken(f"key() is {said!r} at first, and {kit.driver.key()!r} then")
    if len(said.encode()) > 255:
        raise PromiseBroken(f"key() has {len(said.encode())} bytes; what is beyond 255 is not compared")
    for secret in kit.secrets:
        if secret in said:
            raise PromiseBroken("key() shows a secret; it stands in shared memory, in messages and in what `mppool status` prints")


@promise(
    "dial() opens a new session, whose fileno() is its socket, non-blocking and not inherited by programs that are started",
    "give back the descriptor that the driver reads from; settimeout() to a number, never None (a long one is as good); make the socket with socket.socket",
)
def dial(kit: Kit) -> None:
    with kit.dialed() as one, kit.dialed() as two:
        kit.must_not_block(one, "after dial()")
        if os.get_inheritable(kit.fd_of(one)):
            raise PromiseBroken("the descriptor is inherited by programs that this process starts")
        if kit.who(one) == kit.who(two):
            raise PromiseBroken(f"two dials, one identity: {kit.who(one)!r} (does identity() ask the server?)")
        kit.use(one, "first-1")
        kit.use(two, "second-2")


@promise(
    "dial() raises DialFailed (or another OSError) if there is no server",
    "turn what your client raises into DialFailed(message), with permanent=True where waiting will not help",
)
def dial_failed(kit: Kit) -> None:
    if kit.unreachable is None:
        raise DoesNotApply("no unreachable= driver was given")
    before = open_descriptors()
    try:
        kit.run(kit.unreachable.dial)
    except OSError:
        pass
    except Exception as error:
        raise PromiseBroken(f"dial() raised {type(error).__name__}: {error}") from error
    else:
        raise PromiseBroken("dial() succeeded where it should not have")
    must_be_open(before, "a dial that failed")


@promise(
    "residence() says Residence.moves, or why a session stays with its process",
    "return a Residence; sessions over TLS are Residence.tls, whatever cannot be attached elsewhere is Residence.no_adapter (the default)",
)
def residence(kit: Kit) -> str:
    with kit.dialed() as session:
        said = kit.driver.residence(session)
        if not isinstance(said, Residence):
            raise PromiseBroken(f"residence(session) is {said!r}")
        return "sessions move" if said is Residence.moves else f"sessions are resident: {said.name}"
