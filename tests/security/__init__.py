"""What SECURITY.md promises: other users reach nothing of ours, take nothing over, and learn no baggage; peers of ours that speak nonsense harm nobody else.

Other users are real: children and brokers that gave root's rights up. What any frame at all can do is tests/fuzz; modes, owners and versions that
are simply wrong are tests/bad_input.
"""
