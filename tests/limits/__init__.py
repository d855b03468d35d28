"""What happens at the limits of a machine: each is a clear error or a wait, never a loss. Afterwards the whole cap can be leased and nothing is left.

Too few descriptors and too little shared memory at the very beginning are in tests/bad_input; here they run out later.
"""
