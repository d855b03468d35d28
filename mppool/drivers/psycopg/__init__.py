"""psycopg 3: sessions that move between processes under libpq.

conninfo.py says where a connection leads, libpq.py how libpq is shown a login, connecting.py how a session is dialed, connections.py
what is other about psycopg's objects, sessions.py what is known of a session and when it is reset; blocking.py and asynchronous.py do it.
"""

try:
    import psycopg  # noqa: F401
except ImportError as error:
    raise ImportError("mppool needs psycopg 3 for this: pip install 'mppool[psycopg]'") from error

from mppool.drivers.psycopg.asynchronous import AsyncPsycopgDriver
from mppool.drivers.psycopg.blocking import PsycopgDriver

__all__ = ["AsyncPsycopgDriver", "PsycopgDriver"]
