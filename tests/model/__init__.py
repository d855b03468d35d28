"""An exhaustive model of who may use a session and how many there may be. It runs the product's own functions.

steps.py runs an operation up to its next access to shared memory; explore.py tries every order of such steps; world.py makes a small
pool of the product's classes; claims.py, permits.py and broker.py are scenarios; mutations.py lists defects that must be found.
Sequential consistency is assumed, as the pause between a reclaimer's two looks makes it. Time stands still, so deadlines do not pass.
"""
