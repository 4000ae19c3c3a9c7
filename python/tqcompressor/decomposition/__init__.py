"""The decomposition of one numpy matrix, and its results.

May import `errors`, `_core`, `utils` and `config`.
"""
