"""Helpers that know nothing of models: progress, tables, batching, atomic files and folders, hub ids, sizes.

May import `errors`.
"""
