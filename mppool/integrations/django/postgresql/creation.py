"""Test databases are copied and dropped, which PostgreSQL refuses while anybody has a session to them."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import creation

__all__ = ["DatabaseCreation"]


class DatabaseCreation(creation.DatabaseCreation):
    """A pool's name in OPTIONS is for the real database: each test database, and each copy of it, has a pool by a name of its own."""

    def create_test_db(self, *args: Any, **kwargs: Any) -> Any:
        self.connection.settings_dict["OPTIONS"] = unnamed(self.connection.settings_dict["OPTIONS"])
        return super().create_test_db(*args, **kwargs)

    def get_test_db_clone_settings(self, suffix: str) -> dict[str, Any]:
        """What a process of a parallel run takes over; one that was spawned has read the settings anew."""
        settings: dict[str, Any] = super().get_test_db_clone_settings(suffix)
        return {**settings, "OPTIONS": unnamed(settings["OPTIONS"])}

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


def unnamed(options: dict[str, Any]) -> dict[str, Any]:
    pool = options.get("pool")
    return {**options, "name": None, **({"pool": {**pool, "name": None}} if isinstance(pool, dict) else {})}
