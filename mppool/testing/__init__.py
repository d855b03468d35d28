"""For authors of drivers: ``check_driver`` tries, with real processes and a broker of its own, what the pool relies on.

    from mppool.testing import check_driver

    def test_my_driver(server):
        check_driver(
            MyDriver(server.address, user="app", password="secret"),
            identity=lambda session: session.ask("WHOAMI"),
            ask=lambda session, nonce: session.ask(f"ECHO {nonce}"),
            look=lambda session: session.ask("STATE"),
            dirty=[set_a_variable, leave_a_reply_unread],
            secrets=["secret"],
        )

It needs nothing but mppool itself and a server that is running. Every promise is tried in a process of its own, so a driver that
hangs or crashes breaks one promise, not the test run.
"""

from mppool.testing.check import check_driver
from mppool.testing.report import Broken, BrokenDriver, Report

__all__ = ["Broken", "BrokenDriver", "Report", "check_driver"]
