"""What a worker says to the broker, as stories: connect, share, fetch, wait for one's turn, give up waiting.

None of them fails because there is no broker: they say so, and the caller goes on without. A broker that comes back is
found here, and given the duplicates it lacks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from mppool import claims
from mppool.attached import Entry
from mppool.claims import Lane, named
from mppool.errors import BrokerUnavailable, Error, TooManyWaiting
from mppool.line import Descriptor, Line, LineLost, Received
from mppool.states import State
from mppool.story import Attach, Receive, Story
from mppool.table import R_FETCHES, R_REJECTED, W_BEAT, W_EPOCH
from mppool.wire import FRONT, MAX_BAGGAGE, RESIDENT, Kind, Message, encode, pack_session, unpack_session
from mppool.worker import Ahead, Hands, Worker

__all__ = ["attach", "connect", "fetch", "settle_abandoned", "share", "wait_turn"]

log = logging.getLogger("mppool")

ANSWER = 1.0  # seconds within which a living broker answers
LOOK_AGAIN = 0.05  # seconds between two tries to find a broker
AHEAD = 3  # sessions that are fetched along with the one that is wanted; few, as descriptors on their way are limited
AHEAD_WITHIN = 0.02  # seconds that they may take once that one is here: it is waited for
NEVER = -2  # in Entry.uses: this process has not used the session yet


def connect(worker: Worker) -> Story[Line | None]:
    """A line to the broker that nobody else uses, None if no broker answers. Put it back into ``worker.lines`` after use.

    Raises BrokerUnavailable if the one that answers is not for us.
    """
    if worker.words[W_BEAT] and not worker.broker_beats():
        return None  # dead or stopped; one that comes says so in the table first
    while worker.lines:
        try:
            known = worker.lines.pop()
            if worker.owes:
                show(worker, known)
            return known
        except IndexError:
            break
        except LineLost:
            continue
    now = time.monotonic()
    if now < worker.next_try and worker.words[W_EPOCH] == worker.tried_epoch:
        return None
    worker.tried_epoch = worker.words[W_EPOCH]
    line = None
    try:
        line = Line(worker.path)
        line.send(hello(worker))
        answer = yield Receive(line, now + ANSWER)
        if answer is None:
            worker.next_try = now + 2 * ANSWER
            return None
        welcome = answer[0]
        if welcome.kind is Kind.REFUSED:
            raise BrokerUnavailable(f"broker={worker.path!r}: {welcome.body.decode(errors='replace')}")
        if welcome.kind is not Kind.WELCOME:
            raise LineLost
        line.epoch = welcome.serial
        show(worker, line)
        found, line = line, None
        return found
    except (OSError, LineLost):
        worker.next_try = time.monotonic() + LOOK_AGAIN * random.uniform(0.5, 1.5)
        return None
    finally:
        if line is not None:
            line.close()


def hello(worker: Worker) -> Message:
    return Message(Kind.HELLO, worker.row.index, worker.row.incarnation, body=worker.ident.encode())


def show(worker: Worker, line: Line) -> None:
    """Give the broker the duplicates it lacks: all if it is new, else those that were lost on their way. Raises LineLost."""
    words, table = worker.words, worker.table
    for entry in list(worker.entries.values()):
        if entry.generation == worker.words[worker.generation_at + entry.slot.k]:
            send_duplicate(worker, line, entry)
    for k, ahead in list(worker.ahead.items()):
        if words[table.shared_flag + k] != ahead.generation + 1 and words[worker.generation_at + k] == ahead.generation:
            line.send(Message(Kind.SHARE, k, ahead.generation, body=ahead.body), ahead.given.fileno())
    worker.owes = False
    if worker.shown_epoch != line.epoch:
        line.send(Message(Kind.SHOWN))
        worker.shown_epoch = line.epoch


def send_duplicate(worker: Worker, line: Line, entry: Entry) -> None:
    """SHARE a session, unless the broker has it already. Raises LineLost."""
    k, words, table = entry.slot.k, worker.words, worker.table
    if words[table.shared_flag + k] == entry.generation + 1:
        return
    if entry.sock is None:
        return
    driver = worker.driver
    body = pack_session(driver.detach(entry.conn), driver.farewell(entry.conn))
    if len(body) > MAX_BAGGAGE:
        raise Error(f"driver {driver.name!r}: a baggage of {len(body)} bytes, and at most {MAX_BAGGAGE} may be")
    words[table.spread + k] = entry.generation + 1  # before: from now on it may live longer than this process
    line.send(Message(Kind.SHARE, k, entry.generation, RESIDENT if entry.residence else 0, body), entry.sock.fileno())


def share(worker: Worker, entry: Entry) -> Story[None]:
    """Give the broker a duplicate of a new session, if there is a broker; else it gets it when it comes.

    Also if the broker has been silent for long: it reads when it can, and we may not come by again.
    """
    line: Line | None
    while True:
        try:
            line = worker.lines.pop()
        except IndexError:
            line = yield from connect(worker)
        if line is None:
            leave_duplicate(worker, entry)
            return
        try:
            send_duplicate(worker, line, entry)
        except LineLost:
            worker.owes = True  # an old broker's line, or a full one; a new line begins with what is owed
            continue
        worker.lines.append(line)
        return


def leave_duplicate(worker: Worker, entry: Entry) -> None:
    """SHARE without waiting to be welcomed, on a link that ends at once: a broker that is silent finds it when it goes on. Nothing, if there is none."""
    line = None
    try:
        line = Line(worker.path)
        line.send(hello(worker))
        send_duplicate(worker, line, entry)
    except (OSError, LineLost):
        pass
    finally:
        if line is not None:
            line.close()


def holding() -> bool:
    return True


def fetch(worker: Worker, k: int, hold: Callable[[], bool] = holding) -> Story[Entry | None]:
    """A session that this process never had: get a duplicate from the broker, or take the one that came along with another's, and attach it.

    We hold slot k; or ``hold`` is called to get it while the broker is at work, and says if we do. (Another thread may have attached it just before.)
    None if it cannot be; whether we hold the slot then, ``hold`` knows.
    """
    ahead = worker.ahead.pop(k, None)
    if ahead is not None:
        if not hold():
            worker.keep_ahead(k, ahead)
            return None
        entry = worker.attached(k)
        if entry is None and ahead.generation == worker.words[worker.generation_at + k]:
            return (yield from attach(worker, k, ahead.given, ahead.body))
        ahead.given.close()
        if entry is not None:
            return entry
        hold = holding  # another session is there by now
    line = yield from connect(worker)
    if line is None:
        return None
    entry = None
    asked: list[tuple[int, int]] = []
    try:
        ask(worker, line, k, asked)
        held = hold()
        entry = worker.attached(k) if held else None
        if held and entry is None:
            ask_ahead(worker, line, k, asked)
            worker.driver.expect()
        until = time.monotonic() + ANSWER
        ahead = understand_session(worker, line.receive() or (yield Receive(line, until)), asked)
        if ahead is not None and held and entry is None:
            entry = yield from attach(worker, k, ahead.given, ahead.body)
        elif ahead is not None:
            worker.keep_ahead(k, ahead)
        until = min(until, time.monotonic() + AHEAD_WITHIN)
        while asked:
            k, _ = asked[0]
            ahead = understand_session(worker, line.receive() or (yield Receive(line, until)), asked)
            if ahead is not None:
                worker.keep_ahead(k, ahead)
        return entry
    except LineLost:
        return entry
    finally:
        if asked:
            line.close()  # a late answer must not be taken for the next one
        else:
            worker.lines.append(line)


def ask(worker: Worker, line: Line, k: int, asked: list[tuple[int, int]]) -> None:
    """FETCH; in ``asked`` are the slot and the generation until the answer has come."""
    asked.append((k, worker.words[worker.generation_at + k]))
    line.send(Message(Kind.FETCH, *asked[-1]))


def ask_ahead(worker: Worker, line: Line, k: int, asked: list[tuple[int, int]]) -> None:
    """The next idle sessions, if this process never had them: while the broker is awake, an answer costs less than asking for each when it is wanted."""
    table, words = worker.table, worker.words
    for _ in range(AHEAD):
        k = table.find(State.IDLE, k + 1)
        if k < 0:
            break
        if k not in worker.ahead and words[table.shared_flag + k] == words[table.generation + k] + 1 and worker.attached(k) is None:
            ask(worker, line, k, asked)


def understand_session(worker: Worker, answer: Received | None, asked: list[tuple[int, int]]) -> Ahead | None:
    """The answer to the FETCH that was sent first, None if it is no session. Raises LineLost if it has not come."""
    if answer is None:
        raise LineLost
    message, given = answer
    k, generation = asked.pop(0)
    if given is not None and message.kind is Kind.SESSION and (message.number, message.serial) == (k, generation):
        worker.bump(R_FETCHES)
        return Ahead(generation, given, message.body)
    if given is not None:
        given.close()
    return None


def attach(worker: Worker, k: int, given: Descriptor, body: bytes) -> Story[Entry | None]:
    """A session of the descriptor that the broker gave us for slot k, which we hold. None if it is anything else than that session's socket.

    Raises Error if it cannot be attached here; the session is what it was.
    """
    conn = None
    try:
        if not worker.table.is_session(k, given.fileno()):
            log.error("pool %r: the broker gave another socket for slot %d than was dialed there", worker.table.text("name"), k)
            return None
        conn = yield Attach(given.fileno(), unpack_session(body)[0])
        entry = worker.attach(k, conn)
        entry.uses = NEVER
    except Exception as error:
        if conn is not None:
            worker.driver.abort(conn)
        raise error if isinstance(error, Error) else Error(f"a session cannot be attached in this process: {type(error).__name__}: {error}") from error
    finally:
        given.close()
    if worker.words[worker.table.shared_flag + k] != entry.generation + 1:
        yield from share(worker, entry)  # given by an earlier broker; the one there is now must know that we have it
    return entry


class Turn(NamedTuple):
    """How waiting ended: with a session that ``lane`` holds (and perhaps a descriptor of it), the right to dial, or neither."""

    lane: Lane | None = None
    given: Descriptor | None = None
    body: bytes = b""
    dial: bool = False

    def __repr__(self) -> str:
        return f"Turn(dial={self.dial}, lane={self.lane is not None}, {len(self.body)} bytes)"  # which may be secret


def wait_turn(hands: Hands, line: Line, until: float, front: bool) -> Story[Turn]:
    """Queue until a session, or the right to dial, is granted. An empty Turn: not until then, or there is no broker any more.

    Raises TooManyWaiting. Takes the line, and a lane of its own that it gives back unless a session was granted to it.
    """
    worker = hands.worker
    lane = hands.take()
    asked = False
    try:
        asked = True
        if front:
            line.send(Message(Kind.WAIT, lane.index, worker.row.incarnation, FRONT))
        else:
            lane.asking = lane.asking or encode(Message(Kind.WAIT, lane.index, worker.row.incarnation))
            line.say(lane.asking)
        while True:
            answer = yield Receive(line, min(until, time.monotonic() + ANSWER))
            if answer is not None:
                asked = False
                turn = understand(worker, line, lane, answer)
                worker.lines.append(line)
                break
            worker.tidy()
            settle_abandoned(hands)
            if time.monotonic() >= until or worker.words[lane.at] or worker.closing or not worker.broker_beats():
                struck = yield from strike(worker, line, lane)
                if struck is None and not worker.words[lane.at]:
                    lane.owner = 0
                    give_up(worker, line, lane)
                    asked = False
                    return Turn()
                asked = False
                if struck is not None:
                    worker.lines.append(line)
                    turn = struck
                else:
                    line.close()  # its answers, if any come, must not be taken for others
                    turn = granted(worker, lane)
                break
    except LineLost:
        # The broker has ended, and writes to our lane no more: the table says what it granted.
        asked = False
        turn = granted(worker, lane)
    except BaseException:
        if asked:
            lane.owner = 0
            give_up(worker, line, lane)
            settle_abandoned(hands)  # at once, if there is no broker any more: who knows when this process next comes by
        raise
    if turn.lane is None:
        hands.give(lane)
    return turn


def understand(worker: Worker, line: Line, lane: Lane, answer: Received) -> Turn:
    """The broker's answer to a WAIT. Raises TooManyWaiting; LineLost if it is none."""
    message, given = answer
    if message.kind is Kind.GRANT:
        if given is not None and named(worker.words[lane.at]) != message.number:
            given.close()
            given = None
        return granted(worker, lane, given, message.body)
    if message.kind is Kind.TOO_MANY:
        if line.due:
            line.close()
        else:
            worker.lines.append(line)
        worker.bump(R_REJECTED)
        raise TooManyWaiting(f"max_waiting={message.number}: so many callers wait already")
    if message.kind is not Kind.DIAL:
        line.close()
        raise LineLost
    return Turn(dial=True)


def granted(worker: Worker, lane: Lane, given: Descriptor | None = None, body: bytes = b"") -> Turn:
    """Has a session been granted to our lane? The table is the truth; if so we hold it from now on. ``given``: a descriptor of it."""
    k = named(worker.words[lane.at])
    if k < 0:
        return Turn()
    claims.accept(worker.words, lane, worker.slot(k))
    return Turn(lane, given, body)


def strike(worker: Worker, line: Line, lane: Lane) -> Story[Turn | None]:
    """Stop waiting: ask the broker to strike us. Its answer: an empty Turn, or what it had granted meanwhile; None: it is silent."""
    line.cancel()
    until = time.monotonic() + ANSWER / 4
    turn = Turn()
    while time.monotonic() < until:
        answer = yield Receive(line, until)
        if answer is None:
            break
        if answer[0].kind is Kind.STRUCK:
            line.was_struck(answer[0].serial)
            return turn if turn.lane is not None or turn.dial else granted(worker, lane)
        turn = understand(worker, line, lane, answer)
    if turn.lane is None and not turn.dial:
        return None
    line.close()  # it may yet say STRUCK
    return turn


def give_up(worker: Worker, line: Line, lane: Lane) -> None:
    """Nobody here waits any more: an exception came, or the broker is silent. Its answer is read when this process next comes by."""
    if lane not in [other for _, other in worker.abandoned]:
        worker.abandoned.append((line, lane))
    line.give_up()


def settle_abandoned(hands: Hands) -> None:
    """Earlier waits that an exception ended: those that the broker has answered since are over, and their lanes are free.

    It has taken back what it granted to them. One that has gone meanwhile may not have; then we give it back. Nobody waits for an
    answer here, and nobody looks at a lane before it.
    """
    worker = hands.worker
    for _ in range(len(worker.abandoned)):
        try:
            line, lane = worker.abandoned.popleft()
        except IndexError:
            return  # another thread is at it
        struck = False
        try:
            hands.take(lane)  # in our hands for so long: it would be taken for a stray
            struck = is_struck(line)
            if struck:
                worker.refuse_grant(lane)
                worker.lines.append(line)
            else:
                lane.owner = 0
                worker.abandoned.append((line, lane))
        except LineLost:
            worker.refuse_grant(lane)
        except BaseException:
            if not struck:
                lane.owner = 0
                line.given_up = False  # the answer may be lost: asked again
                give_up(worker, line, lane)
            raise


def is_struck(line: Line) -> bool:
    """Has the broker said the last STRUCK that is due? Raises LineLost."""
    for _ in range(line.said - line.struck + 1):  # before them it may have granted something
        answer = line.receive()
        if answer is None:
            break
        if answer[1] is not None:
            answer[1].close()
        if answer[0].kind is Kind.STRUCK and line.was_struck(answer[0].serial):
            return True
    return False
