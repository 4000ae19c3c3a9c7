"""One matrix as a numpy array: decomposing it, and what that gives.

May import `errors`, `_core`, `utils` and `config`.
"""
