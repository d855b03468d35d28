"""The command line, as real processes: broker, run, status, resize, gc."""
