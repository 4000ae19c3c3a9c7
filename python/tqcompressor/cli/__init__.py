"""The command line: its options, and what each command does with them.

May import everything.
"""
