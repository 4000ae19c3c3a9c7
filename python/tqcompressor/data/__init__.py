"""From text to sequences of tokens: files, tokenising, and packed sequences on disk.

May import `errors` and `utils`.
"""
