"""What surrounds the server of prefork_echo.py: upstream, clients, and the one who kills and measures."""
