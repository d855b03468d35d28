"""Crash at every line: worker, broker and keeper are ended, or interrupted, at each line of the package that they execute.

python -m tests.crash [--every K] [--operation NAME] [--kind KIND] [--seed S] [--opcodes]
"""
