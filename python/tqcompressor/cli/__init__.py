"""The command line: the options and the commands.

May import everything.
"""
