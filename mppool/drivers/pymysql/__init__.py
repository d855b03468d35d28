"""PyMySQL: sessions of MySQL and MariaDB that move among processes.

PyMySQL takes a socket through its public ``connect(sock=)``. To attach a session, it is given one end of a socket pair on
which the greeting of that session's server already lies, and the two answers of a login. It goes through its ordinary
start-up with them; then ``dup2`` puts the real connection under the descriptor that it holds. So no state of the driver
has to be written from outside, and it reads and writes a real socket afterwards.

What a session carries beyond its login is forgotten when it changes processes (``COM_RESET_CONNECTION``): transaction, locks,
temporary tables, user variables, prepared statements, session settings. What the reset drops but the login had made (character
set, sql_mode, autocommit, database, init_command) is made again.
"""

from mppool.drivers.pymysql.driver import PyMySQLDriver

__all__ = ["PyMySQLDriver"]
