"""How to open, move and close the sessions of a protocol: base.py is the seam, the others fill it."""
