"""Helpers that know nothing of models: progress, tables, batching, files and folders, hub ids, sizes, checks.

May import `errors`.
"""
