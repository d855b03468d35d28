"""Whatever is wrong is said: a clear error that names the option and the value, at once, with nothing left behind."""
