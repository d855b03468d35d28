"""The shared table of a pool: what it is made of, how it comes to be, who may write what.

One shared memory object of aligned 8-byte words:

    header      magic, version, sizes, options; written under the creation or the dial lock, except what the broker says
    texts       name, target, key of the driver, path of the broker's socket, the last failure to dial
    states      one byte a slot, together, so that a process finds any IDLE one with a single memory search
    slots       one array a field: generation, uses, shared, ...; written by whoever holds the slot's token
    rows        one a worker: who it is, its counters, its *lanes*; written by that worker (a grant by the granter)

Who lives is not in the table: each row has a byte in the pool's lock file that the kernel frees when its process dies.
Lock file, table and semaphores all are in /dev/shm, so containers that share one share all. The creation lock (byte 0)
guards names and the taking of rows; names are removed only while nobody holds a row, under the creation lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mppool.errors import ConfigMismatch, Error, ProtocolError
from mppool.kernel import memory, semaphores
from mppool.kernel.locks import LockFile
from mppool.kernel.process import boot_word
from mppool.options import MAX_SLOTS, Options
from mppool.states import MOVES, CloseReason, State

__all__ = ["NoRow", "Row", "Table", "attach_or_create", "creation_lock", "lock_path"]

MAGIC = 0x6D70706F6F6C3A31  # "mppool:1"
VERSION = 3
ROWS = 512

# Bytes of the lock file.
CREATION, DIAL, BROKER, KEEPER, FIRST_ROW = 0, 1, 2, 3, 16

# Words of the header.
(
    W_MAGIC,
    W_VERSION,
    W_SLOTS,
    W_ROWS,
    W_BOOT,
    W_LOCK_INODE,
    W_CREATED,
    W_INCARNATION,  # creation lock: the last number given to a row's taker
    W_MAX_SIZE,  # dial lock, like the next five
    W_FAILURES,  # of dials in a row, see permits.Breaker
    W_RETRY_AT,
    W_DOWN_SINCE,
    W_REPAIRS,  # how often the permits did not add up and were repaired
    W_ATTENTION,  # 0: nothing to look out for; two halves of 4 bytes, see H_WAITERS and H_FLAGS
    W_EPOCH,  # the broker, like the next
    W_BEAT,
    W_MIN_SIZE,
    W_MAX_WAITING,
    W_MAX_DIALING,
    W_MAX_IDLE,  # nanoseconds, like the next four
    W_MAX_LIFETIME,
    W_RECONNECT_TIMEOUT,
    W_MAX_LEASE,
    W_CLOSE_TIMEOUT,
) = range(24)

# Halves of W_ATTENTION, one writer each, so that a checkout reads both at once.
H_WAITERS = 2 * W_ATTENTION  # how many wait at the broker, who says so
H_FLAGS = 2 * W_ATTENTION + 1  # dial lock
SHRINKING = 1  # flag: more sessions than max_size; who returns one closes it

DRAINED = 1  # in ``expires``: the pool was drained since this session was dialed

_HEADER = 64  # words
_TEXTS = {"name": 64, "target": 256, "key": 256, "broker": 128, "dial_error": 256}  # bytes, in this order

_SLOT_FIELDS = 10  # each an array

# Words of a row; then WAIT_BUCKETS of waits, then its lanes.
(
    R_PID,
    R_ROLE,
    R_INCARNATION,
    R_STARTED,
    R_WAITING,
    R_ATTACHED,
    R_CLAIMED,  # claims by stories; on the fast path a claim is a checkout, so that
    R_LENT,  # checkouts are all uses of slots - R_CLAIMED + R_LENT
    R_DIALS,
    R_DIAL_FAILURES,
    R_WAITS,
    R_WAIT_US,
    R_TIMEOUTS,
    R_REJECTED,
    R_FETCHES,
) = range(15)
R_CLOSED = 16
R_BUCKETS = R_CLOSED + 16
WAIT_BUCKETS = 48  # up to 67 s, see snapshot.py
R_LANES = R_BUCKETS + WAIT_BUCKETS
assert len(CloseReason) <= 16

WORKER, IS_BROKER = 1, 2  # roles of a row's taker

COUNTERS = {
    "dials": R_DIALS,
    "dial_failures": R_DIAL_FAILURES,
    "waits": R_WAITS,
    "wait_us": R_WAIT_US,
    "timeouts": R_TIMEOUTS,
    "rejected": R_REJECTED,
    "fetches": R_FETCHES,
}


_LARGEST = 2**62  # of any option's word


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


class Table:
    """A mapped table, with names for its places. Places are indices into ``words`` unless they end in ``_byte``."""

    def __init__(self, shared: memory.SharedWords, ident: str, lock_inode: int) -> None:
        self.shared = shared
        self.words = shared.words
        self.mem = shared.mem
        self.ident = ident
        words = self.words
        if words[W_VERSION] != VERSION:
            raise ProtocolError(f"pool table {ident} has version {words[W_VERSION]}, this mppool speaks {VERSION}; end its workers, then mppool gc")
        self.slots = words[W_SLOTS]
        self.rows = words[W_ROWS]
        if words[W_BOOT] != boot_word() or not 8 <= self.slots <= MAX_SLOTS or self.rows != ROWS or len(words) * 8 < _size(self.slots):
            raise ProtocolError(f"pool table {ident} is damaged or from before a reboot; end its workers, then mppool gc")
        self.check_header()
        if words[W_LOCK_INODE] != lock_inode:
            raise ProtocolError(f"pool table {ident} has lost its lock file (somebody removed it from {memory.SHM}); end its workers, then mppool gc")
        self.states_byte = _states_byte()
        slot_at = (self.states_byte + self.slots) // 8
        self.generation, self.uses, self.shared_flag, self.spread, self.permit, self.home, self.expires, self.since, self.socket, self.residence = (
            slot_at + field * self.slots for field in range(_SLOT_FIELDS)
        )
        self._rows_at = slot_at + _SLOT_FIELDS * self.slots
        self.lanes = 2 * self.slots
        self._stride = R_LANES + self.lanes
        self._no_lanes = bytes(8 * self.lanes)
        self.halves = shared.halves

    def check_header(self) -> None:
        """Raise ProtocolError if a word of the header cannot be what it was made as."""
        words = self.words
        sizes = 1 <= words[W_MAX_SIZE] <= self.slots and words[W_MIN_SIZE] <= self.slots and 1 <= words[W_MAX_DIALING] <= MAX_SLOTS
        if not sizes or max(words[W_MAX_WAITING : W_CLOSE_TIMEOUT + 1].tolist()) > _LARGEST or words[W_INCARNATION] >= 2**32:
            raise self.damaged("an option is out of its bounds")

    def damaged(self, what: str) -> ProtocolError:
        return ProtocolError(f"pool table {self.ident} is damaged ({what}); end its workers, then mppool gc")

    # Places.

    def row_at(self, row: int) -> int:
        return self._rows_at + row * self._stride

    def lanes_at(self, row: int) -> int:
        return self._rows_at + row * self._stride + R_LANES

    def lanes_of(self, row: int) -> list[int]:
        at = self.lanes_at(row)
        return self.words[at : at + self.lanes].tolist()

    def names_nothing(self, row: int) -> bool:
        """Are all lanes of a row zero? (Most are, and there may be a hundred thousand.)"""
        start = 8 * self.lanes_at(row)
        return self.mem[start : start + 8 * self.lanes] == self._no_lanes

    def array(self, at: int) -> list[int]:
        """A whole field of all slots."""
        return self.words[at : at + self.slots].tolist()

    def is_session(self, k: int, fd: int) -> bool:
        """Is this descriptor the very socket that slot k's dialer connected? (The kernel numbers sockets; no message can lie about it.)"""
        return os.fstat(fd).st_ino == self.words[self.socket + k]

    # States.

    def state(self, k: int) -> State:
        try:
            return _STATES[self.mem[self.states_byte + k]]
        except KeyError as error:
            raise self.damaged(f"slot {k} has state {self.mem[self.states_byte + k]}") from error

    def move(self, k: int, new: State) -> None:
        """Move a slot whose token the caller holds. (The fast path writes IN_USE and IDLE itself.)"""
        old = self.state(k)
        if new not in MOVES[old]:
            raise self.damaged(f"slot {k} may not go from {old.name} to {new.name}")
        self.mem[self.states_byte + k] = new
        self.words[self.since + k] = time.monotonic_ns()

    def states(self) -> bytes:
        return self.mem[self.states_byte : self.states_byte + self.slots]

    def find(self, state: State, start: int = 0) -> int:
        """The first slot in this state from ``start`` on, -1 if there is none."""
        found = self.mem.find(_BYTES[state], self.states_byte + start, self.states_byte + self.slots)
        return found - self.states_byte if found >= 0 else -1

    def find_all(self, state: State) -> list[int]:
        wanted = int(state)
        return [k for k, byte in enumerate(self.states()) if byte == wanted]

    # Rows.

    def taken_rows(self) -> list[int]:
        """Rows that somebody took and no reclaimer freed; their process may be dead."""
        at, stride = self._rows_at + R_PID, self._stride
        return [row for row, pid in enumerate(self.words[at : at + stride * self.rows : stride].tolist()) if pid]

    def home_of(self, row: int) -> int:
        """What says "row, as taken by this very process": unique for the table's life."""
        return row << 32 | self.words[self.row_at(row) + R_INCARNATION]

    # Texts.

    def text(self, field: str) -> str:
        start, size = _text(field)
        return self.mem[start : start + size].split(b"\0", 1)[0].decode(errors="replace")

    def write_text(self, field: str, value: str) -> None:
        start, size = _text(field)
        data = value.encode()[: size - 1]
        self.mem[start : start + size] = data + bytes(size - len(data))

    # Semaphores.

    def open_cap(self) -> semaphores.Semaphore:
        return semaphores.open_semaphore(f"/{self.ident}.cap", self.words[W_MAX_SIZE])

    def open_token(self, k: int) -> semaphores.Semaphore:
        return semaphores.open_semaphore(f"/{self.ident}.{k}", 1)

    def close(self) -> None:
        self.shared.close()


_BYTES = {state: bytes([state]) for state in State}
_STATES = {int(state): state for state in State}


def _states_byte() -> int:
    return _HEADER * 8 + sum(_TEXTS.values())


def _text(field: str) -> tuple[int, int]:
    start = _HEADER * 8
    for name, size in _TEXTS.items():
        if name == field:
            return start, size
        start += size
    raise KeyError(field)


def _size(slots: int) -> int:
    return _states_byte() + slots + 8 * (_SLOT_FIELDS * slots + ROWS * (R_LANES + 2 * slots))


def slots_for(max_size: int) -> int:
    """Room for a pool to grow to four times what it was made with."""
    slots = 64
    while slots < min(4 * max_size, MAX_SLOTS):
        slots *= 2
    return slots


def lock_path(ident: str) -> str:
    return f"{memory.SHM}/{ident}.lock"


@contextmanager
def creation_lock(ident: str, *, create: bool = True, timeout: float = 5.0) -> Iterator[LockFile]:
    """Hold the creation lock of a pool. The lock file is yielded open and stays open: it is the caller's.

    Raises FileNotFoundError without ``create`` if there is no such pool, Error after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        lock = LockFile(lock_path(ident), create=create)
        try:
            while not lock.take(CREATION):
                if time.monotonic() > deadline:
                    raise Error(f"the creation lock {lock.path} is held for {timeout:.0f} s (a stopped process?)")
                time.sleep(0.001)
            if lock.is_current():
                break
        except BaseException:
            lock.close()
            raise
        lock.close()
    try:
        yield lock
    except BaseException:
        lock.close()
        raise
    if lock.fd >= 0:
        lock.give(CREATION)


def open_table(ident: str, lock: LockFile) -> Table | None:
    """Map the table if there is a whole one. Under the creation lock None means: nobody ever finished making it."""
    shared = memory.open_existing(f"/{ident}.table")
    if shared is None:
        return None
    if shared.words[W_MAGIC] != MAGIC:
        shared.close()
        return None
    try:
        return Table(shared, ident, lock.inode)
    except BaseException:
        shared.close()
        raise


def attach_or_create(ident: str, lock: LockFile, options: Options, *, name: str, target: str, key: str, broker: str) -> tuple[Table, list[str]]:
    """The pool's table, made if need be; the caller holds the creation lock. Also what differs from its running options, in words.

    Raises ConfigMismatch if the name is in use for another target or driver.
    """
    table = open_table(ident, lock)
    in_use = is_in_use(lock)
    if table is None and in_use:
        raise ProtocolError(f"pool table {ident} is damaged, or was removed, under processes that use it; end them, then mppool gc")
    if table is None or not in_use:
        # Never finished, or left over by processes that are all gone: their sessions went with them.
        if table is not None:
            table.close()
        remove_names(ident)
        return _create(ident, lock, options, name=name, target=target, key=key, broker=broker), []
    if not _same(table, target, key):
        running = f"target {table.text('target')} and driver {table.text('key')}"
        table.close()
        raise ConfigMismatch(f"name={name!r}: declared here with target {target} and driver {key}, but the running pool has {running}")
    return table, _differences(table, options)


def _same(table: Table, target: str, key: str) -> bool:
    return table.text("target") == target[:255] and table.text("key") == key[:255]


def _create(ident: str, lock: LockFile, options: Options, *, name: str, target: str, key: str, broker: str) -> Table:
    slots = slots_for(options.max_size)
    shared = memory.create(f"/{ident}.table", _size(slots))
    words = shared.words
    words[W_VERSION] = VERSION
    words[W_SLOTS] = slots
    words[W_ROWS] = ROWS
    words[W_BOOT] = boot_word()
    words[W_LOCK_INODE] = lock.inode
    words[W_CREATED] = time.time_ns()
    for at, value in _option_words(options).items():
        words[at] = value
    table = Table(shared, ident, lock.inode)
    for field, text in {"name": name, "target": target, "key": key, "broker": broker}.items():
        table.write_text(field, text)
    table.open_cap()
    words[W_MAGIC] = MAGIC  # last: whoever finds it finds a whole table
    return table


def _option_words(options: Options) -> dict[int, int]:
    return {
        W_MAX_SIZE: options.max_size,
        W_MIN_SIZE: options.min_size,
        W_MAX_WAITING: options.max_waiting,
        W_MAX_DIALING: options.max_dialing,
        W_MAX_IDLE: ns(options.max_idle),
        W_MAX_LIFETIME: ns(options.max_lifetime),
        W_RECONNECT_TIMEOUT: ns(options.reconnect_timeout),
        W_MAX_LEASE: ns(options.max_lease),
        W_CLOSE_TIMEOUT: ns(options.close_timeout),
    }


def _differences(table: Table, options: Options) -> list[str]:
    names = {
        W_MAX_SIZE: "max_size",
        W_MIN_SIZE: "min_size",
        W_MAX_WAITING: "max_waiting",
        W_MAX_DIALING: "max_dialing",
        W_MAX_IDLE: "max_idle",
        W_MAX_LIFETIME: "max_lifetime",
        W_RECONNECT_TIMEOUT: "reconnect_timeout",
        W_MAX_LEASE: "max_lease",
        W_CLOSE_TIMEOUT: "close_timeout",
    }
    found = []
    for at, declared in _option_words(options).items():
        running = table.words[at]
        if running != declared:
            scale = 1e9 if at >= W_MAX_IDLE else 1
            found.append(f"{names[at]}={declared / scale:g} declared here, {running / scale:g} is running and stays")
    return found


def is_in_use(lock: LockFile) -> bool:
    """Does any process hold a row of this pool, or duplicates of its sessions? (What ``lock`` itself holds does not count.)"""
    return lock.is_held(BROKER, FIRST_ROW + ROWS - BROKER)


class NoRow(Error):
    """All rows are taken, by living processes or by dead ones that nobody reclaimed."""


class Row:
    """A row taken by this process, for as long as ``lock`` stays open."""

    __slots__ = ("at", "home", "incarnation", "index", "lanes_at", "lock")

    def __init__(self, table: Table, lock: LockFile, pid: int, role: int = WORKER) -> None:
        """Take a free row; the caller holds the creation lock through ``lock``. Raises Error if all are taken."""
        words = table.words
        taken = set(table.taken_rows())
        for index in range(table.rows):
            if index not in taken and lock.take(FIRST_ROW + index):
                break
        else:
            raise NoRow(f"all {table.rows} rows of pool {table.text('name')!r} are taken: too many processes use it")
        self.lock = lock
        self.index = index
        self.at = table.row_at(index)
        self.lanes_at = self.at + R_LANES
        self.incarnation = words[W_INCARNATION] + 1
        words[W_INCARNATION] = self.incarnation
        words[self.at + R_INCARNATION] = self.incarnation
        words[self.at + R_ROLE] = role
        words[self.at + R_STARTED] = time.time_ns()
        words[self.at + R_WAITING] = words[self.at + R_ATTACHED] = 0
        self.home = index << 32 | self.incarnation
        words[self.at + R_PID] = pid  # last: from here on only a reclaimer frees it


def row_is_alive(lock: LockFile, row: int) -> bool:
    return lock.is_held(FIRST_ROW + row)


def remove_names(ident: str) -> list[str]:
    """Remove a pool's table and semaphores, the table last; the caller holds the creation lock and knows that nobody is there."""
    count = semaphores.unlink_all(f"/{ident}.")
    gone = [f"{count} semaphores"] if count else []
    if memory.names(f"{ident}.table"):  # ours, that is
        memory.unlink(f"/{ident}.table")
        gone.append("table")
    return gone


def remove_if_unused(ident: str) -> bool:
    """What the last process of a pool does on its way out: remove all names, the lock file last. False: somebody is there."""
    try:
        with creation_lock(ident, create=False, timeout=1.0) as lock:
            unused = not is_in_use(lock)
            if unused:
                remove_names(ident)
                os.unlink(lock.path)
            lock.close()
        return unused
    except (FileNotFoundError, Error):
        return False
