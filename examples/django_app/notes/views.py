"""Each is a transaction (ATOMIC_REQUESTS), but for the one that is awaited."""

import os

from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse

from notes.models import Note


def add(request: HttpRequest, author: str, text: str) -> HttpResponse:
    """How many notes the author has now."""
    Note.objects.create(author=author, text=text)
    return HttpResponse(str(Note.objects.filter(author=author).count()))


def notes(request: HttpRequest, author: str) -> HttpResponse:
    return HttpResponse("\n".join(Note.objects.filter(author=author).order_by("id").values_list("text", flat=True)))


def fail(request: HttpRequest, author: str) -> HttpResponse:
    """Writes a note and fails: the note must not be there afterwards."""
    Note.objects.create(author=author, text="never written")
    raise RuntimeError("as it should")


def sleep(request: HttpRequest, seconds: str) -> HttpResponse:
    """Keeps its session for so long: with all of them busy, other workers queue."""
    with connection.cursor() as cursor:
        cursor.execute("select pg_sleep(%s)", [float(seconds)])
    return HttpResponse("slept")


def setting(request: HttpRequest) -> HttpResponse:
    """What the last user of this session has set, if it was another worker: nothing. Then sets it. And the time zone is Django's."""
    with connection.cursor() as cursor:
        cursor.execute("select current_setting('app.worker', true), current_setting('TimeZone')")
        seen, zone = cursor.fetchone()
        cursor.execute("select set_config('app.worker', %s, false)", [str(os.getpid())])
    return HttpResponse(f"{'foreign' if seen and seen != str(os.getpid()) else 'none'}, {zone}")


def whoami(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return HttpResponse(f"backend {cursor.fetchone()[0]}, worker {os.getpid()}")


def stream(request: HttpRequest) -> HttpResponse:
    """Through a cursor on the server."""
    return HttpResponse(str(sum(1 for _ in Note.objects.all().iterator(chunk_size=10))))


@transaction.non_atomic_requests
async def awaited(request: HttpRequest) -> HttpResponse:
    """An async view: the ORM runs in a thread, and so does the end of the request."""
    return HttpResponse(str(await sync_to_async(Note.objects.count)()))
