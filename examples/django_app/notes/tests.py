"""The project's own tests: ``manage.py test``, also with ``--parallel``."""

import threading

from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase

from notes.models import Note


class Notes(TestCase):
    """Each in a transaction that is rolled back."""

    def test_notes_are_counted(self) -> None:
        self.assertEqual(self.client.get("/add/ann/hello").content, b"1")
        self.assertEqual(self.client.get("/add/ann/again").content, b"2")

    def test_nothing_is_left_of_other_tests(self) -> None:
        self.assertEqual(Note.objects.count(), 0)


class Transactions(TransactionTestCase):
    def test_a_failing_request_writes_nothing(self) -> None:
        with self.assertRaises(RuntimeError):
            self.client.get("/fail/ann")
        self.assertEqual(Note.objects.count(), 0)

    def test_savepoints(self) -> None:
        with transaction.atomic():
            Note.objects.create(author="ann", text="kept")
            try:
                with transaction.atomic():
                    Note.objects.create(author="ann", text="dropped")
                    raise KeyError
            except KeyError:
                pass
        self.assertEqual(list(Note.objects.values_list("text", flat=True)), ["kept"])

    def test_a_thread_has_a_session_of_its_own(self) -> None:
        pids: list[int] = []

        def ask() -> None:
            with connection.cursor() as cursor:
                cursor.execute("select pg_backend_pid()")
                pids.append(cursor.fetchone()[0])

        def work() -> None:
            ask()
            connection.close()

        ask()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        self.assertEqual(len(set(pids)), 2)
