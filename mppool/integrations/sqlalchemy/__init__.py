"""SQLAlchemy engines over one pool of connections for all worker processes: ``create_engine(url, poolclass=SharedPool)``."""

try:
    import sqlalchemy as _sqlalchemy  # noqa: F401
except ImportError as error:
    raise ImportError("mppool.integrations.sqlalchemy needs SQLAlchemy: pip install mppool[sqlalchemy]") from error

from mppool.integrations.sqlalchemy.aio import AsyncSharedPool
from mppool.integrations.sqlalchemy.shared import SharedPool

__all__ = ["AsyncSharedPool", "SharedPool"]
