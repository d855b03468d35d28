"""redis-py: live Redis connections move. ``RedisDriver`` lends ``redis.Connection`` objects, ``AsyncRedisDriver`` those of ``redis.asyncio``.

A connection of ours (connections.py) is redis-py's own, of whatever class the user names, that also keeps count: of commands without a
reply (who was interrupted half-way leaves some), and of commands that leave something behind in the server's session (commands.py:
SELECT, WATCH, SUBSCRIBE, ...). What has either is not lent on as it is. It may reconnect while it is lent, as redis-py does after
errors, under the same permit; the new connection ends with the lease.

A process that gets a session it does not know, or that others used since, sends RESET and the login (login.py) in one write, unless the
policy is "trust". RESET came with Redis 6.2.
"""

from mppool.drivers.redis.asynchronous import AsyncRedisDriver
from mppool.drivers.redis.blocking import RedisDriver

__all__ = ["AsyncRedisDriver", "RedisDriver"]
