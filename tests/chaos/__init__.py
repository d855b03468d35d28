"""A host full of trouble: ``python -m tests.chaos`` (or scripts/chaos). The servers' own view is the judge.

board       memory that all share: how the load goes, what relay and upstream count
upstream    the server behind: counts its connections, tags each reply, knows which lease uses which connection
relay       the TCP relay between: the strict judge of the cap, and the place of network trouble
actors      the processes: workers that thread and fork, the bystander that needs the whole cap, the broker
actions     what is done, drawn from the seed
host        does it, round by round, and looks when all is quiet
report      what was done, what was found, and all that helps to find the cause
"""
