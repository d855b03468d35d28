"""Test databases are copied and dropped, which PostgreSQL refuses while anybody has a session to them."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import creation

__all__ = ["DatabaseCreation"]


class DatabaseCreation(creation.DatabaseCreation):
    def _clone_test_db(self, suffix: str, verbosity: int, keepdb: bool = False) -> None:
        self.connection.close()
        self.connection.close_pool()
        super()._clone_test_db(suffix, verbosity, keepdb)

    def _destroy_test_db(self, test_database_name: str, verbosity: int) -> None:
        """It may be a copy, which only the processes of a parallel run had sessions to."""
        settings: dict[str, Any] = self.connection.settings_dict
        name = settings["NAME"]
        settings["NAME"] = test_database_name
        try:
            self.connection.close_pool()
        finally:
            settings["NAME"] = name
        super()._destroy_test_db(test_database_name, verbosity)
